"""A method's filters at work: what they leave, more prompts where they leave too little, and what to say where nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ondol.errors import OndolError
from ondol.methods.base import Method
from ondol.records import Group

#: steps in a row that may come out empty: filters can leave nothing once in a while
EMPTY_STEPS = 10


@dataclass
class Filtered:
    """`kept` of all the `sampled` groups, `resampled` of which were added; a method may say why it refuses them all."""

    kept: list[Group]
    sampled: list[Group]
    resampled: int = 0
    refusal: OndolError | None = None

    @property
    def all_right(self) -> bool:
        """Whether there is nothing wrong in any sampled group."""
        return all(s >= 1 for g in self.sampled for s in g.scores)

    def nothing_left(self) -> OndolError:
        """What to say of a step with nothing to learn from."""
        wrong = sum(all(s <= 0 for s in g.scores) for g in self.sampled)
        right = sum(all(s >= 1 for s in g.scores) for g in self.sampled)
        equal = sum(len(set(g.rewards)) <= 1 for g in self.sampled)
        why = f"{wrong} all wrong, {right} all right, {equal} with equal rewards"
        added = f", {self.resampled} of them sampled in addition" if self.resampled else ""
        what = self.refusal.what if self.refusal else f"the method's filters kept none of {len(self.sampled)} groups"
        remedy = "loosen the filters, sample more of each prompt, or give a task that is neither too hard nor too easy"
        return OndolError(f"{what} ({why}{added})", (self.refusal and self.refusal.remedy) or remedy)


def filtered(
    method: Method, groups: list[Group], wanted: int, sample_more: Callable[[int], list[Group]] | None
) -> Filtered:
    """What the method's `keep` leaves of a step's groups.

    Where that is less than `wanted` and the method asks for it, `sample_more(1)`, `sample_more(2)` ... give further
    groups, at most `max_resamples` times; of what is kept then, `wanted` groups are used.
    """
    most = method.max_resamples if sample_more is not None else 0
    out = Filtered([], list(groups))
    batch = groups
    for again in range(most + 1):
        if again:
            assert sample_more is not None
            batch = sample_more(again)
            out.sampled += batch
            out.resampled += len(batch)
        try:
            out.kept += method.keep(batch)
        except OndolError as e:
            out.refusal = e
        if len(out.kept) >= wanted:
            break
    if method.max_resamples:  # also of recorded groups, among which are those that had been added
        out.kept = out.kept[:wanted]
    return out


def is_hopeless(method: Method, kept: Sequence[float], steps: int, resamples: bool, all_right: bool = False) -> bool:
    """Whether a run should end at an empty step: at once after further sampling; else after ten in a row, or where none
    of its `steps` was anything else. Never where it learned before and now gets everything right: that is success.

    `kept`: groups kept in each step so far, this one's among them; `all_right`: whether every sample of this step is.
    """
    if all_right and any(kept):
        return False
    if resamples and method.max_resamples:
        return True
    return not any(kept[-EMPTY_STEPS:]) and len(kept) >= min(EMPTY_STEPS, steps)
