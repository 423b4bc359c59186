"""The memory tool: a notebook of named notes that outlives the context, one for each trajectory."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from pydantic import Field

from ondol.records import ToolResult
from ondol.tools.base import Tool

_COMMAND = re.compile(r"\s*(write|read|delete|list)\b\s*([^\s:]*)\s*:?[ \t]?(.*)", re.S)


class Memory(Tool):
    """Keep notes: write NAME: TEXT, read NAME, delete NAME, list."""

    name: ClassVar[str] = "memory"
    main_argument: ClassVar[str] = "command"
    capabilities: ClassVar[frozenset[str]] = frozenset({"memory"})
    parameters: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {
            "command": {
                "type": "string",
                "description": "write NAME: TEXT, read NAME, delete NAME, or list. A name is one word.",
            }
        },
        "required": ["command"],
    }

    description: str = Field(
        default="Keeps notes for later. Commands: write NAME: TEXT, read NAME, delete NAME, list.",
        description="what the model reads about the tool",
    )
    timeout_s: float = Field(default=1.0, gt=0, le=600, description="time limit of one call")
    notes: int = Field(default=32, ge=1, le=10_000, description="most notes at once; a full memory refuses new names")
    note_chars: int = Field(default=400, ge=1, le=100_000, description="longest note")

    def session(self, trajectory_id: str) -> MemorySession:
        return MemorySession(self)


class MemorySession:
    """One trajectory's notes; they are gone when it ends."""

    def __init__(self, tool: Memory) -> None:
        self.tool = tool
        self.notes: dict[str, str] = {}

    async def call(self, arguments: dict[str, Any]) -> ToolResult:
        match = _COMMAND.fullmatch(arguments["command"])
        if match is None:
            return _error("a command is: write NAME: TEXT, read NAME, delete NAME, or list")
        verb, name, text = match[1], match[2], match[3].rstrip()
        if verb == "list":
            return ToolResult(", ".join(self.notes) or "(no notes)")
        if not name:
            return _error(f"{verb} needs a name")
        if verb == "write":
            return self._write(name, text)
        if name not in self.notes:
            return _error(f"there is no note {name[:40]!r}")
        if verb == "read":
            return ToolResult(self.notes[name])
        del self.notes[name]
        return ToolResult("ok")

    def _write(self, name: str, text: str) -> ToolResult:
        limit = self.tool.note_chars
        if len(name) > limit or len(text) > limit:
            return _error(f"a note holds at most {limit} characters")
        if name not in self.notes and len(self.notes) >= self.tool.notes:
            return _error(f"the memory is full ({self.tool.notes} notes): delete one first")
        self.notes[name] = text.encode("utf-8", "replace").decode()
        return ToolResult("ok")

    async def close(self) -> None:
        self.notes.clear()


def _error(text: str) -> ToolResult:
    return ToolResult(f"Error: {text}".encode("utf-8", "replace").decode(), ok=False, kind="error")
