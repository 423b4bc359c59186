"""Recall: pairs of a letter and a digit go by, one at a time, and then one of them is asked for.

A policy whose context is shorter than the episode (environment `stream`) has forgotten the pair by then, unless it wrote
it down. The memory rung of the ladder for the survey of agentic RL (arXiv 2509.02547).
"""

from __future__ import annotations

import string
from random import Random
from typing import Literal

from pydantic import Field

from ondol.records import Problem
from ondol.tasks.base import DrawnTask


class Recall(DrawnTask):
    """`problem.data["parts"]` is what goes by: "a=3", "k=7" ... "k?". The answer is a digit, guessed in 1 of 10 cases."""

    pairs: int = Field(default=6, ge=2, le=26, description="pairs that go by before the question")
    demonstrate: Literal["memory", "guess"] = Field(
        default="memory",
        description="demonstrations: write every pair into the memory and read one, or do nothing and guess",
    )

    @property
    def chance(self) -> float:
        """Score of a policy that guesses."""
        return 1 / len(string.digits)

    def draw(self, random: Random) -> Problem:
        keys = random.sample(string.ascii_lowercase, self.pairs)
        values = {k: random.choice(string.digits) for k in keys}
        asked = random.choice(keys)
        parts = [*(f"{k}={v}" for k, v in values.items()), f"{asked}?"]
        return Problem("", " ".join(parts), values[asked], {"parts": parts, "values": values, "asked": asked})

    def score(self, problem: Problem, response: str) -> float:
        return float(response.strip() == problem.answer)

    def near_misses(self, problem: Problem) -> list[str]:
        right = problem.answer
        return [
            "",
            problem.data["asked"],
            f"{problem.data['asked']}={right}",
            right + right,
            *(d for d in string.digits if d != right),
        ]

    def demonstration(self, problem: Problem, random: Random, right: bool) -> list[str]:
        """The turns of an episode in `stream`. A wrong one writes half of the pairs only, and guesses."""
        values, asked = problem.data["values"], problem.data["asked"]
        if self.demonstrate == "guess":
            return ["-"] * self.pairs + [random.choice(string.digits)]
        kept = set(values) if right else set(random.sample(sorted(values), self.pairs // 2)) - {asked}
        turns = [f"<memory>write {k}: {v}</memory>" if k in kept else "-" for k, v in values.items()]
        wrong = random.choice([d for d in string.digits if d != problem.answer])
        return [*turns, f"<memory>read {asked}</memory>", problem.answer if right else wrong]
