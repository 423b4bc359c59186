"""GMPO against its formula, as a product rather than in logs."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st
from token_sequences import answers, assert_advantages, assert_gradient, assert_loss, reward_groups, standardised, tame

from ondol.methods.gmpo import GMPO


@settings(max_examples=40, deadline=None)
@given(groups=reward_groups)
def test_advantages(groups):
    assert_advantages(GMPO(), groups, standardised)


def loop_loss(c: float):
    """-1/N sum_i sgn(A_i) [ prod_t |min(rho A, clip(rho, e^-c, e^c) A)| ]^(1/|o_i|)."""

    def loss(update) -> float:
        total = 0.0
        for a in update:
            if not a.logp:
                continue
            product = 1.0
            for d in a.log_ratios:
                r = math.exp(d)
                held = min(max(r, math.exp(-c)), math.exp(c))
                product *= abs(min(r * a.advantage, held * a.advantage)) ** (1 / len(a.logp))
            # a mean log ratio below -20 is held there, as all log ratios are
            total -= math.copysign(max(product, math.exp(-20) * abs(a.advantage)), a.advantage)
        return total / len(update)

    return loss


@settings(max_examples=80, deadline=None)
@given(update=answers(), c=st.sampled_from([0.1, 0.4, 1.0]))
def test_loss(update, c):
    assert_loss(GMPO(clip_log=c), update, loop_loss(c))


def test_gradient():
    assert_gradient(GMPO(), tame(5), loop_loss(0.4))
