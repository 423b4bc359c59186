"""The image tool: a closer look at a part of a picture that the agent was shown."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import io
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from ondol.records import Image, ToolResult
from ondol.tools.base import Tool

_MAX_PIXELS = 40_000_000  # of a picture that is opened
_MAX_SIDE = 2048  # of one that is made
_NUMBER = re.compile(r"-?\d{1,6}")


class ImageTool(Tool):
    """Cut an area out of a picture and enlarge it. Pictures count from 1, in the order in which the agent saw them."""

    name: ClassVar[str] = "image"
    main_argument: ClassVar[str] = "area"
    parameters: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {
            "area": {
                "type": "string",
                "description": "Left, top, right and bottom in pixels, such as 10, 20, 110, 80.",
            },
            "image": {"type": "integer", "description": "Which picture, counted from 1; the last one by default."},
            "zoom": {"type": "integer", "description": "How many times to enlarge, 1 to 8; 2 by default."},
        },
        "required": ["area"],
    }

    description: str = Field(
        default="Shows a part of a picture, enlarged.", description="what the model reads about the tool"
    )
    timeout_s: float = Field(default=10.0, gt=0, le=600, description="time limit of one call")

    def session(self, trajectory_id: str) -> ImageSession:
        return ImageSession()


class ImageSession:
    """It remembers what was seen; its own results come back to it as pictures seen."""

    def __init__(self) -> None:
        self.seen: Sequence[Image] = ()

    def see(self, images: Sequence[Image]) -> None:
        self.seen = images

    async def call(self, arguments: dict[str, Any]) -> ToolResult:
        try:
            return await asyncio.to_thread(self._cut, **arguments)
        except ValueError as e:
            return ToolResult(f"Error: {e}", ok=False, kind="error")

    async def close(self) -> None:
        self.seen = ()

    def _cut(self, area: str, image: int | None = None, zoom: int = 2) -> ToolResult:
        number = len(self.seen) if image is None else image
        if not self.seen:
            raise ValueError("there is no picture yet")
        if not 1 <= number <= len(self.seen):
            raise ValueError(f"there is no picture {number}; the last is {len(self.seen)}")
        if not 1 <= zoom <= 8:
            raise ValueError("zoom goes from 1 to 8")
        shown = self.seen[number - 1]
        found = [int(n) for n in _NUMBER.findall(area)]
        if len(found) != 4:
            raise ValueError("an area is left, top, right, bottom, such as 10, 20, 110, 80")
        box = (max(0, found[0]), max(0, found[1]), min(shown.width, found[2]), min(shown.height, found[3]))
        if box[0] >= box[2] or box[1] >= box[3]:
            raise ValueError(f"nothing of the picture is there: it is {shown.width}x{shown.height}")
        if max(box[2] - box[0], box[3] - box[1]) * zoom > _MAX_SIDE:
            raise ValueError(f"that would be larger than {_MAX_SIDE} pixels: choose a smaller area or zoom")
        cut = crop(shown, box, zoom)
        said = ", ".join(map(str, box))
        return ToolResult(f"picture {number}, area {said}, {zoom}x: {cut.width}x{cut.height}", images=(cut,))


def crop(image: Image, box: tuple[int, int, int, int], zoom: int = 1) -> Image:
    """The area `box` (left, top, right, bottom) of an image with its bytes, `zoom` times as large."""
    from PIL import Image as Pillow

    if image.png is None:
        raise ValueError("only a reference to that picture is here, not the picture")
    if image.width * image.height > _MAX_PIXELS:
        raise ValueError("that picture is too large")
    with Pillow.open(io.BytesIO(image.png), formats=["PNG"]) as opened:
        part = opened.convert("RGB").crop(box)
    part = part.resize((part.width * zoom, part.height * zoom), Pillow.Resampling.LANCZOS) if zoom > 1 else part
    return Image.of(png_of(part))


def decoded(data: str) -> Image:
    """The picture that base64 text of a PNG, JPEG, GIF or WebP file holds. Raises ValueError for anything else."""
    from PIL import Image as Pillow

    try:
        raw = base64.b64decode(data)
        with contextlib.suppress(ValueError):  # a PNG file is kept as it is
            if (found := Image.of(raw)).width * found.height <= _MAX_PIXELS:
                return found
        with Pillow.open(io.BytesIO(raw), formats=["PNG", "JPEG", "GIF", "WEBP"]) as opened:
            if opened.width * opened.height > _MAX_PIXELS:
                raise ValueError(f"a picture of {opened.width}x{opened.height} pixels is too large")
            return Image.of(png_of(opened.convert("RGB")))
    except (OSError, SyntaxError, binascii.Error, Pillow.DecompressionBombError) as e:
        raise ValueError(f"not a picture: {e}") from e


def png_of(picture: Any) -> bytes:
    """A Pillow picture as the bytes of a PNG file; the same picture gives the same bytes."""
    out = io.BytesIO()
    picture.save(out, format="PNG")
    return out.getvalue()
