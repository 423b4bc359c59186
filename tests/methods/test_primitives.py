"""What methods are made of, against loops written from the formulas, in float64."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_sequences import WIDE, mean, reward_groups, std

from ondol.methods import primitives as p

rough_groups = st.one_of(
    reward_groups,
    st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8), min_size=1, max_size=6),
)


def flat(groups: list[list[float]], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Rewards and odd group numbers in a random order, and where each came from."""
    rows = [(r, 3 * g + 5) for g, own in enumerate(groups) for r in own]
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return torch.tensor([rows[i][0] for i in order], **WIDE), torch.tensor([rows[i][1] for i in order]), order


def shuffled(groups: list[list[float]], order: list[int]) -> torch.Tensor:
    values = [v for own in groups for v in own]
    return torch.tensor([values[i] for i in order], **WIDE)


@settings(max_examples=150, deadline=None)
@given(groups=reward_groups, eps=st.sampled_from([0.0, 1e-4, 1.0]), seed=st.integers(0, 99))
def test_group_statistics(groups, eps, seed):
    rewards, group, order = flat(groups, seed)
    close = {"rtol": 1e-9, "atol": 1e-9}
    want = [[r - mean(g) for r in g] for g in groups]
    torch.testing.assert_close(p.group_centre(rewards, group), shuffled(want, order), **close)
    torch.testing.assert_close(
        p.group_std(rewards, group), shuffled([[std(g)] * len(g) for g in groups], order), **close
    )
    want = [[0.0 if std(g) == 0 else (r - mean(g)) / (std(g) + eps) for r in g] for g in groups]
    torch.testing.assert_close(p.group_advantages(rewards, group, eps), shuffled(want, order), **close)
    want = [[r - mean(g[:i] + g[i + 1 :]) if len(g) > 1 else 0.0 for i, r in enumerate(g)] for g in groups]
    torch.testing.assert_close(p.leave_one_out(rewards, group), shuffled(want, order), **close)
    every = [r for g in groups for r in g]
    want = [[0.0 if std(every) == 0 else (r - mean(every)) / (std(every) + eps) for r in g] for g in groups]
    torch.testing.assert_close(p.batch_advantages(rewards, eps), shuffled(want, order), **close)


