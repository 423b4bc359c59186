"""GRPO against loops written from its formulas, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_sequences import (
    answers,
    assert_advantages,
    assert_gradient,
    assert_loss,
    clipped,
    inputs,
    reward_groups,
    standardised,
    tame,
)  # fmt: skip

from ondol.methods.grpo import GRPO


@settings(max_examples=100, deadline=None)
@given(groups=reward_groups, eps=st.sampled_from([0.0, 1e-4, 1.0]))
def test_advantages(groups, eps):
    assert_advantages(GRPO(eps=eps), groups, lambda g: standardised(g, eps))


def loop_loss(method: GRPO):
    """-1/N sum_i 1/|o_i| sum_t [ min(r A, clip(r) A) - beta (exp(d) - d - 1) ]."""

    def loss(update) -> float:
        total = 0.0
        for a in update:
            for r, lp, ref in zip(a.ratios(), a.logp, a.ref, strict=True):
                kl = math.exp(ref - lp) - (ref - lp) - 1
                objective = clipped(r, a.advantage, method.clip_low, method.clip_high) - method.kl_coef * kl
                total -= objective / (len(a.logp) * len(update))
        return total

    return loss


@settings(max_examples=100, deadline=None)
@given(
    update=answers(),
    low=st.sampled_from([0.1, 0.2]),
    high=st.sampled_from([0.2, 0.28]),
    kl_coef=st.sampled_from([0.0, 0.04, 1.0]),
)
def test_loss(update, low, high, kl_coef):
    method = GRPO(clip_low=low, clip_high=high, kl_coef=kl_coef)
    assert_loss(method, update, loop_loss(method))


def test_gradient():
    method = GRPO(kl_coef=0.3)
    assert_gradient(method, tame(0), loop_loss(method))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_extreme_ratios_stay_finite(dtype, advantage):
    from token_sequences import Answer

    now, then = [-0.1, -800.0, -0.1, -80.0], [-800.0, -0.1, -99.0, -0.1]
    x = inputs([Answer([a], [b], [b], advantage) for a, b in zip(now, then, strict=True)], dtype=dtype)
    loss, _ = GRPO(kl_coef=0).token_loss(x)
    (gradient,) = torch.autograd.grad(loss.sum(), x.logp)
    assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()
    if advantage > 0:
        torch.testing.assert_close(loss.detach(), -advantage * torch.tensor([1.2, 0, 1.2, 0], dtype=dtype))


def test_reference_is_asked_for_only_with_a_penalty():
    assert GRPO().needs_reference and not GRPO().skip_zero_advantage
    assert not GRPO(kl_coef=0).needs_reference and GRPO(kl_coef=0).skip_zero_advantage
