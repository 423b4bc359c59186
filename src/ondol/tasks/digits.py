"""Digits: somewhere in a picture of points there is a digit, too small to be read from afar.

The question shows the picture from afar, a character for each cell of 8 x 8 points; the tool `zoom` shows a cell from
close by, as text. Perception as an action, for agents that read text only.
"""

from __future__ import annotations

import re
from random import Random

from pydantic import Field

from ondol.records import Problem
from ondol.rewards.base import marked_answer
from ondol.tasks.base import DrawnTask

SIZE = 8  # points on each side of a cell
_DIGIT = re.compile(r"(?<![0-9])[0-9](?![0-9])")
_NUMBERS = 1_000_000  # of pictures

#: 5 points wide, 7 high
GLYPHS = {
    "0": (".###.", "#...#", "#...#", "#...#", "#...#", "#...#", ".###."),
    "1": ("..#..", ".##..", "..#..", "..#..", "..#..", "..#..", ".###."),
    "2": (".###.", "#...#", "....#", "...#.", "..#..", ".#...", "#####"),
    "3": ("####.", "....#", "....#", ".###.", "....#", "....#", "####."),
    "4": ("#..#.", "#..#.", "#..#.", "#####", "...#.", "...#.", "...#."),
    "5": ("#####", "#....", "#....", "####.", "....#", "....#", "####."),
    "6": (".###.", "#....", "#....", "####.", "#...#", "#...#", ".###."),
    "7": ("#####", "....#", "...#.", "...#.", "..#..", "..#..", "..#.."),
    "8": (".###.", "#...#", "#...#", ".###.", "#...#", "#...#", ".###."),
    "9": (".###.", "#...#", "#...#", ".####", "....#", "....#", ".###."),
}


class Digits(DrawnTask):
    """Pictures by number; the answer is the one digit of a response. `problem.data["picture"]` holds the rows of points."""

    cells: int = Field(default=3, ge=1, le=26, description="cells on each side of the picture")

    def draw(self, random: Random) -> Problem:
        number = random.randrange(_NUMBERS)
        random = Random(f"picture {number} of {self.cells}")  # the question says all there is to a picture
        digit = random.choice("0123456789")
        x, y = random.randrange(self.cells), random.randrange(self.cells)
        picture = [["."] * (self.cells * SIZE) for _ in range(self.cells * SIZE)]
        left, top = x * SIZE + random.randint(0, SIZE - 5), y * SIZE + random.randint(0, SIZE - 7)
        for dy, row in enumerate(GLYPHS[digit]):
            picture[top + dy][left : left + 5] = row
        afar = "\n".join(
            "".join("#" if (i, j) == (x, y) else "." for i in range(self.cells)) for j in range(self.cells)
        )
        question = f"Picture {number}, from afar, has something in one of its cells:\n{afar}\nWhich digit is it?"
        cell = f"{chr(ord('a') + x)}{y + 1}"
        return Problem("", question, digit, {"picture": ["".join(row) for row in picture], "cell": cell})

    def score(self, problem: Problem, response: str) -> float:
        marked = marked_answer(response)
        found = set(_DIGIT.findall(response if marked is None else marked))
        return float(found == {problem.answer})

    def near_misses(self, problem: Problem) -> list[str]:
        right = problem.answer
        return [
            "",
            problem.data["cell"][0],
            *(d for d in GLYPHS if d != right),
            right + right,
            f"{right} or {(int(right) + 1) % 10}",
        ]

    def demonstration(self, problem: Problem, random: Random, right: bool) -> list[str]:
        """Look at the cell, then say what is there."""
        wrong = random.choice([d for d in GLYPHS if d != problem.answer])
        return [f"<zoom>{problem.data['cell']}</zoom>", problem.answer if right else wrong]
