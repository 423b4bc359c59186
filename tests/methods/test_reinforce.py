"""REINFORCE against its formula."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_sequences import answers, assert_advantages, assert_gradient, assert_loss, mean, reward_groups, tame

from ondol.methods.reinforce import REINFORCE


@settings(max_examples=60, deadline=None)
@given(groups=reward_groups, baseline=st.sampled_from(["none", "batch", "group"]))
def test_advantages(groups, baseline):
    every = mean([r for g in groups for r in g])
    base = {"none": lambda g: 0.0, "batch": lambda g: every, "group": mean}[baseline]
    assert_advantages(REINFORCE(baseline=baseline), groups, lambda gs: [[r - base(g) for r in g] for g in gs])


def loss(update) -> float:
    return -sum(a.advantage * sum(a.logp) for a in update) / len(update)


@settings(max_examples=60, deadline=None)
@given(update=answers())
def test_loss(update):
    assert_loss(REINFORCE(), update, loss)


@pytest.mark.parametrize("seed", range(2))
def test_gradient(seed):
    assert_gradient(REINFORCE(), tame(seed), loss)
