"""Darling: diversity-aware reinforcement learning (arXiv 2509.02534).

The answers to one prompt are put into clusters of the same meaning; an answer's diversity is the share of the others in
other clusters, and its reward is quality times diversity: a wrong answer gains nothing by being new. The rest is GRPO
without the division by the standard deviation, which would magnify the scorer's noise where rewards are nearly equal,
and with a mean over tokens.

Fused rewards are smaller than plain ones and not standardised, so learning is slower at the same learning rate, and at
high ones less stable than GRPO's.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from ondol.errors import OndolError
from ondol.methods.base import Scored
from ondol.methods.grpo import GRPO
from ondol.methods.primitives import group_centre, token_mean
from ondol.parts import make
from ondol.records import Group
from ondol.rewards.diversity import FLOOR, Fusion, among_right, fuse
from ondol.rewards.scorers import PairScorer

if TYPE_CHECKING:
    from torch import Tensor

_RIGHT = 0.5  # score from which an answer counts as right; ours, for scores in [0, 1]


class Darling(GRPO):
    """GRPO on quality times semantic diversity, without the group's std, mean over tokens."""

    objective: ClassVar[str] = "clipped ratio, token mean"
    kl: ClassVar[str] = "optional"
    mechanism: ClassVar[str] = "reward times the share of semantically different answers; no std"
    signal: ClassVar[str] = "verifiable reward or reward model, and a scorer of pairs"
    source: ClassVar[str] = "arXiv 2509.02534"

    kl_coef: float = Field(
        default=0.0, ge=0, description="weight of the KL; 0 for math, 0.001 for chat in the paper's scripts"
    )
    scorer: str | dict[str, Any] = Field(
        default="exact",
        description="says which two answers mean the same: exact, canonical, short-answer, ngram, embedding, model, or your own; the paper trains a classifier ('model')",
    )
    floor: float = Field(
        default=FLOOR, ge=0, le=1, description="least diversity; 0.1 in the official code, the paper has none"
    )
    correct_only: bool = Field(
        default=False, description="compare right answers only, the others get the floor; the official code's for math"
    )
    fusion: Fusion = Field(
        default="multiply", description="multiply (the paper's), add, or norm_add (standardised in the group)"
    )
    add_bias: bool = Field(
        default=False, description="take the group's smallest quality off before multiplying: for rewards below 0"
    )
    weights: tuple[float, float] = Field(
        default=(1.0, 1.0), description="of quality and diversity where they are added"
    )

    @model_validator(mode="after")
    def _sound(self) -> Darling:
        if self.add_bias and self.fusion != "multiply":
            raise ValueError("add_bias is for fusion = 'multiply'")
        _ = self.pair_scorer  # refused now if its table is wrong; a model it may need is loaded when it is asked
        return self

    @cached_property
    def pair_scorer(self) -> PairScorer:
        """The part that `scorer` names."""
        part = make("scorers", self.scorer, "method.scorer")
        if not isinstance(part, PairScorer):
            raise OndolError(
                f"method.scorer: {type(part).__qualname__} is no scorer",
                "derive it from ondol.rewards.scorers.PairScorer",
            )
        return part

    def shaped_rewards(self, groups: list[Group]) -> list[list[float]]:
        return [
            fuse(g.rewards, self.diversity(g), self.fusion, add_bias=self.add_bias, weights=self.weights)
            for g in groups
        ]

    def diversity(self, group: Group) -> list[float]:
        """Of each trajectory's last response."""
        responses = [t.response for t in group.trajectories]
        if not self.correct_only:
            return self.pair_scorer.diversity(responses, self.floor)
        right = [s >= _RIGHT for s in group.scores]
        return among_right(responses, right, lambda chosen: self.pair_scorer.diversity(chosen, self.floor), self.floor)

    def advantages(self, x: Scored) -> Tensor:
        return group_centre(x.rewards, x.group)

    def token_weights(self, lengths: Tensor) -> Tensor:
        return token_mean(lengths)

    def reports(self, groups: list[Group]) -> dict[str, float]:
        """Mean diversity, and clusters of a group."""
        diversity = [d for g in groups for d in self.diversity(g)]
        clusters = [len(self.pair_scorer.clusters([t.response for t in g.trajectories])) for g in groups]
        return {
            "diversity/mean": sum(diversity) / max(len(diversity), 1),
            "diversity/clusters": sum(clusters) / max(len(clusters), 1),
        }
