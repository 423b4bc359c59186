"""Samples of older weights: what part of the correction is the method's ratio, and what part a weight beside it.

Three policies are at hand when samples lag behind: the one that sampled (behaviour), the one that the step begins with (proximal), and the one being trained. A method's
ratio between the first and the last has to bridge the whole lag within its clip. Decoupled, the ratio is taken to the proximal policy, so that the clip bounds what this
step changes, and the rest, proximal over behaviour, weighs each token's loss (decoupled PPO objective: Hilton et al., arXiv 2110.00641, section 3; used for asynchronous
training by AReaL, arXiv 2505.24298, section 5.2). Held at a cap, that weight is truncated importance sampling (Ionides 2008).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ondol.records import Trajectory


@dataclass(frozen=True)
class Corrected:
    """Trajectories whose stale tokens carry the proximal log-probs, and what weighs each trained token.

    Attributes:
        trajectories: N of them; other tokens are as they were.
        factors: N lists, one number per trained token: proximal over behaviour probability, at most the cap; 1 for tokens of the present weights.
        reports: metrics, over the stale trained tokens.
    """

    trajectories: list[Trajectory]
    factors: list[list[float]]
    reports: dict[str, float]


def is_stale(t: Trajectory, version: int) -> bool:
    """Whether other weights than `version` sampled any of its trained tokens."""
    return any(s and a and v != version for s, a, v in zip(t.sampled, t.trained, t.version))


def correct(
    trajectories: Sequence[Trajectory], proximal: Sequence[Sequence[float] | None], version: int, cap: float
) -> Corrected:
    """Decouple the stale tokens.

    Args:
        proximal: of each trajectory the log-probs of its tokens under the present weights, one per entry of `ids`; None where `is_stale` says no.
        version: of the present weights.
        cap: most that a token is weighted with.
    """
    out, factors, found, gaps, capped = [], [], [], [], 0
    for t, now in zip(trajectories, proximal, strict=True):
        if now is None:
            out.append(t)
            factors.append([1.0] * sum(t.trained))
            continue
        stale = [s and a and v != version for s, a, v in zip(t.sampled, t.trained, t.version)]
        # exp of at most the cap's own logarithm: a far log-ratio must not overflow
        raw = [new - old if k else 0.0 for k, new, old in zip(stale, now, t.logp)]
        weights = [math.exp(min(r, math.log(cap))) for r in raw]
        capped += sum(r > math.log(cap) for r in raw)
        gaps += [r for r, k in zip(raw, stale) if k]
        found += [w for w, k in zip(weights, stale) if k]
        factors.append([w if k else 1.0 for w, k, a in zip(weights, stale, t.trained) if a])
        logp = [new if k else old for k, new, old in zip(stale, now, t.logp)]
        out.append(dataclasses.replace(t, logp=logp))
    count = max(len(found), 1)
    trained = sum(len(f) for f in factors)
    return Corrected(
        out,
        factors,
        {
            "off_policy/stale_share": len(found) / max(trained, 1),
            "off_policy/weight": sum(found) / count if found else 1.0,
            "off_policy/capped_share": capped / count,
            # k1, an estimate of KL(behaviour || proximal): how far the weights have moved since these were sampled
            "off_policy/kl": -sum(gaps) / count,
        },
    )
