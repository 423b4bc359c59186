"""PACS against its formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_sequences import answers, assert_gradient, assert_loss, group_of, inputs, loss_and_gradient, mean, std, tame

from ondol.errors import OndolError
from ondol.methods.pacs import PACS


def loop_loss(beta=1.0, proxy="log_ratio", score="rloo", weight="question"):
    def softplus(v: float) -> float:
        return max(v, 0) + math.log1p(math.exp(-abs(v)))

    def loss(update) -> float:
        total = 0.0
        for g in sorted({a.group for a in update}):
            own = [a for a in update if a.group == g and a.logp]  # answers of no tokens are not there
            r = [beta * (sum(a.log_ratios) if proxy == "log_ratio" else mean(a.logp)) for a in own]
            hits = sum(a.reward == 1 for a in own)
            for i, a in enumerate(own):
                psi = r[i]
                if score == "rloo":
                    psi = r[i] - mean(r[:i] + r[i + 1 :]) if len(own) > 1 else 0.0
                elif score == "grpo":
                    psi = (r[i] - mean(r)) / (std(r) + 1e-6)
                w = {"none": 1.0, "only_positive": a.reward, "only_negative": 1 - a.reward}.get(weight)
                if w is None:
                    n = hits if a.reward == 1 else len(own) - hits
                    w = len(own) / (2 * n) if 0 < hits < len(own) else 1.0
                total += w * (a.reward * softplus(-psi) + (1 - a.reward) * softplus(psi))
        return total / len(update)

    return loss


settings_ = {
    "beta": st.sampled_from([0.1, 1.0, 2.0]),
    "proxy": st.sampled_from(["log_ratio", "mean_logp"]),
    "score": st.sampled_from(["rloo", "naive"]),
    "weight": st.sampled_from(["question", "only_positive", "only_negative", "none"]),
}


@settings(max_examples=100, deadline=None)
@given(update=answers(), made=st.fixed_dictionaries(settings_))
def test_loss(update, made):
    assert_loss(PACS(**made), update, loop_loss(**made))


@pytest.mark.parametrize("weight", ["question", "only_positive", "only_negative", "none"])
@pytest.mark.parametrize("score", ["rloo", "grpo", "naive"])
@pytest.mark.parametrize("proxy", ["log_ratio", "mean_logp"])
def test_gradient(proxy, score, weight):
    made = {"proxy": proxy, "score": score, "weight": weight, "beta": 0.7}
    update = tame(9, size=3)
    assert_loss(PACS(**made), update, loop_loss(**made))
    assert_gradient(PACS(**made), update, loop_loss(**made))


@pytest.mark.parametrize("score", ["rloo", "grpo", "naive"])
def test_first_update(score):
    """All psi are 0: L = ln 2 where weights average to 1, all is finite, and single-class groups push nobody."""
    update = tame(10, spread=0.0)
    for a in update:
        if a.group == 0:
            a.reward = 1.0
    loss, gradient = loss_and_gradient(PACS(score=score), update)
    assert loss == pytest.approx(math.log(2))
    if score != "naive":
        assert all(abs(s) < 1e-9 for a, g in zip(update, gradient) if a.group == 0 for s in g)
    mixed = [(a, g) for a, g in zip(update, gradient) if a.group != 0]
    assert all((s < 0) == (a.reward == 1) for a, g in mixed for s in g)


def test_groups_are_whole_and_no_answer_is_skipped():
    assert PACS.whole_groups and not PACS().skip_zero_advantage and not PACS().needs_reference
    with pytest.raises(ValueError, match="epochs"):
        PACS(epochs=2)


def test_labels():
    assert PACS().shaped_rewards([group_of([0, 1])]) == [[0, 1]]
    assert PACS(soft_labels=True).shaped_rewards([group_of([0.25, 1])]) == [[0.25, 1]]
    for method, reward, remedy in ((PACS(), 0.5, "soft_labels"), (PACS(soft_labels=True), -1.0, "0 and 1")):
        with pytest.raises(OndolError, match=remedy):
            method.shaped_rewards([group_of([0, reward])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturation_is_finite_and_reported(dtype):
    update = tame(11, groups=1, size=4, spread=0)
    update[0].logp = [v - 300 for v in update[0].logp]
    x = inputs(update, dtype=dtype)
    loss, reports = PACS().token_loss(x)
    (gradient,) = torch.autograd.grad(loss.sum(), x.logp)
    assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()
    assert (reports["method/psi_saturated_share"] == 1).all()
    assert not PACS().token_loss(inputs(tame(11, spread=0)))[1]["method/psi_saturated_share"].any()
