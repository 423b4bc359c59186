"""Puzzles of reasoning-gym as worlds that move: a state, moves that change it or are refused, and an end.

Made from a problem's question alone; the solution that the moves amount to is scored by reasoning-gym's own verifier.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import ClassVar

from ondol.errors import OndolError
from ondol.records import Problem


class Puzzle(ABC):
    """A puzzle in some state.

    Attributes:
        rules: how to write a move, for the system message.
        moves: those made so far, as the dataset's answers have them.
        joint: what joins them to an answer.
    """

    rules: ClassVar[str]
    joint: ClassVar[str]

    def __init__(self) -> None:
        self.moves: list[str] = []

    @abstractmethod
    def act(self, text: str) -> str | None:
        """Make a move; what is wrong with it, if anything, and then nothing has changed. Never raises."""

    @abstractmethod
    def screen(self) -> str:
        """The state as text."""

    @abstractmethod
    def goal(self) -> str:
        """What is to be reached, in a line."""

    @property
    @abstractmethod
    def solved(self) -> bool: ...

    @property
    def solution(self) -> str:
        return self.joint.join(self.moves)


class Hanoi(Puzzle):
    """Tower of Hanoi. The bottom disk of a peg comes first."""

    rules = (
        "A move takes the top disk of a peg to another one, never onto a smaller disk. The first number of a peg is its "
        'bottom disk. Reply with one move and nothing else, as the two pegs: "1 3".'
    )
    joint = "\n"
    _QUESTION = re.compile(r"with (\d+) disks and (\d+) pegs\.\s+Move all disks from Peg (\d+) to Peg (\d+)")
    _MOVE = re.compile(
        r"(?:move\s+)?(?:disk\s+([0-9]{1,2})\s+)?(?:from\s+)?(?:peg\s*)?([0-9]{1,2})[\s,>-]+(?:to\s+)?(?:peg\s*)?([0-9]{1,2})\.?",
        re.I,
    )

    def __init__(self, question: str) -> None:
        super().__init__()
        disks, pegs, start, self.target = map(int, _found(self._QUESTION, question).groups())
        self.pegs: dict[int, list[int]] = {p: [] for p in range(1, pegs + 1)}
        self.pegs[start] = list(range(disks, 0, -1))
        self.disks = disks

    def act(self, text: str) -> str | None:
        match = self._MOVE.fullmatch(text.strip())
        if match is None:
            return 'not a move; write the two pegs, such as "1 3"'
        a, b = int(match[2]), int(match[3])
        for peg in (a, b):
            if peg not in self.pegs:
                return f"there is no peg {peg}"
        if a == b:
            return "a move needs two pegs"
        if not self.pegs[a]:
            return f"peg {a} is empty"
        disk = self.pegs[a][-1]
        if match[1] is not None and int(match[1]) != disk:
            return f"disk {match[1]} is not on top of peg {a}"
        if self.pegs[b] and self.pegs[b][-1] < disk:
            return f"disk {disk} cannot lie on disk {self.pegs[b][-1]}"
        self.pegs[b].append(self.pegs[a].pop())
        self.moves.append(f"Move disk {disk} from Peg {a} to Peg {b}")
        return None

    def screen(self) -> str:
        return "\n".join(f"peg {p}: {' '.join(map(str, disks)) or '-'}" for p, disks in self.pegs.items())

    def goal(self) -> str:
        return f"Bring all disks to peg {self.target}."

    @property
    def solved(self) -> bool:
        return len(self.pegs[self.target]) == self.disks


class Sokoban(Puzzle):
    """Sokoban, in reasoning-gym's characters."""

    rules = (
        "* is you, % you on a goal, @ a box, X a goal, $ a box on a goal, + a wall, - floor. You push boxes, one at a time, "
        "and never pull. Reply with one move and nothing else: U, D, L or R."
    )
    joint = ""
    _STEPS: ClassVar[dict[str, tuple[int, int]]] = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}

    def __init__(self, question: str) -> None:
        super().__init__()
        board = _found(re.compile(r"Here is your puzzle:\n(.*)", re.S), question)[1]
        rows = [line.replace(" ", "") for line in board.strip().splitlines()]
        cells = {(y, x): c for y, row in enumerate(rows) for x, c in enumerate(row)}
        self.height, self.width = len(rows), max(map(len, rows))
        self.walls = {at for at, c in cells.items() if c == "+"}
        self.goals = {at for at, c in cells.items() if c in "X$%"}
        self.boxes = {at for at, c in cells.items() if c in "@$"}
        self.floor = set(cells) - self.walls
        self.player = next(at for at, c in cells.items() if c in "*%")

    def act(self, text: str) -> str | None:
        move = text.strip().upper()
        if move not in self._STEPS:
            return "not a move; write U, D, L or R"
        dy, dx = self._STEPS[move]
        next_ = (self.player[0] + dy, self.player[1] + dx)
        beyond = (next_[0] + dy, next_[1] + dx)
        if next_ not in self.floor:
            return "there is a wall"
        if next_ in self.boxes:
            if beyond not in self.floor or beyond in self.boxes:
                return "the box cannot be pushed there"
            self.boxes = (self.boxes - {next_}) | {beyond}
        self.player = next_
        self.moves.append(move)
        return None

    def screen(self) -> str:
        return "\n".join("".join(self._cell((y, x)) for x in range(self.width)) for y in range(self.height))

    def _cell(self, at: tuple[int, int]) -> str:
        if at in self.walls:
            return "+"
        here = "*" if at == self.player else "@" if at in self.boxes else ""
        if at in self.goals:
            return {"*": "%", "@": "$", "": "X"}[here]
        return here or "-"

    def goal(self) -> str:
        return "Push every box onto a goal."

    @property
    def solved(self) -> bool:
        return self.boxes <= self.goals


PUZZLES: dict[str, type[Hanoi] | type[Sokoban]] = {"tower_of_hanoi": Hanoi, "sokoban": Sokoban}


def puzzle_of(dataset: str, problem: Problem) -> Puzzle:
    """A problem's puzzle, as it is at first. Raises OndolError for a dataset that is not one of `PUZZLES`."""
    if dataset not in PUZZLES:
        raise OndolError(
            f"reasoning-gym's '{dataset}' has no moves that could be made one by one",
            f"take one of {', '.join(PUZZLES)}, or the environment 'feedback', which takes any",
        )
    return PUZZLES[dataset](problem.question)


def _found(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    match = pattern.search(text)
    if match is None:
        raise OndolError(f"this question is of another form than expected: {text!r:.120}", "use reasoning-gym 0.1.25")
    return match
