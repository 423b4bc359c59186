"""GMPO: geometric-mean policy optimisation (Zhao et al. 2025, arXiv 2507.20673, section 3).

GRPO averages token ratios arithmetically, so one outlier can carry an answer. The geometric mean does not:

    J_i = sgn(A) * [ prod_t |min(rho_t A, clip(rho_t, e^-c, e^c) A)| ]^(1 / |o_i|)

Clipping is by token, in log space, and bites only on the side where the sign of A lets the objective grow; so with
A > 0 a token counts min(log rho, c), with A < 0 max(log rho, -c).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ondol.methods.base import Method, Scored, TokenInputs
from ondol.methods.primitives import first_of, group_advantages, ratio, sequence_mean, sequence_sum

if TYPE_CHECKING:
    from torch import Tensor


class GMPO(Method):
    """GRPO with the geometric mean of clipped token ratios; defaults are the paper's."""

    family: ClassVar[str] = "GRPO"
    objective: ClassVar[str] = "geometric mean of clipped token ratios"
    clip: ClassVar[bool] = True
    kl: ClassVar[str] = "no"
    mechanism: ClassVar[str] = "outlier tokens weigh by the log of their ratio"
    signal: ClassVar[str] = "verifiable reward"
    source: ClassVar[str] = "arXiv 2507.20673"
    min_samples: ClassVar[int] = 2

    clip_log: float = Field(default=0.4, gt=0, description="log ratios are held within +- this; 0.4 in the paper")
    eps: float = Field(default=1e-4, ge=0, description="added to the group's std; not in the paper's formula")

    def advantages(self, x: Scored) -> Tensor:
        return group_advantages(x.rewards, x.group, self.eps)

    def token_weights(self, lengths: Tensor) -> Tensor:
        return sequence_mean(lengths)

    def token_loss(self, x: TokenInputs) -> tuple[Tensor, dict[str, Tensor]]:
        import torch

        sign = torch.where(x.advantage < 0, -1.0, 1.0).to(x.logp.dtype)
        gain = sign * (x.logp - x.old_logp)  # grows with the objective, whatever the sign
        held = sign * gain.clamp(max=self.clip_log)
        total, tokens, index = sequence_sum(held, x.sequence)
        mean = total / tokens
        r = ratio(mean, torch.zeros_like(mean))
        loss = -r * first_of(x.advantage, index, len(tokens))
        clipped = (gain.detach() > self.clip_log).to(x.logp.dtype)
        return loss[index], {"policy/clip_share": clipped, "policy/ratio_max": r.detach()[index]}
