"""Dr. GRPO against its formula."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from token_sequences import answers, assert_advantages, assert_gradient, assert_loss, clipped, mean, reward_groups, tame

from ondol.methods.dr_grpo import DrGRPO


@settings(max_examples=60, deadline=None)
@given(groups=reward_groups)
def test_advantages(groups):
    assert_advantages(DrGRPO(), groups, lambda gs: [[r - mean(g) for r in g] for g in gs])


def loop_loss(length: int):
    def loss(update) -> float:
        return -sum(clipped(r, a.advantage, 0.2, 0.2) for a in update for r in a.ratios()) / length / len(update)

    return loss


@settings(max_examples=60, deadline=None)
@given(update=answers(), length=st.integers(1, 100))
def test_loss(update, length):
    assert_loss(DrGRPO(max_length=length), update, loop_loss(length))


def test_gradient():
    assert_gradient(DrGRPO(max_length=7), tame(2), loop_loss(7))
