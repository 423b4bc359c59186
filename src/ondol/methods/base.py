"""What a method is: filters, rewards, advantages, weights of tokens, and a loss per token.

The learner knows no method. For each batch of rollouts it asks, in this order:

    keep            which groups (and which of their trajectories) are compared at all
    shaped_rewards  what each trajectory's reward is to this method
    counted         which of the kept trajectories count in the loss (the others still count in their group's statistics)
    advantages      one number a trajectory; an `ActorCritic` has `token_advantages` instead
    token_weights   how token losses add up to one number, fixed before micro-batching so that accumulation changes nothing
    token_loss      the loss of each token

All are pure but for `Scored.memory`, a method's own notes across steps, which travel with the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ondol.parts import Part
from ondol.records import Group, Trajectory

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Scored:
    """What advantages may look at: N trajectories, those of a group side by side.

    Attributes:
        rewards: [N] float64, as `shaped_rewards` gave them.
        group: [N] integers, which group each belongs to.
        trajectories: N of them, for whoever needs more (the problem's id, turns); may be empty in tests of plain formulas.
        memory: the method's notes across steps, plain JSON data; may be changed in place.
    """

    rewards: Tensor
    group: Tensor
    trajectories: Sequence[Trajectory] = ()
    memory: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenInputs:
    """What a loss may look at: T tokens that are trained on, in the order of their sequences. A sequence is never split
    between micro-batches; a group only where the method does not set `whole_groups`.

    Attributes:
        logp: [T] under the weights being trained, differentiable.
        old_logp: [T] under the weights that sampled.
        reference_logp: [T] under the frozen reference, None unless the method asked for one.
        advantage: [T] of the token's trajectory, or of the token itself (ActorCritic).
        sequence: [T] which trajectory each token belongs to.
        group: [T] which group.
        reward: [T] of the token's trajectory.
        constant: what `constant` made of the whole update; None unless the method asked for one.
    """

    logp: Tensor
    old_logp: Tensor
    reference_logp: Tensor | None
    advantage: Tensor
    sequence: Tensor
    group: Tensor
    reward: Tensor
    constant: Tensor | None = None


class Method(Part):
    """Base of all methods; the columns of the survey's table (arXiv 2509.02547) are class variables."""

    family: ClassVar[str]
    objective: ClassVar[str]
    clip: ClassVar[bool]
    kl: ClassVar[str]
    mechanism: ClassVar[str]
    signal: ClassVar[str]
    source: ClassVar[str]

    min_samples: ClassVar[int] = 1  #: samples of one prompt that it takes
    whole_groups: ClassVar[bool] = False  #: the loss couples a group's members: they share a micro-batch
    needs_constant: ClassVar[bool] = False  #: see `constant`

    minibatches: int = Field(default=1, ge=1, description="optimiser updates per batch of rollouts")
    epochs: int = Field(default=1, ge=1, description="passes over a batch of rollouts")

    @property
    def needs_reference(self) -> bool:
        """Whether `reference_logp` must be computed."""
        return False

    @property
    def skip_zero_advantage(self) -> bool:
        """Whether a zero advantage means a zero gradient, so that such trajectories need no compute."""
        return not self.needs_reference

    @property
    def max_resamples(self) -> int:
        """How often more prompts are sampled, at most, where `keep` left fewer groups than a step should have."""
        return 0

    def keep(self, groups: list[Group]) -> list[Group]:
        """The groups to compare, in order; a group may come back with some of its trajectories only."""
        return groups

    def shaped_rewards(self, groups: list[Group]) -> list[list[float]]:
        """The reward of each trajectory of each kept group."""
        return [g.rewards for g in groups]

    def counted(self, groups: list[Group]) -> list[list[bool]]:
        """Whether each trajectory of each kept group counts in the loss."""
        return [[True] * len(g.trajectories) for g in groups]

    def advantages(self, x: Scored) -> Tensor:
        """[N] advantages of N trajectories."""
        raise NotImplementedError(f"{type(self).__name__} must define advantages()")

    def token_weights(self, lengths: Tensor) -> Tensor:
        """Trained tokens of each of an update's N counted trajectories [N] -> weight of one token of each [N]."""
        raise NotImplementedError(f"{type(self).__name__} must define token_weights()")

    def constant(self, x: TokenInputs) -> Tensor:
        """A number (no gradient) that the loss needs of the whole update at once; asked only where `needs_constant`."""
        raise NotImplementedError(f"{type(self).__name__} must define constant()")

    def token_loss(self, x: TokenInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each token [T], and per-token values to report as token means ("..._max": as maxima)."""
        raise NotImplementedError(f"{type(self).__name__} must define token_loss()")
