"""DPO: direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

The reward of an answer is implicit: beta * D with D = log pi(y|x) - log pi_ref(y|x). The loss is the negative
log-likelihood of the preference under Bradley and Terry, -log sigmoid(beta * (D_w - D_l)).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ondol.methods.preference import Pairs, PreferenceMethod

if TYPE_CHECKING:
    from torch import Tensor


class DPO(PreferenceMethod):
    """Direct preference optimisation; defaults are the paper's."""

    objective: ClassVar[str] = "-log sigmoid of the difference of implicit rewards"
    kl: ClassVar[str] = "implicit (reference in the reward)"
    mechanism: ClassVar[str] = "the policy is its own reward model"
    source: ClassVar[str] = "arXiv 2305.18290"

    beta: float = Field(
        default=0.1, gt=0, description="how strongly the policy is held to the reference; 0.1 in the paper, appendix B"
    )

    @property
    def needs_reference(self) -> bool:
        return True

    def pair_loss(self, pairs: Pairs, logp: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        from torch.nn.functional import logsigmoid

        assert reference is not None
        margin = self.beta * pairs.difference(logp - reference)
        return -logsigmoid(margin), margin