@settings(max_examples=150, deadline=None)
@given(groups=rough_groups, eps=st.sampled_from([0.0, 1e-4]))
def test_advantages_are_finite_and_exactly_zero_for_equals(groups, eps):
    rewards, group, _ = flat(groups)
    got = p.group_advantages(rewards, group, eps)
    equal = torch.tensor([len(set(groups[(g - 5) // 3])) == 1 for g in group.tolist()])
    assert (got[equal] == 0).all() and torch.isfinite(got).all()
    assert (p.group_centre(rewards, group)[equal] == 0).all()


def test_nothing_at_all():
    nothing, none = torch.zeros(0, **WIDE), torch.zeros(0, dtype=torch.long)
    assert p.group_advantages(nothing, none).shape == (0,)
    assert p.leave_one_out(nothing, none).shape == (0,)
    assert p.batch_advantages(nothing, 0.0).shape == (0,)
    assert [v.shape for v in p.sequence_sum(nothing, none)] == [(0,)] * 3


log_ratios = st.one_of(st.floats(-3, 3), st.sampled_from([0.0, math.log(1.2), math.log(0.8), -19.0, 19.0]))


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.lists(
        st.tuples(log_ratios, st.floats(-2, 2), st.floats(0, 0.9), st.floats(0, 2)), min_size=1, max_size=9
    ),
    limit=st.sampled_from([1.5, 3.0, 10.0]),
)
def test_clipped_ratio_and_dual_clip(tokens, limit):
    ratio, advantage, low, high = (torch.tensor(c, **WIDE) for c in zip(*tokens))
    loss, r, _ = p.clipped_ratio_loss(ratio, torch.zeros_like(ratio), advantage, low, high)
    dual = p.dual_clip(loss, advantage, limit)
    for i, (d, a, lo, hi) in enumerate(tokens):
        held = min(max(math.exp(d), 1 - lo), 1 + hi) * a
        want = -min(math.exp(d) * a, held)
        assert float(loss[i]) == pytest.approx(want, rel=1e-12, abs=1e-12)
        assert float(r[i]) == pytest.approx(math.exp(d), rel=1e-12)
        assert float(dual[i]) == pytest.approx(min(want, -limit * a) if a < 0 else want, rel=1e-12, abs=1e-12)
    same = p.clipped_ratio_loss(ratio, torch.zeros_like(ratio), advantage, 0.2, 0.28)
    many = p.clipped_ratio_loss(
        ratio, torch.zeros_like(ratio), advantage, torch.full_like(ratio, 0.2), torch.full_like(ratio, 0.28)
    )
    assert all(torch.equal(a, b) for a, b in zip(same, many, strict=True))


def test_a_clipped_token_has_no_gradient():
    generator = torch.Generator().manual_seed(0)
    old, advantage, noise = torch.randn(3, 60, generator=generator, **WIDE)
    logp = (old + 0.5 * noise).requires_grad_()
    loss, _, clipped = p.clipped_ratio_loss(logp, old, advantage, 0.2, 0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert torch.equal(gradient == 0, clipped.bool()) and 0 < clipped.mean() < 1


@settings(max_examples=100, deadline=None)
@given(pairs=st.lists(st.tuples(st.floats(-30, 0), st.floats(-30, 0)), min_size=1, max_size=20))
def test_k3_is_never_negative(pairs):
    logp, ref = (torch.tensor(c, **WIDE) for c in zip(*pairs))
    assert (p.kl_k3(logp, ref) >= 0).all() and (p.kl_k3(logp, logp) == 0).all()
    assert (p.kl_k3(logp.float(), ref.float()) >= 0).all()


def test_k3_is_unbiased_and_k2_has_the_gradient_of_the_divergence():
    """Over all tokens of a distribution, exactly: E_p[k3] = KL(p || q), E_p[grad k2] = grad KL(p || q)."""
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 50, generator=generator, **WIDE)
    logits.requires_grad_()
    lp, lq = logits.log_softmax(-1), other.log_softmax(-1)
    divergence = (lp.exp() * (lp - lq)).sum()
    torch.testing.assert_close((lp.exp() * p.kl_k3(lp, lq)).sum(), divergence, rtol=1e-12, atol=1e-12)
    (want,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    (got,) = torch.autograd.grad((lp.detach().exp() * p.kl_k2(lp, lq)).sum(), logits)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.tuples(st.floats(-9, 9), st.integers(0, 4)), max_size=20))
def test_sums_over_sequences(values):
    numbers = torch.tensor([v for v, _ in values], **WIDE)
    sequence = torch.tensor([s for _, s in values], dtype=torch.long)
    sums, tokens, index = p.sequence_sum(numbers, sequence)
    names = sorted(set(sequence.tolist()))
    assert tokens.tolist() == [sequence.tolist().count(s) for s in names]
    assert sums.tolist() == pytest.approx([math.fsum(v for v, s in values if s == n) for n in names])
    assert [names[i] for i in index.tolist()] == sequence.tolist()
    assert p.first_of(sequence.double(), index, len(names)).tolist() == names


def test_weights():
    lengths = torch.tensor([3.0, 0.0, 1.0, 4.0], **WIDE)
    per_answer = p.sequence_mean(lengths)
    assert float((per_answer * lengths).sum()) == pytest.approx(3 / 4)  # a silent answer counts in the denominator
    assert torch.isfinite(per_answer).all()
    assert float((p.token_mean(lengths) * lengths).sum()) == pytest.approx(1)
    assert p.constant_length(lengths, 10).tolist() == [1 / 40] * 4
    for weights in (p.sequence_mean, p.token_mean, lambda n: p.constant_length(n, 5)):
        assert weights(torch.zeros(0, **WIDE)).shape == (0,) and torch.isfinite(weights(torch.zeros(2, **WIDE))).all()
