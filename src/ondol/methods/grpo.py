"""GRPO: group-relative policy optimisation (Shao et al. 2024, DeepSeekMath, arXiv 2402.03300, section 4.1).

For each problem G answers are sampled; an answer's advantage is its reward standardised inside its group, so no
critic is needed. The loss is PPO's clipped ratio, averaged over the tokens of each answer and then over answers, plus
a KL penalty to a frozen reference with the k3 estimator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ondol.methods.base import Method, TokenInputs

if TYPE_CHECKING:
    from torch import Tensor


def group_advantages(rewards: Tensor, group: Tensor, eps: float = 1e-4) -> Tensor:
    """A_i = (R_i - mean) / (std + eps) over the members of i's group; std unbiased.

    rewards [N], group [N] integers -> [N]. Exactly 0 in a group of one and where all rewards are equal.
    """
    import torch

    _, index = torch.unique(group, return_inverse=True)
    count = torch.zeros(int(index.max()) + 1 if len(index) else 0, dtype=rewards.dtype, device=rewards.device)
    count = count.index_add(0, index, torch.ones_like(rewards))
    mean = torch.zeros_like(count).index_add(0, index, rewards) / count
    high = torch.full_like(count, -torch.inf).scatter_reduce(0, index, rewards, "amax")
    low = torch.full_like(count, torch.inf).scatter_reduce(0, index, rewards, "amin")
    centred = torch.where((high == low)[index], 0.0, rewards - mean[index])  # no rounding residue in equal groups
    variance = torch.zeros_like(count).index_add(0, index, centred**2) / (count - 1).clamp(min=1)
    scale = variance[index].sqrt() + eps
    return torch.where(scale > 0, centred / scale, 0.0)


def clipped_ratio_loss(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """-min(r A, clip(r, 1 - low, 1 + high) A) per token, r = exp(logp - old_logp).

    All [T]. Returns (loss, ratio, clipped), `clipped` being 1.0 where the clip bites (the gradient is zero there).
    log r is held within +-20, as verl does: e^89 overflows float32, and 0 * infinity would make the gradient NaN.
    """
    import torch

    ratio = torch.exp((logp - old_logp).clamp(-20, 20))
    plain = ratio * advantage
    bounded = ratio.clamp(1 - low, 1 + high) * advantage
    return -torch.minimum(plain, bounded), ratio, (bounded < plain).to(logp.dtype)


def kl_k3(logp: Tensor, reference_logp: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = reference_logp - logp, per token [T]: unbiased for KL(policy || reference), never negative."""
    import torch

    d = reference_logp - logp
    return torch.expm1(d) - d


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

    def advantages(self, rewards: Tensor, group: Tensor) -> Tensor:
        return group_advantages(rewards, group, self.eps)

    def token_weights(self, lengths: Tensor) -> Tensor:
        return 1 / (len(lengths) * lengths.clamp(min=1))

    def token_loss(self, x: TokenInputs) -> tuple[Tensor, dict[str, Tensor]]:
        loss, ratio, clipped = clipped_ratio_loss(x.logp, x.old_logp, x.advantage, self.clip_low, self.clip_high)
        reports = {"policy/clip_share": clipped, "policy/ratio_max": ratio.detach()}
        if x.reference_logp is not None:
            kl = kl_k3(x.logp, x.reference_logp)
            loss = loss + self.kl_coef * kl
            reports["policy/kl_k3"] = kl.detach()
        return loss, reports
