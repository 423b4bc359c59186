"""Tools that work in a real sandbox: full CPython, a shell, files. Those of one trajectory share its sandbox.

So a file that `files` wrote is there for `cpython` and `shell`, and nobody else's. See `ondol.sandbox.levels` for the walls.
"""

from __future__ import annotations

import asyncio
import weakref
from typing import Any, ClassVar, Literal

from pydantic import Field

from ondol.errors import OndolError
from ondol.records import ToolResult
from ondol.sandbox.boxes import LEVELS, Answer, Box, Limits
from ondol.sandbox.levels import check_level, reached, try_level
from ondol.sandbox.monty import clean
from ondol.sandbox.turns import TURN_S
from ondol.tools.base import Tool

Level = Literal["rlimits", "namespaces", "bubblewrap"]

RESTARTED = "(the interpreter was restarted: earlier variables are gone)"
EMPTIED = "(the sandbox was restarted: variables and files are gone)"


class Sandboxed(Tool):
    """Base of the tools that work in a sandbox."""

    timeout_s: float = Field(default=5.0, gt=0, le=600, description="wall time of one call")
    memory_mib: int = Field(default=512, ge=16, le=1 << 20, description="memory beyond the interpreter's own, in MiB")
    disk_mib: int = Field(default=64, ge=1, le=1 << 20, description="of the trajectory's folder, in MiB")
    processes: int = Field(default=64, ge=4, le=4096, description="most at once, threads included")
    output_chars: int = Field(default=2048, ge=64, description="longer output is cut in the middle")
    require: Level = Field(default="rlimits", description="a machine that reaches less than this level is refused")
    level: Level | None = Field(default=None, description="exactly this level; by default the strongest that works")

    #: settings that the tools of one trajectory share
    shared: ClassVar[tuple[str, ...]] = ("memory_mib", "disk_mib", "processes", "level")

    @property
    def deadline_s(self) -> float:
        return self.timeout_s + TURN_S + 90.0  # the sandbox keeps `timeout_s`; this is for it hanging

    def facts(self) -> dict[str, Any]:
        """The level that calls run behind on this machine. Raises OndolError when it is less than required."""
        check_level(self.require, f"the tool '{self.name}'")
        if self.level is None:
            found = reached()
            return {"sandbox": found.level, "walls": found.walls}
        if LEVELS.index(self.level) < LEVELS.index(self.require):
            raise OndolError(
                f"the tool '{self.name}' requires '{self.require}' and asks for '{self.level}'", "drop one"
            )
        problem = try_level(self.level)
        if problem is not None:
            raise OndolError(f"the sandbox level '{self.level}' does not work here: {problem}", "see: ondol doctor")
        return {"sandbox": self.level}

    def limits(self) -> Limits:
        return Limits(self.memory_mib, self.disk_mib, self.processes, output_bytes=max(1 << 16, 8 * self.output_chars))


class _Shared:
    """The sandbox of one trajectory and the names of the tools that hold it."""

    def __init__(self, settings: tuple[Any, ...]) -> None:
        self.settings = settings
        self.holders: set[str] = set()
        self.box: Box | None = None
        self.lock = asyncio.Lock()


_of_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, _Shared]] = weakref.WeakKeyDictionary()


class SandboxSession:
    """One tool in one trajectory's sandbox, which opens at the first call and ends with the last of its sessions."""

    preload: ClassVar[tuple[str, ...]] = ()

    def __init__(self, tool: Sandboxed, trajectory_id: str) -> None:
        self.tool, self.id = tool, trajectory_id
        self._shared: _Shared | None = None

    async def box(self) -> Box:
        """The trajectory's sandbox. Raises OndolError when this machine has none of the level that is wanted."""
        tool = self.tool
        settings = tuple(getattr(tool, name) for name in tool.shared)
        if self._shared is None:
            known = _of_loop.setdefault(asyncio.get_running_loop(), {})
            found = known.get(self.id)
            if found is None or tool.name in found.holders:  # another trajectory that is called the same
                found = known[self.id] = _Shared(settings)
            if found.settings != settings:
                raise OndolError(
                    f"the tool '{tool.name}' shares its sandbox with {', '.join(sorted(found.holders))} and differs in settings",
                    f"give these the same values for both: {', '.join(tool.shared)}",
                )
            found.holders.add(tool.name)
            self._shared = found
        shared = self._shared
        async with shared.lock:
            if shared.box is None:
                facts = await asyncio.to_thread(tool.facts)
                shared.box = Box(facts["sandbox"], self.id, tool.limits(), self.preload)
        return shared.box

    async def ask(self, do: str, **details: Any) -> Answer:
        return await (await self.box()).ask(do, self.tool.timeout_s, **details)

    async def close(self) -> None:
        shared, self._shared = self._shared, None
        if shared is None:
            return
        shared.holders.discard(self.tool.name)
        if not shared.holders:
            known = _of_loop.get(asyncio.get_running_loop(), {})
            if known.get(self.id) is shared:
                del known[self.id]
            if shared.box is not None:
                await shared.box.close()

    def result(self, answer: Answer, text: str) -> ToolResult:
        """What the model reads: the output, and what went wrong. Kinds that a record does not know become its nearest."""
        tool = self.tool
        wrong = {
            "timeout": f"TimeoutError: ran longer than {tool.timeout_s:g} s",
            "memory": "" if "MemoryError" in text else f"MemoryError: more than {tool.memory_mib} MiB in use",
            "processes": f"OSError: more than {tool.processes} processes",
            "disk": f"OSError: more than {tool.disk_mib} MiB of files",
            "crashed": "SandboxError: the process crashed",
        }.get(answer.kind, "")
        if answer.emptied:
            wrong += f"\n{EMPTIED}"
        elif answer.restarted:
            wrong += f"\n{RESTARTED}"
        if text and wrong and not text.endswith("\n"):
            text += "\n"
        kind = {"processes": "memory", "disk": "memory"}.get(answer.kind, answer.kind)
        return ToolResult(clean(text + wrong, tool.output_chars), kind == "ok", kind, answer.seconds)
