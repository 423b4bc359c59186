"""Mean, spread, and the interval of a paired difference. Plain numbers, no arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache


def summary(values: Sequence[float]) -> dict[str, float | int | None]:
    """{"mean", "spread", "n"}: spread is the unbiased standard deviation, None of a single value."""
    n = len(values)
    if not n:
        return {"mean": None, "spread": None, "n": 0}
    mean = math.fsum(values) / n
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else None
    return {"mean": mean, "spread": spread, "n": n}


def paired(values: Mapping[int, float], base: Mapping[int, float]) -> dict[str, float | int | None]:
    """Difference to `base` over the seeds that both have: {"mean", "low", "high", "n"}.

    low..high is Student's 95 % interval of the mean difference; None with fewer than two seeds. Same seeds mean same
    problems and same start, so pairing takes their spread out.
    """
    found = summary([values[s] - base[s] for s in sorted(values.keys() & base.keys())])
    mean, spread, n = found["mean"], found["spread"], int(found["n"] or 0)
    if mean is None or spread is None:
        return {"mean": mean, "low": None, "high": None, "n": n}
    half = t_quantile(n - 1) * spread / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


@lru_cache
def t_quantile(freedom: int, level: float = 0.95) -> float:
    """t with P(|T| <= t) = level for Student's distribution of `freedom` degrees, to about 1e-9."""
    low, high = 0.0, 1.0
    while _within(high, freedom) < level:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return (low + high) / 2


def _within(t: float, freedom: int) -> float:
    """P(|T| <= t), by the finite sums for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    if freedom % 2:
        term, total = cosine, cosine if freedom > 1 else 0.0
        for k in range(3, freedom - 1, 2):
            term *= cosine * cosine * (k - 1) / k
            total += term
        return 2 / math.pi * (angle + sine * total)
    term, total = 1.0, 1.0
    for k in range(2, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return sine * total
