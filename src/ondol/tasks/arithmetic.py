"""Arithmetic on random integers: "What is 47 * 76 + 29?"."""

from __future__ import annotations

import re
from random import Random

from pydantic import Field, model_validator

from ondol.records import Problem
from ondol.rewards.numeric import Numeric, last_number
from ondol.tasks.base import DrawnTask
from ondol.tools.calculator import evaluate

_NAME = re.compile(r"[a-z]")


class Arithmetic(DrawnTask):
    """Expressions of given forms; the last number of a response is its answer, compared exactly."""

    forms: tuple[str, ...] = Field(
        default=("a * b + c",),
        min_length=1,
        description="expressions drawn from; each letter becomes a number; + - * // % and parentheses",
    )
    low: int = Field(default=12, description="smallest operand")
    high: int = Field(default=98, description="largest operand")
    ranges: dict[str, tuple[int, int]] = Field(default={}, description="letter -> its own (smallest, largest)")
    template: str = Field(default="What is {expression}?", description="the question; {expression} is filled in")

    @model_validator(mode="after")
    def _sound(self) -> Arithmetic:
        for name, (low, high) in {"low..high": (self.low, self.high), **self.ranges}.items():
            if low > high:
                raise ValueError(f"{name}: {low} > {high}, the range is empty")
        if "{expression}" not in self.template:
            raise ValueError("template: it must hold {expression}")
        for form in self.forms:
            if not _NAME.search(form) or re.search(
                r"[^a-z0-9\s()+*/%-]|[a-z0-9]\s*[a-z]|[a-z]\s*[0-9]|\*\s*\*|(?<!/)/(?!/)", form
            ):
                raise ValueError(f"form {form!r}: single letters, numbers, + - * // % and parentheses only")
            try:
                evaluate(_NAME.sub(lambda m: str(max(map(abs, self.ranges.get(m[0], (self.low, self.high))))), form))
            except ZeroDivisionError:
                pass
            except ValueError as e:
                raise ValueError(f"form {form!r}: {e}") from None
        return self

    def draw(self, random: Random) -> Problem | None:
        form = random.choice(self.forms)
        values: dict[str, int] = {}
        for name in _NAME.findall(form):
            if name not in values:
                values[name] = random.randint(*self.ranges.get(name, (self.low, self.high)))
        expression = _NAME.sub(lambda m: str(v) if (v := values[m[0]]) >= 0 else f"({v})", form)
        try:
            answer = evaluate(expression)
        except ZeroDivisionError:
            return None
        return Problem("", self.template.replace("{expression}", expression), str(answer), {"expression": expression})

    def score(self, problem: Problem, response: str) -> float:
        return Numeric().score(problem, response)

    def feedback(self, problem: Problem, response: str, score: float) -> str:
        given = last_number(response)
        if given is None:
            return "there is no number"
        return "too small" if given < int(problem.answer) else "too large"

    def near_misses(self, problem: Problem) -> list[str]:
        value = int(problem.answer)
        return ["", str(value + 1), str(value - 1), str(10 * value + 1), f"{value} or {value + 10}"]
