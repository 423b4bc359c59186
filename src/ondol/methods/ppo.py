"""PPO: proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347), on tokens, with a critic.

A critic says what is to be expected at each token; GAE makes of it an advantage of each token; the ratio to the sampling
policy is clipped so that one batch moves the policy only so far. The reward comes after the last token, the tokens of all
turns of an episode are one row, and no token of an observation is among them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ondol.methods.base import ActorCritic, TokenInputs
from ondol.methods.primitives import clipped_ratio_loss, token_mean

if TYPE_CHECKING:
    from torch import Tensor


class ClippedActorCritic(ActorCritic):
    """What PPO and its descendants share: the clipped ratio, averaged over all tokens."""

    family: ClassVar[str] = "PPO"
    objective: ClassVar[str] = "clipped ratio, token mean, and a value loss"
    clip: ClassVar[bool] = True
    kl: ClassVar[str] = "no"

    clip_low: float = Field(default=0.2, gt=0, lt=1, description="lower clip offset; 0.2 in PPO's table 1")
    clip_high: float = Field(default=0.2, gt=0, description="upper clip offset; PPO has one for both")

    def token_weights(self, lengths: Tensor) -> Tensor:
        return token_mean(lengths)

    def token_loss(self, x: TokenInputs) -> tuple[Tensor, dict[str, Tensor]]:
        loss, r, clipped = clipped_ratio_loss(x.logp, x.old_logp, x.advantage, self.clip_low, self.clip_high)
        return loss, {"policy/clip_share": clipped, "policy/ratio_max": r.detach()}


class PPO(ClippedActorCritic):
    """Proximal policy optimisation with a critic and one lambda for policy and critic."""

    mechanism: ClassVar[str] = "critic and GAE, clipped ratio"
    signal: ClassVar[str] = "any reward"
    source: ClassVar[str] = "arXiv 1707.06347"

    lam: float = Field(default=0.95, ge=0, le=1, description="lambda of GAE; 0.95 in PPO's table 3")

    def lambdas(self, lengths: Tensor) -> tuple[Tensor, float]:
        import torch

        return torch.full_like(lengths, self.lam), self.lam
