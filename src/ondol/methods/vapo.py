"""VAPO: value-based augmented PPO for long reasoning (Yue et al. 2025, arXiv 2504.05118).

PPO, and what keeps its critic honest over long answers with a reward at the end only: the critic is trained before the
policy is; its targets are plain returns (lambda 1) while the policy's lambda grows with the length of the answer; the
upper clip is wider; all tokens weigh the same; and right answers are imitated a little besides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ondol.methods.base import TokenInputs
from ondol.methods.gae import length_adaptive_lambda
from ondol.methods.ppo import ClippedActorCritic

if TYPE_CHECKING:
    from torch import Tensor


class DecoupledActorCritic(ClippedActorCritic):
    """Two lambdas: a critic's own, and a policy's that follows the length of the episode."""

    clip_high: float = Field(default=0.28, gt=0, description="upper clip offset; 0.28 in VAPO's section 5.1")
    alpha: float = Field(
        default=0.05,
        gt=0,
        description="the policy's lambda is 1 - 1 / (alpha * length), 0 for answers up to 1 / alpha tokens; 0.05 in VAPO, for "
        "answers of thousands of tokens: with tens of tokens take 0.5 to 1",
    )
    lam_critic: float = Field(
        default=1.0, ge=0, le=1, description="lambda of the critic's targets; 1: plain returns, VAPO's section 4.1"
    )
    critic_learning_rate: float = Field(
        default=2e-6, gt=0, description="of the critic; 2e-6 in VAPO, the policy's is 1e-6"
    )
    value_pretraining_steps: int = Field(
        default=50, ge=0, description="steps that train the critic alone, before RL; 50 in VAPO's section 5.1"
    )

    def lambdas(self, lengths: Tensor) -> tuple[Tensor, float]:
        return length_adaptive_lambda(lengths, self.alpha), self.lam_critic


class VAPO(DecoupledActorCritic):
    """Value-based augmented PPO: value pretraining, decoupled and length-adaptive GAE, clip-higher, positive examples."""

    objective: ClassVar[str] = "clipped ratio, token mean, value loss, NLL of right answers"
    mechanism: ClassVar[str] = "value pretraining, decoupled length-adaptive GAE, clip-higher"
    signal: ClassVar[str] = "verifiable reward"
    source: ClassVar[str] = "arXiv 2504.05118"
    needs_constant: ClassVar[bool] = True
    constant_of_logp: ClassVar[bool] = False

    positive_nll_coef: float = Field(
        default=0.1, ge=0, description="weight of the NLL of right answers (reward above 0); 0.1 in VAPO's section 4.3"
    )

    def constant(self, x: TokenInputs) -> Tensor:
        """The share of the update's tokens that are of right answers, whose NLL is a mean over these alone."""
        return (x.reward > 0).to(x.logp.dtype).mean()

    def token_loss(self, x: TokenInputs) -> tuple[Tensor, dict[str, Tensor]]:
        import torch

        loss, reports = super().token_loss(x)
        if self.positive_nll_coef and x.constant is not None:
            scale = torch.where(x.reward > 0, self.positive_nll_coef / x.constant.clamp(min=1e-12), 0.0)
            loss = loss - scale.to(loss.dtype) * x.logp
        return loss, reports
