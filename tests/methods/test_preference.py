"""Preference methods against loops written from their formulas, and how pairs are made."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ondol.errors import OndolError
from ondol.methods.base import Scored, TokenInputs
from ondol.methods.dpo import DPO
from ondol.methods.ipo import IPO
from ondol.methods.kto import KTO
from ondol.methods.orpo import ORPO, log_odds
from ondol.methods.preference import pairs_of
from ondol.methods.simpo import SimPO
from ondol.records import Group, Problem, StopReason, Trajectory

WIDE = {"dtype": torch.float64}
PROBLEM = Problem("p", "q", "a")


def answer(score: float, sample: int = 0, tokens: int = 2) -> Trajectory:
    on = [False] + [True] * tokens
    flat = [0.0] * (tokens + 1)
    return Trajectory((0, 0, sample), PROBLEM, [1] * len(on), 1, on, on, flat, [0] * len(on), [], [], StopReason.ANSWERED, score, score)  # fmt: skip


def group_of(scores) -> Group:
    return Group(PROBLEM, [answer(s, i) for i, s in enumerate(scores)])


def inputs(pairs, reference: bool, constant=None, group=True) -> tuple[TokenInputs, torch.Tensor]:
    """pairs: of (chosen tokens, rejected tokens), each token (logp, reference logp). Also the lengths by sequence."""
    rows = [
        (*token, 1.0 - 2 * k, 2 * p + k, p if group else 2 * p + k)
        for p, pair in enumerate(pairs)
        for k, tokens in enumerate(pair)
        for token in tokens
    ]
    columns = list(zip(*rows))
    logp, ref, sign = (torch.tensor(c, **WIDE) for c in columns[:3])
    sequence, group_ = (torch.tensor(c) for c in columns[3:])
    x = TokenInputs(
        logp.requires_grad_(),
        logp.detach(),
        ref if reference else None,
        sign,
        sequence,
        group_,
        (sign + 1) / 2,
        constant,
    )
    return x, torch.tensor([len(tokens) for pair in pairs for tokens in pair], **WIDE)


def total(method, pairs, constant=None) -> tuple[float, dict[str, torch.Tensor]]:
    """The learner's sum of weight * loss."""
    x, lengths = inputs(pairs, method.needs_reference, constant)
    loss, reports = method.token_loss(x)
    assert loss.shape == x.logp.shape and all(r.shape == loss.shape and not r.requires_grad for r in reports.values())
    return (loss * method.token_weights(lengths)[x.sequence]).sum().item(), reports


def log_sigmoid(v: float) -> float:
    return -math.log1p(math.exp(-v)) if v > -700 else v


def loop(method, pairs) -> float:
    """Mean over pairs, from the papers' formulas."""
    losses = []
    for chosen, rejected in pairs:
        w, ref_w = (math.fsum(t[k] for t in chosen) for k in (0, 1))
        l, ref_l = (math.fsum(t[k] for t in rejected) for k in (0, 1))  # noqa: E741
        d = (w - ref_w) - (l - ref_l)
        if isinstance(method, DPO):
            losses.append(-log_sigmoid(method.beta * d))
        elif isinstance(method, IPO):
            losses.append((d - 1 / (2 * method.tau)) ** 2)
        elif isinstance(method, SimPO):
            losses.append(-log_sigmoid(method.beta * w / len(chosen) - method.beta * l / len(rejected) - method.gamma))
        elif isinstance(method, ORPO):
            p, q = math.exp(w / len(chosen)), math.exp(l / len(rejected))
            ratio = math.log(p / (1 - p)) - math.log(q / (1 - q))
            losses.append(-w / len(chosen) - method.lam * log_sigmoid(ratio))
    return math.fsum(losses) / len(losses)


token = st.tuples(st.floats(-4, -0.01), st.floats(-4, -0.01))
answers = st.lists(token, min_size=1, max_size=5)
pairs_of_tokens = st.lists(st.tuples(answers, answers), min_size=1, max_size=4)
METHODS = [DPO(), DPO(beta=2.5), IPO(), IPO(tau=1.0), SimPO(), SimPO(beta=2.5, gamma=0.0), ORPO(), ORPO(lam=1.0)]


