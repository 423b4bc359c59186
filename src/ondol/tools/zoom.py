"""The zoom tool: a cell of a problem's picture from close by, as a grid of characters."""

from __future__ import annotations

import re
import string
from typing import Any, ClassVar

from pydantic import Field

from ondol.records import Problem, ToolResult
from ondol.tools.base import Tool

_CELL = re.compile(r"\s*([a-z])\s*([0-9]{1,2})\s*", re.I)


class Zoom(Tool):
    """Look closely at one cell of a picture of text: the problem's (`problem.data["picture"]`), else the setting's."""

    name: ClassVar[str] = "zoom"
    main_argument: ClassVar[str] = "cell"
    capabilities: ClassVar[frozenset[str]] = frozenset({"perception"})
    parameters: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {"cell": {"type": "string", "description": "Column and row, such as b2; a1 is at the top left."}},
        "required": ["cell"],
    }

    description: str = Field(
        default="Shows one cell of the picture closely, such as b2: column b, row 2.",
        description="what the model reads about the tool",
    )
    timeout_s: float = Field(default=1.0, gt=0, le=600, description="time limit of one call")
    size: int = Field(default=8, ge=1, le=64, description="points on each side of a cell")
    picture: tuple[str, ...] = Field(default=(), description="rows of a picture, for problems that have none")

    def session(self, trajectory_id: str) -> ZoomSession:
        return ZoomSession(self.size, self.picture)

    def open(self, trajectory_id: str, problem: Problem) -> ZoomSession:
        return ZoomSession(self.size, problem.data.get("picture", self.picture))


class ZoomSession:
    """It remembers nothing."""

    def __init__(self, size: int, picture: Any) -> None:
        self.size, self.picture = size, picture

    async def call(self, arguments: dict[str, Any]) -> ToolResult:
        if not self.picture:
            return ToolResult("Error: there is no picture", ok=False, kind="error")
        match = _CELL.fullmatch(arguments["cell"])
        rows, columns = len(self.picture) // self.size, len(self.picture[0]) // self.size
        if match is not None:
            x, y = string.ascii_lowercase.find(match[1].lower()), int(match[2]) - 1
            if 0 <= x < columns and 0 <= y < rows:
                left, top = x * self.size, y * self.size
                return ToolResult("\n".join(r[left : left + self.size] for r in self.picture[top : top + self.size]))
        last = f"{string.ascii_lowercase[columns - 1]}{rows}"
        return ToolResult(f"Error: cells go from a1 to {last}", ok=False, kind="error")

    async def close(self) -> None:
        pass
