"""The shell tool: one command line in the trajectory's sandbox, without network."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from ondol.records import ToolResult
from ondol.tools.sandboxed import Sandboxed, SandboxSession


class Shell(Sandboxed):
    """Run a shell command; the model sees its output, and its exit code unless that is 0."""

    name: ClassVar[str] = "shell"
    main_argument: ClassVar[str] = "command"
    parameters: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {"command": {"type": "string", "description": "The command line to run."}},
        "required": ["command"],
    }

    description: str = Field(
        default="Runs a shell command in a private folder without network and returns its output.",
        description="what the model reads about the tool",
    )

    def session(self, trajectory_id: str) -> ShellSession:
        return ShellSession(self, trajectory_id)


class ShellSession(SandboxSession):
    """Each command has a shell of its own; files stay, variables and background processes do not."""

    async def call(self, arguments: dict[str, Any]) -> ToolResult:
        command = arguments["command"]
        if "\0" in command or _odd(command):
            return ToolResult("Error: the command holds characters that no shell takes", False, "error")
        answer = await self.ask("shell", command=command)
        text = answer.stdout
        if answer.kind == "error":
            text = f"{text}{'' if not text or text.endswith(chr(10)) else chr(10)}(exit code {answer.exit})"
        return self.result(answer, text)


def _odd(text: str) -> bool:
    """Half characters (lone surrogates), which have no bytes."""
    try:
        text.encode()
        return False
    except UnicodeEncodeError:
        return True
