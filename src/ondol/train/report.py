"""What the loop tells whoever watches; the default says nothing."""

from __future__ import annotations

from collections.abc import Sequence

from ondol.records import Trajectory
from ondol.rollout.statistics import what_failed


class Reporter:
    """Override what you want to hear. `units` are weights of work, so that an ETA over stages is possible."""

    def plan(self, stages: list[tuple[str, float]]) -> None:
        """All stages of the run to come, with their relative amounts of work."""

    def stage(self, name: str, total: int) -> None:
        """A stage begins; it has `total` steps."""

    def advance(self, part: float, values: dict[str, float]) -> None:
        """`part` of a step is done (1.0 when it is complete); values are metrics, empty in between."""

    def trajectory(self, title: str, trajectory: Trajectory) -> None:
        """One trajectory worth looking at."""

    def note(self, text: str) -> None:
        """Something happened that a person may want to know."""

    def warn(self, text: str) -> None:
        """Something happened that a person should know."""

    def failures(self, where: str, trajectories: Sequence[Trajectory]) -> None:
        """Warns of rollouts of which most have failed."""
        if said := what_failed(trajectories):
            self.warn(f"{where}: {said}")
