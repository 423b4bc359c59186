"""A tool in processes of its own, one for each trajectory: `{name = "isolated", tool = "my_tool:Reverse"}`.

For tools that may block, crash or be killed: whatever happens in the process harms this trajectory's call alone. At its
deadline a process that does not answer is killed; the next call finds a fresh one, and its result says so. This keeps
faults apart, not secrets: the process may do all that ours may. (Model-written code belongs into the sandbox.)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from functools import cached_property
from typing import Any

from pydantic import Field, field_validator

from ondol.errors import OndolError
from ondol.parts import make
from ondol.records import ToolResult
from ondol.tools import background
from ondol.tools._zygote import MAX_LINE
from ondol.tools.actions import Action, printable
from ondol.tools.base import Tool, Toolset
from ondol.tools.remote import described_class

RESTARTED = "(the tool was started again: what it remembered is gone)"
_START_S = 60.0  # for a process to say that it is there; the first one waits for the tool's imports
_GRACE_S = 1.0  # beyond the tool's own deadline, before its process is killed
_CLOSE_S = 10.0  # for a process to end by itself


class Isolated(Toolset):
    """A tool in a process of its own for each trajectory."""

    tool: Any = Field(description="the tool, by name or as a table")

    @field_validator("tool")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if not isinstance(value, (str, dict)):  # its processes make it themselves
            raise ValueError("the tool by name or as a table")
        return value

    def tools(self) -> tuple[Tool, ...]:
        return (self._tool,)

    @cached_property
    def _tool(self) -> Tool:
        inner = make("tools", self.tool, "isolated.tool")
        if not isinstance(inner, Tool):
            raise OndolError(f"isolated.tool: {self.tool!r} is not a single tool", "name a tool, not a set of tools")
        named = described_class(IsolatedTool, inner.name, inner.parameters, inner.main_argument)
        return named(inner=inner, zygote=_Zygote(self.tool), description=inner.description, timeout_s=inner.timeout_s)


class IsolatedTool(Tool):
    """The tool as others see it. `name`, `parameters` and `main_argument` are those of the tool inside."""

    inner: Any = Field(exclude=True, repr=False, description="the tool; here it only reads actions")
    zygote: Any = Field(exclude=True, repr=False, description="what makes its processes")

    @property
    def deadline_s(self) -> float:
        return _START_S + self.inner.deadline_s + 2 * _GRACE_S  # the session keeps both

    def parse_action(self, text: str) -> Action | None:
        return self.inner.parse_action(text)

    def session(self, trajectory_id: str) -> IsolatedSession:
        return IsolatedSession(self, trajectory_id)


class IsolatedSession:
    """One trajectory's process, made at the first call. Its pipes live in the background loop."""

    def __init__(self, tool: IsolatedTool, trajectory_id: str) -> None:
        self.tool, self.id = tool, trajectory_id
        self.pid: int | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._lost = False  # a process died: the next result says that what it remembered is gone

    async def call(self, arguments: dict[str, Any]) -> ToolResult:
        return await background.away(self._call(arguments))

    async def close(self) -> None:
        await background.away(self._close())

    async def _call(self, arguments: dict[str, Any]) -> ToolResult:
        tool = self.tool
        try:
            if self._writer is None:
                async with asyncio.timeout(_START_S):
                    await self._open()
            note, self._lost = f"\n{RESTARTED}" if self._lost else "", False
            assert self._writer is not None and self._reader is not None
            self._writer.write(json.dumps({"arguments": arguments}).encode() + b"\n")
            async with asyncio.timeout(tool.inner.deadline_s + _GRACE_S):
                await self._writer.drain()
                line = await self._reader.readline()
            if not line:
                raise ConnectionError("its process ended")
            reply = json.loads(line)
            return ToolResult(printable(reply["text"]) + note, reply["ok"], reply["kind"])
        except TimeoutError:
            self._kill()
            return ToolResult(f"TimeoutError: {tool.name} took longer than {tool.timeout_s:g} s", False, "timeout")
        except (OSError, ValueError, KeyError, TypeError) as e:  # ValueError: a line that is too long, or no JSON
            self._kill()
            return ToolResult(f"{tool.name} failed: {e}"[:500], False, "crashed")
        except asyncio.CancelledError:
            self._kill()  # it may still be at work
            raise

    async def _open(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            await self.tool.zygote.fork(theirs, self.id)
        ours.setblocking(False)
        self._reader, self._writer = await asyncio.open_connection(sock=ours, limit=MAX_LINE)
        hello = await self._reader.readline()
        if not hello:
            raise ConnectionError("its process did not start")
        self.pid = json.loads(hello)["pid"]

    def _kill(self) -> None:
        self._lost = True
        writer, reader, pid = self._writer, self._reader, self.pid
        self._writer = self._reader = self.pid = None
        if writer is not None:
            writer.close()
        if pid is not None and reader is not None and not reader.at_eof():  # else the number may be another's by now
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)

    async def _close(self) -> None:
        writer, reader, pid = self._writer, self._reader, self.pid
        self._writer = self._reader = self.pid = None
        self._lost = False
        if writer is None or reader is None:
            return
        try:
            async with asyncio.timeout(_CLOSE_S):
                writer.write_eof()
                while await reader.read(1 << 16):
                    pass
        except (TimeoutError, OSError):
            if pid is not None and not reader.at_eof():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        finally:
            writer.close()


class _Zygote:
    """The process that forks, started when it is first needed and again when it is gone."""

    def __init__(self, table: Any) -> None:
        self._table = table
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        background.at_exit(self._end)

    async def fork(self, theirs: socket.socket, trajectory_id: str) -> None:
        """A process for this trajectory, which talks over `theirs`. Raises OSError."""
        if self._process is None or self._process.poll() is not None:
            await self._end()
            self._start()
        request = json.dumps({"tool": self._table, "trajectory_id": trajectory_id}).encode()
        assert self._control is not None
        socket.send_fds(self._control, [request], [theirs.fileno()])

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        name = self._table if isinstance(self._table, str) else self._table.get("name", "")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ondol.tools._zygote", str(theirs.fileno()), name],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # ours may be a protocol
                env=environment,
            )
        self._control = ours

    async def _end(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            self._process.wait(_CLOSE_S)  # not in a thread: when the process ends there are none any more
        self._control = self._process = None
