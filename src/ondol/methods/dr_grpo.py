"""Dr. GRPO: GRPO done right (Liu et al. 2025, arXiv 2503.20783, section 3).

Two of GRPO's divisions bias it. Dividing by the group's std weighs prompts by how uniform their answers are; dividing by
an answer's own length makes long wrong answers cheap. Both go: A = R - mean, and token losses are summed and divided by
one constant for all answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ondol.methods.base import Method, Scored, TokenInputs
from ondol.methods.primitives import clipped_ratio_loss, constant_length, group_centre

if TYPE_CHECKING:
    from torch import Tensor


class DrGRPO(Method):
    """GRPO without std and without the answer's length; defaults are the paper's."""

    family: ClassVar[str] = "GRPO"
    objective: ClassVar[str] = "clipped ratio, token sum over a constant length"
    clip: ClassVar[bool] = True
    kl: ClassVar[str] = "no"
    mechanism: ClassVar[str] = "reward centred in the group, no std, no length"
    signal: ClassVar[str] = "verifiable reward"
    source: ClassVar[str] = "arXiv 2503.20783"
    min_samples: ClassVar[int] = 2

    clip_low: float = Field(default=0.2, gt=0, lt=1, description="lower clip offset; PPO's 0.2")
    clip_high: float = Field(default=0.2, gt=0, description="upper clip offset; PPO's 0.2")
    max_length: int = Field(
        default=3000,
        ge=1,
        description="tokens; divides each answer's sum. Give the most an answer can have; 3000 there",
    )

    def advantages(self, x: Scored) -> Tensor:
        return group_centre(x.rewards, x.group)

    def token_weights(self, lengths: Tensor) -> Tensor:
        return constant_length(lengths, self.max_length)

    def token_loss(self, x: TokenInputs) -> tuple[Tensor, dict[str, Tensor]]:
        loss, r, clipped = clipped_ratio_loss(x.logp, x.old_logp, x.advantage, self.clip_low, self.clip_high)
        return loss, {"policy/clip_share": clipped, "policy/ratio_max": r.detach()}
