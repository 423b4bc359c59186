"""DAPO: decoupled clip and dynamic sampling (Yu et al. 2025, arXiv 2503.14476, section 3). GRPO, and four changes:

    clip-higher        more room above than below, so that unlikely tokens can rise
    dynamic sampling   groups whose answers are all right or all wrong go, and more prompts are sampled in their place
    token mean         every token of the update weighs the same, whatever its answer's length
    over-long penalty  the last tokens before the limit cost reward, more with each, instead of a cliff at the limit

and no KL penalty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from ondol.methods.base import Method, Scored, TokenInputs
from ondol.methods.primitives import clipped_ratio_loss, group_advantages, token_mean

if TYPE_CHECKING:
    from torch import Tensor

    from ondol.records import Group


class DAPO(Method):
    """GRPO for long answers; defaults are the paper's, section 4.1."""

    family: ClassVar[str] = "GRPO"
    objective: ClassVar[str] = "clipped ratio (higher above), token mean"
    clip: ClassVar[bool] = True
    kl: ClassVar[str] = "no"
    mechanism: ClassVar[str] = "all-equal groups resampled, soft over-long penalty"
    signal: ClassVar[str] = "verifiable reward"
    source: ClassVar[str] = "arXiv 2503.14476"
    min_samples: ClassVar[int] = 2

    clip_low: float = Field(default=0.2, gt=0, lt=1, description="lower clip offset; 0.2 in the paper")
    clip_high: float = Field(default=0.28, gt=0, description="upper clip offset; 0.28 in the paper")
    eps: float = Field(default=1e-4, ge=0, description="added to the group's std; not in the paper's formula")
    dynamic_sampling: bool = Field(default=True, description="drop groups whose scores are all equal, sample others")
    resamples: int = Field(
        default=9,
        ge=0,
        description="how often more prompts are sampled at most; 10 batches in all in the official script",
    )
    max_response: int = Field(default=20480, ge=1, description="tokens of an answer, with which the penalty is whole")
    overlong_cache: int = Field(default=4096, ge=0, description="tokens before that over which the penalty grows")
    overlong_penalty: float = Field(
        default=0.5, ge=0, description="the whole penalty; the paper's 1 is for rewards of -1 and 1, ours are 0 and 1"
    )

    @model_validator(mode="after")
    def _room(self) -> DAPO:
        if self.overlong_cache > self.max_response:
            raise ValueError(
                f"overlong_cache ({self.overlong_cache}) is part of max_response ({self.max_response}): give at most that"
            )
        return self

    @property
    def max_resamples(self) -> int:
        return self.resamples if self.dynamic_sampling else 0

    def keep(self, groups: list[Group]) -> list[Group]:
        # by score, not by reward: a penalty for length is no difference in success
        return [g for g in groups if len(set(g.scores)) > 1] if self.dynamic_sampling else groups

    def shaped_rewards(self, groups: list[Group]) -> list[list[float]]:
        return [[t.reward - self._overlong(t.sampled_tokens) for t in g.trajectories] for g in groups]

    def _overlong(self, tokens: int) -> float:
        """What an answer of that many tokens loses (equation 13)."""
        over = tokens - (self.max_response - self.overlong_cache)
        if over <= 0:
            return 0.0
        return self.overlong_penalty * min(over / max(self.overlong_cache, 1), 1.0)

    def advantages(self, x: Scored) -> Tensor:
        return group_advantages(x.rewards, x.group, self.eps)

    def token_weights(self, lengths: Tensor) -> Tensor:
        return token_mean(lengths)

    def token_loss(self, x: TokenInputs) -> tuple[Tensor, dict[str, Tensor]]:
        loss, r, clipped = clipped_ratio_loss(x.logp, x.old_logp, x.advantage, self.clip_low, self.clip_high)
        return loss, {"policy/clip_share": clipped, "policy/ratio_max": r.detach()}
