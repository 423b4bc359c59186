"""Corrections for samples of older weights: against the formula by hand, and where two ways must be one."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from float64 import exact
from ondol.methods.grpo import GRPO
from ondol.recipe import OptimizerSettings
from ondol.records import Group, Problem, Trajectory
from ondol.train.learner import Learner
from ondol.train.off_policy import correct, is_stale
from ondol.train.optimizer import Optimizer
from ondol.train.packing import Sequence_
from train_data import trajectories

NUMBERS = st.floats(-700, 0)


def learner(cap: float | None, rate: float = 1e-3) -> Learner:
    model, _ = exact("llama")
    made = Learner(model, Optimizer(model, OptimizerSettings(learning_rate=rate)), importance_cap=cap)
    made.version = 3
    return made


def groups(version: int) -> list[Group]:
    out: dict[int, list[Trajectory]] = {}
    for t in trajectories(seed=2):
        t.version = [version if s else -1 for s in t.sampled]
        out.setdefault(t.key[1], []).append(t)
    for ts in out.values():
        for i, t in enumerate(ts):
            t.reward = float(i % 2)
    return [Group(ts[0].problem, ts) for ts in out.values()]


@given(
    st.lists(st.tuples(NUMBERS, NUMBERS, st.booleans(), st.integers(2, 3)), min_size=1, max_size=12), st.floats(1, 50)
)
def test_factors_are_the_formula(rows, cap):
    n = len(rows)
    t = Trajectory((0, 0, 0), Problem("p", "q", "a"), [9] * (n + 1), 1, [False] + [True] * n, [False] + [r[2] for r in rows],
                   [0.0] + [r[0] for r in rows], [-1] + [r[3] for r in rows])  # fmt: skip
    now = [0.0] + [r[1] for r in rows]
    stale = [r for r in rows if r[2] and r[3] == 2]
    assert is_stale(t, 3) == bool(stale)
    found = correct([t, t], [now, None], 3, cap)
    want = [1.0 if r[3] == 3 else min(math.exp(min(r[1] - r[0], 700)), cap) for r in rows if r[2]]
    assert found.factors[0] == pytest.approx(want, rel=1e-12) and found.factors[1] == [1.0] * len(want)
    assert found.trajectories[0].logp[1:] == [r[1] if r[2] and r[3] == 2 else r[0] for r in rows]
    assert found.trajectories[1] is t
    if stale:
        assert found.reports["off_policy/kl"] == pytest.approx(sum(r[0] - r[1] for r in stale) / len(stale))


def test_nothing_stale_changes_nothing():
    plain, corrected = learner(None), learner(2.0)
    found = [each.reinforce(groups(version=3), GRPO(kl_coef=0, minibatches=2)) for each in (plain, corrected)]
    for a, b in zip(plain.model.parameters(), corrected.model.parameters()):
        assert torch.equal(a, b)
    assert found[1]["off_policy/stale_share"] == 0 and found[1]["off_policy/weight"] == 1


def test_without_clip_and_cap_both_ways_are_one():
    """ratio to the sampling weights = (ratio to the present ones) x (present over sampling)."""
    method = GRPO(kl_coef=0, clip_low=0.999999, clip_high=1e9)
    plain, corrected = learner(None), learner(1e9)
    for each in (plain, corrected):
        each.reinforce(groups(version=1), method)
    for a, b in zip(plain.model.parameters(), corrected.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_gradient_is_the_capped_one():
    """At the first update the ratio is 1: the gradient is that of sum(weight x factor x advantage x logp), whatever the clip."""
    cap, method = 1.5, GRPO(kl_coef=0)
    one = learner(cap, rate=1e-4)
    before = copy.deepcopy(one.model)
    work = groups(version=1)
    one.reinforce(work, method)
    by_hand = Learner(before, Optimizer(before, OptimizerSettings(learning_rate=1e-4)))
    members = [t for g in work for t in g.trajectories]
    now = by_hand._logp_now(members, [True] * len(members))
    advantages = [a for g in work for a in method_advantages(g, method)]
    lengths = torch.tensor([sum(t.trained) for t in members], dtype=torch.float64)
    sequences = []
    for i, (t, w) in enumerate(zip(members, method.token_weights(lengths).tolist())):
        factors = [min(math.exp(n - o), cap) for n, o, a in zip(now[i], t.logp, t.trained) if a]
        sequences.append(Sequence_(t, i, advantages[i], [w * f for f in factors]))
    by_hand.apply(by_hand.pack(sequences), lambda logp, batch, reference: (-logp * batch.advantage, {}))
    for a, b in zip(one.model.parameters(), by_hand.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def method_advantages(group: Group, method: GRPO) -> list[float]:
    from ondol.methods.base import Scored

    rewards = torch.tensor([t.reward for t in group.trajectories], dtype=torch.float64)
    return method.advantages(Scored(rewards, torch.zeros(len(rewards), dtype=torch.long), group.trajectories)).tolist()
