"""The files tool: read, write, list, edit and delete in the trajectory's private folder, which lies in its sandbox."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from ondol.records import ToolResult
from ondol.tools.sandboxed import Sandboxed, SandboxSession


class Files(Sandboxed):
    """One command a call: a verb and a path in the first line, the text below it.

    read PATH · list [PATH] · delete PATH · write PATH, then the text · edit PATH, then the old text, a line of seven
    '=' and the new text; the old text must be there exactly once.
    """

    name: ClassVar[str] = "files"
    main_argument: ClassVar[str] = "command"
    parameters: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {
            "command": {
                "type": "string",
                "description": "read PATH, list [PATH], delete PATH; write PATH with the text from the second line on; "
                "edit PATH with the old text from the second line on, a line =======, and the new text.",
            }
        },
        "required": ["command"],
    }

    description: str = Field(
        default="Reads, lists, writes, edits and deletes files in a private folder.",
        description="what the model reads about the tool",
    )

    def session(self, trajectory_id: str) -> FilesSession:
        return FilesSession(self, trajectory_id)


class FilesSession(SandboxSession):
    """Paths that leave the folder, by '..' or by a link, are refused."""

    async def call(self, arguments: dict[str, Any]) -> ToolResult:
        answer = await self.ask("files", command=arguments["command"])
        wrong = f"Error: {answer.stderr}" if answer.kind == "error" else ""
        return self.result(answer, answer.stdout + wrong)
