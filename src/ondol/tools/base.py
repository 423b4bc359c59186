"""What a tool is: a schema that the model reads, and a session per trajectory that does the work."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import Any, ClassVar, Protocol, runtime_checkable

from pydantic import Field

from ondol.errors import OndolError, nearest
from ondol.parts import Part
from ondol.records import Image, Problem, ToolCall, ToolResult
from ondol.tools.actions import Action, find_action


class ToolSession(Protocol):
    """A tool in one trajectory: what it remembers is that trajectory's alone."""

    async def call(self, arguments: dict[str, Any]) -> ToolResult:
        """Do the work. `arguments` fit the tool's schema."""
        ...

    async def close(self) -> None:
        """Give back what the session holds. May be called twice."""
        ...


@runtime_checkable
class Sees(Protocol):
    """A session that works on pictures: before each call it is told of all that the trajectory has shown, in order."""

    def see(self, images: Sequence[Image]) -> None: ...


class Tool(Part):
    """A tool that an agent may call.

    A subclass names itself (`name`), its arguments (`parameters`, JSON Schema of an object) and the argument that a
    call in tags or a code block fills (`main_argument`), and makes sessions.
    """

    name: ClassVar[str]
    parameters: ClassVar[dict[str, Any]]
    main_argument: ClassVar[str]
    capabilities: ClassVar[frozenset[str]] = frozenset()  #: what using it asks of an agent, beside "tool use"

    description: str = Field(description="what the model reads about the tool")
    timeout_s: float = Field(default=10.0, gt=0, le=3600, description="time limit of one call")

    @property
    def deadline_s(self) -> float:
        """When `call_tool` gives a call up; longer than `timeout_s` where a tool keeps its limit itself."""
        return self.timeout_s

    def unavailable(self) -> str | None:
        """Why the tool cannot work on this machine (a program or a package is missing); None where it can."""
        return None

    def schema(self) -> dict[str, Any]:
        """The tool in OpenAI's function format, as chat templates take it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    def facts(self) -> dict[str, Any]:
        """What this machine gives the tool, for the record of a run. Raises OndolError where the tool needs more."""
        return {}

    def session(self, trajectory_id: str) -> ToolSession:
        """A fresh session. `trajectory_id` seeds whatever the tool draws at random."""
        raise NotImplementedError

    def open(self, trajectory_id: str, problem: Problem) -> ToolSession:
        """A session for a problem, for tools that work on something of it: its database, its picture."""
        return self.session(trajectory_id)

    def parse_action(self, text: str) -> Action | None:
        """This tool's call in a model's text, as a tool server looks for it; None if there is none."""
        return find_action(text, self.name, self.main_argument)


class Toolset(Part):
    """Several tools behind one entry of a recipe: a server's, say."""

    def tools(self) -> tuple[Tool, ...]:
        """The tools, always the same ones. May ask a server for them; raises OndolError when it cannot."""
        raise NotImplementedError


def unpack(entries: Iterable[Tool | Toolset]) -> tuple[Tool, ...]:
    """The tools that the entries of a recipe stand for. Raises ValueError when two are called the same."""
    found = [t for entry in entries for t in (entry.tools() if isinstance(entry, Toolset) else (entry,))]
    seen = [t.name for t in found]
    if len(set(seen)) < len(seen):
        raise ValueError(f"two tools are called the same: {', '.join(seen)}")
    return tuple(found)


async def call_tool(session: ToolSession, tool: Tool, call: ToolCall) -> ToolResult:
    """Call a tool and measure `seconds`. Bad calls, deadlines and exceptions become results.

    Only OndolError passes: it means that the tool cannot work on this machine, which no model can learn to avoid.
    """
    started = perf_counter()
    try:
        wrong = _wrong(tool, call)
        if wrong is not None:
            result = wrong
        else:
            async with asyncio.timeout(tool.deadline_s):
                result = await session.call(call.arguments)
            if isinstance(result, str):
                result = ToolResult(result)
            if not isinstance(result, ToolResult):
                raise TypeError(f"the tool '{tool.name}' gave {type(result).__name__}, not ToolResult")
            if not isinstance(result.text, str):
                raise TypeError(f"the tool '{tool.name}' gave a text that is {type(result.text).__name__}, not str")
    except TimeoutError:
        result = ToolResult(f"TimeoutError: {tool.name} took longer than {tool.deadline_s:g} s", False, "timeout")
    except OndolError:
        raise
    except Exception as e:
        result = ToolResult(f"{tool.name} failed: {type(e).__name__}: {e}"[:500], False, "crashed")
    return dataclasses.replace(result, seconds=perf_counter() - started)


def _wrong(tool: Tool, call: ToolCall) -> ToolResult | None:
    """Why this call cannot be made, in words that a model can act on."""
    if call.error is not None:
        return ToolResult(f"Error: {call.error}", False, "bad_arguments")
    if call.name != tool.name:
        return ToolResult(
            f"Error: there is no tool '{call.name}' ({nearest(call.name, [tool.name])})", False, "unknown_tool"
        )
    for problem in _misfits(call.arguments, tool.parameters):
        return ToolResult(f"Error: {tool.name}: {problem}", False, "bad_arguments")
    return None


def _misfits(arguments: Any, parameters: dict[str, Any]) -> list[str]:
    """Where `arguments` do not fit a JSON Schema object: required keys, unknown keys, plain types and enums.

    Of a schema that says more (a server's may), the rest is left for the tool to check.
    """
    if not isinstance(arguments, dict):
        return ["the arguments are not an object"]
    properties = parameters.get("properties", {})
    wrong = [f"argument '{key}' is missing" for key in parameters.get("required", []) if key not in arguments]
    for key, value in arguments.items():
        if key not in properties:
            if parameters.get("additionalProperties"):
                continue
            wrong.append(f"there is no argument '{key}' ({nearest(str(key), properties)})")
            continue
        kinds = properties[key].get("type") or []
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if kinds and not any(k not in _TYPES or _fits(value, k) for k in kinds):
            wrong.append(f"argument '{key}' must be of type {' or '.join(kinds)}, not {type(value).__name__}")
        elif "enum" in properties[key] and value not in properties[key]["enum"]:
            wrong.append(f"argument '{key}' must be one of {properties[key]['enum']}")
    return wrong


_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "array": (list, tuple),
    "object": (dict,),
    "null": (type(None),),
}


def _fits(value: Any, kind: str) -> bool:
    # bool is an int to Python, but not to JSON.
    return isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))
