"""GSPO: group sequence policy optimisation (Zheng et al. 2025, arXiv 2507.18071, section 4.1).

The unit of reward is the answer, so the unit of the ratio is the answer as well:

    s_i = (pi(o_i) / pi_old(o_i))^(1 / |o_i|) = exp(mean over tokens of the log ratio)

clipped as a whole. The bounds are two orders narrower than for tokens, because a mean moves less than its terms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ondol.methods.base import TokenInputs
from ondol.methods.grpo import GRPO
from ondol.methods.primitives import clipped_ratio_loss, first_of, sequence_sum

if TYPE_CHECKING:
    from torch import Tensor


class GSPO(GRPO):
    """GRPO with one ratio for the whole answer; defaults are the paper's, section 5.1."""

    objective: ClassVar[str] = "clipped sequence ratio"
    kl: ClassVar[str] = "optional"
    mechanism: ClassVar[str] = "ratio and clip of the whole answer"
    signal: ClassVar[str] = "verifiable reward"
    source: ClassVar[str] = "arXiv 2507.18071"

    clip_low: float = Field(default=3e-4, gt=0, lt=1, description="lower clip offset; 3e-4 in the paper")
    clip_high: float = Field(default=4e-4, gt=0, description="upper clip offset; 4e-4 in the paper")
    kl_coef: float = Field(default=0.0, ge=0, description="weight of a KL to the start of RL; the paper has none")

    def token_loss(self, x: TokenInputs) -> tuple[Tensor, dict[str, Tensor]]:
        import torch

        total, tokens, index = sequence_sum(x.logp - x.old_logp, x.sequence)
        mean = total / tokens
        advantage = first_of(x.advantage, index, len(tokens))
        loss, s, clipped = clipped_ratio_loss(mean, torch.zeros_like(mean), advantage, self.clip_low, self.clip_high)
        # the answer's loss at each of its tokens: weights of 1 / (N * length) make a mean over answers of it
        reports = {"policy/clip_share": clipped[index], "policy/ratio_max": s.detach()[index]}
        return self._with_kl(loss[index], reports, x)
