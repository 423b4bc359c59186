"""What a batch of rollouts was like: the numbers of it that papers argue with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ondol.records import Finish, Group, Problem, StopReason, Trajectory, Turn


def statistics(
    groups: Sequence[Group], answer_class: Callable[[Problem, str], str | None] | None = None
) -> dict[str, float]:
    """Metrics of a batch of rollouts: score, reward, stop reasons, tools, lengths, answers.

    `answer_class` names the kind of a right answer (None: none); without one its text does.
    """
    all_ = [t for g in groups for t in g.trajectories]
    if not all_:
        return {}
    n = len(all_)
    rewards = [t.reward for t in all_]
    mean = sum(rewards) / n
    turns = [turn for t in all_ for turn in t.turns]
    results = [r for turn in turns for r in turn.results]
    in_positives = [r for t in all_ if t.score >= 1.0 for turn in t.turns for r in turn.results]
    out = {
        "score/mean": sum(t.score for t in all_) / n,
        "reward/mean": mean,
        "reward/std": (sum((r - mean) ** 2 for r in rewards) / n) ** 0.5,
        "rollout/turns": sum(len(t.turns) for t in all_) / n,
        "rollout/sampled_tokens": float(sum(t.sampled_tokens for t in all_)),
        "rollout/response_tokens": sum(t.sampled_tokens for t in all_) / n,
        "rollout/void_share": sum(map(is_void, turns)) / max(len(turns), 1),
        "tools/calls_per_trajectory": len(results) / n,
        "tools/error_share": sum(not r.ok for r in results) / max(len(results), 1),
    }
    if in_positives:
        out["tools/error_share_in_positives"] = sum(not r.ok for r in in_positives) / len(in_positives)
    for reason in StopReason:
        out[f"stop/{reason}"] = sum(t.stop_reason is reason for t in all_) / n
    return out | _answers([g for g in groups if g.trajectories], answer_class)


def what_failed(trajectories: Sequence[Trajectory]) -> str | None:
    """In words, when more than half of them ended with an error or out of time: then it is rarely the policy that is to blame."""
    errors = [t for t in trajectories if t.stop_reason is StopReason.ERROR]
    late = sum(t.stop_reason is StopReason.TIMEOUT for t in trajectories)
    if 2 * (len(errors) + late) <= len(trajectories):
        return None
    said = []
    if errors:
        first = " ".join(str(errors[0].info.get("error", "")).split())[:300]
        said.append(f"{len(errors)} ended with an error, the first with: {first}")
    if late:
        said.append(f"{late} ran out of time (rollout.timeout_s)")
    return f"of {len(trajectories)} trajectories " + "; ".join(said)


def is_void(turn: Turn) -> bool:
    """Neither a tool call nor an answer: cut off before either, or blank."""
    return not turn.calls and (turn.finish in (Finish.LENGTH, Finish.CONTEXT) or not turn.text.strip())


def _answers(groups: Sequence[Group], answer_class: Callable[[Problem, str], str | None] | None) -> dict[str, float]:
    """pass@1 and pass@k, k being the (smallest) group's size, and the kinds of right answers; means over groups."""
    k = min(len(g.trajectories) for g in groups)
    tries = [(len(g.trajectories), _right(g.trajectories)) for g in groups]
    kinds = [
        {answer_class(t.problem, t.response) if answer_class else t.response.strip() for t in right} - {None}
        for _, right in tries
    ]
    out = {"answers/distinct_right": sum(map(len, kinds)) / len(groups)}
    for size in dict.fromkeys((1, k)):
        # unbiased: 1 - C(n - c, k) / C(n, k) of c right ones among n (Chen et al. 2021, arXiv 2107.03374)
        missed = (math.comb(n - len(right), size) / math.comb(n, size) for n, right in tries)
        out[f"answers/pass@{size}"] = 1 - sum(missed) / len(groups)
    return out


def _right(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    return [t for t in trajectories if t.score >= 1.0]


def staleness(groups: Sequence[Group], version: int) -> dict[str, float]:
    """How far the weights have come, to `version`, since they sampled these."""
    used = [{v for v, s in zip(t.version, t.sampled) if s} for g in groups for t in g.trajectories if t.sampled_tokens]
    count = max(len(used), 1)
    return {
        "rollout/staleness": sum(version - min(u) for u in used) / count,
        "rollout/switched_share": sum(len(u) > 1 for u in used) / count,
    }
