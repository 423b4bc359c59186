"""What of a finished trajectory is trained on: its sampled tokens, unless a setting says otherwise (VerlTool, arXiv
2509.01055; names and rules are those of its agent loop)."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from ondol.parts import Part
from ondol.records import StopReason, Trajectory

#: ends that the agent or its environment chose
_FINISHED = (StopReason.ANSWERED, StopReason.EMPTY, StopReason.ENV_DONE)
#: results of calls that no tool took up
_INVALID = ("unknown_tool", "bad_arguments", "crashed")


class Masking(Part):
    """Sampled tokens are trained on. A trajectory that is masked whole still has a reward, and its group hears of it."""

    mask_observations: bool = Field(
        default=True, description="observations are not trained on; off is for showing what that costs"
    )
    mask_overlong_loss: bool = Field(
        default=False, description="nor is a trajectory that was cut short: by turns, tokens, time, or an error"
    )
    mask_void_traj: bool = Field(
        default=False, description="nor one in which no call reached a tool and no answer is marked"
    )
    answer_marks: tuple[str, ...] = Field(
        default=("\\boxed", "final_answer("), description="mask_void_traj: text that marks an answer"
    )

    def apply(self, t: Trajectory) -> None:
        """Set `trained` of a trajectory that has ended."""
        n = t.prompt_length
        if self.masks(t):
            t.trained = [False] * len(t.ids)
        elif not self.mask_observations:
            t.trained = [False] * n + [True] * (len(t.ids) - n)

    def masks(self, t: Trajectory) -> bool:
        """Whether nothing of the trajectory is trained on."""
        if self.mask_overlong_loss and t.stop_reason not in _FINISHED:
            return True
        return self.mask_void_traj and self._void(t)

    def _void(self, t: Trajectory) -> bool:
        valid = any(r.kind not in _INVALID for turn in t.turns for r in turn.results)
        return not valid and not any(mark in text for text in _texts(t) for mark in self.answer_marks)


def _texts(t: Trajectory) -> Iterator[str]:
    for turn in t.turns:
        yield turn.text
        yield from (r.text for r in turn.results)
