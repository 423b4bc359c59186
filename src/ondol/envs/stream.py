"""StreamEnv: a question that comes in parts, and a context that holds only the last of them.

What was said before is out of sight, so what matters later has to be written down: partial observability in its plainest
form. For tasks whose problems have `data["parts"]`, such as `recall`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from ondol.envs.base import StepResult
from ondol.envs.tool import Toolbox, ToolEnv
from ondol.errors import OndolError
from ondol.records import Message, Problem
from ondol.tasks.base import Task


class StreamEnv(ToolEnv):
    """One turn a part, in which tools may be called; at the last part, further turns until one without a call answers.

    After `window` parts the context begins anew with the next one. Results of tools open it, so nothing that a tool says
    is lost; the tools themselves live on.
    """

    max_turns: int = Field(default=64, ge=2, description="most turns of an episode")
    window: int = Field(default=1, ge=1, description="parts that one context holds")
    answer_turns: int = Field(
        default=3, ge=1, description="most turns at the last part; a call on the last is not carried out"
    )

    @property
    def turns_in_context(self) -> int:
        return min(self.window - 1 + self.answer_turns, self.max_turns)

    def without_tools(self) -> StreamEnv:
        return self.model_copy(update={"tools": ()})  # the parts still take their turns

    def episode(
        self, task: Task, problem: Problem, trajectory_id: str, renderer: Any, examples: Sequence[Message] = ()
    ) -> _Episode:
        parts = problem.data.get("parts")
        if not isinstance(parts, list) or not parts:
            raise OndolError(
                f"a problem of the task {type(task).__name__} does not come in parts",
                "set task.name to recall, or leave env.name at tool",
            )
        if len(parts) > self.max_turns:
            raise OndolError(
                f"a problem of this task has {len(parts)} parts, env.max_turns is {self.max_turns}",
                "raise env.max_turns",
            )
        return _Episode(self, task, problem, trajectory_id, renderer, examples)


class _Episode:
    def __init__(
        self,
        env: StreamEnv,
        task: Task,
        problem: Problem,
        trajectory_id: str,
        renderer: Any,
        examples: Sequence[Message],
    ) -> None:
        self.env, self.task, self.problem, self.id, self.examples = env, task, problem, trajectory_id, examples
        self.renderer, self.toolbox = renderer, Toolbox(env, renderer, trajectory_id, problem)
        self.parts: list[str] = problem.data["parts"]
        self.at, self.answers, self.over = 0, 0, False

    async def reset(self) -> list[Message]:
        return self._opening(self.parts[0])

    async def step(self, action: Message, last_turn: bool) -> StepResult:
        if self.over:
            raise RuntimeError(f"episode {self.id} is over: reset a new one")
        asked = self.at == len(self.parts) - 1
        if asked:
            self.answers += 1
            if not action.calls:
                self.over = True
                score = await self.task.judged(self.problem, action.content)
                return StepResult([], reward=score, terminated=True, score=score)
        if last_turn or self.answers == self.env.answer_turns:
            self.over = True
            return StepResult([], truncated=True)
        results, said = await self.toolbox.carry_out(action.calls) if action.calls else ([], None)
        if asked:
            assert said is not None
            return StepResult([said], results=results)
        self.at += 1
        part = self.parts[self.at]
        text = part if said is None else f"{said.content}\n{part}"
        if self.at % self.env.window == 0:
            return StepResult(self._opening(text), results=results, anew=True)
        if said is not None and said.role == "tool":
            return StepResult([said, Message("user", part)], results=results)
        return StepResult([Message("user", text)], results=results)

    def _opening(self, text: str) -> list[Message]:
        system = self.env.system_text(self.renderer)
        return [*([Message("system", system)] if system else []), *self.examples, Message("user", text)]

    async def close(self) -> None:
        await self.toolbox.close()
