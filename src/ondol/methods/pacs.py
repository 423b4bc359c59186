"""PACS: policy optimisation as supervised learning (arXiv 2509.02522). Whether an answer is right is a label, and a score
made of the policy itself has to predict it:

    r_i   = beta * sum_t (log pi - log pi_old)      what the policy has come to think of answer i
    psi_i = r_i - mean of the others' r             inside the group; the gradient flows through all of them
    L     = mean_i w_i * BCE(sigmoid(psi_i), y_i)   w balances right and wrong inside the group

Its gradient holds an actor's part and a critic's, with shared weights. No clip and no KL: only the sigmoid's saturation
holds an update back. With weights equal all psi are 0, and the gradient is beta times RLOO's where w = 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ondol.errors import OndolError
from ondol.methods.base import Method, Scored, TokenInputs
from ondol.methods.primitives import first_of, group_index, group_sum, leave_one_out, sequence_mean, sequence_sum

if TYPE_CHECKING:
    from torch import Tensor

    from ondol.records import Group


class PACS(Method):
    """Cross-entropy of a policy-derived score; defaults are those of the official scripts."""

    family: ClassVar[str] = "supervised"
    objective: ClassVar[str] = "cross-entropy of a group-relative score"
    clip: ClassVar[bool] = False
    kl: ClassVar[str] = "no"
    mechanism: ClassVar[str] = "reward as label, implicit actor and critic"
    signal: ClassVar[str] = "verifiable reward of 0 or 1"
    source: ClassVar[str] = "arXiv 2509.02522"
    min_samples: ClassVar[int] = 2
    whole_groups: ClassVar[bool] = True

    beta: float = Field(default=1.0, gt=0, description="scale of the score; 1 or 2 in the official scripts")
    proxy: Literal["log_ratio", "mean_logp"] = Field(
        default="log_ratio", description="r: summed log ratio to the sampling weights, or mean log-probability"
    )
    score: Literal["rloo", "grpo", "naive"] = Field(
        default="rloo", description="psi: r against the others' mean, r standardised in the group, or r"
    )
    weight: Literal["question", "only_positive", "only_negative", "none"] = Field(
        default="question", description="w: classes balanced in each mixed group, one class only, or 1"
    )
    soft_labels: bool = Field(default=False, description="allow rewards between 0 and 1 as labels")
    epochs: int = Field(default=1, ge=1, le=1, description="one pass over a batch of rollouts: there is no clip")

    @property
    def skip_zero_advantage(self) -> bool:
        return False  # the loss does not look at the advantage

    def shaped_rewards(self, groups: list[Group]) -> list[list[float]]:
        for g in groups:
            for r in g.rewards:
                if not 0 <= r <= 1 or (r not in (0, 1) and not self.soft_labels):
                    raise OndolError(
                        f"PACS takes rewards as labels, 0 or 1, and problem '{g.problem.id}' has one of {r}",
                        "set method.soft_labels = true for rewards between 0 and 1"
                        if 0 <= r <= 1
                        else "give rewards of 0 and 1",
                    )
        return [g.rewards for g in groups]

    def advantages(self, x: Scored) -> Tensor:
        # for reports only: what the first update amounts to
        return leave_one_out(x.rewards, x.group)

    def token_weights(self, lengths: Tensor) -> Tensor:
        return sequence_mean(lengths)

    def token_loss(self, x: TokenInputs) -> tuple[Tensor, dict[str, Tensor]]:
        from torch.nn.functional import binary_cross_entropy_with_logits

        values = x.logp - x.old_logp if self.proxy == "log_ratio" else x.logp
        r, tokens, index = sequence_sum(values, x.sequence)
        r = self.beta * (r if self.proxy == "log_ratio" else r / tokens)
        label, group = first_of(x.reward, index, len(r)), first_of(x.group, index, len(r))
        psi = self._score(r, group)
        loss = self._weights(label, group) * binary_cross_entropy_with_logits(psi, label, reduction="none")
        said = psi.detach()
        reports = {
            "method/psi_saturated_share": (said.abs() > 5).to(
                r.dtype
            ),  # beyond this the sigmoid hardly passes a gradient
            "method/psi_accuracy": ((said > 0) == (label >= 0.5)).to(r.dtype),
            "method/psi_margin": said * (2 * label - 1),
        }
        return loss[index], {name: v[index] for name, v in reports.items()}

    def _score(self, r: Tensor, group: Tensor) -> Tensor:
        """psi [S] out of r [S]."""
        import torch

        if self.score == "naive":
            return r
        if self.score == "rloo":
            return leave_one_out(r, group)
        index, k = group_index(group)
        count = group_sum(torch.ones_like(r), index, k)
        centred = r - (group_sum(r, index, k) / count)[index]
        variance = (group_sum(centred**2, index, k) / (count - 1).clamp(min=1))[index]
        # the root has no derivative at 0, where all r are equal: every first update is there
        std = torch.where(variance > 0, variance, 1.0).sqrt() * (variance > 0)
        return centred / (std + 1e-6)

    def _weights(self, label: Tensor, group: Tensor) -> Tensor:
        """w [S]; 1 in a group of one class."""
        import torch

        right = (label >= 0.5).to(label.dtype)
        if self.weight == "none":
            return torch.ones_like(label)
        if self.weight != "question":
            return right if self.weight == "only_positive" else 1 - right
        index, k = group_index(group)
        count = group_sum(torch.ones_like(right), index, k)[index]
        hits = group_sum(right, index, k)[index]
        own = torch.where(right > 0, hits, count - hits)
        return torch.where(own == count, 1.0, count / (2 * own))