@settings(max_examples=60, deadline=None)
@given(pairs=pairs_of_tokens, method=st.sampled_from(METHODS))
def test_losses(pairs, method):
    got, reports = total(method, pairs)
    assert got == pytest.approx(loop(method, pairs), rel=1e-9, abs=1e-9)
    assert set(reports) == {"preference/margin", "preference/accuracy"}


@settings(max_examples=60, deadline=None)
@given(pairs=pairs_of_tokens, beta=st.floats(0.01, 3), lam_d=st.floats(0, 2), lam_u=st.floats(0, 2))
def test_kto(pairs, beta, lam_d, lam_u):
    method = KTO(beta=beta, lam_d=lam_d, lam_u=lam_u)
    ratios = [(1 - 2 * k, math.fsum(a - b for a, b in tokens)) for pair in pairs for k, tokens in enumerate(pair)]
    z0 = max(0.0, math.fsum(d for _, d in ratios) / len(ratios))
    want = math.fsum(
        lam_d * (1 - 1 / (1 + math.exp(-beta * (d - z0)))) if s > 0 else lam_u * (1 - 1 / (1 + math.exp(-beta * (z0 - d))))
        for s, d in ratios
    ) / len(ratios)  # fmt: skip
    x, _ = inputs(pairs, True)
    constant = method.constant(x)
    assert float(constant) == pytest.approx(z0, abs=1e-12) and not constant.requires_grad
    assert total(method, pairs, constant)[0] == pytest.approx(want, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("method", [*METHODS, KTO()], ids=repr)
def test_gradients(method):
    """Against finite differences, and the way they point: the chosen answer up, the rejected one down."""
    pairs = [
        ([(-0.5, -0.6), (-1.1, -1.0)], [(-0.7, -0.7)]),
        ([(-2.0, -1.9)], [(-0.3, -0.4), (-0.9, -1.0), (-1.5, -1.4)]),
    ]
    constant = torch.tensor(0.1, **WIDE)
    x, lengths = inputs(pairs, method.needs_reference, constant)
    weights = method.token_weights(lengths)[x.sequence]

    def summed(logp: torch.Tensor) -> torch.Tensor:
        y = TokenInputs(logp, x.old_logp, x.reference_logp, x.advantage, x.sequence, x.group, x.reward, constant)
        return (method.token_loss(y)[0] * weights).sum()

    assert torch.autograd.gradcheck(summed, x.logp.detach().requires_grad_(), eps=1e-6, atol=1e-8)
    (gradient,) = torch.autograd.grad(summed(x.logp), x.logp)
    assert torch.equal(gradient.sign(), -x.advantage)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_pair_does_not_depend_on_the_others(method):
    """Micro-batches of whole pairs: the same losses; other numbers for groups and sequences: the same, too."""
    pairs = [([(-0.5, -0.6)], [(-0.7, -0.7), (-2.0, -1.0)]), ([(-2.0, -1.9)], [(-0.3, -0.4)])]
    x, _ = inputs(pairs, method.needs_reference)
    whole = method.token_loss(x)[0]
    parts = torch.cat([method.token_loss(inputs([p], method.needs_reference)[0])[0] for p in pairs])
    torch.testing.assert_close(whole, parts)
    renamed = TokenInputs(x.logp, x.old_logp, x.reference_logp, x.advantage, 9 - x.sequence, 7 - 3 * x.group, x.reward)
    torch.testing.assert_close(method.token_loss(renamed)[0], whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", [*METHODS, KTO()], ids=repr)
def test_extremes_stay_finite(method, dtype):
    for low, high in ((-800.0, 0.0), (0.0, -800.0), (0.0, 0.0), (-1e-8, -800.0)):
        logp = torch.tensor([low, low, high], dtype=dtype, requires_grad=True)
        x = TokenInputs(
            logp, logp.detach(), torch.full((3,), -1.0, dtype=dtype), torch.tensor([1.0, 1.0, -1.0], dtype=dtype),
            torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0]), torch.tensor([1.0, 1.0, 0.0], dtype=dtype),
            torch.zeros((), dtype=dtype),
        )  # fmt: skip
        loss, _ = method.token_loss(x)
        loss.sum().backward()
        assert torch.isfinite(loss).all() and torch.isfinite(logp.grad).all() and loss.dtype == dtype


