"""Gymnasium's games as text: those of its `toy_text` family, and any other with a finite set of actions and an `ansi` rendering."""

from __future__ import annotations

import itertools
import re
from collections import deque
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

from pydantic import Field, model_validator

from ondol.errors import OndolError
from ondol.records import Problem
from ondol.tasks.games import GameTask, Told

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_MARKED = re.compile(r"\x1b\[[0-9;]*m(.*?)\x1b\[0m", re.S)
_TRIES = 400  # games played in search of a solution where the game does not tell how it moves
_DEPTH = 8
_SWEEPS = 100  # of value iteration, over as few states as these games have

#: id without its version -> words for the actions, in order; the last reward that a won game gives at least; rules
_KNOWN: dict[str, tuple[tuple[str, ...], float, str]] = {
    "FrozenLake": (
        ("left", "down", "right", "up"),
        1.0,
        "You cross a frozen lake, from S to G. F is ice, H a hole that ends the game. You are where the brackets are.",
    ),
    "FrozenLake8x8": (
        ("left", "down", "right", "up"),
        1.0,
        "You cross a frozen lake, from S to G. F is ice, H a hole that ends the game. You are where the brackets are.",
    ),
    "Taxi": (
        ("south", "north", "east", "west", "pickup", "dropoff"),
        20.0,
        "You drive a taxi: fetch the passenger, bring the passenger to the destination. Nobody drives through | walls.",
    ),
    "CliffWalking": (
        ("up", "right", "down", "left"),
        -1.0,
        "You walk from the lower left corner to T, past the cliff C: who falls begins anew. You are at x.",
    ),
    "Blackjack": (
        ("stick", "hit"),
        1.0,
        "You play Blackjack against the dealer, who sticks at 17. Whoever is nearer to 21 without more wins.",
    ),
}


class Gymnasium(GameTask):
    """Seeds of one game. Problems without a solution (hands that cannot be won) are left out."""

    id: str = Field(default="FrozenLake-v1", description="id of the environment, as gymnasium.make takes it")
    options: dict[str, Any] = Field(
        default_factory=dict, description="what gymnasium.make takes besides, such as is_slippery = false"
    )
    actions: tuple[str, ...] = Field(default=(), description="words for the actions, in order; by default known ones")
    won: float | None = Field(
        default=None, description="a game is won when its last reward is at least this; by default known, else above 0"
    )

    @model_validator(mode="after")
    def _made(self) -> Gymnasium:
        self._world(0).close()
        return self

    def draw(self, random: Random) -> Problem | None:
        seed = random.randrange(1_000_000)
        data = {"seed": seed}
        game = self.open(Problem("", "", "", data))
        try:
            first = game.start()
            gold = self._solution(seed)
        finally:
            game.close()
        return None if gold is None else Problem("", f"{self.id} {seed}\n{first}", "\n".join(gold), data)

    def open(self, problem: Problem) -> _Played:
        return _Played(self, problem.data["seed"])

    def _known(self) -> tuple[tuple[str, ...], float, str]:
        return _KNOWN.get(self.id.rsplit("-", 1)[0].rsplit("/", 1)[-1], ((), 1e-9, ""))

    @property
    def words(self) -> tuple[str, ...]:
        return self.actions or self._known()[0]

    @property
    def least(self) -> float:
        return self._known()[1] if self.won is None else self.won

    def _world(self, seed: int) -> Any:
        """The environment of gymnasium. A frozen lake is another one for each seed, and not slippery, unless told so."""
        try:
            import gymnasium
            from gymnasium.envs.registration import load_env_creator
        except ImportError as e:
            raise OndolError("the package gymnasium is not installed", "pip install 'ondol[games]'") from e
        options = dict(self.options)
        if self.id.startswith("FrozenLake"):
            from gymnasium.envs.toy_text.frozen_lake import generate_random_map

            options.setdefault("is_slippery", False)
            if "desc" not in options and "map_name" not in options:
                options["desc"] = generate_random_map(8 if "8x8" in self.id else 4, seed=seed)
        try:
            spec = gymnasium.spec(self.id)
            modes = getattr(load_env_creator(str(spec.entry_point)), "metadata", {})
            text = "ansi" if "ansi" in modes.get("render_modes", ()) else None
            world = gymnasium.make(self.id, render_mode=text, **options)
        except Exception as e:  # gymnasium's own errors, and whatever an environment makes of wrong options
            raise OndolError(
                f"gymnasium cannot make '{self.id}': {' '.join(str(e).split())[:300]}",
                "give an id that `gymnasium.pprint_registry()` lists, and its options",
            ) from e
        count = getattr(world.action_space, "n", None)
        if count is None or not hasattr(world.observation_space, "contains"):
            raise OndolError(f"'{self.id}' has no finite set of actions", "only games with some are told as text")
        if text is None and "Blackjack" not in self.id:
            raise OndolError(f"'{self.id}' cannot be shown as text", "it needs the render mode 'ansi'")
        if self.words and len(self.words) != count:
            raise OndolError(f"'{self.id}' has {count} actions", "give as many words for them")
        return world

    def _solution(self, seed: int) -> list[str] | None:
        """Words of a shortest game that is won; None when none is found."""
        world = self._world(seed)
        try:
            world.reset(seed=seed)
            moves = getattr(world.unwrapped, "P", None)
            if moves is not None and all(len(m) == 1 for s in moves.values() for m in s.values()):
                plan = _plan(moves, world.unwrapped.s, self.least)
            elif moves is not None:
                plan = self._lucky(world, moves)
            else:
                plan = next((p for p in _plans(world.action_space.n) if self._wins(world, seed, p)), None)
        finally:
            world.close()
        return None if plan is None else [self.words[a] if self.words else str(a) for a in plan]

    def _lucky(self, world: Any, moves: dict[int, Any]) -> list[int] | None:
        """What the best policy does where chance has a part, if it wins with this seed. The world has just been reset."""
        values = dict.fromkeys(moves, 0.0)

        def worth(outcomes: Any) -> float:
            return sum(p * (float(r >= self.least) if end else 0.99 * values[int(s)]) for p, s, r, end in outcomes)

        for _ in range(_SWEEPS):
            values = {s: max(map(worth, actions.values())) for s, actions in moves.items()}
        plan: list[int] = []
        while True:
            here = moves[int(world.unwrapped.s)]
            plan.append(max(here, key=lambda a: worth(here[a])))
            _, reward, terminated, truncated, _ = world.step(plan[-1])
            if terminated or truncated:
                return plan if terminated and reward >= self.least else None

    def _wins(self, world: Any, seed: int, plan: Sequence[int]) -> bool:
        world.reset(seed=seed)
        for number, action in enumerate(plan):
            _, reward, terminated, truncated, _ = world.step(action)
            if terminated or truncated:
                return bool(terminated) and reward >= self.least and number == len(plan) - 1
        return False


