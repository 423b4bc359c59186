"""RLOO: REINFORCE leave-one-out (Ahmadian et al. 2024, "Back to Basics", arXiv 2402.14740, section 3.2; Kool et al. 2019).

The baseline of an answer is the mean reward of the other answers to its prompt: independent of the answer itself, so the
gradient stays unbiased. The whole answer is one action; nothing is clipped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ondol.methods.base import Method, Scored, TokenInputs
from ondol.methods.primitives import constant_length, leave_one_out, sequence_sum

if TYPE_CHECKING:
    from torch import Tensor


class RLOO(Method):
    """REINFORCE with the leave-one-out baseline; defaults are the paper's."""

    family: ClassVar[str] = "REINFORCE"
    objective: ClassVar[str] = "return times log-probability, sum over tokens"
    clip: ClassVar[bool] = False
    kl: ClassVar[str] = "in the reward"
    mechanism: ClassVar[str] = "baseline = mean reward of the other samples"
    signal: ClassVar[str] = "verifiable reward or reward model"
    on_policy: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2402.14740"
    min_samples: ClassVar[int] = 2

    kl_coef: float = Field(
        default=0.03, ge=0, description="weight of the KL to the start of RL; 0.03 in the paper, appendix C"
    )

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    def advantages(self, x: Scored) -> Tensor:
        return leave_one_out(x.rewards, x.group)

    def token_weights(self, lengths: Tensor) -> Tensor:
        return constant_length(lengths, 1)

    def token_loss(self, x: TokenInputs) -> tuple[Tensor, dict[str, Tensor]]:
        if x.reference_logp is None:
            return -x.advantage * x.logp, {}
        # the paper's reward is R - beta * log(pi / reference) of the whole answer, at sampling. The second part has no
        # baseline here: the expected gradient is the same, and a group's members need not share a micro-batch
        gap, _, index = sequence_sum(x.old_logp - x.reference_logp, x.sequence)
        advantage = x.advantage - self.kl_coef * gap[index]
        return -advantage * x.logp, {"policy/kl_k1": x.old_logp - x.reference_logp}
