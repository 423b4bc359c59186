"""What a method makes of a batch of rollouts: who is compared, who counts in the loss, and with which advantage."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ondol.errors import OndolError
from ondol.methods.base import ActorCritic, Method, Scored
from ondol.methods.gae import explained_variance
from ondol.records import Group, Trajectory
from ondol.train.packing import Sequence_

#: trajectories -> the critic's value of each one's trained tokens
Values = Callable[[Sequence[Trajectory]], list[Tensor]]


@dataclass
class Credit:
    """N trajectories of the kept groups, those of a group side by side.

    Attributes:
        group: [N] which group; rewards: [N] as the method shaped them; counted: [N] whether it counts in the loss.
        advantages: N numbers, or N tensors with one number per trained token.
        values, returns: N tensors, one number per trained token; None without a critic.
        factors: N lists, what each trained token's weight in the loss is multiplied with; None for 1.
    """

    trajectories: list[Trajectory]
    group: list[int]
    rewards: Tensor
    counted: list[bool]
    advantages: list[float] | list[Tensor]
    values: list[Tensor] | None = None
    returns: list[Tensor] | None = None
    factors: list[list[float]] | None = None

    def touched(self, i: int) -> bool:
        """Whether trajectory `i` has an advantage other than zero and counts, with any of its tokens."""
        a = self.advantages[i]
        return self.counted[i] and any(self.trajectories[i].trained) and _nonzero(a)

    def updates(self, minibatches: int) -> list[list[int]]:
        """Indices of trajectories in runs of whole groups, in order: one run an update."""
        groups = sorted(set(self.group))
        size = -(-len(groups) // minibatches) if groups else 1
        chosen = [set(groups[i : i + size]) for i in range(0, len(groups), size)]
        return [[i for i, g in enumerate(self.group) if g in c] for c in chosen]

    def sequences(self, members: Sequence[int], method: Method) -> list[Sequence_]:
        """What one update trains on: its counted members, weighted among themselves. Empty when none of them counts."""
        counted = [i for i in members if self.counted[i]]
        lengths = torch.tensor([sum(self.trajectories[i].trained) for i in counted], dtype=torch.float64)
        if not lengths.any():
            return []
        return [
            self._sequence(i, float(w))
            for i, w in zip(counted, method.token_weights(lengths), strict=True)
            if self.touched(i) or not method.skip_zero_advantage
        ]

    def monte_carlo(self, method: ActorCritic) -> list[Tensor]:
        """The returns that followed each trained token."""
        scored = Scored(self.rewards, torch.tensor(self.group), self.trajectories)
        return method.returns(scored, [sum(t.trained) for t in self.trajectories])

    def explained_variance(self, returns: list[Tensor]) -> float:
        """How much of the returns the critic foresaw, over the trained tokens of what counts."""
        chosen = [i for i, counts in enumerate(self.counted) if counts]
        if self.values is None or not chosen:
            return 0.0
        return explained_variance(torch.cat([self.values[i] for i in chosen]), torch.cat([returns[i] for i in chosen]))

    def _sequence(self, i: int, weight: float) -> Sequence_:
        def listed(values: list[Tensor] | None) -> list[float] | None:
            return None if values is None else values[i].tolist()

        a = self.advantages[i]
        return Sequence_(
            self.trajectories[i],
            i,
            a.tolist() if isinstance(a, Tensor) else a,
            weight if self.factors is None else [weight * f for f in self.factors[i]],
            self.group[i],
            float(self.rewards[i]),
            listed(self.values),
            listed(self.returns),
        )

    def metrics(self, sampled: int) -> dict[str, float]:
        """How much of a step's `sampled` trajectories the loss hears of."""
        n, members = len(self.trajectories), dict.fromkeys(self.group)
        useful = {self.group[i] for i in range(n) if _nonzero(self.advantages[i])}
        return {
            "groups/kept": float(len(members)),
            "groups/zero_advantage_share": 1 - len(useful) / len(members) if members else 1.0,
            "groups/response_utilisation": sum(self.touched(i) for i in range(n)) / max(sampled, 1),
            "groups/counted_share": sum(self.counted) / n if n else 0.0,
            "reward/shaped": float(self.rewards.mean()) if n else 0.0,
        }


def credit(kept: list[Group], method: Method, memory: dict[str, Any], values: Values | None = None) -> Credit:
    """Ask the method about the groups that its `keep` left. `memory` may be changed; `values` is for critics.

    Raises OndolError for what nothing can be learned from.
    """
    trajectories = [t for g in kept for t in g.trajectories]
    group = [i for i, g in enumerate(kept) for _ in g.trajectories]
    if any(t.turns and not t.ids for t in trajectories):
        raise OndolError(
            "these trajectories are text without token ids (an endpoint sampled them): nothing can be learned from them",
            "sample with the embedded engine to train; endpoints are for evaluation and judging",
        )
    flat = [r for rewards in method.shaped_rewards(kept) for r in rewards]
    _one_each("shaped_rewards", method, flat, trajectories)
    if not all(map(math.isfinite, flat)):
        bad = [t.key for t, r in zip(trajectories, flat) if not math.isfinite(r)][:3]
        raise OndolError(f"rewards are not finite (first trajectories: {bad})", "look at the verifier")
    counted = [bool(c) for counts in method.counted(kept) for c in counts]
    _one_each("counted", method, counted, trajectories)
    rewards = torch.tensor(flat, dtype=torch.float64)
    scored = Scored(rewards, torch.tensor(group), trajectories, memory)
    if isinstance(method, ActorCritic):
        assert values is not None
        before = values(trajectories)
        advantages, returns = method.token_advantages(scored, before)
        _one_each("token_advantages", method, advantages, trajectories)
        _finite("advantages", method, advantages)
        _finite("returns", method, returns)
        return Credit(trajectories, group, rewards, counted, advantages, before, returns)
    per_trajectory = method.advantages(scored) if trajectories else rewards
    _one_each("advantages", method, per_trajectory, trajectories)
    _finite("advantages", method, [per_trajectory])
    return Credit(trajectories, group, rewards, counted, per_trajectory.tolist())


def _one_each(what: str, method: Method, found: Sequence[Any] | Tensor, trajectories: Sequence[Trajectory]) -> None:
    if len(found) != len(trajectories):
        raise OndolError(
            f"{type(method).__name__}.{what} gave {len(found)} numbers for {len(trajectories)} trajectories",
            "give one for each trajectory of the groups that it was asked about",
        )


def _finite(what: str, method: Method, found: Sequence[Tensor]) -> None:
    if not all(bool(torch.isfinite(f).all()) for f in found):
        raise OndolError(
            f"{type(method).__name__} gave {what} that are not finite", "look at its formula and the rewards"
        )


def _nonzero(a: float | Tensor) -> bool:
    return bool(a.any()) if isinstance(a, Tensor) else a != 0
