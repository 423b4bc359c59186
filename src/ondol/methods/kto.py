"""KTO: Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306, section 4).

Each answer is desirable or undesirable on its own, no pairs are needed. With D = log pi(y|x) - log pi_ref(y|x):

    desirable:    lam_d * (1 - sigmoid(beta * (D - z0)))
    undesirable:  lam_u * (1 - sigmoid(beta * (z0 - D)))

z0, the point of reference, is an estimate of KL(policy || reference), held at 0 or more, without gradient. The paper
takes D of mismatched pairs (a prompt with the answer to another one), since its answers are not the policy's own. Ours is
the mean of D over the answers of the whole update: they are sampled from the policy that is trained, so that is the plain
Monte Carlo estimate and costs no further pass. On recorded trajectories of another policy it is biased.

The paper wants lam_d n_d / (lam_u n_u) between 1 and 4/3 (equation 8, as TRL's `kto_trainer.py` cites it; the loss is its
equation 7), by weights chosen once for a data set. On-policy the classes change from batch to batch, and so do the weights
here (`balance`). The loss and these bounds were checked against TRL; the paper was not at hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ondol.methods.base import Method, Scored, TokenInputs
from ondol.methods.primitives import first_of, sequence_mean, sequence_sum
from ondol.records import Group

if TYPE_CHECKING:
    from torch import Tensor


_MOST = 4 / 3  # of lam_d n_d / (lam_u n_u); the least is 1


class KTO(Method):
    """Kahneman-Tversky optimisation of unpaired answers."""

    family: ClassVar[str] = "DPO"
    objective: ClassVar[str] = "sigmoid value of the log-ratio around a point of reference"
    clip: ClassVar[bool] = False
    kl: ClassVar[str] = "implicit (reference in the reward)"
    mechanism: ClassVar[str] = "gains and losses weighed apart, no pairs"
    signal: ClassVar[str] = "desirable or undesirable"
    source: ClassVar[str] = "arXiv 2402.01306"
    needs_constant: ClassVar[bool] = True

    beta: float = Field(
        default=0.1,
        gt=0,
        description="how fast value saturates; 0.1 is TRL's default and common, the paper's own could not be looked up",
    )
    lam_d: float = Field(default=1.0, ge=0, description="weight of desirable answers; 1 is TRL's default")
    lam_u: float = Field(
        default=1.0,
        ge=0,
        description="weight of undesirable answers; 1 is TRL's default",
    )
    balance: bool = Field(
        default=True,
        description="raise lam_d or lam_u in each batch, no more than needed, so that lam_d n_d / (lam_u n_u) is within 1 to 4/3",
    )
    threshold: float = Field(
        default=0.5, description="answers that score this or more are desirable; ours, for scores in [0, 1]"
    )

    @property
    def needs_reference(self) -> bool:
        return True

    def shaped_rewards(self, groups: list[Group]) -> list[list[float]]:
        return [g.scores for g in groups]

    def advantages(self, x: Scored) -> Tensor:
        """Positive for desirable answers, negative for the others; 1 or what `balance` makes of it."""
        import torch

        good = x.rewards >= self.threshold
        up, down = self.factors(int(good.sum()), int((~good).sum()))
        return torch.where(good, torch.full_like(x.rewards, up), torch.full_like(x.rewards, -down))

    def factors(self, desirable: int, undesirable: int) -> tuple[float, float]:
        """What lam_d and lam_u are multiplied by, where so many answers are of each class; 1 where one has none."""
        d, u = self.lam_d * desirable, self.lam_u * undesirable
        if not self.balance or not d or not u:
            return 1.0, 1.0
        return max(1.0, u / d), max(1.0, d / u / _MOST)

    def token_weights(self, lengths: Tensor) -> Tensor:
        return sequence_mean(lengths)

    def constant(self, x: TokenInputs) -> Tensor:
        """z0: max(0, mean of D over the answers of the update)."""
        assert x.reference_logp is not None
        ratio, _, _ = sequence_sum((x.logp - x.reference_logp).detach(), x.sequence)
        return (ratio.sum() / max(len(ratio), 1)).clamp(min=0)

    def token_loss(self, x: TokenInputs) -> tuple[Tensor, dict[str, Tensor]]:
        import torch

        assert x.reference_logp is not None and x.constant is not None
        ratio, length, of_token = sequence_sum(x.logp - x.reference_logp, x.sequence)
        advantage = first_of(x.advantage, of_token, len(length))
        sign = advantage.sign()
        reward = self.beta * (ratio - x.constant.detach().to(ratio.dtype))
        value = torch.sigmoid(sign * reward)  # of an undesirable answer: sigmoid(beta (z0 - D))
        weight = advantage.abs() * torch.full_like(value, self.lam_u).masked_fill(sign > 0, self.lam_d)
        right_side = (sign * reward).detach()[of_token]  # how far an answer is on its own side of z0
        return (weight * (1 - value))[of_token], {
            "preference/margin": right_side,
            "preference/accuracy": (right_side > 0).to(right_side.dtype),
        }
