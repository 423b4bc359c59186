"""DCPO against the formulas of its card: bounds, smoothed advantages over many visits, loss."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_sequences import (  # fmt: skip
    WIDE,
    answers,
    assert_advantages,
    assert_gradient,
    assert_loss,
    group_of,
    mean,
    reward_groups,
    standardised,
    std,
    tame,
)

from ondol.errors import OndolError
from ondol.methods.base import Scored
from ondol.methods.dcpo import DCPO, dac_bounds


def bounds(q: float, low: float = 0.16, high: float = 0.2, cap: float = 10.0) -> tuple[float, float]:
    q = min(q, 1.0)
    if q == 0:
        return 0.5 if low else 1.0, cap
    return 0.5 + 0.5 * math.sqrt(max(1 - 4 * low / q, 0)), min(0.5 + 0.5 * math.sqrt(1 + 4 * high / q), cap)


@settings(max_examples=100, deadline=None)
@given(q=st.floats(0, 1.0001), low=st.one_of(st.just(0.0), st.floats(1e-3, 0.25)), high=st.floats(0.01, 2))
def test_bounds(q, low, high):
    least, most = dac_bounds(torch.tensor([q], **WIDE).log(), low, high)
    want = bounds(q, low, high)
    assert float(least) == pytest.approx(want[0], abs=1e-6) and float(most) == pytest.approx(want[1], rel=1e-9)
    if 4 * low < q <= 1:  # where they come from: |(r - 1) p| with p = r q
        assert float(least * (1 - least)) * q == pytest.approx(low, abs=1e-6)
    if float(most) < 10 and q <= 1:
        assert float(most * (most - 1)) * q == pytest.approx(high)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("low", [0.0, 0.16])
def test_bounds_at_the_ends(dtype, low):
    least, most = dac_bounds(torch.tensor([-math.inf, -1e4, -90.0, 0.0, 1e-3], dtype=dtype), low)
    assert torch.isfinite(least).all() and torch.isfinite(most).all()
    assert most[:3].tolist() == [10] * 3 and float(most[3]) == float(most[4]) < 1.5
    assert (least >= 0.5).all() and (least <= 1).all() and (low == 0 or least[:3].tolist() == [0.5] * 3)


def test_reference_points_of_the_card():
    least, most = bounds(0.9)
    assert 0.9 * least == pytest.approx(0.69, abs=0.01) and 0.9 * most == pytest.approx(1.06, abs=0.01)
    least, most = bounds(0.01)
    assert 0.01 * least == pytest.approx(0.005) and 0.01 * most == pytest.approx(0.05, abs=0.001)


class History:
    """SAS as the card has it, for one prompt. The total's mean and std are kept over visits, each the sum of all."""

    def __init__(self, norm: bool = True) -> None:
        self.i, self.mu, self.var, self.norm = 0, 0.0, 0.0, norm

    def visit(self, rewards: list[float]) -> list[float]:
        mu, var, t = mean(rewards), std(rewards) ** 2, self.i
        self.i, i = t + 1, t + 1
        if t == 0:
            self.mu, self.var = mu, var
        else:
            self.var = (t * self.var + var + t / (t + 1) * (mu - self.mu) ** 2) / (t + 1)
            self.mu = (t * self.mu + mu) / (t + 1)

        def norm(r: float, mu: float, var: float) -> float:
            if not self.norm:
                return r - mu
            return 0.0 if var < 1e-20 else (r - mu) / math.sqrt(var)

        out = []
        for r in rewards:
            new, tot = norm(r, mu, var), norm(r, self.mu, self.var)
            sa_new, sa_tot = (i - 1) / i * new + 1 / i * tot, 1 / i * new + (i - 1) / i * tot
            out.append(sa_new if abs(sa_new) < abs(sa_tot) else sa_tot)
        return out


visits = st.lists(
    st.lists(
        st.one_of(
            st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=6),
            st.builds(lambda r, n: [r] * n, st.sampled_from([0.0, 0.1, 1.0]), st.integers(2, 6)),
        ),
        min_size=2, max_size=2,
    ),
    min_size=1, max_size=6,
)  # fmt: skip


