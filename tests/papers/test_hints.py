"""The ladder of hints: the weakest that helps, and no more questions than needed."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.errors import OndolError
from ondol.records import Problem
from ondol.tasks.hints import HintLadder, answer_prefixes

PROBLEM = Problem("1", "42", "17+25")


@given(st.integers(1, 6), st.lists(st.booleans(), min_size=7, max_size=7))
def test_the_lowest_level_that_helps(levels, works) -> None:
    asked = []
    ladder = HintLadder([lambda p, i=i: f"hint {i}" for i in range(1, levels + 1)])

    def policy(problem: Problem, hint: str) -> float:
        level = int(hint.removeprefix("hint ") or 0)
        asked.append(level)
        return 0.125 * works[level]

    found = ladder.lowest_success(policy, PROBLEM)
    right = [i for i in range(levels + 1) if works[i]]
    assert found == (right[0] if right else None)
    assert asked == list(range((levels if found is None else found) + 1))


@given(st.integers(1, 9), st.text(min_size=1, max_size=12))
def test_prefixes_grow_to_the_whole_answer(levels, answer) -> None:
    ladder = answer_prefixes(lambda p: p.answer, levels)
    texts = [hint(Problem("1", "q", answer)) for hint in ladder.levels]
    assert len(texts) == levels and texts[-1] == answer and texts[0] != ""
    assert all(b.startswith(a) for a, b in itertools.pairwise(texts))


def test_an_empty_ladder_is_refused() -> None:
    with pytest.raises(OndolError, match="without levels"):
        HintLadder([])
