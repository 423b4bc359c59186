"""What an agent sees of a graphical interface, and what it can do to it: the same types for a web page, a phone and a game.

Element  one thing on a screen: its number, what it is, what it says, where it is
Screen   a screen as text, as elements, and (where it was asked for) as a picture
Action   one thing done to it, written `click(3)`, `type(4, "hi")`, `scroll(down)`, `done()`

Elements are numbered from 1, and coordinates are pixels from the upper left corner. Both ways of pointing are the same
action: `click(3)` names an element, `click(120, 44)` a place.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal, get_args

from ondol.records import Image

Box = tuple[int, int, int, int]  # left, top, right, bottom; the last two are just outside
Point = tuple[int, int]
Kind = Literal[
    "click", "double_click", "right_click", "long_press", "hover", "drag",
    "type", "press", "select", "scroll", "back", "home", "wait", "screenshot", "goto", "run", "done",
]  # fmt: skip

_POINTING = ("click", "double_click", "right_click", "long_press", "hover")
_TEXT = ("press", "goto", "run")
_BARE = ("back", "home", "wait", "screenshot")
DIRECTIONS = ("up", "down", "left", "right")
_MAX_TEXT = 2000
_CALL = re.compile(r"([a-z_]+)\s*\((.*)\)", re.S)
_NUMBERS = re.compile(r"\s*\d{1,5}\s*(?:,\s*\d{1,5}\s*)*")
_FIRST = re.compile(r"\s*(\d{1,5})\s*,(.*)", re.S)


@dataclass(frozen=True)
class Action:
    """Something done to an interface.

    Attributes:
        targets: numbers of elements: one to act on, two to drag from and to.
        points: the same by place; an action has targets or points or neither, never both.
        text: what is typed, selected, run or opened; the key to press; the direction to scroll; the answer of `done`.
    """

    kind: Kind
    targets: tuple[int, ...] = ()
    points: tuple[Point, ...] = ()
    text: str | None = None

    @classmethod
    def parse(cls, source: str) -> Action:
        """The action that a text stands for. Raises ValueError, in words for whoever wrote it."""
        call = _CALL.fullmatch(source.strip())
        if call is None:
            raise ValueError("an action is written like click(3)")
        kind, inside = call[1], call[2]
        if kind not in get_args(Kind):
            raise ValueError(f"there is no action {kind}; known: {', '.join(get_args(Kind))}")
        if len(inside) > _MAX_TEXT:
            raise ValueError(f"the text is longer than {_MAX_TEXT} characters")
        if kind in _POINTING or kind == "drag":
            return cls._pointing(kind, inside)  # type: ignore[arg-type]
        if kind in _BARE:
            if inside.strip():
                raise ValueError(f"{kind}() takes nothing")
            return cls(kind)  # type: ignore[arg-type]
        if kind == "done":
            return cls("done", text=_unquote(inside) or None)
        if kind in _TEXT:
            return cls(kind, text=_some(kind, _unquote(inside)))  # type: ignore[arg-type]
        first = _FIRST.fullmatch(inside)
        targets, text = ((int(first[1]),), first[2]) if first else ((), inside)
        if kind == "select" and not targets:
            raise ValueError("select takes an element and an option, as in select(3, red)")
        text = _unquote(text)
        if kind == "scroll" and text not in DIRECTIONS:
            raise ValueError(f"scroll takes a direction: {', '.join(DIRECTIONS)}")
        return cls(kind, targets, text=text)  # type: ignore[arg-type]

    @classmethod
    def find(cls, said: str) -> Action:
        """The action in what a model said: all of it, or its last line where thoughts come first. Raises ValueError."""
        lines = [line for line in said.split("\n") if line.strip()]
        try:
            return cls.parse(said)
        except ValueError:
            if len(lines) < 2:
                raise
        return cls.parse(lines[-1])

    @classmethod
    def _pointing(cls, kind: Kind, inside: str) -> Action:
        numbers = [int(n) for n in inside.split(",")] if _NUMBERS.fullmatch(inside) else []
        ends = 2 if kind == "drag" else 1
        if len(numbers) == ends:
            return cls(kind, tuple(numbers))
        if len(numbers) == 2 * ends:
            return cls(kind, points=tuple(zip(numbers[::2], numbers[1::2])))
        if kind == "drag":
            raise ValueError("drag takes two elements or two places, as in drag(3, 4) or drag(10, 20, 30, 40)")
        raise ValueError(f"{kind} takes an element or a place, as in {kind}(3) or {kind}(10, 20)")

    def __str__(self) -> str:
        said = [str(n) for n in (*self.targets, *(n for point in self.points for n in point))]
        if self.text is not None:
            plain = self.kind in ("scroll", "press") and re.fullmatch(r"[\w+]+", self.text)
            said.append(self.text if plain else json.dumps(self.text, ensure_ascii=False))
        return f"{self.kind}({', '.join(said)})"


@dataclass(frozen=True)
class Element:
    """One thing on a screen.

    Attributes:
        role: what it is: button, link, textbox, checkbox, tab...
        name: what it says or is called;  value: its state: the text of a field, "on" or "off", the option chosen.
        looks: what tells it from others where names do not: its colour, its size.
        box: where it is; None when it is nowhere to be seen.
    """

    number: int
    role: str
    name: str = ""
    value: str | None = None
    box: Box | None = None
    looks: str = ""

    def __str__(self) -> str:
        name = json.dumps(self.name, ensure_ascii=False) if self.name else ""
        value = "" if self.value is None else f"= {self.value}"
        return " ".join(filter(None, (f"[{self.number}] {self.role}", name, value, self.looks)))


@dataclass(frozen=True)
class Screen:
    """An interface as it looks now.

    Attributes:
        text: the whole screen for a model that reads: elements as they write themselves, between the text around them.
        width, height: in pixels.
        image: the picture, for a model that sees.
    """

    text: str
    elements: tuple[Element, ...]
    width: int
    height: int
    image: Image | None = None

    def element(self, number: int) -> Element:
        """The element of this number. Raises ValueError where there is none."""
        for element in self.elements:
            if element.number == number:
                return element
        known = f"the last is {self.elements[-1].number}" if self.elements else "there are none here"
        raise ValueError(f"there is no element {number}; {known}")

    def at(self, point: Point) -> Element | None:
        """The element at a place, the smallest where several lie above each other."""
        x, y = point

        def area(e: Element) -> int:
            left, top, right, bottom = e.box or (0, 0, 0, 0)
            return (right - left) * (bottom - top)

        here = [e for e in self.elements if e.box and e.box[0] <= x < e.box[2] and e.box[1] <= y < e.box[3]]
        return min(here, key=area, default=None)


def centre(box: Box) -> Point:
    """The middle of a box."""
    return (box[0] + box[2]) // 2, (box[1] + box[3]) // 2


def _unquote(text: str) -> str:
    """What a text in quotes says (JSON's escapes count in double quotes), or the text without the blanks around it."""
    text = text.strip()
    if len(text) >= 2 and text[0] == text[-1] == '"':
        try:
            return json.loads(text, strict=False)
        except ValueError:
            return text[1:-1]
    return text[1:-1] if len(text) >= 2 and text[0] == text[-1] == "'" else text


def _some(kind: str, text: str) -> str:
    if not text:
        raise ValueError(f"{kind} takes a text, as in {kind}(Enter)" if kind == "press" else f"{kind} takes a text")
    return text
