"""Pass@k training (Chen et al. 2025, arXiv 2508.10751, section 2.4): the reward of k answers is that of the best one.

Of N answers, N_neg wrong, every subset of k is a group; its reward is 1 where any member is right. Averaged over all
subsets an answer belongs to, without drawing any:

    mean = 1 - C(N_neg, k) / C(N, k)        std = sqrt(mean (1 - mean))
    right: A = (1 - mean) / std             wrong: A = (1 - mean - C(N_neg - 1, k - 1) / C(N - 1, k - 1)) / std

Prompts that are mostly solved get little weight, so the model need not give up its other ways. The loss is GRPO's.
"""

from __future__ import annotations

from math import comb, sqrt
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ondol.errors import OndolError
from ondol.methods.base import Method, Scored, TokenInputs
from ondol.methods.primitives import clipped_ratio_loss, group_index, group_sum, sequence_mean

if TYPE_CHECKING:
    from torch import Tensor


def pass_at_k_advantages(right: int, samples: int, k: int) -> tuple[float, float]:
    """Advantage of a right and of a wrong answer, where `right` of `samples` are right. 0 where every subset fares the
    same; the one of a kind that is not there is not defined, and 0."""
    wrong = samples - right
    fail = comb(wrong, k) / comb(samples, k)
    if right == 0 or fail == 0:
        return 0.0, 0.0
    std = sqrt((1 - fail) * fail)
    return fail / std, (fail - comb(wrong - 1, k - 1) / comb(samples - 1, k - 1)) / std


class PassAtK(Method):
    """GRPO's loss with the analytic advantage of pass@k."""

    family: ClassVar[str] = "GRPO"
    objective: ClassVar[str] = "clipped ratio, per-sequence token mean"
    clip: ClassVar[bool] = True
    kl: ClassVar[str] = "no"
    mechanism: ClassVar[str] = "group reward pass@k, analytic advantage"
    signal: ClassVar[str] = "verifiable reward (right: 1 or more)"
    source: ClassVar[str] = "arXiv 2508.10751"
    min_samples: ClassVar[int] = 2

    k: int = Field(default=4, ge=1, description="answers that are judged by their best; the paper varies it, 4 is ours")
    clip_low: float = Field(default=0.2, gt=0, lt=1, description="lower clip offset; PPO's 0.2")
    clip_high: float = Field(default=0.2, gt=0, description="upper clip offset; PPO's 0.2")

    @property
    def least_samples(self) -> int:
        return max(self.min_samples, self.k)

    def advantages(self, x: Scored) -> Tensor:
        import torch

        index, groups = group_index(x.group)
        right = x.rewards >= 1
        counts = group_sum(torch.ones_like(x.rewards), index, groups).int().tolist()
        hits = group_sum(right.to(x.rewards.dtype), index, groups).int().tolist()
        if counts and min(counts) < self.k:
            raise OndolError(
                f"pass@{self.k} training needs {self.k} answers to a prompt, and one has {min(counts)}",
                "raise train.samples_per_prompt, or lower method.k",
            )
        pairs = [pass_at_k_advantages(h, n, self.k) for h, n in zip(hits, counts, strict=True)]
        table = torch.tensor(pairs, dtype=x.rewards.dtype, device=x.rewards.device).reshape(-1, 2)[index]
        return torch.where(right, table[:, 0], table[:, 1])

    def token_weights(self, lengths: Tensor) -> Tensor:
        return sequence_mean(lengths)

    def token_loss(self, x: TokenInputs) -> tuple[Tensor, dict[str, Tensor]]:
        loss, r, clipped = clipped_ratio_loss(x.logp, x.old_logp, x.advantage, self.clip_low, self.clip_high)
        return loss, {"policy/clip_share": clipped, "policy/ratio_max": r.detach()}
