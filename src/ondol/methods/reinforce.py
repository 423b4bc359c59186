"""REINFORCE (Williams 1992, "Simple statistical gradient-following algorithms"): return times score function.

An answer is one action: its loss is -A * log pi(answer), the sum over its tokens, and A its return, with or without a
baseline. There is no ratio and no clip, so it expects answers of the very weights that it updates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ondol.methods.base import Method, Scored, TokenInputs
from ondol.methods.primitives import constant_length, group_centre

if TYPE_CHECKING:
    from torch import Tensor


class REINFORCE(Method):
    """Plain policy gradient on whole answers."""

    family: ClassVar[str] = "REINFORCE"
    objective: ClassVar[str] = "return times log-probability, sum over tokens"
    clip: ClassVar[bool] = False
    kl: ClassVar[str] = "no"
    mechanism: ClassVar[str] = "score function, optional mean baseline"
    signal: ClassVar[str] = "any reward"
    on_policy: ClassVar[bool] = True
    source: ClassVar[str] = "Williams 1992, doi 10.1007/BF00992696"

    baseline: Literal["none", "batch", "group"] = Field(
        default="none", description="taken off the return: nothing, the batch's mean or the mean of the prompt's group"
    )

    def advantages(self, x: Scored) -> Tensor:
        import torch

        if self.baseline == "none":
            return x.rewards
        return group_centre(x.rewards, x.group if self.baseline == "group" else torch.zeros_like(x.group))

    def token_weights(self, lengths: Tensor) -> Tensor:
        return constant_length(lengths, 1)

    def token_loss(self, x: TokenInputs) -> tuple[Tensor, dict[str, Tensor]]:
        return -x.advantage * x.logp, {}
