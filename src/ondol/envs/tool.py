"""ToolEnv: a question, tools to work it out with, and an answer that the task's verifier scores."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ondol.envs.base import Env, StepResult
from ondol.errors import OndolError
from ondol.parts import make, names
from ondol.records import Image, Message, Problem, ToolCall, ToolResult
from ondol.tasks.base import Task
from ondol.tools.base import Sees, Tool, ToolSession, Toolset, call_tool, unpack
from ondol.tools.calls import CallStyle, Json, Tags, tags_text

#: the ends of a result that was cut, and the note; VerlTool's (arXiv 2509.01055)
_CUT = {"left": "{1}...(truncated)", "middle": "{0}...(truncated)...{1}", "right": "{0}(truncated)..."}


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
    max_observation_tokens: int = Field(
        default=0, ge=0, description="longer results are cut to so many tokens and a note of it; 0: never"
    )
    truncate_observation: Literal["left", "middle", "right"] = Field(
        default="middle",
        description="where they are cut: left keeps the last tokens, middle both ends, right the first",
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

    def exercises(self) -> frozenset[str]:
        return self.capabilities.union(*(t.capabilities for t in self._tools))

    @property
    def _by_name(self) -> dict[str, Tool]:
        return {t.name: t for t in self._tools}

    def facts(self) -> dict[str, Any]:
        return {tool.name: facts for tool in self._tools if (facts := tool.facts())}

    def call_style(self, renderer: Any) -> CallStyle | None:
        if not self._tools:
            return None
        return Tags(self._tools) if self.calls == "tags" else Json(renderer)  # type: ignore[arg-type]  # ClassVars read alike

    def schemas(self, renderer: Any) -> list[dict[str, Any]]:
        return [t.schema() for t in self._tools] if self.calls == "json" else []

    def system_text(self, renderer: Any) -> str | None:
        """The system message: as set, or a line for each tool."""
        if self.system is not None:
            return self.system or None
        if not self._tools:
            return None
        if self.calls == "tags":
            return tags_text(self._tools)
        if renderer.renders_tools:  # then the chat format has a place of its own for them
            return None
        return renderer.tools_text(self.schemas(renderer)) or None

    def episode(
        self, task: Task, problem: Problem, trajectory_id: str, renderer: Any, examples: Sequence[Message] = ()
    ) -> _Episode:
        return _Episode(self, task, problem, trajectory_id, renderer, examples)


class Toolbox:
    """The tools of one trajectory: carries out calls, each tool in a session of its own that lives until `close`."""

    def __init__(self, env: ToolEnv, renderer: Any, trajectory_id: str, problem: Problem | None = None) -> None:
        self.env, self.id, self.style = env, trajectory_id, env.call_style(renderer)
        self.problem = problem or Problem("", "", "")
        self.codec: Any = getattr(renderer, "codec", None)
        if env.max_observation_tokens and self.codec is None:
            raise OndolError(
                "env.max_observation_tokens counts tokens, and an endpoint's model has a tokenizer of its own",
                "set it to 0 to evaluate over an endpoint",
            )
        self.sessions: dict[str, ToolSession] = {}
        self.seen: list[Image] = []  # by the agent, in the question and in results

    async def carry_out(self, calls: Sequence[ToolCall]) -> tuple[list[ToolResult], Message]:
        """Results in the order of a turn's calls (at least one), and the observation that tells the model of them."""
        assert self.style is not None, "calls come from a call style, and without tools there is none"
        results = [self._cut(r) for r in await asyncio.gather(*(self._call(c) for c in calls))]
        text = "\n".join(self.style.result(r, c.name) for r, c in zip(results, calls))
        images = tuple(image for r in results for image in r.images)
        self.seen += images
        return results, Message(self.env.result_role, text, name=calls[0].name or None, images=images)

    async def close(self) -> None:
        sessions, self.sessions, self.seen = list(self.sessions.values()), {}, []
        for failed in await asyncio.gather(*(s.close() for s in sessions), return_exceptions=True):
            if failed is not None:
                raise failed

    def _cut(self, result: ToolResult) -> ToolResult:
        """The result with no more of its text than the setting allows, and a note where some is left out. Counted is the
        text alone: neither the note nor what the call style or the chat format puts around it."""
        most, side = self.env.max_observation_tokens, self.env.truncate_observation
        if not most:
            return result
        first, last = {"left": (0, most), "middle": (most // 2, most // 2), "right": (most, 0)}[side]
        ends = self.codec.ends(result.text, most, first, last)
        return result if ends is None else dataclasses.replace(result, text=_CUT[side].format(*ends))

    async def _call(self, call: ToolCall) -> ToolResult:
        if call.error is not None:
            return ToolResult(f"error: {call.error}", ok=False, kind="bad_arguments")
        tool = self.env._by_name.get(call.name)
        if tool is None:
            known = ", ".join(self.env._by_name)
            return ToolResult(f"error: there is no tool '{call.name}'; known: {known}", ok=False, kind="unknown_tool")
        if call.name not in self.sessions:
            self.sessions[call.name] = tool.open(self.id, self.problem)
        session = self.sessions[call.name]
        if isinstance(session, Sees):
            session.see(tuple(self.seen))
        return await call_tool(session, tool, call)


class _Episode:
    def __init__(
        self, env: ToolEnv, task: Task, problem: Problem, trajectory_id: str, renderer: Any, examples: Sequence[Message]
    ) -> None:
        self.env, self.task, self.problem, self.id, self.examples = env, task, problem, trajectory_id, examples
        self.renderer, self.toolbox = renderer, Toolbox(env, renderer, trajectory_id, problem)
        self.over = False

    async def reset(self) -> list[Message]:
        system = self.env.system_text(self.renderer)
        first = [Message("system", system)] if system else []
        images = self.task.images(self.problem)
        self.toolbox.seen += images
        return [*first, *self.examples, Message("user", self.problem.question, images=images)]

    async def step(self, action: Message, last_turn: bool) -> StepResult:
        if self.over:
            raise RuntimeError(f"episode {self.id} is over: reset a new one")
        if not action.calls or self.problem.data.get("use_tool") is False:
            return await self._scored(action)
        if last_turn:
            self.over = True
            return StepResult([], truncated=True)
        results, observation = await self.toolbox.carry_out(action.calls)
        earned = self._earned(action.calls, results)
        if any(r.done for r in results):
            return await self._scored(action, earned, results)
        return StepResult([observation], reward=earned, results=results)

    async def _scored(self, action: Message, earned: float = 0.0, results: Sequence[ToolResult] = ()) -> StepResult:
        self.over = True
        score = await self.task.judged(self.problem, action.content)
        return StepResult([], reward=earned + score, terminated=True, score=score, results=list(results))

    def _earned(self, calls: Sequence[ToolCall], results: Sequence[ToolResult]) -> float:
        for call, result in zip(calls, results, strict=True):
            if not (math.isfinite(result.reward) and result.reward >= 0):
                raise OndolError(
                    f"sample {self.id}: the tool '{call.name}' gave a reward of {result.reward}",
                    "a tool's reward is a number of at least 0; penalties belong to the task or the method",
                )
        return math.fsum(r.reward for r in results)

    async def close(self) -> None:
        await self.toolbox.close()
