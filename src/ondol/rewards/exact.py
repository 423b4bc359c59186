"""Text that must equal the gold answer."""

from __future__ import annotations

import unicodedata

from pydantic import Field

from ondol.records import Problem
from ondol.rewards.base import Verifier, marked_answer


class Exact(Verifier):
    """1 when the answer is the gold text: what the last `<answer>` or `\\boxed{}` holds, else the whole response."""

    ignore_case: bool = Field(default=True, description="upper and lower case are the same")
    ignore_space: bool = Field(default=True, description="runs of white space are one space")

    def score(self, problem: Problem, response: str) -> float:
        marked = marked_answer(response)
        return float(self._normal(response if marked is None else marked) == self._normal(problem.answer))

    def near_misses(self, problem: Problem) -> list[str]:
        candidates = ["", f"{problem.answer} x", f"<answer>{problem.answer} x</answer> {problem.answer}"]
        return [c for c in candidates if self._normal(c) != self._normal(problem.answer)]

    def _normal(self, text: str) -> str:
        text = unicodedata.normalize("NFC", text).strip()
        if self.ignore_space:
            text = " ".join(text.split())
        return text.casefold() if self.ignore_case else text
