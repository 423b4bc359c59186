"""SimpleTIR: tool-integrated reasoning that drops trajectories with void turns (arXiv 2509.02479).

A void turn neither acts (no complete code block, no call) nor answers. Trajectories that have one are full of tokens the
policy found improbable; with a negative advantage their ratio is not bounded above and their gradients explode (see
`token_gradient_norm`). They are masked from the loss whole, and nothing else is changed in GRPO.

The rivals of the paper's ablation are settings of `filter`. Two of them are not: masking the void turns' tokens only
(whether a trajectory counts is a question about the whole of it), and stopping at a void turn but learning from it, which
is what an environment does that ends there, with filter = "none". Where too few groups survive more prompts are sampled,
while the official code samples three times as many at once and repeats survivors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field, model_validator

from ondol.errors import OndolError
from ondol.methods.base import Scored, TokenInputs
from ondol.methods.grpo import GRPO
from ondol.methods.primitives import (
    clipped_ratio_loss,
    dual_clip,
    group_advantages,
    group_index,
    ratio,
    token_mean,
)
from ondol.parts import find
from ondol.records import Finish, Group, StopReason, Trajectory, Turn

if TYPE_CHECKING:
    from torch import Tensor

# -- void turns ----------------------------------------------------------------------------------------------------------

_BLOCK = re.compile(r"```([^\n`]*)\n.*?\n```", re.DOTALL)
_CODE = ("", "py", "python")
_OVERLONG = (StopReason.TURN_LENGTH, StopReason.RESPONSE_LENGTH, StopReason.CONTEXT)


@dataclass(frozen=True)
class TurnKind:
    """What a turn's text holds. `truncated`: a fence was opened and never closed, and there is no code before it."""

    code: bool
    answer: bool
    truncated: bool

    @property
    def void(self) -> bool:
        return not (self.code or self.answer)


def classify_turn(text: str) -> TurnKind:
    """A turn of the paper's format: code is the first complete fenced block without a tag or tagged py or python, an
    answer is `\\boxed{` in the text up to its end. Blocks in other languages are passed over whole, where the official
    expression would take their closing fence for an opening one."""
    end = 0
    for block in _BLOCK.finditer(text):
        end = block.end()
        if block[1] in _CODE:
            return TurnKind(True, "\\boxed{" in text[:end], False)
    return TurnKind(False, "\\boxed{" in text, "```" in text[end:])


def void_call(trajectory: Trajectory, turn: Turn) -> bool:
    """Void in any format that the environment parses: no call, and no answer either, which is the last turn's when it
    ended by itself and says something."""
    last = turn is trajectory.turns[-1] and turn.finish in (Finish.END, Finish.STOP) and turn.text.strip()
    return not (turn.calls or last)


def void_fence(trajectory: Trajectory, turn: Turn) -> bool:
    """Void in the paper's format of fenced code and `\\boxed{}`."""
    return classify_turn(turn.text).void


VOID: dict[str, Callable[[Trajectory, Turn], bool]] = {"calls": void_call, "fences": void_fence}


def has_void_turn(trajectory: Trajectory, void: Callable[[Trajectory, Turn], bool] = void_call) -> bool:
    """Whether any of its turns is void; one without turns is."""
    return not trajectory.turns or any(void(trajectory, turn) for turn in trajectory.turns)


def token_gradient_norm(logits: Tensor, chosen: Tensor, advantage: Tensor, ratio: Tensor) -> Tensor:
    """Norm of an unclipped token's policy gradient with respect to its logits: |A| rho sqrt(1 - 2 P(c) + sum_j P(j)^2).

    logits [..., V], chosen [...] token ids, advantage and ratio [...] -> [...]. Large where the chosen token is improbable
    and another one nearly certain.
    """
    p = logits.softmax(-1)
    square = 1 - 2 * p.gather(-1, chosen.unsqueeze(-1)).squeeze(-1) + (p * p).sum(-1)
    return advantage.abs() * ratio * square.clamp(min=0).sqrt()


# -- the method ----------------------------------------------------------------------------------------------------------


