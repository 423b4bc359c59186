"""RLOO against its formula."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from token_sequences import answers, assert_advantages, assert_gradient, assert_loss, inputs, mean, reward_groups, tame

from ondol.methods.rloo import RLOO


@settings(max_examples=60, deadline=None)
@given(groups=reward_groups)
def test_advantages(groups):
    def loop(groups):
        return [[r - mean(g[:i] + g[i + 1 :]) if len(g) > 1 else 0.0 for i, r in enumerate(g)] for g in groups]

    assert_advantages(RLOO(), groups, loop)


def loop_loss(method: RLOO):
    """-1/N sum_i [A_i - beta log(pi_old / reference)(o_i)] log pi(o_i)."""

    def loss(update) -> float:
        return -sum((a.advantage - method.kl_coef * (sum(a.old) - sum(a.ref))) * sum(a.logp) for a in update) / len(
            update
        )

    return loss


@settings(max_examples=60, deadline=None)
@given(update=answers(), kl_coef=st.sampled_from([0.0, 0.03, 1.0]))
def test_loss(update, kl_coef):
    assert_loss(RLOO(kl_coef=kl_coef), update, loop_loss(RLOO(kl_coef=kl_coef)))


def test_gradient():
    method = RLOO(kl_coef=0.5)
    assert_gradient(method, tame(0), loop_loss(method))


def test_reference_is_asked_for_only_with_a_penalty():
    assert RLOO().needs_reference and not RLOO().skip_zero_advantage
    assert not RLOO(kl_coef=0).needs_reference and RLOO(kl_coef=0).skip_zero_advantage
    assert not RLOO().token_loss(inputs(tame(0)))[1]