def test_margin_and_accuracy():
    pairs = [([(-0.5, -0.6)], [(-0.7, -0.6)]), ([(-2.0, -1.0)], [(-0.3, -0.4)])]
    _, reports = total(DPO(), pairs)
    torch.testing.assert_close(reports["preference/margin"], torch.tensor([0.02, 0.02, -0.11, -0.11], **WIDE))
    assert reports["preference/accuracy"].tolist() == [1, 1, 0, 0]


def test_log_odds():
    p = torch.tensor([1e-9, 0.1, 0.5, 0.9, 1 - 1e-5], **WIDE)
    torch.testing.assert_close(log_odds(p.log()), (p / (1 - p)).log(), rtol=1e-9, atol=1e-9)


scores = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=9)


@settings(max_examples=150, deadline=None)
@given(scores=scores, most=st.integers(1, 5))
def test_pairs(scores, most):
    group = group_of(scores)
    pairs = pairs_of(group, most)
    ranked = sorted(scores)
    possible = sum(a < b for a, b in zip(ranked[: len(ranked) // 2], reversed(ranked)))
    assert len(pairs) == min(most, possible)
    used = [t.key for p in pairs for t in p.trajectories]
    assert len(set(used)) == len(used) == 2 * len(pairs)
    for pair, low, high in zip(pairs, ranked, reversed(ranked)):
        assert pair.scores == [high, low] and pair.problem is PROBLEM
    if pairs:  # the earliest of equals
        assert pairs[0].trajectories[0].key[2] == scores.index(max(scores))
        assert pairs[0].trajectories[1].key[2] == scores.index(min(scores))
    again = pairs_of(group, most)
    assert [p.trajectories for p in again] == [p.trajectories for p in pairs]


def test_pairs_become_advantages():
    method = DPO(pairs_per_group=2)
    kept = method.keep([group_of([0, 1, 0, 1, 0.5]), group_of([1, 1]), group_of([0.2, 0.7])])
    assert [g.scores for g in kept] == [[1, 0], [1, 0], [0.7, 0.2]]
    rewards = torch.tensor([r for rs in method.shaped_rewards(kept) for r in rs], **WIDE)
    group = torch.arange(len(kept)).repeat_interleave(2)
    assert method.advantages(Scored(rewards, group)).tolist() == [1, -1] * 3


def test_silent_answers_make_no_pair():
    group = Group(PROBLEM, [answer(1, 0, tokens=0), answer(0, 1), answer(0.5, 2)])
    assert [g.scores for g in DPO().keep([group])] == [[0.5, 0]]


@pytest.mark.parametrize("cls", [DPO, IPO, SimPO, ORPO])
def test_unpaired_data(cls):
    with pytest.raises(OndolError, match="none of 2 groups holds a better and a worse answer") as caught:
        cls().keep([group_of([1, 1, 1]), group_of([0])])
    assert "kto" in caught.value.remedy


def test_kto_takes_unpaired_data():
    groups = [group_of([1, 1, 1]), group_of([0]), group_of([0.5])]
    method = KTO()
    assert method.keep(groups) == groups
    flat = torch.tensor([r for rs in method.shaped_rewards(groups) for r in rs], **WIDE)
    assert method.advantages(Scored(flat, torch.tensor([0, 0, 0, 1, 2]))).tolist() == [1, 1, 1, -3, 1]  # 4 and 1
    assert method.min_samples == 1


@settings(max_examples=60, deadline=None)
@given(d=st.integers(0, 40), u=st.integers(0, 40), lam_d=st.floats(0.1, 9), lam_u=st.floats(0.1, 9))
def test_classes_of_kto_balance(d, u, lam_d, lam_u):
    """The paper's condition holds, and no weight is changed more than it asks for."""
    up, down = KTO(lam_d=lam_d, lam_u=lam_u).factors(d, u)
    assert KTO(lam_d=lam_d, lam_u=lam_u, balance=False).factors(d, u) == (1, 1) and min(up, down) == 1
    if d and u:
        before, after = lam_d * d / (lam_u * u), lam_d * up * d / (lam_u * down * u)
        assert 1 - 1e-12 <= after <= 4 / 3 + 1e-12
        assert after == pytest.approx(min(max(before, 1), 4 / 3))
    else:
        assert (up, down) == (1, 1)


def test_references():
    assert DPO().needs_reference and IPO().needs_reference and KTO().needs_reference
    assert not SimPO().needs_reference and not ORPO().needs_reference
    assert not any(m.skip_zero_advantage for m in (*METHODS, KTO()))
