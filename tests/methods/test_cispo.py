"""CISPO against its formula; its gradient, where the weight is a constant, as well."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_sequences import (
    answers,
    assert_advantages,
    assert_loss,
    loss_and_gradient,
    reward_groups,
    standardised,
    tame,
)

from ondol.methods.cispo import CISPO


@settings(max_examples=40, deadline=None)
@given(groups=reward_groups)
def test_advantages(groups):
    assert_advantages(CISPO(), groups, standardised)


def weights(a, low, high):
    return [min(max(r, 1 - low), 1 + high) for r in a.ratios()]


@settings(max_examples=80, deadline=None)
@given(update=answers(), low=st.sampled_from([0.2, 1.0]), high=st.sampled_from([0.2, 4.0]))
def test_loss(update, low, high):
    def loss(update) -> float:
        tokens = max(sum(len(a.logp) for a in update), 1)
        return -sum(w * a.advantage * p for a in update for w, p in zip(weights(a, low, high), a.logp)) / tokens

    assert_loss(CISPO(clip_low=low, clip_high=high), update, loss)


def test_no_token_loses_its_gradient():
    update = tame(6, spread=2.0)
    _, gradient = loss_and_gradient(CISPO(clip_high=0.2), update)
    tokens = sum(len(a.logp) for a in update)
    for a, slopes in zip(update, gradient, strict=True):
        assert slopes == pytest.approx([-w * a.advantage / tokens for w in weights(a, 1.0, 0.2)])
        assert all(slopes)
