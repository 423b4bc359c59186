"""GSPO against its formula."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st
from token_sequences import (  # fmt: skip
    answers,
    assert_advantages,
    assert_gradient,
    assert_loss,
    clipped,
    mean,
    reward_groups,
    standardised,
    tame,
)

from ondol.methods.gspo import GSPO


@settings(max_examples=40, deadline=None)
@given(groups=reward_groups)
def test_advantages(groups):
    assert_advantages(GSPO(), groups, standardised)


def loop_loss(method: GSPO):
    """-1/N sum_i min(s_i A_i, clip(s_i) A_i), and the KL's per-answer token mean."""

    def loss(update) -> float:
        total = 0.0
        for a in update:
            if a.logp:
                s = math.exp(min(max(mean(a.log_ratios), -20), 20))
                kl = mean([math.exp(r - p) - (r - p) - 1 for p, r in zip(a.logp, a.ref, strict=True)])
                total -= clipped(s, a.advantage, method.clip_low, method.clip_high) - method.kl_coef * kl
        return total / len(update)

    return loss


@settings(max_examples=80, deadline=None)
@given(update=answers(), high=st.sampled_from([4e-4, 0.3]), kl_coef=st.sampled_from([0.0, 0.5]))
def test_loss(update, high, kl_coef):
    method = GSPO(clip_high=high, kl_coef=kl_coef)
    assert_loss(method, update, loop_loss(method))


def test_gradient():
    method = GSPO(clip_low=0.3, clip_high=0.3, kl_coef=0.2)
    assert_gradient(method, tame(4), loop_loss(method))
    assert_gradient(GSPO(), tame(4), loop_loss(GSPO()))


def test_defaults_are_the_papers():
    assert (GSPO().clip_low, GSPO().clip_high) == (3e-4, 4e-4) and not GSPO().needs_reference
