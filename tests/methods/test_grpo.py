"""GRPO against loops written from its formulas, in float64."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ondol.methods.base import TokenInputs
from ondol.methods.grpo import GRPO, clipped_ratio_loss, group_advantages, kl_k3

rewards_of_groups = st.lists(
    st.one_of(
        st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=8),
        st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8),
        st.builds(lambda r, n: [r] * n, st.floats(-1e3, 1e3), st.integers(1, 8)),
    ),
    min_size=1,
    max_size=6,
)


def loop_advantages(groups: list[list[float]], eps: float) -> list[float]:
    out = []
    for rewards in groups:
        mean = math.fsum(rewards) / len(rewards)
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / max(len(rewards) - 1, 1))
        out += [0.0 if len(set(rewards)) == 1 or std + eps == 0 else (r - mean) / (std + eps) for r in rewards]
    return out


@settings(max_examples=200, deadline=None)
@given(groups=rewards_of_groups, eps=st.sampled_from([0.0, 1e-4, 1.0]), shuffle=st.integers(0, 100))
def test_advantages(groups, eps, shuffle):
    want = loop_advantages(groups, eps)
    flat = [
        (r, 3 * g + 5, w)
        for r, g, w in zip([r for g in groups for r in g], [i for i, g in enumerate(groups) for _ in g], want)
    ]
    random.Random(shuffle).shuffle(flat)  # members need not stand side by side, numbers need not be 0, 1, 2...
    rewards, group, want = (list(c) for c in zip(*flat))
    got = group_advantages(torch.tensor(rewards, dtype=torch.float64), torch.tensor(group), eps)
    spread = max(max(g) - min(g) for g in groups)
    if eps or spread == 0 or min(max(g) - min(g) for g in groups if len(set(g)) > 1) > 1e-6:
        torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-7, atol=1e-7)
    equal = torch.tensor([len(set(groups[(g - 5) // 3])) == 1 for g in group])
    assert (got[equal] == 0).all() and torch.isfinite(got).all()


def test_advantages_of_nothing():
    assert group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)


log_ratios = st.one_of(st.floats(-3, 3), st.sampled_from([0.0, math.log(1.2), math.log(0.8), -19.0, 19.0, -90.0]))
token = st.tuples(log_ratios, st.floats(-4, -0.01), st.sampled_from([-2.0, -0.3, 0.0, 0.3, 2.0]), st.floats(-1, 1))


def loop_loss(sequences, method: GRPO) -> float:
    """-1/N sum_i 1/|o_i| sum_t [ min(r A, clip(r) A) - beta (exp(d) - d - 1) ]."""
    total = 0.0
    for tokens, advantage in sequences:
        for ratio, logp, ref in tokens:
            r = math.exp(ratio)
            clipped = min(max(r, 1 - method.clip_low), 1 + method.clip_high)
            objective = min(r * advantage, clipped * advantage)
            d = ref - logp
            objective -= method.kl_coef * (math.exp(d) - d - 1)
            total -= objective / (len(tokens) * len(sequences))
    return total


@settings(max_examples=150, deadline=None)
@given(
    made=st.lists(st.tuples(st.lists(token, max_size=5), st.floats(-2, 2)), min_size=1, max_size=5),
    low=st.sampled_from([0.1, 0.2]),
    high=st.sampled_from([0.2, 0.28]),
    kl_coef=st.sampled_from([0.0, 0.04, 1.0]),
)
def test_loss(made, low, high, kl_coef):
    method = GRPO(clip_low=low, clip_high=high, kl_coef=kl_coef)
    sequences = [([(ratio, lp, lp + d) for ratio, lp, _, d in tokens], a) for tokens, a in made]
    rows = [(i, *t, a) for i, (tokens, a) in enumerate(sequences) for t in tokens]
    wide = {"dtype": torch.float64}
    index = torch.tensor([r[0] for r in rows], dtype=torch.long)
    logp = torch.tensor([r[2] for r in rows], **wide)
    x = TokenInputs(
        logp,
        logp - torch.tensor([r[1] for r in rows], **wide),
        torch.tensor([r[3] for r in rows], **wide) if kl_coef else None,
        torch.tensor([r[4] for r in rows], **wide),
        index,
    )
    loss, reports = method.token_loss(x)
    weights = method.token_weights(torch.tensor([len(t) for t, _ in sequences], **wide))
    close = {"rel": 1e-8, "abs": 1e-12}
    # log-ratios are held at 20 in the code; no clipped value depends on that
    held = [([(max(-20.0, t[0]), *t[1:]) for t in tokens], a) for tokens, a in sequences]
    assert float((loss * weights[index]).sum()) == pytest.approx(loop_loss(held, method), **close)
    assert all(v.shape == loss.shape for v in reports.values())


def test_gradient_against_finite_differences():
    generator = torch.Generator().manual_seed(0)
    n = 60
    old, ref, advantage = (torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(3))
    logp = old + 0.5 * torch.randn(n, generator=generator, dtype=torch.float64)
    edge = torch.minimum((logp - old - math.log(1.2)).abs(), (logp - old - math.log(0.8)).abs())
    assert edge.min() > 1e-4  # no kink within reach of the differences
    method = GRPO(kl_coef=0.3)

    def loss(values: torch.Tensor) -> torch.Tensor:
        return method.token_loss(TokenInputs(values, old, ref, advantage, torch.arange(n)))[0]

    assert torch.autograd.gradcheck(loss, logp.requires_grad_(), eps=1e-6, atol=1e-7)
    _, _, clipped = clipped_ratio_loss(logp, old, advantage, 0.2, 0.2)
    plain = torch.autograd.grad(clipped_ratio_loss(logp, old, advantage, 0.2, 0.2)[0].sum(), logp)[0]
    assert torch.equal(plain == 0, clipped.bool()) and 0 < clipped.mean() < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_extreme_ratios_stay_finite(dtype, advantage):
    logp = torch.tensor([-0.1, -800.0, -0.1, -80.0], dtype=dtype, requires_grad=True)
    old = torch.tensor([-800.0, -0.1, -99.0, -0.1], dtype=dtype)
    method = GRPO(kl_coef=0)
    loss, _ = method.token_loss(TokenInputs(logp, old, None, torch.full((4,), advantage, dtype=dtype), torch.arange(4)))
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(logp.grad).all()
    if advantage > 0:
        torch.testing.assert_close(loss.detach(), -advantage * torch.tensor([1.2, 0, 1.2, 0], dtype=dtype))


@settings(max_examples=100, deadline=None)
@given(pairs=st.lists(st.tuples(st.floats(-30, 0), st.floats(-30, 0)), min_size=1, max_size=20))
def test_k3_is_never_negative(pairs):
    logp, ref = (torch.tensor(c, dtype=torch.float64) for c in zip(*pairs))
    assert (kl_k3(logp, ref) >= 0).all() and (kl_k3(logp, logp) == 0).all()
    assert (kl_k3(logp.float(), ref.float()) >= 0).all()


def test_k3_is_unbiased():
    """Over all tokens of a distribution, exactly: E_p[k3] = KL(p || q)."""
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 50, generator=generator, dtype=torch.float64).log_softmax(-1)
    expectation = (p.exp() * kl_k3(p, q)).sum()
    torch.testing.assert_close(expectation, (p.exp() * (p - q)).sum(), rtol=1e-12, atol=1e-12)


def test_denominators_count_silent_trajectories():
    lengths = torch.tensor([3.0, 0.0, 1.0, 4.0], dtype=torch.float64)
    weights = GRPO().token_weights(lengths)
    assert float((weights * lengths).sum()) == pytest.approx(3 / 4)
    assert torch.isfinite(weights).all()


def test_reference_is_asked_for_only_with_a_penalty():
    assert GRPO().needs_reference and not GRPO().skip_zero_advantage
    assert not GRPO(kl_coef=0).needs_reference and GRPO(kl_coef=0).skip_zero_advantage
