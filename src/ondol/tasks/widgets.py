"""Widgets: bring a small graphical interface, made at random, into a given state.

The interface is a tree of two levels: tabs, named by letters, and on each tab widgets, numbered through all of them.
A switch is on or off, a field holds text, a terminal shows the last command that was run in it. The screen is one line,
the open tab in upper case and what is on it; a goal is written in the same way:

    aB 3+ 4(hi) 5$ls        tab b of a and b is open; switch 3 is on, field 4 reads hi, ls was run in terminal 5

That is the short way to write screens and actions, for small models. The same world is also a screen with numbered
elements and places (`World.view`, `widgets_screen`), operated with the actions of every other interface (`World.do`), by
models that read and by models that see. It stands for the apps of a phone and of a desktop.

The task is that of the laptop runs on UI-TARS-2 (arXiv 2509.02544): several turns of few tokens, and nothing is said of
success before the end.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
import string
from random import Random
from typing import Any, Literal

from pydantic import Field, model_validator

from ondol.records import Problem
from ondol.tasks.base import DrawnTask
from ondol.tasks.widgets_screen import LOOKS, Look, layout, picture
from ondol.tools.gui import Action, Screen, centre

WORDS = ("do", "go", "hi", "if", "me", "no", "ok", "up")
COMMANDS = ("cp", "df", "id", "ls", "mv", "ps", "rm", "wc")
END = "end"

Kind = Literal["switch", "field", "terminal"]
Way = Literal["short", "numbers", "places"]
_ACTION = re.compile(r"c([a-z]|[0-9]{1,2})|t([0-9]{1,2}):([^()\n]{0,12})|r:([^\n]{1,40})")
_TEXT = re.compile(r"[^()\n]{0,12}")
_MOST_ACTIONS = 1000  # of a response that is text: more are not looked at


class World:
    """An interface in some state.

    Args:
        tabs: widgets of each tab, in order.
        states: of each widget as the screen shows it: "+" or "-" of a switch, "(text)" of a field, "$command" of a terminal.
        look: sizes of the screen.
    Attributes:
        opened: index of the open tab, at first the first;  before: those that were open before it.
        scrolled: rows of the open tab that are above the screen.
        focus: the widget that is typed into, if any.
        last: the largest number of a widget.
    """

    def __init__(self, tabs: list[list[int]], states: dict[int, str], look: Look = LOOKS["phone"]) -> None:
        self.tabs, self.states, self.opened, self.look = tabs, dict(states), 0, look
        self.before: list[int] = []
        self.scrolled, self.focus, self.last = 0, 0, max(states)

    def screen(self) -> str:
        names = string.ascii_lowercase[: len(self.tabs)]
        bar = names[: self.opened] + names[self.opened].upper() + names[self.opened + 1 :]
        return " ".join([bar, *(f"{w}{self.states[w]}" for w in self.tabs[self.opened])])

    def act(self, action: str) -> str | None:
        """Carry out an action other than the end; what is wrong with it, if anything. Never raises."""
        match = _ACTION.fullmatch(action.strip())
        if match is None:
            return "unknown action"
        clicked, field, text, command = match.groups()
        if clicked is not None and clicked.isalpha():
            tab = string.ascii_lowercase.index(clicked)
            if tab >= len(self.tabs):
                return f"no tab {clicked}"
            self._open(tab)
            return None
        here = self.tabs[self.opened]
        if command is not None:
            terminals = [w for w in here if kind(self.states[w]) == "terminal"]
            if not terminals:
                return "no terminal here"
            if command not in COMMANDS:
                return "no such command"
            self.states[terminals[0]] = f"${command}"
            return None
        widget = int(clicked if clicked is not None else field)
        if widget not in here:
            return f"no {widget} here"
        found = kind(self.states[widget])
        if clicked is not None and found == "switch":
            self.states[widget] = "-" if self.states[widget] == "+" else "+"
        elif clicked is None and found == "field":
            self.states[widget] = f"({text})"
        else:
            return f"{widget} is a {found}"
        return None

    def view(self, pictured: bool = False, places: bool = False) -> Screen:
        """The screen, with its picture where that is asked for; with `places` the text says where everything is."""
        screen = layout(self, places)
        return dataclasses.replace(screen, image=picture(self)) if pictured else screen

    def do(self, action: Action) -> str | None:
        """Carry out an action on the screen as it is now; what is wrong with it, if anything. Never raises."""
        match action.kind:
            case "click":
                return self._click(action)
            case "type":
                return self._type(action)
            case "run":
                terminals = [w for w in self.tabs[self.opened] if kind(self.states[w]) == "terminal"]
                return self._enter(terminals[0], action.text or "") if terminals else "no terminal here"
            case "scroll" if action.text in ("up", "down"):
                return self._scroll(self.look.rows if action.text == "down" else -self.look.rows)
            case "drag" if action.points:  # a finger that moves up moves what is below into view
                return self._scroll(round((action.points[0][1] - action.points[1][1]) / self.look.row))
            case "back":
                if not self.before:
                    return "nothing to go back to"
                self._open(self.before.pop())
            case "home":
                self.before.clear()
                self._open(0)
            case "wait" | "screenshot":
                pass
            case other:
                return f"{other} does nothing here"
        return None

    def _click(self, action: Action) -> str | None:
        screen = layout(self)
        try:
            found = screen.element(action.targets[0]) if action.targets else screen.at(action.points[0])
        except ValueError:
            return f"no {action.targets[0]} here"
        if found is None:
            return "nothing there"
        if found.role == "tab":
            if (tab := found.number - self.last - 1) != self.opened:
                self.before.append(self.opened)
                self._open(tab)
        elif found.role == "switch":
            self.states[found.number] = "-" if self.states[found.number] == "+" else "+"
            self.focus = 0
        else:
            self.focus = found.number
        return None

    def _type(self, action: Action) -> str | None:
        widget = action.targets[0] if action.targets else self.focus
        if not widget:
            return "nothing has the focus"
        if widget not in (e.number for e in layout(self).elements) or widget > self.last:
            return f"no {widget} here"
        return self._enter(widget, action.text or "")

    def _enter(self, widget: int, text: str) -> str | None:
        match kind(self.states[widget]):
            case "switch":
                return f"{widget} is a switch"
            case "field" if not _TEXT.fullmatch(text):
                return "no such text: at most 12 characters, no brackets"
            case "field":
                self.states[widget] = f"({text})"
            case "terminal" if text not in COMMANDS:
                return "no such command"
            case "terminal":
                self.states[widget] = f"${text}"
        self.focus = widget
        return None

    def _scroll(self, rows: int) -> str | None:
        most = max(0, len(self.tabs[self.opened]) - self.look.rows)
        before, self.scrolled = self.scrolled, min(most, max(0, self.scrolled + rows))
        return "there is no more" if self.scrolled == before else None

    def _open(self, tab: int) -> None:
        self.opened, self.scrolled, self.focus = tab, 0, 0

    def misses(self, goal: dict[int, str]) -> list[int]:
        """Widgets that are not as they should be, in order. A terminal that should hold no command may hold any: a command
        cannot be taken back."""
        return [w for w, s in sorted(goal.items()) if self.states[w] != s and s != "$"]

    def solve(self, goal: dict[int, str]) -> list[str]:
        """Actions that reach the goal from here, the end among them; what is on the open tab comes first."""
        left, actions = self.misses(goal), []
        where = {w: i for i, tab in enumerate(self.tabs) for w in tab}
        order = [self.opened, *(i for i in range(len(self.tabs)) if i != self.opened)]
        at = self.opened
        for tab in order:
            for widget in left:
                if where[widget] != tab:
                    continue
                if at != tab:
                    actions.append(f"c{string.ascii_lowercase[tab]}")
                    at = tab
                actions.append(_setting(widget, goal[widget]))
        return [*actions, END]

    def solve_on_screen(self, goal: dict[int, str], places: bool) -> list[Action]:
        """As `solve`, with actions on elements by number or by place, and scrolling."""
        world, actions = copy.deepcopy(self), []

        def do(made: str, number: int = 0, text: str | None = None) -> None:
            by_place = bool(number) and places
            points = (centre(world.view().element(number).box or (0, 0, 0, 0)),) if by_place else ()
            action = Action(made, () if by_place or not number else (number,), points, text)  # type: ignore[arg-type]
            wrong = world.do(action)
            assert wrong is None, f"{action}: {wrong}"
            actions.append(action)

        where = {w: i for i, tab in enumerate(world.tabs) for w in tab}
        left = sorted(world.misses(goal), key=lambda w: (where[w] != world.opened, where[w], w))
        for widget in left:
            if where[widget] != world.opened:
                do("click", world.last + 1 + where[widget])
            while widget not in (e.number for e in world.view().elements):
                above = world.tabs[world.opened].index(widget) < world.scrolled
                do("scroll", text="up" if above else "down")
            state = goal[widget]
            if kind(state) == "switch":
                do("click", widget)
                continue
            text = state[1:-1] if kind(state) == "field" else state[1:]
            if places:
                do("click", widget)
                do("type", text=text)
            else:
                do("type", widget, text)
        return [*actions, Action("done")]


def kind(state: str) -> Kind:
    """What a widget in this state is."""
    return "switch" if state in ("+", "-") else "terminal" if state.startswith("$") else "field"


def _setting(widget: int, state: str) -> str:
    """The action that brings a widget into a state it is not in."""
    return {"switch": f"c{widget}", "field": f"t{widget}:{state[1:-1]}", "terminal": f"r:{state[1:]}"}[kind(state)]


class Widgets(DrawnTask):
    """Interfaces without end. The goal names the widgets that are to change; all others must be as they were."""

    tabs: int = Field(default=2, ge=1, le=9, description="tabs of an interface")
    widgets: int = Field(default=6, ge=1, le=40, description="widgets on all tabs together; one of them is a terminal")
    goals: tuple[int, int] = Field(default=(2, 3), description="fewest and most widgets that are to change")
    actions: Way = Field(
        default="short",
        description="short: one line a screen and c3, t4:hi, for small models; numbers: click(3) on a screen of elements; "
        "places: click(90, 60)",
    )
    look: Literal["phone", "desktop"] = Field(default="phone", description="the screen, for numbers and places")

    @model_validator(mode="after")
    def _sound(self) -> Widgets:
        if self.tabs > self.widgets:
            raise ValueError(f"tabs: {self.tabs} tabs need as many widgets, not {self.widgets}")
        if not 1 <= self.goals[0] <= self.goals[1] <= self.widgets:
            raise ValueError(f"goals: from at least 1 to at most {self.widgets}, the widgets that there are")
        return self

    @property
    def most_turns(self) -> int:
        """Turns that the longest solution of any problem takes."""
        opened = min(self.tabs - 1, self.goals[1])
        if self.actions == "short":
            return self.goals[1] + opened + 1
        scrolls = (opened + 1) * -(-max(0, self.widgets - LOOKS[self.look].rows) // LOOKS[self.look].rows)
        return self.goals[1] * (2 if self.actions == "places" else 1) + opened + scrolls + 1

    def draw(self, random: Random) -> Problem:
        ids = range(1, self.widgets + 1)
        terminal = random.choice(ids)
        kinds = {w: "terminal" if w == terminal else random.choice(("switch", "field")) for w in ids}
        chosen = sorted(random.sample(ids, random.randint(*self.goals)))
        changes = {w: _drawn(kinds[w], random) for w in chosen}
        said = " ".join(f"{w}{s}" for w, s in changes.items())
        # the rest follows from what is said of the goal: questions that are the same are of the same world
        random = Random(said)
        terminal = next((w for w in chosen if kinds[w] == "terminal"), None) or random.choice(
            [w for w in ids if w not in chosen] or [0]
        )
        states = {}
        for w in ids:
            drawn = "terminal" if w == terminal else random.choice(("switch", "field"))
            if w in changes:
                states[w] = {"+": "-", "-": "+"}.get(changes[w], "$" if kinds[w] == "terminal" else "()")
            else:
                states[w] = {"terminal": "$", "field": "()", "switch": random.choice("+-")}[drawn]
        cuts = [0, *sorted(random.sample(range(1, self.widgets), self.tabs - 1)), self.widgets]
        tabs = [list(ids[a:b]) for a, b in itertools.pairwise(cuts)]
        world, goal = World(tabs, states, LOOKS[self.look]), {**states, **changes}
        data = {
            "tabs": tabs,
            "states": {str(w): s for w, s in states.items()},
            "goal": {str(w): s for w, s in goal.items()},
        }
        if self.actions == "short":
            return Problem("", f"{said}\n{world.screen()}", "\n".join(world.solve(goal)), data)
        data["look"] = self.look
        wanted = "; ".join(_wish(w, s) for w, s in changes.items())
        answer = "\n".join(map(str, world.solve_on_screen(goal, self.actions == "places")))
        return Problem("", f"{wanted}.\n{world.view(places=self.actions == 'places').text}", answer, data)

    def score(self, problem: Problem, response: str) -> float:
        """1 where the actions, one a line with the end as the last, leave everything as it should be."""
        *actions, last = response.strip().split("\n", _MOST_ACTIONS)
        if not self.ends(last):
            return 0.0
        world, goal = world_of(problem), goal_of(problem)
        for action in actions:
            if self.ends(action):
                return 0.0
            self.carry_out(world, action)
        return float(not world.misses(goal))

    def ends(self, text: str) -> bool:
        """Whether this action says that the goal is reached."""
        return text.strip() == (END if self.actions == "short" else "done()")

    def carry_out(self, world: World, text: str) -> str | None:
        """Do what a text says; what is wrong with it, if anything. Never raises."""
        if self.actions == "short":
            return world.act(text)
        try:
            action = Action.find(text)
        except ValueError as e:
            return str(e)
        if self.actions == "places" and action.targets:
            return "point to a place, as in click(90, 60)"
        return world.do(action)

    def near_misses(self, problem: Problem) -> list[str]:
        """The gold answer without its end; without each one of its settings; with one more widget changed."""
        *actions, end = problem.answer.split("\n")
        if self.actions != "short":  # nothing in those is superfluous
            fewer = [[*actions[:i], *actions[i + 1 :], end] for i in range(len(actions))]
            return ["", end, *("\n".join(a) for a in (actions, [*actions, end, end], *fewer))]
        needed = [i for i, a in enumerate(actions) if not re.fullmatch("c[a-z]", a)]
        out = ["", end, problem.answer.replace("\n", " "), "\n".join(actions), f"{problem.answer}\n{actions[0]}"]
        out += ["\n".join([*actions[:i], *actions[i + 1 :], end]) for i in needed]
        world = world_of(problem)
        extra = [w for w in world.tabs[world.opened] if kind(world.states[w]) == "switch"]
        return out + ["\n".join([f"c{w}", *actions, end]) for w in extra]

    def demonstration(self, problem: Problem, random: Random, right: bool) -> list[str]:
        """The scripted solver's actions. A wrong one goes astray at one of them, rather an early one, and does so again."""
        *actions, end = problem.answer.split("\n")
        if right:
            return [*actions, end]
        if self.actions != "short":
            return random.choice(self.near_misses(problem)[4:]).split("\n")
        for _ in range(100):
            start = min(random.randrange(len(actions)) for _ in range(3))
            made = actions[:start]
            for number, action in enumerate(actions[start:]):
                made += self._slips(action, random) if number == 0 or random.random() < 0.5 else [action]
            if self.score(problem, "\n".join([*made, end])) < 1:
                return [*made, end]
        return [end]

    def _slips(self, action: str, random: Random) -> list[str]:
        """What is done instead of an action: nothing, or the like with another widget, tab or text."""
        if random.random() < 0.25:
            return []
        if action.startswith("r:"):
            return [f"r:{random.choice(COMMANDS)}"]
        if action.startswith("t") and random.random() < 0.5:
            return [f"{action[: action.index(':')]}:{random.choice(WORDS)}"]
        if action[1].isalpha():
            return [f"c{random.choice(string.ascii_lowercase[: self.tabs])}"]
        return [re.sub("[0-9]+", str(random.randint(1, self.widgets)), action, count=1)]


def world_of(problem: Problem) -> World:
    """A problem's interface as it is at first."""
    d: dict[str, Any] = problem.data
    return World(d["tabs"], {int(w): s for w, s in d["states"].items()}, LOOKS[d.get("look", "phone")])


def goal_of(problem: Problem) -> dict[int, str]:
    """How every widget should be at the end."""
    return {int(w): s for w, s in problem.data["goal"].items()}


def _wish(widget: int, state: str) -> str:
    """What is to be done with a widget, in words."""
    match kind(state):
        case "switch":
            return f"turn switch {widget} {'on' if state == '+' else 'off'}"
        case "field":
            return f'type "{state[1:-1]}" into field {widget}'
    return f'run "{state[1:]}" in terminal {widget}'


def _drawn(kind: str, random: Random) -> str:
    """A state to be reached."""
    if kind == "switch":
        return random.choice("+-")
    return f"({random.choice(WORDS)})" if kind == "field" else f"${random.choice(COMMANDS)}"
