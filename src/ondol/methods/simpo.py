"""SimPO: simple preference optimisation (Meng et al. 2024, arXiv 2405.14734, equation 6).

No reference: the implicit reward is beta times the mean log-probability of a token, and the chosen answer's has to be
the higher one by gamma: -log sigmoid(beta / |y_w| log pi(y_w) - beta / |y_l| log pi(y_l) - gamma).

Defaults: the table in the README of the official code (princeton-nlp/SimPO) gives beta and gamma / beta as 2.0 and 0.8
(Mistral base), 2.5 and 0.1 (Mistral instruct), 2.0 and 0.5 (Llama-3 base), 2.5 and 0.55 (Llama-3 instruct). It was read;
the paper, whose equation is cited, was not at hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ondol.methods.preference import Pairs, PreferenceMethod

if TYPE_CHECKING:
    from torch import Tensor


class SimPO(PreferenceMethod):
    """Simple preference optimisation with a length-normalised, reference-free reward."""

    objective: ClassVar[str] = "-log sigmoid of the difference of mean log-probabilities, less a margin"
    kl: ClassVar[str] = "no"
    mechanism: ClassVar[str] = "length-normalised reward without a reference, target margin"
    source: ClassVar[str] = "arXiv 2405.14734"

    beta: float = Field(
        default=2.0,
        gt=0,
        description="scale of the reward; 2.0 or 2.5 in the official runs, which also say that 10 may be better",
    )
    gamma: float = Field(
        default=1.0,
        ge=0,
        description="target margin; 0.25 to 1.6 in the official runs, 1.0 with beta 2.0 for Llama-3 base",
    )

    def pair_loss(self, pairs: Pairs, logp: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        from torch.nn.functional import logsigmoid

        margin = self.beta * pairs.difference(logp / pairs.length)
        return -logsigmoid(margin - self.gamma), margin
