"""The Python tool: a notebook without files, network or foreign modules (see `ondol.sandbox.monty`)."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from ondol.records import ToolResult
from ondol.sandbox.monty import MontySession
from ondol.sandbox.turns import TURN_S
from ondol.tools.actions import Action, find_blocks
from ondol.tools.base import Tool


class Python(Tool):
    """Run Python code; the model sees what it prints and the value of its last expression."""

    name: ClassVar[str] = "python"
    main_argument: ClassVar[str] = "code"
    parameters: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {"code": {"type": "string", "description": "The Python code to run."}},
        "required": ["code"],
    }

    description: str = Field(
        default="Runs Python code and returns what it prints and the value of its last expression.",
        description="what the model reads about the tool",
    )
    timeout_s: float = Field(default=2.0, gt=0, le=600, description="wall time of one call")
    memory_mib: int = Field(default=64, ge=4, le=65536, description="memory of one session, in MiB")
    output_chars: int = Field(default=512, ge=64, description="longer output is cut in the middle")
    stateful: bool = Field(default=True, description="variables live on from call to call of one trajectory")

    @property
    def deadline_s(self) -> float:
        return self.timeout_s + TURN_S + 30.0  # the sandbox keeps `timeout_s`; this is for it hanging

    def parse_action(self, text: str) -> Action | None:
        """All blocks, joined by newlines: `<python>` ones, else ```python fences, else ```py ones."""
        return find_blocks(text, self.name, self.main_argument, ("python", "py"))

    def session(self, trajectory_id: str) -> PythonSession:
        return PythonSession(self, trajectory_id)


class PythonSession:
    """One trajectory's interpreter, opened at its first call."""

    def __init__(self, tool: Python, trajectory_id: str) -> None:
        self._stateful = tool.stateful
        self._monty = MontySession(trajectory_id, tool.timeout_s, tool.memory_mib << 20, tool.output_chars)

    async def call(self, arguments: dict[str, Any]) -> ToolResult:
        result = await self._monty.run(arguments["code"])
        if not self._stateful:
            await self._monty.close()
        return result

    async def close(self) -> None:
        await self._monty.close()
