"""Made-up updates for tests of losses: sequences of plain numbers, and what a method makes of them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import strategies as st

from ondol.methods.base import Method, Scored, TokenInputs
from ondol.records import Group, Problem, StopReason, Trajectory

WIDE = {"dtype": torch.float64}


@dataclass
class Answer:
    """One trajectory: log-probs of its tokens now, at sampling, and of the reference."""

    logp: list[float]
    old: list[float]
    ref: list[float]
    advantage: float = 0.0
    reward: float = 0.0
    group: int = 0

    @property
    def log_ratios(self) -> list[float]:
        return [a - b for a, b in zip(self.logp, self.old, strict=True)]

    def ratios(self) -> list[float]:
        """The library holds log ratios at +-20."""
        return [math.exp(min(max(d, -20.0), 20.0)) for d in self.log_ratios]


_ratio = st.one_of(st.floats(-3, 3), st.sampled_from([0.0, math.log(1.2), math.log(0.8), -19.0, 19.0, -90.0]))
_token = st.tuples(st.floats(-4, -0.01), _ratio, st.floats(-1, 1))


@st.composite
def answers(draw) -> list[Answer]:
    """One to four groups of answers, some of no tokens, some of one, with ratios from tame to extreme."""
    out = []
    for group in range(draw(st.integers(1, 4))):
        for _ in range(draw(st.integers(1, 4))):
            tokens = draw(st.lists(_token, max_size=4))
            a = draw(st.sampled_from([-2.0, -0.5, 0.0, 0.5, 1.5]))
            logp = [t[0] for t in tokens]
            old, ref = [t[0] - t[1] for t in tokens], [t[0] + t[2] for t in tokens]
            out.append(Answer(logp, old, ref, a, draw(st.sampled_from([0.0, 1.0])), 7 * group + 3))
    return out


def tame(seed: int, groups: int = 3, size: int = 4, spread: float = 0.5, length: int = 5) -> list[Answer]:
    """A random update of mixed groups whose ratios are near 1."""
    draw = random.Random(seed)
    out = []
    for group in range(groups):
        for i in range(size):
            old = [-3 * draw.random() - 0.05 for _ in range(draw.randint(1, length))]
            logp = [o + draw.gauss(0, spread) for o in old]
            ref = [o + draw.gauss(0, spread) for o in old]
            out.append(Answer(logp, old, ref, draw.gauss(0, 1), float(i % 2 == group % 2), group))
    return out


def inputs(update: Sequence[Answer], reference: bool = False, dtype: torch.dtype = torch.float64) -> TokenInputs:
    """What the learner hands to a loss."""
    rows = [(lp, o, r, a.advantage, i, a.group, a.reward) for i, a in enumerate(update) for lp, o, r in zip(a.logp, a.old, a.ref)]  # fmt: skip
    logp, old, ref, advantage, sequence, group, reward = zip(*rows, strict=True) if rows else [()] * 7
    as_ = {"dtype": dtype}
    return TokenInputs(
        torch.tensor(logp, **as_).requires_grad_(),
        torch.tensor(old, **as_),
        torch.tensor(ref, **as_) if reference else None,
        torch.tensor(advantage, **as_),
        torch.tensor(sequence, dtype=torch.long),
        torch.tensor(group, dtype=torch.long),
        torch.tensor(reward, **as_),
    )


def loss_and_gradient(method: Method, update: Sequence[Answer]) -> tuple[float, list[list[float]]]:
    """The update's loss as the learner adds it up, and its slope at each token of each answer."""
    x = inputs(update, method.needs_reference)
    loss, reports = method.token_loss(x)
    assert loss.shape == x.logp.shape and all(v.shape == loss.shape for v in reports.values())
    weights = method.token_weights(torch.tensor([len(a.logp) for a in update], **WIDE))
    total = (loss * weights[x.sequence]).sum()
    (gradient,) = torch.autograd.grad(total, x.logp, allow_unused=True) if len(x.logp) else (x.logp,)
    assert torch.isfinite(total) and torch.isfinite(gradient).all()
    flat, out = gradient.tolist(), []
    for a in update:
        out.append([flat.pop(0) for _ in a.logp])
    return total.item(), out


def assert_loss(method: Method, update: Sequence[Answer], reference: Callable[[Sequence[Answer]], float]) -> None:
    got, _ = loss_and_gradient(method, update)
    assert got == pytest.approx(reference(update), rel=1e-8, abs=1e-10)


def assert_gradient(method: Method, update: Sequence[Answer], reference: Callable[[Sequence[Answer]], float]) -> None:
    """Autograd's slopes of the method against finite differences of a reference written as a loop."""
    _, gradient = loss_and_gradient(method, update)
    h = 1e-6
    for i, a in enumerate(update):
        for t in range(len(a.logp)):
            ends = []
            for step in (h, -h):
                moved = replace(a, logp=[v + step * (s == t) for s, v in enumerate(a.logp)])
                ends.append(reference([*update[:i], moved, *update[i + 1 :]]))
            assert gradient[i][t] == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5, abs=1e-7), (i, t)


#: groups of rewards: ties, all equal, single, mixed signs; values that differ do so by 0.01 at least
reward_groups = st.lists(
    st.one_of(
        st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=8),
        st.lists(st.integers(-1000, 1000).map(lambda v: v / 100), min_size=1, max_size=8),
        st.builds(lambda r, n: [r / 100] * n, st.integers(-1000, 1000), st.integers(1, 8)),
    ),
    min_size=1,
    max_size=6,
)


def assert_advantages(
    method: Method, groups: list[list[float]], reference: Callable[[list[list[float]]], list[list[float]]]
) -> None:
    """Against a loop over groups; members are shuffled and groups numbered oddly first."""
    rows = [(r, 3 * g + 5, w) for g, (own, want) in enumerate(zip(groups, reference(groups), strict=True)) for r, w in zip(own, want, strict=True)]  # fmt: skip
    random.Random(len(rows)).shuffle(rows)
    rewards, group, want = (list(c) for c in zip(*rows, strict=True))
    got = method.advantages(Scored(torch.tensor(rewards, **WIDE), torch.tensor(group)))
    torch.testing.assert_close(got, torch.tensor(want, **WIDE), rtol=1e-9, atol=1e-9)


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def std(values: Sequence[float]) -> float:
    """Unbiased; 0 for one value and for equal ones."""
    if len(set(values)) == 1:
        return 0.0
    return math.sqrt(math.fsum((v - mean(values)) ** 2 for v in values) / (len(values) - 1))


def standardised(groups: list[list[float]], eps: float = 1e-4) -> list[list[float]]:
    """GRPO's advantages."""
    return [[0.0 if std(g) == 0 else (r - mean(g)) / (std(g) + eps) for r in g] for g in groups]


def clipped(r: float, a: float, low: float, high: float) -> float:
    """PPO's objective of one token."""
    return min(r * a, min(max(r, 1 - low), 1 + high) * a)


def group_of(
    scores: Sequence[float], lengths: Sequence[int] | None = None, problem: str = "p", question: str = "q"
) -> Group:
    """A group of trajectories with these scores (rewards equal to them), sampled lengths and problem."""
    p = Problem(problem, question, "a")
    out = []
    for i, score in enumerate(scores):
        n = 1 if lengths is None else lengths[i]
        ids, policy = [1] * (n + 2), [False] * 2 + [True] * n
        t = Trajectory((0, 0, i), p, ids, 2, policy, policy, [0.0] * (n + 2), [-1] * 2 + [0] * n)
        t.score = t.reward = score
        t.stop_reason = StopReason.ANSWERED
        out.append(t)
    return Group(p, out)
