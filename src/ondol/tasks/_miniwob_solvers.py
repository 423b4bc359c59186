"""Scripted solvers of MiniWoB++ pages: they read the instruction and the screen, as an agent does, and nothing else.

A solver is a generator: it yields an action and is sent the screen that follows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable

from ondol.tools.gui import Action, Element, Screen

Solver = Generator[Action, Screen, None]
_FIELDS = ("textbox", "textarea", "password box", "date box", "time box")


def click(element: Element) -> Action:
    return Action("click", (element.number,))


def enter(element: Element, text: str) -> Action:
    return Action("type", (element.number,), text=text)


def one(screen: Screen, name: str | None = None, *roles: str) -> Element:
    """The first element of this name and of one of these roles."""
    for e in screen.elements:
        if (name is None or e.name == name) and (not roles or e.role in roles):
            return e
    raise ValueError(f"no {' or '.join(roles) or 'element'} {name!r} on the screen:\n{screen.text}")


def quoted(ask: str) -> list[str]:
    return re.findall(r'"([^"]*)"', ask)


def between(ask: str, before: str, after: str) -> str:
    found = re.search(re.escape(before) + "(.*?)" + re.escape(after), ask)
    if found is None:
        raise ValueError(f"not understood: {ask!r}")
    return found[1].strip()


def _submit(screen: Screen) -> Action:
    return click(next(e for e in screen.elements if e.role == "button" and e.name.lower() in ("submit", "login")))


def _button(ask: str, screen: Screen) -> Solver:
    yield click(one(screen, None, "button"))


def _named_button(ask: str, screen: Screen) -> Solver:
    name = quoted(ask)[0]
    yield click(one(screen, "Close" if name == "x" else name, "button"))


def _one_then_two(ask: str, screen: Screen) -> Solver:
    for name in re.findall(r"button (\w+)", ask):
        screen = yield click(one(screen, name, "button"))


def _link(ask: str, screen: Screen) -> Solver:
    yield click(one(screen, quoted(ask)[0], "span", "link"))


def _tab(ask: str, screen: Screen) -> Solver:
    yield click(one(screen, between(ask, "Click on ", "."), "link"))


def _choices(ask: str, screen: Screen) -> Solver:
    for name in between(ask, "Select ", " and click").split(", "):
        if name != "nothing":
            screen = yield click(one(screen, name, "checkbox", "radio"))
    yield _submit(screen)


def _colour(ask: str, screen: Screen) -> Solver:
    from PIL import ImageColor

    red, green, blue = ImageColor.getrgb(between(ask, "Click on the ", " colored"))[:3]
    yield click(next(e for e in screen.elements if f"rgb({red},{green},{blue})" in e.looks))


def _widget(ask: str, screen: Screen) -> Solver:
    wanted = quoted(ask)[0]
    yield click(one(screen, None, {"text": "textbox"}.get(wanted, wanted)))


def _shades(ask: str, screen: Screen) -> Solver:
    wanted = ["red", "green", "blue"].index(between(ask, "shades of ", " and"))
    for e in screen.elements:
        rgb = re.search(r"rgb\((\d+),(\d+),(\d+)\)", e.looks) if e.role == "span" else None
        if rgb and max(range(3), key=lambda i, rgb=rgb: int(rgb[i + 1])) == wanted:
            screen = yield click(e)
    yield _submit(screen)


def _collapsible(ask: str, screen: Screen) -> Solver:
    screen = yield click(next(e for e in screen.elements if e.role == "tab" or e.name.startswith("Section #")))
    yield _submit(screen)


def _focus(ask: str, screen: Screen) -> Solver:
    place = re.search(r"the (\d)", ask)
    fields = [e for e in screen.elements if e.role == "textbox"]
    yield click(fields[int(place[1]) - 1 if place else 0])


def _fields(texts: Callable[[str, Screen], Iterable[str]]) -> Callable[[str, Screen], Solver]:
    """Type one text after the other into the fields, and submit."""

    def solve(ask: str, screen: Screen) -> Solver:
        for number, text in enumerate(texts(ask, screen)):
            field = [e for e in screen.elements if e.role in _FIELDS][number]
            screen = yield enter(field, text)
        yield _submit(screen)

    return solve


def _cased(ask: str, screen: Screen) -> list[str]:
    text = quoted(ask)[0]
    return [text.upper() if "upper case" in ask else text.lower()]


def _date(ask: str, screen: Screen) -> list[str]:
    month, day, year = between(ask, "Enter ", " as").split("/")
    return [f"{year}-{month}-{day}"]


def _time(ask: str, screen: Screen) -> list[str]:
    said = re.search(r"(\d+):(\d+)\s*([AP])M", ask)
    assert said is not None
    return [f"{int(said[1]) % 12 + (12 if said[3] == 'P' else 0):02d}:{said[2]}"]


def _sum(ask: str, screen: Screen) -> list[str]:
    said = next(m for e in screen.elements if (m := re.search(r"(\d) ([-+x]) (\d) =", e.name)))
    a, b = int(said[1]), int(said[3])
    return [str({"+": a + b, "-": a - b, "x": a * b}[said[2]])]


def _equation(ask: str, screen: Screen) -> list[str]:
    for e in screen.elements:
        if said := re.search(r"x ([-+]) (\d+) = (\d+)", e.name):
            return [str(int(said[3]) + (int(said[2]) if said[1] == "-" else -int(said[2])))]
        if said := re.search(r"(\d+) ([-+]) x = (\d+)", e.name):
            return [str((int(said[3]) - int(said[1])) * (1 if said[2] == "+" else -1))]
    raise ValueError(f"no equation:\n{screen.text}")


def _cell(ask: str, screen: Screen) -> list[str]:
    cells = [e.name for e in screen.elements if e.role == "td"]
    return [cells[cells.index(between(ask, "value of ", " into")) + 1]]


def _letters(ask: str, screen: Screen) -> list[str]:
    return ["".join(e.name for e in screen.elements if e.role == "span")]


def _list(ask: str, screen: Screen) -> Solver:
    wanted = between(ask, "Select ", " from the list")
    screen = yield Action("select", (one(screen, None, "combobox").number,), text=wanted)
    yield _submit(screen)


def _grid(ask: str, screen: Screen) -> Solver:
    wanted = "id=" + between(ask, "coordinate ", ".").replace(" ", "")
    yield click(next(e for e in screen.elements if e.role == "circle" and wanted in e.looks.split()))


def _shape(ask: str, screen: Screen) -> Solver:
    shown = next(e for e in screen.elements if e.role in ("text", "rect", "circle", "polygon"))
    kind = {"rect": "Rectangle", "circle": "Circle", "polygon": "Triangle"}.get(shown.role)
    yield click(one(screen, kind or ("Number" if shown.name.isdigit() else "Letter"), "button"))


def _copy(ask: str, screen: Screen) -> Solver:
    import json

    text = json.loads(one(screen, None, "textarea").value or '""')
    screen = yield enter(one(screen, None, "textbox"), text)
    yield _submit(screen)


def _odd_or_even(ask: str, screen: Screen) -> Solver:
    rows = [i for i, e in enumerate(screen.elements) if re.fullmatch(r"-?\d+", e.name)]
    for i in rows:
        odd = int(screen.elements[i].name) % 2
        screen = yield click(screen.elements[i - 1 if odd else i + 1])
    yield _submit(screen)


#: page -> its solver; these are the pages that the task `miniwob` knows
SOLVERS: dict[str, Callable[[str, Screen], Solver]] = {
    "choose-list": _list,
    "click-button": _named_button,
    "click-button-sequence": _one_then_two,
    "click-checkboxes": _choices,
    "click-checkboxes-large": _choices,
    "click-collapsible-nodelay": _collapsible,
    "click-color": _colour,
    "click-dialog": _button,
    "click-dialog-2": _named_button,
    "click-link": _link,
    "click-option": _choices,
    "click-shades": _shades,
    "click-tab": _tab,
    "click-tab-2-easy": _link,
    "click-test": _button,
    "click-test-2": _one_then_two,
    "click-widget": _widget,
    "copy-paste": _copy,
    "enter-date": _fields(_date),
    "enter-password": _fields(lambda ask, screen: quoted(ask) * 2),
    "enter-text": _fields(lambda ask, screen: quoted(ask)),
    "enter-text-2": _fields(_cased),
    "enter-time": _fields(_time),
    "focus-text": _focus,
    "focus-text-2": _focus,
    "grid-coordinate": _grid,
    "identify-shape": _shape,
    "login-user": _fields(lambda ask, screen: quoted(ask)),
    "odd-or-even": _odd_or_even,
    "read-table": _fields(_cell),
    "simple-algebra": _fields(_equation),
    "simple-arithmetic": _fields(_sum),
    "text-transform": _fields(_letters),
}


def another(page: str, screen: Screen, action: Action) -> Action | None:
    """A click on something else of the same kind, which is wrong; None where there is nothing of it."""
    if action.kind != "click" or not action.targets:
        return None
    right = screen.element(action.targets[0])
    for e in screen.elements:
        same_kind = e.role == right.role
        if page == "click-widget":  # where the kind is what is asked for
            if not same_kind and e.role in ("button", "checkbox", "radio", "textbox", "textarea"):
                return click(e)
        elif same_kind and (e.name, e.looks) != (right.name, right.looks):
            return click(e)
    return None