class SimpleTIR(GRPO):
    """GRPO without the trajectories that have a void turn; defaults are the official script's."""

    objective: ClassVar[str] = "clipped ratio with dual clip, token mean"
    kl: ClassVar[str] = "no"
    mechanism: ClassVar[str] = "trajectories with a void turn are masked from the loss"
    signal: ClassVar[str] = "verifiable reward"
    source: ClassVar[str] = "arXiv 2509.02479"

    minibatches: int = Field(
        default=4, ge=1, description="optimiser updates per batch of rollouts; 512 prompts in 4 of 128"
    )
    clip_high: float = Field(default=0.28, gt=0, description="upper clip offset")
    dual_clip: float = Field(default=3.0, gt=1, description="bound of the ratio where the advantage is negative")
    kl_coef: float = Field(default=0.0, ge=0, description="weight of the KL; none in the official script")
    filter: Literal["void", "none", "low_prob", "high_ratio"] = Field(
        default="void",
        description="trajectories that do not count: with a void turn (the method), none, with an improbable token, or with a high ratio under the current weights",
    )
    void: str = Field(
        default="calls",
        description='when a turn is void: calls (no call and no answer), fences (the paper\'s format), or "module:function" of (trajectory, turn)',
    )
    advantage_over: Literal["all", "kept"] = Field(
        default="all",
        description="the group's mean and std are over all trajectories (official code), or over those that count",
    )
    min_prob: float = Field(
        default=1e-3,
        gt=0,
        lt=1,
        description="low_prob: least probability of a sampled token; ours, the paper's is not known",
    )
    max_ratio: float = Field(
        default=3.0, gt=1, description="high_ratio: greatest ratio of a token; ours, the paper's is not known"
    )
    min_std: float = Field(default=1e-3, ge=0, description="groups whose rewards spread less are dropped")
    accuracy: tuple[float, float] = Field(
        default=(0.0, 1.0),
        description="groups whose mean score lies outside are dropped; the official option is 0.1 to 0.9",
    )
    drop_overlong: bool = Field(
        default=False, description="over-long trajectories do not count, and groups with few others are dropped"
    )
    min_valid: int = Field(
        default=4, ge=1, description="drop_overlong: least trajectories of a group that are not over-long"
    )
    resamples: int = Field(
        default=2, ge=0, description="how often more prompts are sampled to fill a batch; the official code samples x3"
    )

    @model_validator(mode="after")
    def _sound(self) -> SimpleTIR:
        _ = self.is_void
        return self

    @property
    def least_samples(self) -> int:
        return max(self.min_samples, self.min_valid) if self.drop_overlong else self.min_samples

    @property
    def max_resamples(self) -> int:
        return self.resamples

    @cached_property
    def is_void(self) -> Callable[[Trajectory, Turn], bool]:
        """The predicate that `void` names."""
        if self.void not in VOID and ":" not in self.void:
            raise OndolError(f"method.void: '{self.void}' is not known", 'known: calls, fences, or "module:function"')
        predicate: Any = VOID[self.void] if self.void in VOID else find("methods", self.void)
        if not callable(predicate):
            raise OndolError(f"method.void: '{self.void}' is no function", "give one of (trajectory, turn)")
        return cast("Callable[[Trajectory, Turn], bool]", predicate)

    def keep(self, groups: list[Group]) -> list[Group]:
        return [g for g in groups if self._informative(g)]

    def counted(self, groups: list[Group]) -> list[list[bool]]:
        return [[self._counts(t) for t in g.trajectories] for g in groups]

    def advantages(self, x: Scored) -> Tensor:
        import torch

        if self.advantage_over == "all" or not x.trajectories:
            return super().advantages(x)
        kept = torch.tensor([self._counts(t) for t in x.trajectories], dtype=torch.bool)
        out = torch.zeros_like(x.rewards)
        out[kept] = group_advantages(x.rewards[kept], x.group[kept], self.eps)
        return out

    def token_weights(self, lengths: Tensor) -> Tensor:
        return token_mean(lengths)

    def token_loss(self, x: TokenInputs) -> tuple[Tensor, dict[str, Tensor]]:
        import torch

        loss, r, clipped = clipped_ratio_loss(x.logp, x.old_logp, x.advantage, self.clip_low, self.clip_high)
        bounded = dual_clip(loss, x.advantage, self.dual_clip)
        clipped = torch.where(bounded < loss, 1.0, clipped)
        if self.filter == "high_ratio":  # only here is the current ratio known; the weights still count these tokens
            bounded = torch.where(self._high(x), 0.0, bounded)
        return self._with_kl(bounded, {"policy/clip_share": clipped, "policy/ratio_max": r.detach()}, x)

    def reports(self, groups: list[Group]) -> dict[str, float]:
        """Shares the paper argues with, over all trajectories of the groups."""
        return turn_statistics([t for g in groups for t in g.trajectories], self.is_void)

    def _informative(self, group: Group) -> bool:
        n = len(group.trajectories)
        mean = math.fsum(group.rewards) / n
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in group.rewards) / max(n - 1, 1))
        valid = sum(not _overlong(t) for t in group.trajectories)
        low, high = self.accuracy
        return (
            std >= self.min_std
            and low <= math.fsum(group.scores) / n <= high
            and (not self.drop_overlong or valid >= self.min_valid)
        )

    def _counts(self, t: Trajectory) -> bool:
        if self.drop_overlong and _overlong(t):
            return False
        if self.filter == "void":
            return not has_void_turn(t, self.is_void)
        return self.filter != "low_prob" or min_token_prob(t) >= self.min_prob

    def _high(self, x: TokenInputs) -> Tensor:
        """[T] whether any token of the same trajectory has a ratio above the limit."""
        index, count = group_index(x.sequence)
        peak = x.logp.new_zeros(count).scatter_reduce(0, index, ratio(x.logp, x.old_logp).detach(), "amax")
        return (peak > self.max_ratio)[index]


def _overlong(t: Trajectory) -> bool:
    return t.stop_reason in _OVERLONG


def min_token_prob(t: Trajectory) -> float:
    """Probability of the least probable token that is trained on, as it was sampled; 1 where there is none."""
    return math.exp(min((lp for lp, trained in zip(t.logp, t.trained) if trained), default=0.0))


def turn_statistics(
    trajectories: list[Trajectory], void: Callable[[Trajectory, Turn], bool] = void_call
) -> dict[str, float]:
    """Void turns and trajectories with one, turns, use of tools and how much of it worked, least token probability."""
    turns = [(t, turn) for t in trajectories for turn in t.turns]
    results = [r for _, turn in turns for r in turn.results]
    n = max(len(trajectories), 1)
    return {
        "turns/void_share": sum(void(t, turn) for t, turn in turns) / max(len(turns), 1),
        "turns/void_trajectory_share": sum(has_void_turn(t, void) for t in trajectories) / n,
        "turns/mean": len(turns) / n,
        "turns/call_share": sum(any(turn.calls for turn in t.turns) for t in trajectories) / n,
        "turns/valid_call_share": sum(r.ok for r in results) / max(len(results), 1),
        "turns/min_token_prob": min(map(min_token_prob, trajectories), default=1.0),
    }
