"""How the widgets' world looks on a screen: where everything is, as elements and as a picture.

A screen has a bar of tabs, at the top of a desktop's and at the foot of a phone's, and below or above it the widgets of the
open tab, one a row; what does not fit is scrolled to. Elements keep their numbers wherever they are: widgets have their
own, the tabs follow the last of them.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ondol.records import Image
from ondol.tools.gui import Box, Element, Screen, centre

if TYPE_CHECKING:
    from ondol.tasks.widgets import World

_INK, _PAPER, _LINE, _ACCENT, _DARK = "#202124", "#ffffff", "#c4c7cc", "#1a73e8", "#2b2d31"


@dataclass(frozen=True)
class Look:
    """Sizes of a screen, in pixels."""

    name: Literal["phone", "desktop"]
    width: int
    height: int
    bar: int  # height of the bar of tabs
    row: int  # height of a widget

    @property
    def rows(self) -> int:
        """Widgets that fit."""
        return (self.height - self.bar) // self.row

    @property
    def top(self) -> int:
        """Where the first row begins."""
        return 0 if self.name == "phone" else self.bar


LOOKS = {
    "phone": Look("phone", 180, 320, bar=40, row=40),
    "desktop": Look("desktop", 320, 200, bar=24, row=28),
}


def layout(world: World, places: bool = False) -> Screen:
    """What is to be seen of a world, without the picture; with `places` the text says where the middle of each is."""
    look, count = world.look, len(world.tabs)
    here = world.tabs[world.opened]
    first = world.scrolled
    elements = []
    for place, widget in enumerate(here[first : first + look.rows]):
        y = look.top + place * look.row
        role, value = _words(world.states[widget])
        if widget == world.focus:
            value += " (focus)"
        elements.append(_element(places, widget, role, "", value, (0, y, look.width, y + look.row)))
    for tab in range(count):
        name = string.ascii_lowercase[tab]
        open_ = "open" if tab == world.opened else None
        elements.append(_element(places, world.last + 1 + tab, "tab", name, open_, _tab_box(look, tab, count)))
    lines = [*map(str, elements[len(elements) - count :])]
    if first:
        lines.append(f"({first} more above)")
    lines += map(str, elements[: len(elements) - count])
    if (below := len(here) - first - look.rows) > 0:
        lines.append(f"({below} more below)")
    return Screen("\n".join(lines), tuple(elements), look.width, look.height)


def picture(world: World) -> Image:
    """The screen as a picture. The same world gives the same one, with the same version of Pillow."""
    from PIL import Image as Pillow
    from PIL import ImageDraw, ImageFont

    from ondol.tools.image import png_of

    look, screen = world.look, layout(world)
    canvas = Pillow.new("RGB", (look.width, look.height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(13)
    for e in screen.elements:
        assert e.box is not None
        left, top, right, bottom = e.box
        middle = (top + bottom) // 2
        if e.role == "tab":
            on = e.value is not None
            draw.rectangle((left, top, right - 1, bottom - 1), fill=_ACCENT if on else "#eef1f5", outline=_LINE)
            draw.text(((left + right) // 2, middle), e.name.upper(), _PAPER if on else _INK, font, anchor="mm")
            continue
        draw.line((left, bottom - 1, right, bottom - 1), fill=_LINE)
        draw.text((left + 8, middle), str(e.number), _INK, font, anchor="lm")
        state = world.states[e.number]
        edge = _ACCENT if e.number == world.focus else _LINE
        inside = (left + 36, top + 4, right - 8, bottom - 5)
        if e.role == "switch":
            on = state == "+"
            draw.rounded_rectangle((right - 48, middle - 9, right - 12, middle + 9), 9, fill=_ACCENT if on else _LINE)
            x = right - 22 if on else right - 38
            draw.ellipse((x - 7, middle - 7, x + 7, middle + 7), fill=_PAPER)
        elif e.role == "textbox":
            draw.rounded_rectangle(inside, 3, fill=_PAPER, outline=edge, width=1 + (edge == _ACCENT))
            draw.text((left + 42, middle), state[1:-1], _INK, font, anchor="lm")
        else:
            draw.rounded_rectangle(inside, 3, fill=_DARK, outline=edge, width=1 + (edge == _ACCENT))
            draw.text((left + 42, middle), f"$ {state[1:]}", "#7ee787", font, anchor="lm")
    here = len(world.tabs[world.opened])
    if here > look.rows:  # how far it is scrolled
        whole = look.rows * look.row
        begin = look.top + world.scrolled * whole // here
        draw.rectangle((look.width - 4, begin, look.width - 2, begin + look.rows * whole // here - 1), fill="#80868b")
    return Image.of(png_of(canvas))


def _element(places: bool, number: int, role: str, name: str, value: str | None, box: Box) -> Element:
    x, y = centre(box)
    return Element(number, role, name, value, box, f"at {x}, {y}" if places else "")


def _words(state: str) -> tuple[str, str]:
    """Role and value of a widget in this state."""
    if state in ("+", "-"):
        return "switch", "on" if state == "+" else "off"
    if state.startswith("$"):
        return "terminal", f'"$ {state[1:]}"'
    return "textbox", f'"{state[1:-1]}"'


def _tab_box(look: Look, tab: int, count: int) -> Box:
    top = look.height - look.bar if look.name == "phone" else 0
    return tab * look.width // count, top, (tab + 1) * look.width // count, top + look.bar
