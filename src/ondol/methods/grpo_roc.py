"""GRPO-RoC: GRPO with resampling on correct (rStar2-Agent, arXiv 2508.20722).

An outcome reward takes a right answer reached through failing tool calls for as good as a clean one. So twice as many
trajectories are sampled as are trained on: of the wrong ones any are kept (failures of all kinds teach), of the right ones
those with the fewest tool errors and format faults, both classes keeping their proportion.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from ondol.errors import OndolError
from ondol.methods.grpo import GRPO
from ondol.methods.primitives import token_mean
from ondol.parts import find
from ondol.records import Group, StopReason, ToolResult, Trajectory

if TYPE_CHECKING:
    from torch import Tensor

_INFRASTRUCTURE = ("crashed",)  # the tool's failure, not the model's: nobody is punished for it
_NO_CALL = 0.5  # penalty of a trajectory that never used a tool, official code
_SOFT = 0.1  # added to penalties in the sampling selector; ours, the paper does not state the form


def flagged(result: ToolResult) -> bool:
    """Whether a tool's result is an error, by its flag."""
    return not result.ok


def says_error(result: ToolResult) -> bool:
    """Whether the text of a result has the word "error": the official detector."""
    return "error" in result.text.lower()


def error_penalty(trajectory: Trajectory, is_error: Callable[[ToolResult], bool] = flagged) -> float:
    """Share of tool results that are errors; 0.5 without a call that was carried out. Infrastructure's failures are
    left out."""
    results = [r for turn in trajectory.turns for r in turn.results]
    if not results:
        return _NO_CALL
    judged = [r for r in results if r.kind not in _INFRASTRUCTURE]
    return sum(map(is_error, judged)) / max(len(judged), 1)


def unanswered(trajectory: Trajectory) -> float:
    """1 where the agent did not end the episode with an answer."""
    return float(trajectory.stop_reason not in (StopReason.ANSWERED, StopReason.ENV_DONE))


def answer_tags(trajectory: Trajectory) -> float:
    """1 where `<answer>` is missing or unbalanced, else how many there are too many, per turn and at most 1 (official)."""
    text = "\n".join(turn.text for turn in trajectory.turns)
    opened, closed = text.count("<answer>"), text.count("</answer>")
    blocks = len(re.findall(r"<answer>.*?</answer>", text, re.DOTALL))
    if not blocks or opened != blocks or closed != blocks:
        return 1.0
    return min((blocks - 1) / len(trajectory.turns), 1.0)


ERRORS: dict[str, Callable[[ToolResult], bool]] = {"flag": flagged, "text": says_error}
FORMATS: dict[str, Callable[[Trajectory], float]] = {
    "answered": unanswered,
    "answer_tags": answer_tags,
    "none": lambda trajectory: 0.0,
}


def shares(right: int, wrong: int, keep: int, min_right: int = 2, min_wrong: int = 2) -> tuple[int, int]:
    """How many of `right` and of `wrong` trajectories are kept, `keep` in all: in proportion, at least the minima.

    Rounds half to even and sets the minima one after the other, as the official code does; where its numbers do not add up
    to `keep` or ask for more than there are (small groups), the right ones give way.
    """
    total = right + wrong
    if total <= keep:
        return right, wrong
    n_wrong, n_right = round(wrong * keep / total), round(right * keep / total)
    if n_wrong <= min(min_wrong, wrong):
        n_wrong = min(min_wrong, wrong)
        n_right = keep - n_wrong
    if n_right <= min(min_right, right):
        n_right = min(min_right, right)
        n_wrong = keep - n_right
    n_wrong = min(max(n_wrong, keep - right, 0), wrong, keep)
    return keep - n_wrong, n_wrong


