"""Widgets: bring a small graphical interface, made at random, into a given state.

The interface is a tree of two levels: tabs, named by letters, and on each tab widgets, numbered through all of them.
A switch is on or off, a field holds text, a terminal shows the last command that was run in it. The screen is one line,
the open tab in upper case and what is on it; a goal is written in the same way:

    aB 3+ 4(hi) 5$ls        tab b of a and b is open; switch 3 is on, field 4 reads hi, ls was run in terminal 5

The task is that of the laptop runs on UI-TARS-2 (arXiv 2509.02544): several turns of few tokens, and nothing is said of
success before the end.
"""

from __future__ import annotations

import itertools
import re
import string
from random import Random
from typing import Any, Literal

from pydantic import Field, model_validator

from ondol.records import Problem
from ondol.tasks.base import DrawnTask

WORDS = ("do", "go", "hi", "if", "me", "no", "ok", "up")
COMMANDS = ("cp", "df", "id", "ls", "mv", "ps", "rm", "wc")
END = "end"

Kind = Literal["switch", "field", "terminal"]
_ACTION = re.compile(r"c([a-z]|[0-9]{1,2})|t([0-9]{1,2}):([^()\n]{0,12})|r:([^\n]{1,40})")
_MOST_ACTIONS = 1000  # of a response that is text: more are not looked at


class World:
    """An interface in some state.

    Args:
        tabs: widgets of each tab, in order.
        states: of each widget as the screen shows it: "+" or "-" of a switch, "(text)" of a field, "$command" of a terminal.
    Attributes:
        opened: index of the open tab, at first the first.
    """

    def __init__(self, tabs: list[list[int]], states: dict[int, str]) -> None:
        self.tabs, self.states, self.opened = tabs, dict(states), 0

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
            self.opened = tab
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
        return self.goals[1] + min(self.tabs - 1, self.goals[1]) + 1

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
        world, goal = World(tabs, states), {**states, **changes}
        data = {
            "tabs": tabs,
            "states": {str(w): s for w, s in states.items()},
            "goal": {str(w): s for w, s in goal.items()},
        }
        return Problem("", f"{said}\n{world.screen()}", "\n".join(world.solve(goal)), data)

    def score(self, problem: Problem, response: str) -> float:
        """1 where the actions, one a line with the end as the last, leave everything as it should be."""
        *actions, last = response.strip().split("\n", _MOST_ACTIONS)
        if last.strip() != END:
            return 0.0
        world, goal = world_of(problem), goal_of(problem)
        for action in actions:
            if action.strip() == END:
                return 0.0
            world.act(action)
        return float(not world.misses(goal))

    def near_misses(self, problem: Problem) -> list[str]:
        """The gold answer without its end; without each one of its settings; with one more widget changed."""
        *actions, end = problem.answer.split("\n")
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
    return World(d["tabs"], {int(w): s for w, s in d["states"].items()})


def goal_of(problem: Problem) -> dict[int, str]:
    """How every widget should be at the end."""
    return {int(w): s for w, s in problem.data["goal"].items()}


def _drawn(kind: str, random: Random) -> str:
    """A state to be reached."""
    if kind == "switch":
        return random.choice("+-")
    return f"({random.choice(WORDS)})" if kind == "field" else f"${random.choice(COMMANDS)}"
