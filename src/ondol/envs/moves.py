"""MovesEnv: a puzzle of reasoning-gym played move by move; every move is an action, and the new state comes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from ondol.envs.base import Env, StepResult
from ondol.errors import OndolError
from ondol.records import Message, Problem, ToolResult
from ondol.tasks.base import Task
from ondol.tasks.puzzles import PUZZLES, puzzle_of
from ondol.tasks.reasoning_gym import ReasoningGym


class MovesEnv(Env):
    """Tower of Hanoi and Sokoban. A move that breaks the rules changes nothing and is told why; it costs its turn.

    The episode ends when the puzzle is solved, or after the last turn. Its score is reasoning-gym's own for the moves that
    were made: for a tower solved in more moves than needed, the share of those that were needed.
    """

    capabilities: ClassVar[frozenset[str]] = frozenset({"planning", "reasoning"})
    action_space: ClassVar[str] = "one move a turn"

    max_turns: int = Field(default=32, ge=1, description="most moves, refused ones included")
    system: str | None = Field(default=None, description="system message; by default the puzzle's rules, '' for none")

    def episode(
        self, task: Task, problem: Problem, trajectory_id: str, renderer: Any, examples: Sequence[Message] = ()
    ) -> _Episode:
        if not isinstance(task, ReasoningGym):
            raise OndolError(
                f"the environment 'moves' has no puzzle for a problem of the task {type(task).__name__}",
                f"set task.name to reasoning-gym and task.dataset to one of {', '.join(PUZZLES)}",
            )
        return _Episode(self, task, problem, trajectory_id, examples)


class _Episode:
    def __init__(
        self, env: MovesEnv, task: ReasoningGym, problem: Problem, trajectory_id: str, examples: Sequence[Message]
    ) -> None:
        self.env, self.task, self.problem, self.id, self.examples = env, task, problem, trajectory_id, examples
        self.puzzle, self.over = puzzle_of(task.dataset, problem), False

    async def reset(self) -> list[Message]:
        said = self.puzzle.rules if self.env.system is None else self.env.system
        first = [Message("system", said)] if said else []
        return [*first, *self.examples, Message("user", f"{self.puzzle.goal()}\n{self.puzzle.screen()}")]

    async def step(self, action: Message, last_turn: bool) -> StepResult:
        if self.over:
            raise RuntimeError(f"episode {self.id} is over: reset a new one")
        wrong = self.puzzle.act(action.content)
        seen = self.puzzle.screen()
        result = ToolResult(
            seen if wrong is None else wrong, ok=wrong is None, kind="ok" if wrong is None else "bad_arguments"
        )
        solved = self.puzzle.solved and bool(
            self.puzzle.moves
        )  # some are drawn solved: a move has to be made all the same
        if solved or last_turn:
            self.over = True
            score = await self.task.judged(self.problem, f"<answer>{self.puzzle.solution}</answer>")
            return StepResult([], reward=score, terminated=solved, truncated=not solved, score=score, results=[result])
        return StepResult([Message("user", seen if wrong is None else f"? {wrong}\n{seen}")], results=[result])

    async def close(self) -> None:
        pass
