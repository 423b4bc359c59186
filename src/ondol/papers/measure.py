"""Numbers off a finished run, for the claims of papers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ondol.store import Run


def series(run: Run, metric: str, phase: str = "rl") -> list[float]:
    """A metric by step; what was not finite is left out."""
    return [m.value for m in run.db.metrics(metric, phase) if math.isfinite(m.value)]


def mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def last_quarter(run: Run, metric: str, phase: str = "rl") -> float | None:
    """Mean over the last quarter of the steps (at least one); None where it was not recorded."""
    values = series(run, metric, phase)
    return mean(values[-max(len(values) // 4, 1) :])


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value that `share` (0 ... 1) of the values do not exceed, between neighbours linearly."""
    if not values:
        return None
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    return ordered[low] + (at - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def known(**values: float | None) -> dict[str, float]:
    """Without what is None."""
    return {name: v for name, v in values.items() if v is not None}


def by_step(run: Run, *metrics: str, phase: str = "rl") -> list[tuple[float, ...]]:
    """Several metrics of the same step side by side; steps that lack one are left out."""
    tables = [{m.step: m.value for m in run.db.metrics(name, phase)} for name in metrics]
    steps = sorted(set.intersection(*(set(t) for t in tables)))
    return [tuple(t[s] for t in tables) for s in steps]
