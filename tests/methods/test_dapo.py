"""DAPO against its formulas: filter, over-long penalty, advantages, loss."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_sequences import (
    answers,
    assert_advantages,
    assert_gradient,
    assert_loss,
    clipped,
    group_of,
    reward_groups,
    standardised,
    tame,
)  # fmt: skip

from ondol.errors import OndolError
from ondol.methods.dapo import DAPO
from ondol.parts import make


@settings(max_examples=60, deadline=None)
@given(groups=reward_groups)
def test_advantages(groups):
    assert_advantages(DAPO(), groups, standardised)


def loss(update) -> float:
    tokens = sum(len(a.logp) for a in update)
    return -sum(clipped(r, a.advantage, 0.2, 0.28) for a in update for r in a.ratios()) / max(tokens, 1)


@settings(max_examples=60, deadline=None)
@given(update=answers())
def test_loss(update):
    assert_loss(DAPO(), update, loss)


def test_gradient():
    assert_gradient(DAPO(), tame(3), loss)


@settings(max_examples=60, deadline=None)
@given(scores=st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=4), max_size=6))
def test_dynamic_sampling_keeps_what_differs(scores):
    groups = [group_of(s) for s in scores]
    kept = DAPO().keep(groups)
    assert [id(g) for g in kept] == [id(g) for g, s in zip(groups, scores) if min(s) < max(s)]
    assert DAPO(dynamic_sampling=False).keep(groups) == groups
    assert DAPO().max_resamples == 9 and DAPO(dynamic_sampling=False).max_resamples == 0


def test_the_filter_looks_at_scores():
    group = group_of([1, 1], [5, 20])
    method = DAPO(max_response=20, overlong_cache=10)
    assert method.shaped_rewards([group]) == [[1.0, 0.5]] and method.keep([group]) == []


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    most=st.integers(10, 50),
    cache=st.integers(0, 10),
    penalty=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_overlong_penalty(lengths, most, cache, penalty):
    """Equation 13: 0, then ((L_max - L_cache) - n) / L_cache, then -1."""

    def want(n: int) -> float:
        if n <= most - cache:
            return 0.0
        return (most - cache - n) / cache if n <= most else -1.0

    method = DAPO(max_response=most, overlong_cache=cache, overlong_penalty=penalty)
    (got,) = method.shaped_rewards([group_of([1.0] * len(lengths), lengths)])
    assert got == pytest.approx([1 + penalty * want(n) for n in lengths])


def test_the_cache_is_part_of_the_answer():
    with pytest.raises(OndolError, match="overlong_cache"):
        make("methods", {"name": "dapo", "max_response": 100}, "method")