class _Played:
    def __init__(self, task: Gymnasium, seed: int) -> None:
        self.task, self.seed, self.world = task, seed, task._world(seed)
        words = task.words or tuple(str(a) for a in range(self.world.action_space.n))
        self.numbers = {word: number for number, word in enumerate(words)}
        self.rules = (
            f"{task._known()[2]} Each turn reply with one of these and nothing else: {', '.join(words)}.".strip()
        )
        self.done = False

    def start(self) -> str:
        observation, _ = self.world.reset(seed=self.seed)
        self.done = False
        return self._text(observation)

    def act(self, said: str) -> Told:
        lines = said.strip().lower().splitlines() or [""]
        action = self.numbers.get(lines[-1].strip().strip(".!\"'` "))
        if action is None or self.done:
            return Told(f"? one of: {', '.join(self.numbers)}", ok=False)
        observation, reward, terminated, truncated, _ = self.world.step(action)
        self.done = bool(terminated or truncated)
        won = bool(terminated) and float(reward) >= self.task.least
        return Told(self._text(observation), float(reward), self.done, float(won))

    def close(self) -> None:
        self.world.close()

    def _text(self, observation: Any) -> str:
        world = self.world.unwrapped
        name = type(world).__name__
        if name == "BlackjackEnv":
            total, dealer, ace = observation
            cards = " ".join("A" if c == 1 else str(c) for c in world.player)
            return f"your cards: {cards} = {total}{' (an ace counts 11)' if ace else ''}\nthe dealer shows {'A' if dealer == 1 else dealer}"
        board = _COLOUR.sub("", _MARKED.sub(r"[\1]", self.world.render())).strip("\n")
        if name != "TaxiEnv":
            return "\n".join(line.rstrip() for line in board.splitlines())
        row, column, passenger, destination = (int(n) for n in world.decode(world.s))
        board = _COLOUR.sub("", self.world.render()).strip("\n")
        places = ("R", "G", "Y", "B", "in the taxi")
        spots = ", ".join(f"{p} {r},{c}" for p, (r, c) in zip("RGYB", world.locs))
        where = f"taxi at row {row}, column {column}; passenger {'at ' if passenger < 4 else ''}{places[passenger]}"
        return f"{board}\n{where}; destination {places[destination]} ({spots})"


def _plan(moves: dict[int, Any], state: int, least: float) -> list[int] | None:
    """A shortest list of actions that ends the game with a last reward of at least `least`, by breadth-first search."""
    came: dict[int, tuple[int, int] | None] = {int(state): None}
    queue = deque(came)
    while queue:
        here = queue.popleft()
        for action, ((_, there, reward, terminated),) in moves[here].items():
            if terminated and reward >= least:
                plan, at = [action], here
                while (step := came[at]) is not None:
                    at = step[0]
                    plan.append(step[1])
                return plan[::-1]
            if not terminated and int(there) not in came:
                came[int(there)] = (here, action)
                queue.append(int(there))
    return None


def _plans(actions: int) -> Iterator[tuple[int, ...]]:
    """Lists of actions, shorter ones first, so many as may be tried."""
    every = (plan for n in range(1, _DEPTH + 1) for plan in itertools.product(range(actions), repeat=n))
    return itertools.islice(every, _TRIES)
