"""CISPO: clipped importance-sampling weights (MiniMax-M1 2025, arXiv 2506.13585, section 3.1).

PPO's clip takes the gradient away from tokens whose ratio moved far: often the rare ones where reasoning turns. CISPO
clips the weight instead, and no token loses its gradient:

    loss_t = -sg( clip(rho_t, 1 - low, 1 + high) ) * A * log pi_t      mean over all tokens of the update
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ondol.methods.base import Method, Scored, TokenInputs
from ondol.methods.primitives import group_advantages, ratio, token_mean

if TYPE_CHECKING:
    from torch import Tensor


class CISPO(Method):
    """Off-policy REINFORCE with bounded weights and GRPO's advantage."""

    family: ClassVar[str] = "GRPO"
    objective: ClassVar[str] = "clipped weight times log-probability, token mean"
    clip: ClassVar[bool] = True
    kl: ClassVar[str] = "no"
    mechanism: ClassVar[str] = "clips the importance weight, not the gradient"
    signal: ClassVar[str] = "verifiable reward or reward model"
    source: ClassVar[str] = "arXiv 2506.13585"
    min_samples: ClassVar[int] = 2

    clip_low: float = Field(
        default=1.0, gt=0, le=1, description="lower offset of the weight; 1 is none, as in the paper"
    )
    clip_high: float = Field(
        default=4.0,
        gt=0,
        description="upper offset; the paper gives no number, weights up to 5 are ScaleRL's (2510.13786)",
    )
    eps: float = Field(default=1e-4, ge=0, description="added to the group's std; not in the paper's formula")

    def advantages(self, x: Scored) -> Tensor:
        return group_advantages(x.rewards, x.group, self.eps)

    def token_weights(self, lengths: Tensor) -> Tensor:
        return token_mean(lengths)

    def token_loss(self, x: TokenInputs) -> tuple[Tensor, dict[str, Tensor]]:
        r = ratio(x.logp, x.old_logp).detach()
        weight = r.clamp(1 - self.clip_low, 1 + self.clip_high)
        return -weight * x.advantage * x.logp, {
            "policy/clip_share": (weight != r).to(x.logp.dtype),
            "policy/ratio_max": r,
        }
