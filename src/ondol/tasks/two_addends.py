"""Two addends: for N, write "a+b" with a + b = N. Few prompts, many right answers.

The task of the pilot runs on prompt history (DCPO, arXiv 2509.02333) and on diversity (Darling, arXiv 2509.02534).
"""

from __future__ import annotations

import re
from random import Random

from pydantic import Field, model_validator

from ondol.errors import OndolError
from ondol.records import Problem
from ondol.tasks.base import Split, Task, question_id, shuffled, split_of

_ANSWER = re.compile(r"([0-9]{1,18})\+([0-9]{1,18})")
_BUCKET = 3  # pairs whose smaller addends share a bucket of 3 mean the same (Darling's semantic class)


class TwoAddends(Task):
    """Every N of a range once per pass, in another order each pass."""

    low: int = Field(default=10, ge=2, description="smallest N")
    high: int = Field(default=60, le=10**9, description="largest N")
    template: str = Field(default="{n}", description="the question; {n} is filled in")

    @model_validator(mode="after")
    def _sound(self) -> TwoAddends:
        if self.low > self.high:
            raise ValueError(f"low..high: {self.low} > {self.high}, the range is empty")
        if self.high - self.low > 1_000_000:
            raise ValueError("low..high: more than a million numbers")
        if "{n}" not in self.template:
            raise ValueError("template: it must hold {n}")
        return self

    def problem(self, index: int, split: Split = "train") -> Problem:
        numbers = self._numbers(split)
        if not numbers:
            raise OndolError(f"no N in {self.low}..{self.high} belongs to the {split} split", "widen low..high")
        n = numbers[shuffled(self.seed, index, len(numbers))]
        question = self._question(n)
        return Problem(question_id(question), question, f"{n // 2}+{n - n // 2}", {"n": n})

    def size(self, split: Split) -> int:
        return len(self._numbers(split))

    def score(self, problem: Problem, response: str) -> float:
        return float(self._addends(problem, response) is not None)

    def near_misses(self, problem: Problem) -> list[str]:
        n = problem.data["n"]
        return [
            "",
            str(n),
            f"{n}+0",
            f"0+{n}",
            f"1+{n}",
            f"1+{n - 1}+0",
            f"1 + {n - 1}",
            f"1+{n - 1}={n}",
            f"-1+{n + 1}",
        ]

    def demonstration(self, problem: Problem, random: Random, right: bool) -> str:
        """Any pair; a wrong one adds up to another number, at most 9 away."""
        n = problem.data["n"]
        total = n if right else random.choice([m for m in range(max(2, n - 9), n + 10) if m != n])
        a = random.randint(1, total - 1)
        return f"{a}+{total - a}"

    def answer_class(self, problem: Problem, response: str) -> str | None:
        """Which kind of right answer this is: the unordered pair, in buckets of 3. None for a wrong one."""
        addends = self._addends(problem, response)
        return None if addends is None else str(min(addends) // _BUCKET)

    def _addends(self, problem: Problem, response: str) -> tuple[int, int] | None:
        match = _ANSWER.fullmatch(response.strip())
        if match is None:
            return None
        a, b = int(match[1]), int(match[2])
        return (a, b) if a >= 1 and b >= 1 and a + b == problem.data["n"] else None

    def _question(self, n: int) -> str:
        return self.template.replace("{n}", str(n))

    def _numbers(self, split: Split) -> tuple[int, ...]:
        return _numbers(self.low, self.high, self.template, split)


_CACHE: dict[tuple[int, int, str, Split], tuple[int, ...]] = {}


def _numbers(low: int, high: int, template: str, split: Split) -> tuple[int, ...]:
    key = (low, high, template, split)
    if key not in _CACHE:
        _CACHE[key] = tuple(n for n in range(low, high + 1) if split_of(template.replace("{n}", str(n))) == split)
    return _CACHE[key]
