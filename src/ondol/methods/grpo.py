"""GRPO: group-relative policy optimisation (Shao et al. 2024, DeepSeekMath, arXiv 2402.03300, section 4.1).

For each problem G answers are sampled; an answer's advantage is its reward standardised inside its group, so no
critic is needed. The loss is PPO's clipped ratio, averaged over the tokens of each answer and then over answers, plus
a KL penalty to a frozen reference with the k3 estimator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ondol.methods.base import Method, Scored, TokenInputs
from ondol.methods.primitives import clipped_ratio_loss, group_advantages, kl_k3, sequence_mean

if TYPE_CHECKING:
    from torch import Tensor


class GRPO(Method):
    """Group-relative policy optimisation; defaults are the paper's."""

    family: ClassVar[str] = "GRPO"
    objective: ClassVar[str] = "clipped ratio, per-sequence token mean"
    clip: ClassVar[bool] = True
    kl: ClassVar[str] = "yes"
    mechanism: ClassVar[str] = "reward standardised in the group, no critic"
    signal: ClassVar[str] = "verifiable reward or reward model"
    source: ClassVar[str] = "arXiv 2402.03300"
    min_samples: ClassVar[int] = 2

    clip_low: float = Field(
        default=0.2, gt=0, lt=1, description="lower clip offset; 0.2 as PPO's, which the paper keeps"
    )
    clip_high: float = Field(default=0.2, gt=0, description="upper clip offset")
    kl_coef: float = Field(
        default=0.04, ge=0, description="weight of the KL to the start of RL; 0.04 in the paper, section 4.1"
    )
    eps: float = Field(
        default=1e-4, ge=0, description="added to the group's std; not in the paper's formula, 1e-4 is common"
    )

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    def advantages(self, x: Scored) -> Tensor:
        return group_advantages(x.rewards, x.group, self.eps)

    def token_weights(self, lengths: Tensor) -> Tensor:
        return sequence_mean(lengths)

    def token_loss(self, x: TokenInputs) -> tuple[Tensor, dict[str, Tensor]]:
        loss, r, clipped = clipped_ratio_loss(x.logp, x.old_logp, x.advantage, self.clip_low, self.clip_high)
        return self._with_kl(loss, {"policy/clip_share": clipped, "policy/ratio_max": r.detach()}, x)

    def _with_kl(self, loss: Tensor, reports: dict[str, Tensor], x: TokenInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the KL penalty, for methods that differ from GRPO in the ratio only."""
        if x.reference_logp is not None:
            kl = kl_k3(x.logp, x.reference_logp)
            loss = loss + self.kl_coef * kl
            reports = {**reports, "policy/kl_k3": kl.detach()}
        return loss, reports
