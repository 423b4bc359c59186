"""DCPO: dynamic clipping and advantages that remember (arXiv 2509.02333). GRPO, and three parts, each with its switch:

DAC  clip bounds of each token by its old probability q, so that |(r - 1) p| stays bounded: rare tokens get room
SAS  advantages from this visit of a prompt and from all its visits, so that an all-equal group still teaches
OTM  token losses averaged inside each answer only
"""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ondol.errors import OndolError
from ondol.methods.base import Scored, TokenInputs
from ondol.methods.grpo import GRPO
from ondol.methods.primitives import clipped_ratio_loss, dual_clip, sequence_mean

if TYPE_CHECKING:
    from torch import Tensor

    from ondol.records import Problem


def dac_bounds(
    old_logp: Tensor, low: float = 0.16, high: float = 0.2, max_ratio: float = 10.0
) -> tuple[Tensor, Tensor]:
    """Least and greatest ratio of each token [T]: where r (r - 1) q = -low and = high, the latter at most `max_ratio`.

    0.5 below wherever q <= 4 low; never NaN, for q = 0 (logp -inf) or q rounded above 1 either.
    """
    import torch

    q = old_logp.detach().exp().clamp(torch.finfo(old_logp.dtype).tiny, 1)
    least = 0.5 + 0.5 * (1 - 4 * low / q).clamp(min=0).sqrt()
    return least, (0.5 + 0.5 * (1 + 4 * high / q).sqrt()).clamp(max=max_ratio)


def smooth_advantages(rewards: list[float], past: dict[str, Any], norm_by_std: bool = True) -> list[float]:
    """SAS for one prompt's rewards at one visit; `past` ({} at first) holds its visits, mean and std, and is updated."""
    count = len(rewards)
    # exactly the value where all are equal: a rounding residue over a std of 1e-17 would be an advantage
    mean = rewards[0] if min(rewards) == max(rewards) else math.fsum(rewards) / count
    std = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / max(count - 1, 1))
    before, i = past.get("visits", 0), past.get("visits", 0) + 1
    mean_all, std_all = mean, std
    if before:
        shift = mean - past["mean"]
        mean_all = past["mean"] + shift / i
        std_all = math.sqrt((before * past["std"] ** 2 + std**2 + before / i * shift**2) / i)
    past.update(visits=i, mean=mean_all, std=std_all)

    def scale(centred: float, by: float) -> float:
        return centred / by if norm_by_std and by > 0 else 0.0 if norm_by_std else centred

    out = []
    for r in rewards:
        new, total = scale(r - mean, std), scale(r - mean_all, std_all)
        towards_new = (before * new + total) / i
        towards_total = (new + before * total) / i
        out.append(towards_new if abs(towards_new) < abs(towards_total) else towards_total)
    return out


class DCPO(GRPO):
    """GRPO with dynamic clipping and smooth advantages; defaults are the paper's."""

    objective: ClassVar[str] = "ratio clipped by token probability, per-answer token mean"
    kl: ClassVar[str] = "optional"
    mechanism: ClassVar[str] = "dynamic clip bounds, advantages with a prompt's history"
    signal: ClassVar[str] = "verifiable reward"
    source: ClassVar[str] = "arXiv 2509.02333"

    dac: bool = Field(default=True, description="clip bounds by old probability; off: clip_low and clip_high")
    dac_low: float = Field(default=0.16, ge=0, le=0.25, description="bound of the change downwards; 0.16 in the paper")
    dac_high: float = Field(default=0.2, gt=0, description="bound of the change upwards; 0.2 in the paper")
    max_ratio: float = Field(
        default=10.0, gt=1, description="DAC's greatest ratio, and its dual clip where A < 0; 10 in the official code"
    )
    sas: bool = Field(default=True, description="advantages smoothed over a prompt's visits; off: GRPO's")
    norm_by_std: bool = Field(default=True, description="SAS divides by the std; off: centred rewards")
    otm: bool = Field(default=True, description="sum over answers of each one's token mean; off: GRPO's average")
    otm_scale: float | None = Field(
        default=None,
        gt=0,
        description="multiplies that sum. Unset: 1/answers, so that learning rates compare with GRPO's; 1 is the paper's sum",
    )
    eps: float = Field(default=0.0, ge=0, description="added to the group's std where SAS is off; none in the paper")
    kl_coef: float = Field(default=0.0, ge=0, description="weight of a KL to the start of RL; the paper has none")

    def advantages(self, x: Scored) -> Tensor:
        import torch

        if not self.sas:
            return super().advantages(x)
        members: dict[int, list[int]] = {}
        for i, g in enumerate(x.group.tolist()):
            members.setdefault(g, []).append(i)
        rewards, out = x.rewards.tolist(), [0.0] * len(x.rewards)
        for own in members.values():
            past = _history(x.memory, x.trajectories[own[0]].problem) if x.trajectories else {}
            for i, a in zip(own, smooth_advantages([rewards[i] for i in own], past, self.norm_by_std), strict=True):
                out[i] = a
        return torch.tensor(out, dtype=x.rewards.dtype, device=x.rewards.device)

    def token_weights(self, lengths: Tensor) -> Tensor:
        if self.otm and self.otm_scale is not None:
            return self.otm_scale / lengths.clamp(min=1)
        return sequence_mean(lengths)  # OTM at its default scale is GRPO's mean; what it argues against is DAPO's

    def token_loss(self, x: TokenInputs) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.dac:
            return super().token_loss(x)
        least, most = dac_bounds(x.old_logp, self.dac_low, self.dac_high, self.max_ratio)
        loss, r, clipped = clipped_ratio_loss(x.logp, x.old_logp, x.advantage, 1 - least, most - 1)
        bounded = dual_clip(loss, x.advantage, self.max_ratio)
        clipped = clipped.maximum((bounded < loss).to(clipped.dtype))
        return self._with_kl(bounded, {"policy/clip_share": clipped, "policy/ratio_max": r.detach()}, x)


def _history(memory: dict[str, Any], problem: Problem) -> dict[str, Any]:
    """The notes on a prompt, made at its first visit. Two prompts under one id would mix their histories."""
    past = memory.setdefault(problem.id, {})
    question = zlib.crc32(problem.question.encode())
    if past.setdefault("question", question) != question:
        raise OndolError(
            f"two different questions have the id '{problem.id}': DCPO would mix their histories",
            "give each problem of the task an id of its own",
        )
    return past
