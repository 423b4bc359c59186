"""REINFORCE++ against its formulas."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from token_sequences import (
    answers,
    assert_advantages,
    assert_gradient,
    assert_loss,
    clipped,
    mean,
    reward_groups,
    standardised,
    tame,
)  # fmt: skip

from ondol.methods.reinforce_pp import ReinforcePP


@settings(max_examples=80, deadline=None)
@given(groups=reward_groups, baseline=st.booleans())
def test_advantages(groups, baseline):
    def loop(groups):
        own = [[0.0 if len(set(g)) == 1 else r - mean(g) for r in g] for g in groups] if baseline else groups
        (every,) = standardised([[r for g in own for r in g]], 1e-8)
        return [[every.pop(0) for _ in g] for g in groups]

    assert_advantages(ReinforcePP(baseline=baseline), groups, loop)


def loop_loss(method: ReinforcePP):
    def loss(update) -> float:
        total = 0.0
        for a in update:
            for r, lp, ref in zip(a.ratios(), a.logp, a.ref, strict=True):
                objective = clipped(r, a.advantage, 0.2, 0.2) - method.kl_coef * (lp - ref) ** 2 / 2
                total -= objective / (len(a.logp) * len(update))
        return total

    return loss


@settings(max_examples=60, deadline=None)
@given(update=answers(), kl_coef=st.sampled_from([0.0, 0.001, 1.0]))
def test_loss(update, kl_coef):
    assert_loss(ReinforcePP(kl_coef=kl_coef), update, loop_loss(ReinforcePP(kl_coef=kl_coef)))


def test_gradient():
    method = ReinforcePP(kl_coef=0.5)
    assert_gradient(method, tame(1), loop_loss(method))
