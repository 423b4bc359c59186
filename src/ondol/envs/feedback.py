"""FeedbackEnv: an answer that is not right may be tried again, after what the verifier says of it.

The step form of any task that answers in one turn, all of reasoning-gym's among them: their partial scores come back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from ondol.envs.base import Env, StepResult
from ondol.records import Message, Problem
from ondol.tasks.base import Task


class FeedbackEnv(Env):
    """Every turn is a whole answer. The first that is right ends the episode; else the last one counts.

    An answer at try k (0 is the first) is rewarded with discount^k times its score. Nothing is rewarded on the way, so
    that a policy cannot collect reward by improving slowly.
    """

    capabilities: ClassVar[frozenset[str]] = frozenset({"self-improvement", "reasoning"})

    max_turns: int = Field(default=3, ge=1, description="most tries")
    discount: float = Field(
        default=1.0, gt=0, le=1, description="of the reward, for each try before; the score has none"
    )
    tell: bool = Field(
        default=True, description="say what the verifier has to say; without it, only that it is not right"
    )
    system: str | None = Field(default=None, description="system message; none by default")

    def episode(
        self, task: Task, problem: Problem, trajectory_id: str, renderer: Any, examples: Sequence[Message] = ()
    ) -> _Episode:
        return _Episode(self, task, problem, trajectory_id, examples)


class _Episode:
    def __init__(
        self, env: FeedbackEnv, task: Task, problem: Problem, trajectory_id: str, examples: Sequence[Message]
    ) -> None:
        self.env, self.task, self.problem, self.id, self.examples = env, task, problem, trajectory_id, examples
        self.tries, self.over = 0, False

    async def reset(self) -> list[Message]:
        first = [Message("system", self.env.system)] if self.env.system else []
        return [*first, *self.examples, Message("user", self.problem.question)]

    async def step(self, action: Message, last_turn: bool) -> StepResult:
        if self.over:
            raise RuntimeError(f"episode {self.id} is over: reset a new one")
        score = await self.task.judged(self.problem, action.content)
        weight = self.env.discount**self.tries
        self.tries += 1
        if score >= 1 or last_turn:
            self.over = True
            return StepResult([], reward=weight * score, terminated=True, score=score)
        said = f" ({self.task.feedback(self.problem, action.content, score)})" if self.env.tell else ""
        return StepResult([Message("user", f"Not right{said}. Try again.")], info={"score": score})

    async def close(self) -> None:
        pass
