"""IPO: identity preference optimisation (Azar et al. 2023, arXiv 2310.12036, equation 17).

DPO's loss wants an infinite margin where a preference is certain; IPO regresses the margin to a finite one:
(D_w - D_l - 1 / (2 tau))^2 with D = log pi(y|x) - log pi_ref(y|x). D is a sum over tokens, as in the paper; some other
implementations take means over tokens, for which tau has another scale.

Checked against TRL's `dpo_trainer.py`, which cites the same equation and calls tau beta. The paper itself was not at hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ondol.methods.preference import Pairs, PreferenceMethod

if TYPE_CHECKING:
    from torch import Tensor


class IPO(PreferenceMethod):
    """Identity preference optimisation."""

    objective: ClassVar[str] = "squared distance of the log-ratio margin from 1 / (2 tau)"
    kl: ClassVar[str] = "implicit (reference in the reward)"
    mechanism: ClassVar[str] = "a finite margin: no overfitting to certain preferences"
    source: ClassVar[str] = "arXiv 2310.12036"

    tau: float = Field(
        default=0.1,
        gt=0,
        description="the wanted margin is 1 / (2 tau) nats; 0.1 is TRL's default, the paper's own could not be looked up",
    )

    @property
    def needs_reference(self) -> bool:
        return True

    def pair_loss(self, pairs: Pairs, logp: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        assert reference is not None
        margin = pairs.difference(logp - reference)
        return (margin - 1 / (2 * self.tau)) ** 2, margin
