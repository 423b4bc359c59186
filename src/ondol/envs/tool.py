"""ToolEnv: a question, tools to work it out with, and an answer that the task's verifier scores."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ondol.envs.base import Env, StepResult
from ondol.parts import make, names
from ondol.records import Message, Problem, ToolCall, ToolResult
from ondol.tasks.base import Task
from ondol.tools.base import Tool, ToolSession, Toolset, call_tool, unpack
from ondol.tools.calls import CallStyle, Json, Tags

TAGS_TEXT = "{usage} The result comes back between <result> and </result>. When you know the answer, reply with the answer alone."


class ToolEnv(Env):
    """Conversation with tools. A turn without a call is the answer and ends the episode."""

    capabilities: ClassVar[frozenset[str]] = frozenset({"tool use", "reasoning"})
    action_space: ClassVar[str] = "text or tool call"

    max_turns: int = Field(default=2, ge=1, description="most turns; a call on the last one is not carried out")
    tools: tuple[Any, ...] = Field(
        default=(), description="tools by name or as tables; none makes it plain question answering"
    )
    calls: Literal["tags", "json"] = Field(
        default="tags", description="<python>...</python>, or the model family's own JSON"
    )
    system: str | None = Field(default=None, description="system message; by default a line that describes the tools")
    result_role: Literal["tool", "user"] = Field(
        default="user", description="role of the message that carries a tool's result"
    )

    @field_validator("tools", mode="before")
    @classmethod
    def _make_tools(cls, value: Any) -> tuple[Tool | Toolset, ...]:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f'a list of tools, e.g. ["python"]; known: {", ".join(names("tools"))}')
        return tuple(v if isinstance(v, (Tool, Toolset)) else make("tools", v, "env.tools") for v in value)

    @model_validator(mode="after")
    def _consistent(self) -> ToolEnv:
        if self._tools and self.max_turns < 2:
            raise ValueError("with tools max_turns must be at least 2: one to call, one to answer")
        return self

    @property
    def _tools(self) -> tuple[Any, ...]:
        return unpack(self.tools)  # an entry may stand for several: all of a server's

    @property
    def _by_name(self) -> dict[str, Tool]:
        return {t.name: t for t in self._tools}

    def call_style(self, renderer: Any) -> CallStyle | None:
        if not self._tools:
            return None
        return Tags(self._tools) if self.calls == "tags" else Json(renderer)

    def schemas(self, renderer: Any) -> list[dict[str, Any]]:
        return [t.schema() for t in self._tools] if self.calls == "json" else []

    def system_text(self, renderer: Any) -> str | None:
        """The system message: as set, or a line for each tool."""
        if self.system is not None:
            return self.system or None
        if not self._tools:
            return None
        if self.calls == "tags":
            usage = " ".join(
                f"{t.description} To use it, write {t.main_argument} between <{t.name}> and </{t.name}>."
                for t in self._tools
            )
            return TAGS_TEXT.format(usage=usage)
        if renderer.renders_tools:  # then the chat format has a place of its own for them
            return None
        return renderer.tools_text(self.schemas(renderer)) or None

    def episode(
        self, task: Task, problem: Problem, trajectory_id: str, renderer: Any, examples: Sequence[Message] = ()
    ) -> _Episode:
        return _Episode(self, task, problem, trajectory_id, renderer, examples)


class Toolbox:
    """The tools of one trajectory: carries out calls, each tool in a session of its own that lives until `close`."""

    def __init__(self, env: ToolEnv, renderer: Any, trajectory_id: str) -> None:
        self.env, self.id, self.style = env, trajectory_id, env.call_style(renderer)
        self.sessions: dict[str, ToolSession] = {}

    async def carry_out(self, calls: Sequence[ToolCall]) -> tuple[list[ToolResult], Message]:
        """Results in the order of a turn's calls (at least one), and the observation that tells the model of them."""
        assert self.style is not None, "calls come from a call style, and without tools there is none"
        results = await asyncio.gather(*(self._call(c) for c in calls))
        text = "\n".join(self.style.result(r, c.name) for r, c in zip(results, calls))
        return list(results), Message(self.env.result_role, text, name=calls[0].name or None)

    async def close(self) -> None:
        for session in self.sessions.values():
            await session.close()
        self.sessions.clear()

    async def _call(self, call: ToolCall) -> ToolResult:
        if call.error is not None:
            return ToolResult(f"error: {call.error}", ok=False, kind="bad_arguments")
        tool = self.env._by_name.get(call.name)
        if tool is None:
            known = ", ".join(self.env._by_name)
            return ToolResult(f"error: there is no tool '{call.name}'; known: {known}", ok=False, kind="unknown_tool")
        if call.name not in self.sessions:
            self.sessions[call.name] = tool.session(self.id)
        return await call_tool(self.sessions[call.name], tool, call)


class _Episode:
    def __init__(
        self, env: ToolEnv, task: Task, problem: Problem, trajectory_id: str, renderer: Any, examples: Sequence[Message]
    ) -> None:
        self.env, self.task, self.problem, self.id, self.examples = env, task, problem, trajectory_id, examples
        self.renderer, self.toolbox = renderer, Toolbox(env, renderer, trajectory_id)
        self.over = False

    async def reset(self) -> list[Message]:
        system = self.env.system_text(self.renderer)
        first = [Message("system", system)] if system else []
        return [*first, *self.examples, Message("user", self.problem.question)]

    async def step(self, action: Message, last_turn: bool) -> StepResult:
        if self.over:
            raise RuntimeError(f"episode {self.id} is over: reset a new one")
        if not action.calls:
            self.over = True
            score = self.task.score(self.problem, action.content)
            return StepResult([], reward=score, terminated=True, score=score)
        if last_turn:
            self.over = True
            return StepResult([], truncated=True)
        results, observation = await self.toolbox.carry_out(action.calls)
        return StepResult([observation], results=results)

    async def close(self) -> None:
        await self.toolbox.close()
