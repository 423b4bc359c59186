"""The browser tool: pages that are on this machine, read as text, seen as pictures, and operated."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from ondol.errors import OndolError
from ondol.records import ToolResult
from ondol.tools.base import Tool
from ondol.tools.chromium import Reach, missing
from ondol.tools.gui import Action
from ondol.tools.tab import PageError, Tab

_GRACE_S = 75.0  # beyond a call's time: the first call starts the browser


class Browser(Tool):
    """Operate a page in Chromium. Nothing outside this machine is reached."""

    name: ClassVar[str] = "browser"
    main_argument: ClassVar[str] = "action"
    parameters: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {
            "action": {
                "type": "string",
                "description": "One of goto(page), click(3), click(120, 44), type(4, text), select(5, option), press(Enter), "
                "scroll(down), scroll(6, up), drag(3, 7), hover(3), back(), wait(), screenshot().",
            }
        },
        "required": ["action"],
    }

    description: str = Field(
        default="Operates a web browser: one action a call, such as goto(page), click(3) or type(4, text). It gives the "
        "page's text with numbered elements; screenshot() gives its picture.",
        description="what the model reads about the tool",
    )
    timeout_s: float = Field(default=15.0, gt=0, le=600, description="time limit of one call")
    folder: Path | None = Field(default=None, description="pages may be files below it; none: no files")
    origins: tuple[str, ...] = Field(
        default=(), description="origins on loopback that pages may load from, such as http://127.0.0.1:8000"
    )
    start: str | None = Field(default=None, description="page that is open at first")
    width: int = Field(default=800, ge=64, le=4096, description="of the window, in pixels")
    height: int = Field(default=600, ge=64, le=4096, description="of the window, in pixels")
    chars: int = Field(default=4000, ge=200, description="longer texts of a page are cut")
    pictures: bool = Field(default=False, description="every result has a picture, not only that of screenshot()")
    executable: str | None = Field(
        default=None, description="the browser's program; by default $ONDOL_CHROMIUM, or chromium on the PATH"
    )

    @field_validator("origins")
    @classmethod
    def _loopback(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            Reach(None, value)
        except OndolError as e:
            raise ValueError(f"{e.what}: {e.remedy}") from e
        return value

    @property
    def deadline_s(self) -> float:
        return self.timeout_s + _GRACE_S

    def unavailable(self) -> str | None:
        return missing(self.executable)

    def session(self, trajectory_id: str) -> BrowserSession:
        return BrowserSession(self)


class BrowserSession:
    """One trajectory's page, opened at its first call."""

    def __init__(self, tool: Browser) -> None:
        self.tool = tool
        self.tab = Tab(
            Reach(tool.folder, tool.origins),
            tool.width,
            tool.height,
            tool.timeout_s,
            executable=tool.executable,
            chars=tool.chars,
        )
        self._started = tool.start is None

    async def call(self, arguments: dict[str, Any]) -> ToolResult:
        try:
            action = Action.parse(arguments["action"])
            if not self._started and action.kind != "goto":
                await self.tab.goto(self.tool.start or "")
                await self.tab.look()  # its elements have their numbers from the start
            self._started = True
            await self.tab.act(action) if action.kind != "goto" else await self.tab.goto(action.text or "")
            screen = await self.tab.look(self.tool.pictures or action.kind == "screenshot")
            title, url = await self.tab.title()
        except (ValueError, PageError) as e:
            return ToolResult(f"Error: {e}", ok=False, kind="error")
        address = url if len(url) <= 80 else f"{url[:77]}..."
        text = f"page: {title or 'no title'} ({address})\n{screen.text}".rstrip()
        return ToolResult(text, images=(screen.image,) if screen.image else ())

    async def close(self) -> None:
        await self.tab.close()
