"""Games told in text: what a game is, and the task whose problems are games.

A response is the list of actions, one a line; it is scored by playing them. So a game checks itself like every other
task: its gold actions win, and near misses do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar, Protocol

from ondol.records import Problem
from ondol.tasks.base import DrawnTask

_MOST_ACTIONS = 1000  # of a response: more are not looked at


@dataclass(frozen=True)
class Told:
    """What an action led to.

    Attributes:
        text: what is told of it, or what was wrong with it (then `ok` is False, and nothing happened).
        reward: the game's own;  score: how well the game was played, in [0, 1], once it is `done`.
    """

    text: str
    reward: float = 0.0
    done: bool = False
    score: float = 0.0
    ok: bool = True


class Game(Protocol):
    """One game, from its beginning. The same problem always plays the same."""

    rules: str  # for a player who does not know it

    def start(self) -> str:
        """What is told at first."""
        ...

    def act(self, said: str) -> Told:
        """Play a turn. Never raises for anything a player may say."""
        ...

    def close(self) -> None: ...


class GameTask(DrawnTask):
    """A task whose problems are games. `blocking`: a turn waits for somebody else, so it is played in a thread."""

    blocking: ClassVar[bool] = False

    def open(self, problem: Problem) -> Game:
        """A fresh game of this problem."""
        raise NotImplementedError

    def score(self, problem: Problem, response: str) -> float:
        game = self.open(problem)
        try:
            game.start()
            for line in response.split("\n")[:_MOST_ACTIONS]:
                told = game.act(line)
                if told.done:
                    return min(1.0, max(0.0, told.score))
            return 0.0
        finally:
            game.close()

    def near_misses(self, problem: Problem) -> list[str]:
        """The gold actions without the last one, without the first one, and nothing."""
        actions = self.gold(problem).split("\n")
        fewer = ["\n".join(actions[:-1]), "\n".join(actions[1:])]
        return ["", *(a for a in fewer if self.score(problem, a) < 1)]

    def demonstration(self, problem: Problem, random: Random, right: bool) -> list[str]:
        said = self.gold(problem) if right else random.choice(self.near_misses(problem))
        return said.split("\n")
