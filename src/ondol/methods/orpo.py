"""ORPO: odds ratio preference optimisation (Hong et al. 2024, arXiv 2403.07691, equations 6 and 7).

Fine-tuning on the chosen answer plus a penalty on the rejected one, without a reference: NLL(y_w) - lam log sigmoid(
log odds(y_w) - log odds(y_l)) with odds = p / (1 - p), where log p is the mean log-probability of the answer's tokens;
NLL is a mean over tokens as well.

Checked against the official code (xfactlab/orpo, `src/orpo_trainer.py` and the script of Mistral-ORPO-beta), which counts
the prompt's tokens in the NLL unless told otherwise; here only the policy's own are. Numbers of equations are from memory
(TRL cites 4 and 7 for the odds ratio): the paper was not at hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ondol.methods.preference import Pairs, PreferenceMethod

if TYPE_CHECKING:
    from torch import Tensor

_CERTAIN = -1e-6  # mean log-probability above which odds stop growing: at p = 1 they are infinite, and inf - inf is NaN


class ORPO(PreferenceMethod):
    """Odds ratio preference optimisation."""

    objective: ClassVar[str] = "NLL of the chosen answer, -log sigmoid of the log odds ratio"
    kl: ClassVar[str] = "no"
    mechanism: ClassVar[str] = "SFT and preference in one loss, no reference"
    source: ClassVar[str] = "arXiv 2403.07691"

    lam: float = Field(
        default=0.1, ge=0, description="weight of the odds ratio; 0.1 in the official script of Mistral-ORPO-beta"
    )

    def pair_loss(self, pairs: Pairs, logp: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        from torch.nn.functional import logsigmoid

        mean = logp / pairs.length
        margin = pairs.difference(log_odds(mean))
        return -pairs.chosen(mean) - self.lam * logsigmoid(margin), margin


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(logp), finite also at p = 1."""
    import torch

    held = logp.clamp(max=_CERTAIN)
    return held - torch.log(-torch.expm1(held))
