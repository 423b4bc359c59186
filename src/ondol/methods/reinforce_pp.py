"""REINFORCE++ (Hu et al. 2025, arXiv 2501.03262): one sample a prompt will do, because the batch is what normalises.

    A = (R - mean) / std over the whole batch, PPO's clipped ratio
    with `baseline` (the paper's "REINFORCE++ w/ Baseline"): R is first centred inside the prompt's group

The paper's KL penalty is part of each token's reward (k1) in the first form, a k2 loss in the second. Here both have the
k2 loss: its gradient is what k1 in the reward gives to the token itself, without the share of the tokens that follow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ondol.methods.base import Method, Scored, TokenInputs
from ondol.methods.primitives import batch_advantages, clipped_ratio_loss, group_centre, kl_k2, sequence_mean

if TYPE_CHECKING:
    from torch import Tensor


class ReinforcePP(Method):
    """Critic-free PPO with advantages normalised over the batch."""

    family: ClassVar[str] = "REINFORCE"
    objective: ClassVar[str] = "clipped ratio, per-sequence token mean"
    clip: ClassVar[bool] = True
    kl: ClassVar[str] = "yes"
    mechanism: ClassVar[str] = "reward standardised over the whole batch, no critic"
    signal: ClassVar[str] = "verifiable reward or reward model"
    source: ClassVar[str] = "arXiv 2501.03262"

    baseline: bool = Field(default=False, description="centre rewards in their group first; needs groups")
    clip_low: float = Field(default=0.2, gt=0, lt=1, description="lower clip offset; PPO's 0.2")
    clip_high: float = Field(default=0.2, gt=0, description="upper clip offset; PPO's 0.2")
    kl_coef: float = Field(default=0.001, ge=0, description="weight of the KL to the start of RL; 0.001 is common")
    eps: float = Field(default=1e-8, ge=0, description="added to the batch's std; not in the paper's formula")

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    def advantages(self, x: Scored) -> Tensor:
        rewards = group_centre(x.rewards, x.group) if self.baseline else x.rewards
        return batch_advantages(rewards, self.eps)

    def token_weights(self, lengths: Tensor) -> Tensor:
        return sequence_mean(lengths)

    def token_loss(self, x: TokenInputs) -> tuple[Tensor, dict[str, Tensor]]:
        loss, r, clipped = clipped_ratio_loss(x.logp, x.old_logp, x.advantage, self.clip_low, self.clip_high)
        reports = {"policy/clip_share": clipped, "policy/ratio_max": r.detach()}
        if x.reference_logp is not None:
            kl = kl_k2(x.logp, x.reference_logp)
            loss, reports["policy/kl_k2"] = loss + self.kl_coef * kl, kl.detach()
        return loss, reports
