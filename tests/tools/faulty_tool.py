"""A tool that goes wrong in every way, for tests of the server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from typing import Any, ClassVar

from ondol.errors import OndolError
from ondol.records import ToolResult
from ondol.tools.base import Tool

OPEN: set[str] = set()  # trajectories with a session, in this process


class Faulty(Tool):
    """Does what it is told: `echo TEXT`, `count`, `wait SECONDS`, `raise`, `hang` and worse."""

    name: ClassVar[str] = "faulty"
    main_argument: ClassVar[str] = "what"
    parameters: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {"what": {"type": "string"}},
        "required": ["what"],
    }
    description: str = "For tests."
    timeout_s: float = 1.0

    def session(self, trajectory_id: str) -> FaultySession:
        return FaultySession(trajectory_id)


class FaultySession:
    def __init__(self, trajectory_id: str) -> None:
        self.id, self.count = trajectory_id, 0
        OPEN.add(trajectory_id)

    async def call(self, arguments: dict[str, Any]) -> Any:
        word, _, rest = arguments["what"].partition(" ")
        match word:
            case "echo":
                return ToolResult(rest)
            case "count":
                self.count += 1
                return ToolResult(f"{self.count}")
            case "add":  # what a sum of everything so far is: state, and order
                self.count += int(rest)
                return ToolResult(f"{self.count}")
            case "wait":
                await asyncio.sleep(float(rest))
                return ToolResult("waited")
            case "raise":
                raise KeyError("gone")
            case "hang":
                await asyncio.sleep(600)
            case "stubborn":  # does not care that it is cancelled
                until = time.monotonic() + 3
                while time.monotonic() < until:
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.sleep(until - time.monotonic())
            case "rubbish":
                return 5
            case "number":
                return ToolResult(5)  # type: ignore[arg-type]
            case "control":
                return ToolResult("a\x00b\ud800c")
            case "exit":
                sys.exit(3)
            case "cannot":
                raise OndolError("no such machine", "buy one")
            case "pid":
                return ToolResult(str(os.getpid()))
            case "block":
                time.sleep(600)
            case "die":
                os._exit(3)
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "memory":
                os.abort()
        return ToolResult(f"no '{word}'", False, "error")

    async def close(self) -> None:
        OPEN.discard(self.id)
        if self.id.startswith("bad-close"):
            raise RuntimeError("cannot close")


class Lonely(Faulty):
    """The same under another name."""

    name: ClassVar[str] = "lonely"
