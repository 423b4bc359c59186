"""The full Python tool: CPython with numpy and sympy, in a real sandbox. `python` (Monty) is the small and quick one."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from ondol.records import ToolResult
from ondol.sandbox.boxes import PACKAGES
from ondol.tools.sandboxed import Sandboxed, SandboxSession


class CPython(Sandboxed):
    """Run Python code; the model sees what it prints and the value of its last expression."""

    name: ClassVar[str] = "cpython"
    main_argument: ClassVar[str] = "code"
    parameters: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {"code": {"type": "string", "description": "The Python code to run."}},
        "required": ["code"],
    }

    description: str = Field(
        default="Runs Python code (numpy and sympy can be imported) and returns what it prints and the value of its last "
        "expression.",
        description="what the model reads about the tool",
    )
    stateful: bool = Field(default=True, description="variables live on from call to call of one trajectory")

    def session(self, trajectory_id: str) -> CPythonSession:
        return CPythonSession(self, trajectory_id)


class CPythonSession(SandboxSession):
    """A notebook's interpreter, or with `stateful = false` a fresh one for each call."""

    preload = PACKAGES

    async def call(self, arguments: dict[str, Any]) -> ToolResult:
        assert isinstance(self.tool, CPython)
        answer = await self.ask("cell" if self.tool.stateful else "cell-alone", code=arguments["code"])
        return self.result(answer, answer.stdout)
