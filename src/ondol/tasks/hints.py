"""Hints of growing strength, for problems that a model never solves (Keye-VL-1.5, arXiv 2509.01563: progressive hints)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ondol.errors import OndolError
from ondol.records import Problem

#: problem -> the hint's text
Hint = Callable[[Problem], str]


@dataclass(frozen=True)
class HintLadder:
    """Levels from the weakest hint to the strongest. The paper's are: concept, strategy, method, concrete steps, solution."""

    levels: Sequence[Hint]

    def __post_init__(self) -> None:
        if not self.levels:
            raise OndolError("a ladder of hints without levels", "give at least one")

    def lowest_success(self, policy: Callable[[Problem, str], float], problem: Problem) -> int | None:
        """The lowest level at which the policy succeeds: 1 ... len(levels), 0 without a hint, None at no level.

        `policy(problem, hint)` says how well it does (right at least once: above 0); the hint is "" at level 0. Levels
        above the answer are not asked for: a stronger hint than needed would leave less to learn.
        """
        hints: list[Hint] = [lambda p: "", *self.levels]
        for level, hint in enumerate(hints):
            if policy(problem, hint(problem)) > 0:
                return level
        return None


def answer_prefixes(gold: Callable[[Problem], str], levels: int = 5) -> HintLadder:
    """A ladder whose hints are beginnings of the gold answer, in equal shares; the last is the whole answer."""

    def prefix(share: float) -> Hint:
        def hint(problem: Problem) -> str:
            text = gold(problem)
            return text[: math.ceil(share * len(text))]

        return hint

    return HintLadder([prefix((i + 1) / levels) for i in range(levels)])