class GRPORoC(GRPO):
    """GRPO on clean right answers and any wrong ones; defaults are the paper's."""

    objective: ClassVar[str] = "clipped ratio, token mean"
    kl: ClassVar[str] = "no"
    mechanism: ClassVar[str] = "oversampling; right answers with fewest tool errors are kept"
    signal: ClassVar[str] = "verifiable reward, tool results"
    source: ClassVar[str] = "arXiv 2508.20722"

    clip_high: float = Field(default=0.28, gt=0, description="upper clip offset; 0.28 in the paper")
    kl_coef: float = Field(default=0.0, ge=0, description="weight of the KL; the paper drops it")
    keep_samples: int | None = Field(
        default=None,
        ge=2,
        description="trajectories kept of each prompt; by default half of those sampled, as 16 of 32",
    )
    selector: Literal["greedy", "sample"] = Field(
        default="greedy",
        description="right answers: lowest penalties first (official code), or drawn with weight 1 / (penalty + 0.1) (the paper draws; the form is ours)",
    )
    errors: str = Field(
        default="flag",
        description='what is a tool error: flag (its result is not ok), text (says "error", official), or "module:function" of a ToolResult',
    )
    format: str = Field(
        default="answered",
        description='penalty of form: answered (no answer: 1), answer_tags (official), none, or "module:function" of a trajectory',
    )
    min_right: int = Field(default=2, ge=0, description="right trajectories kept at least, where there are any")
    min_wrong: int = Field(default=2, ge=0, description="wrong trajectories kept at least, where there are any")

    @model_validator(mode="after")
    def _sound(self) -> GRPORoC:
        if self.keep_samples is not None and self.min_right + self.min_wrong > self.keep_samples:
            raise ValueError(f"min_right + min_wrong is more than keep_samples ({self.keep_samples})")
        _ = self._penalties
        return self

    @cached_property
    def _penalties(self) -> tuple[Callable[[ToolResult], bool], Callable[[Trajectory], float]]:
        return _function("errors", self.errors, ERRORS), _function("format", self.format, FORMATS)

    @property
    def least_samples(self) -> int:
        return self.keep_samples or self.min_samples  # prompts with fewer are dropped

    def penalty(self, trajectory: Trajectory) -> float:
        """Tool errors plus faults of form."""
        is_error, form = self._penalties
        return error_penalty(trajectory, is_error) + form(trajectory)

    def keep(self, groups: list[Group]) -> list[Group]:
        """Prompts with both good and bad rewards, each with half of its trajectories, in the order of sampling.

        A prompt with fewer trajectories than are to be kept is dropped; with just as many it is kept whole.
        """
        kept = []
        for group in groups:
            n = len(group.trajectories)
            most = max(n // 2, min(n, 2)) if self.keep_samples is None else self.keep_samples
            if len(set(group.rewards)) > 1 and n >= most:
                chosen = self._choose(group.trajectories, most)
                kept.append(Group(group.problem, [group.trajectories[i] for i in chosen]))
        return kept

    def token_weights(self, lengths: Tensor) -> Tensor:
        return token_mean(lengths)

    def reports(self, groups: list[Group]) -> dict[str, float]:
        """Tool errors in all trajectories of the groups and in the right ones."""
        every = [t for g in groups for t in g.trajectories]
        is_error = self._penalties[0]
        return {
            "tools/error_share": error_share(every, is_error),
            "tools/error_share_right": error_share([t for t in every if _right(t)], is_error),
        }

    def _choose(self, trajectories: Sequence[Trajectory], most: int) -> list[int]:
        """Indices of those that are kept, rising."""
        right = [i for i, t in enumerate(trajectories) if _right(t)]
        wrong = [i for i, t in enumerate(trajectories) if not _right(t)]
        n_right, n_wrong = shares(len(right), len(wrong), most, self.min_right, self.min_wrong)
        penalty = {i: self.penalty(trajectories[i]) for i in right}
        if self.selector == "greedy":
            right.sort(key=penalty.__getitem__)
        else:
            # a stream of the group's own: what is drawn depends on nothing but its trajectories' keys
            random = Random(f"roc/{[tuple(t.key) for t in trajectories]}")
            # Efraimidis and Spirakis: the greatest u^(1/w) are a weighted sample without replacement
            draw = {i: random.random() ** (penalty[i] + _SOFT) for i in right}
            right.sort(key=draw.__getitem__, reverse=True)
            random.shuffle(wrong)
        return sorted(right[:n_right] + wrong[:n_wrong])


def error_share(trajectories: Sequence[Trajectory], is_error: Callable[[ToolResult], bool] = flagged) -> float:
    """Share of errors among all tool results of the trajectories, infrastructure's left out; 0 without any."""
    results = [r for t in trajectories for turn in t.turns for r in turn.results if r.kind not in _INFRASTRUCTURE]
    return sum(map(is_error, results)) / max(len(results), 1)


def _right(t: Trajectory) -> bool:
    return t.score > 0  # as the official code splits; scores are 0 or 1 there


def _function(key: str, name: str, known: dict[str, Any]) -> Any:
    if name not in known and ":" not in name:
        raise OndolError(f"method.{key}: '{name}' is not known", f'known: {", ".join(known)}, or "module:function"')
    found = known.get(name) or find("methods", name)
    if not callable(found):
        raise OndolError(f"method.{key}: '{name}' is no function", "name a function")
    return found
