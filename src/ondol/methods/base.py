"""What a method is: filters, advantages, weights of tokens, and a loss per token; all pure.

The learner knows none of them. It asks a method for `keep` (which groups are worth training on), `advantages`
(one number a trajectory), `token_weights` (how token losses add up to one number, fixed before micro-batching so that
accumulation changes nothing) and `token_loss`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ondol.parts import Part
from ondol.records import Group

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TokenInputs:
    """What a loss may look at; T tokens that are trained on, in the order of their sequences.

    Attributes:
        logp: [T] under the weights being trained, differentiable.
        old_logp: [T] under the weights that sampled.
        reference_logp: [T] under the frozen reference, None unless the method asked for one.
        advantage: [T] of the token's trajectory.
        sequence: [T] which trajectory each token belongs to.
    """

    logp: Tensor
    old_logp: Tensor
    reference_logp: Tensor | None
    advantage: Tensor
    sequence: Tensor


class Method(Part):
    """Base of all methods; the columns of the survey's table (arXiv 2509.02547) are class variables."""

    family: ClassVar[str]
    objective: ClassVar[str]
    clip: ClassVar[bool]
    kl: ClassVar[str]
    mechanism: ClassVar[str]
    signal: ClassVar[str]
    source: ClassVar[str]

    minibatches: int = Field(default=1, ge=1, description="optimiser updates per batch of rollouts")
    epochs: int = Field(default=1, ge=1, description="passes over a batch of rollouts")
    min_samples: ClassVar[int] = 1

    @property
    def needs_reference(self) -> bool:
        """Whether `reference_logp` must be computed."""
        return False

    @property
    def skip_zero_advantage(self) -> bool:
        """Whether a zero advantage means a zero gradient, so that such trajectories need no compute."""
        return not self.needs_reference

    def keep(self, groups: list[Group]) -> list[Group]:
        """The groups to train on, in order."""
        return groups

    def advantages(self, rewards: Tensor, group: Tensor) -> Tensor:
        """rewards [N], group [N] (which group each belongs to) -> advantages [N]."""
        raise NotImplementedError(f"{type(self).__name__} must define advantages()")

    def token_weights(self, lengths: Tensor) -> Tensor:
        """Trained tokens of each of the update's N trajectories [N] -> weight of one token of each [N]."""
        raise NotImplementedError(f"{type(self).__name__} must define token_weights()")

    def token_loss(self, x: TokenInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each token [T], and per-token values to report as token means."""
        raise NotImplementedError(f"{type(self).__name__} must define token_loss()")