def scored(groups, memory) -> Scored:
    rewards = torch.tensor([r for g in groups for r in g.rewards], **WIDE)
    index = torch.tensor([i for i, g in enumerate(groups) for _ in g.trajectories])
    return Scored(rewards, index, [t for g in groups for t in g.trajectories], memory)


@settings(max_examples=100, deadline=None)
@given(steps=visits, norm=st.booleans())
def test_smooth_advantages_over_visits(steps, norm):
    method, memory, loops = DCPO(norm_by_std=norm), {}, [History(norm), History(norm)]
    for pair in steps:
        groups = [group_of(r, problem=f"p{i}", question=f"q{i}") for i, r in enumerate(pair)]
        got = method.advantages(scored(groups, memory)).tolist()
        want = [a for loop, r in zip(loops, pair, strict=True) for a in loop.visit(r)]
        # where |SA_new| = |SA_tot| the signs may differ, and rounding decides
        for g, w in zip(got, want, strict=True):
            assert abs(g) == pytest.approx(abs(w), abs=1e-9)
    assert {k: v["visits"] for k, v in memory.items()} == {"p0": len(steps), "p1": len(steps)}


def test_an_all_equal_group_teaches_once_its_history_has_both():
    memory: dict = {}
    method = DCPO()

    def visit(rewards):
        return method.advantages(scored([group_of(rewards)], memory)).tolist()

    assert visit([0, 0, 0, 0]) == [0] * 4
    assert visit([0, 1, 0, 0])[1] > 0
    again = visit([1, 1, 1, 1])
    mu = (0 + 0.25 + 1) / 3
    assert len(set(again)) == 1 and again[0] > 0
    assert again[0] == pytest.approx((1 - mu) / memory["p"]["std"] / 3)


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1.0])
def test_a_prompt_that_was_always_equal_stays_at_zero(reward):
    memory: dict = {}
    for size in (3, 7, 4, 6, 3, 8) * 3:
        assert not DCPO().advantages(scored([group_of([reward] * size)], memory)).any()


def test_one_prompt_twice_in_a_step_is_two_visits():
    apart, together = {}, {}
    groups = [group_of([0, 1, 1]), group_of([0, 0, 1])]
    one = [DCPO().advantages(scored([g], apart)) for g in groups]
    both = DCPO().advantages(scored(groups, together))
    torch.testing.assert_close(both, torch.cat(one))
    assert apart == together


def test_two_questions_under_one_id():
    memory: dict = {}
    DCPO().advantages(scored([group_of([0, 1])], memory))
    with pytest.raises(OndolError, match="have the id 'p'"):
        DCPO().advantages(scored([group_of([0, 1], question="another")], memory))


def test_notes_are_plain_json():
    import json

    memory: dict = {}
    DCPO().advantages(scored([group_of([0, 1])], memory))
    assert json.loads(json.dumps(memory)) == memory


@settings(max_examples=60, deadline=None)
@given(groups=reward_groups)
def test_without_history(groups):
    assert_advantages(DCPO(), groups, lambda g: standardised(g, 0.0))
    assert_advantages(DCPO(sas=False), groups, lambda g: standardised(g, 0.0))


def loop_loss(scale: float | None = None):
    """sum_i 1/|o_i| sum_t max(-A r, -A clamp(r, r_min, r_max)), at most -10 A where A < 0; times the scale."""

    def loss(update) -> float:
        total = 0.0
        for a in update:
            for r, old in zip(a.ratios(), a.old, strict=True):
                least, most = bounds(math.exp(old))
                term = max(-a.advantage * r, -a.advantage * min(max(r, least), most))
                total += (min(term, -10 * a.advantage) if a.advantage < 0 else term) / len(a.logp)
        return total * (1 / len(update) if scale is None else scale)

    return loss


@settings(max_examples=80, deadline=None)
@given(update=answers(), scale=st.sampled_from([None, 1.0, 0.25]))
def test_loss(update, scale):
    assert_loss(DCPO(otm_scale=scale), update, loop_loss(scale))


def test_gradient():
    assert_gradient(DCPO(), tame(8, spread=1.0), loop_loss())
