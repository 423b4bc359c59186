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
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from ondol.parts import Part
from ondol.records import Group, StopReason, Trajectory

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

    min_samples: ClassVar[int] = 1  #: samples of one prompt that it takes, whatever its settings; see `least_samples`
    whole_groups: ClassVar[bool] = False  #: the loss couples a group's members: they share a micro-batch
    needs_constant: ClassVar[bool] = False  #: see `constant`
    constant_of_logp: ClassVar[bool] = True  #: `constant` looks at logp; if not, a pass is saved and logp is old_logp

    on_policy: ClassVar[bool] = False  #: no ratio corrects for weights that changed since sampling: one update a batch

    minibatches: int = Field(default=1, ge=1, description="optimiser updates per batch of rollouts")
    epochs: int = Field(default=1, ge=1, description="passes over a batch of rollouts")

    @model_validator(mode="after")
    def _current(self) -> Method:
        if self.on_policy and self.minibatches * self.epochs > 1:
            raise ValueError(
                f"{type(self).__name__} has no ratio between the weights that sampled and those that learn: it makes one "
                "update of a batch (minibatches = 1, epochs = 1); grpo, reinforce++ and ppo can make several"
            )
        return self

    @property
    def needs_reference(self) -> bool:
        """Whether `reference_logp` must be computed."""
        return False

    @property
    def skip_zero_advantage(self) -> bool:
        """Whether a zero advantage means a zero gradient, so that such trajectories need no compute."""
        return not self.needs_reference

    @property
    def least_samples(self) -> int:
        """Samples of one prompt that it takes with these settings."""
        return self.min_samples

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

    def reports(self, groups: list[Group]) -> dict[str, float]:
        """Metrics of the method's own, by registered names, of all groups that a step sampled."""
        return {}

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


class ActorCritic(Method):
    """A method with a critic: a value of every token, learned beside the policy.

    The value of a token is what is expected before it is sampled: it is read from the hidden state that predicts it.
    """

    critic: Literal["separate", "shared"] = Field(
        default="separate",
        description="separate: a copy of the model with a value head; shared: a value head on the policy's own hidden states",
    )
    critic_learning_rate: float = Field(
        default=1e-5, gt=0, description="of the critic; of its head alone where the trunk is shared"
    )
    value_coef: float = Field(
        default=0.5, gt=0, description="shared trunk: weight of the value loss beside the policy's; 0.5 is common"
    )
    value_clip: float = Field(
        default=0.2, ge=0, description="a value may move so far from the one before the step; 0: as far as it likes"
    )
    value_pretraining_steps: int = Field(
        default=0, ge=0, description="steps that train the critic alone on sampled returns, before RL"
    )
    gamma: float = Field(default=1.0, gt=0, le=1, description="discount of a token; 1: none")
    bootstrap_truncated: bool = Field(
        default=False,
        description="an episode that was cut short goes on as its last value says, instead of ending with its reward",
    )
    whiten_advantages: bool = Field(
        default=True,
        description="advantages of all tokens of a step to mean 0 and std 1; not in the papers' formulas, common in code",
    )

    @property
    def skip_zero_advantage(self) -> bool:
        return False  # the critic learns from them

    def lambdas(self, lengths: Tensor) -> tuple[Tensor, float]:
        """Lambdas of GAE by the number of action tokens of each trajectory [N]: the policy's [N], and the critic's."""
        raise NotImplementedError(f"{type(self).__name__} must define lambdas()")

    def token_advantages(self, x: Scored, values: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Advantages and value targets, float64, one of each per trained token of each trajectory.

        The reward comes after a trajectory's last token.

        Args:
            x: of N trajectories.
            values: the critic's, N tensors [L] over each one's L trained tokens.
        """
        import torch

        from ondol.methods.gae import decoupled_gae, whiten

        lam, lam_critic = self.lambdas(torch.tensor([len(v) for v in values], dtype=torch.float64))
        advantages, targets = [], []
        for i, value in enumerate(values):
            value = value.to(torch.float64)
            cut = self.bootstrap_truncated and bool(x.trajectories) and x.trajectories[i].stop_reason in _CUT_SHORT
            a, target = decoupled_gae(
                _terminal(x.rewards[i], len(value)),
                value,
                self.gamma,
                lam_policy=float(lam[i]),
                lam_critic=lam_critic,
                # the state after the last token is not at hand; the one before it is one token away
                last_value=float(value[-1]) if cut and len(value) else 0.0,
            )
            advantages.append(a)
            targets.append(target)
        return whiten(advantages) if self.whiten_advantages else advantages, targets

    def returns(self, x: Scored, lengths: list[int]) -> list[Tensor]:
        """Discounted rewards to come (Monte Carlo) at each trained token of each trajectory: what values are held against,
        and what value pretraining learns."""
        import torch

        ahead = [torch.arange(n - 1, -1, -1, dtype=torch.float64) for n in lengths]
        return [float(r) * self.gamma**k for r, k in zip(x.rewards, ahead, strict=True)]

    def value_loss(self, value: Tensor, old_value: Tensor, returns: Tensor) -> Tensor:
        """Half the squared error [T], the larger one of the value and of the value held within `value_clip` of before."""
        import torch

        loss = (value - returns) ** 2
        if self.value_clip:
            held = old_value + (value - old_value).clamp(-self.value_clip, self.value_clip)
            loss = torch.maximum(loss, (held - returns) ** 2)
        return loss / 2


#: ends that the agent did not choose
_CUT_SHORT = (
    StopReason.MAX_TURNS,
    StopReason.TURN_LENGTH,
    StopReason.RESPONSE_LENGTH,
    StopReason.CONTEXT,
    StopReason.TIMEOUT,
)


def _terminal(reward: Tensor, length: int) -> Tensor:
    """[L] zeros, and the reward at the last token."""
    import torch

    out = torch.zeros(length, dtype=torch.float64)
    out[-1:] = float(reward)
    return out
