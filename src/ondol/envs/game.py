"""GameEnv: a game that is told in text, an action a turn; any task that can open its problem as a `Game` brings one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from pydantic import Field

from ondol.envs.base import Env, StepResult
from ondol.errors import OndolError
from ondol.records import Message, Problem, ToolResult
from ondol.tasks.base import Task
from ondol.tasks.games import Game, GameTask


class GameEnv(Env):
    """A game of the task's. It ends the episode, or the last turn does, and then it is lost."""

    capabilities: ClassVar[frozenset[str]] = frozenset({"games", "planning"})
    action_space: ClassVar[str] = "one word or command a turn"

    max_turns: int = Field(default=30, ge=1, description="most turns; a game that is not over by then is lost")
    system: str | None = Field(
        default=None, description="system message; by default the rules of the game, '' for none"
    )

    def takes(self, task: Task) -> None:
        if not isinstance(task, GameTask):
            raise OndolError(
                f"the environment 'game' has no game for a problem of the task {type(task).__name__}",
                "set task.name to gymnasium, textworld or openenv, or leave env.name at tool",
            )

    def episode(
        self, task: Task, problem: Problem, trajectory_id: str, renderer: Any, examples: Sequence[Message] = ()
    ) -> _Episode:
        self.takes(task)
        assert isinstance(task, GameTask)
        return _Episode(self, task, problem, trajectory_id, examples)


class _Episode:
    def __init__(
        self, env: GameEnv, task: GameTask, problem: Problem, trajectory_id: str, examples: Sequence[Message]
    ) -> None:
        self.env, self.id, self.examples = env, trajectory_id, examples
        self.game: Game = task.open(problem)
        self.blocking = task.blocking
        self.over = False

    async def _play(self, turn: Callable[..., Any], *said: str) -> Any:
        return await asyncio.to_thread(turn, *said) if self.blocking else turn(*said)

    async def reset(self) -> list[Message]:
        said = self.game.rules if self.env.system is None else self.env.system
        first = [Message("system", said)] if said else []
        return [*first, *self.examples, Message("user", await self._play(self.game.start))]

    async def step(self, action: Message, last_turn: bool) -> StepResult:
        if self.over:
            raise RuntimeError(f"episode {self.id} is over: reset a new one")
        told = await self._play(self.game.act, action.content)
        self.over = told.done or last_turn
        result = ToolResult(told.text, ok=told.ok, kind="ok" if told.ok else "bad_arguments")
        return StepResult(
            [] if self.over else [Message("user", told.text)],
            reward=told.reward,
            terminated=told.done,
            truncated=last_turn and not told.done,
            score=told.score if told.done else 0.0,
            results=[result],
        )

    async def close(self) -> None:
        await self._play(self.game.close)
