"""How good is a model at a task: held-out problems, greedy and sampled, with and without tools."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ondol.engines.base import Engine, Sampling
from ondol.envs.base import Env
from ondol.errors import OndolError
from ondol.records import Group, Problem, Trajectory
from ondol.rollout.driver import Plan, rollout
from ondol.rollout.statistics import statistics
from ondol.store import Run
from ondol.tasks.base import Task

#: phases of a run in which the model is evaluated, in order, and what people call them
RUNGS = {"before": "before", "warm": "after warm start", "after": "after RL"}


@dataclass
class Evaluation:
    """A score with what it came from. `error` is the standard error over problems."""

    score: float
    error: float
    problems: int
    samples: int
    groups: list[Group] = field(repr=False)

    @property
    def statistics(self) -> dict[str, float]:
        return statistics(self.groups)

    @property
    def trajectories(self) -> list[Trajectory]:
        return [t for g in self.groups for t in g.trajectories]


def held_out(task: Task, count: int) -> list[Problem]:
    """The first `count` problems of the test split, fewer if it has fewer."""
    size = task.size("test")
    return [task.problem(i, "test") for i in range(count if size is None else min(count, size))]


def evaluate(
    engine: Engine,
    renderer: Any,
    task: Task,
    env: Env,
    problems: list[Problem],
    sampling: Sampling,
    *,
    seed: tuple[int, ...] = (0,),
    samples: int = 1,
    timeout_s: float = 600.0,
    max_response_tokens: int | None = None,
    progress: Callable[[Trajectory], None] = lambda t: None,
    stop: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Mean score over problems (each the mean of its samples). Greedy needs one sample only."""
    samples = 1 if sampling.temperature == 0 else samples
    plan = Plan(
        task,
        env,
        problems,
        samples,
        sampling,
        seed,
        timeout_s=timeout_s,
        max_response_tokens=max_response_tokens,
        progress=progress,
        stop=stop,
    )
    groups = rollout(engine, renderer, plan)
    return summarise(groups, samples)


def summarise(groups: list[Group], samples: int) -> Evaluation:
    """Score and standard error of what was rolled out: `samples` tries at each problem (fewer where cut short)."""
    means = [sum(g.scores) / len(g.scores) for g in groups]
    mean = sum(means) / len(means) if means else math.nan
    spread = math.sqrt(sum((m - mean) ** 2 for m in means) / max(len(means) - 1, 1))
    return Evaluation(mean, spread / math.sqrt(max(len(means), 1)), len(means), samples, groups)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of k tries is right, unbiased, when c of n tries were: 1 - C(n-c, k) / C(n, k) (Chen et
    al. 2021, arXiv 2107.03374). Raises OndolError unless 1 <= k <= n and 0 <= c <= n."""
    if not (1 <= k <= n and 0 <= c <= n):
        raise OndolError(f"pass@{k} of {n} tries, {c} of them right, means nothing", "1 <= k <= n and 0 <= c <= n")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def many_samples(result: Evaluation, task: Task) -> dict[str, float]:
    """What several samples of a problem tell beyond their mean, as metrics; nothing for one sample.

    "eval/pass@K" for K = 1, 2, 4 ... and all samples, mean over problems. "eval/distinct_right": mean number of different
    kinds of right answers to a problem, where the task has `answer_class(problem, response)`.
    """
    if result.samples < 2 or not result.groups:
        return {}
    powers = [1 << i for i in range(result.samples.bit_length())]
    out = {}
    for k in sorted({*(k for k in powers if k <= result.samples), result.samples}):
        tried = [g for g in result.groups if len(g.scores) >= k]  # an evaluation that was cut short has smaller groups
        if tried:
            right = [pass_at_k(len(g.scores), sum(s >= 1.0 for s in g.scores), k) for g in tried]
            out[f"eval/pass@{k}"] = sum(right) / len(right)
    kind = getattr(task, "answer_class", None)
    if kind is not None:
        found = [
            {kind(t.problem, t.response) for t in g.trajectories if t.score >= 1.0} - {None} for g in result.groups
        ]
        out["eval/distinct_right"] = sum(map(len, found)) / len(found)
    return out


def greedy(sampling: Sampling) -> Sampling:
    """The same limits, without chance."""
    return sampling.model_copy(update={"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0})


def ways(env: Env, sampling: Sampling, samples: int, without_tools: bool) -> Iterator[tuple[str, Env, Sampling, int]]:
    """How a model is measured: (name, environment, sampling, samples per problem)."""
    if without_tools and getattr(env, "tools", ()):
        yield "no_tool", env.without_tools(), greedy(sampling), 1
    yield "greedy", env, greedy(sampling), 1
    if sampling.temperature > 0:
        yield "sampled", env, sampling, samples


def ladder(run: Run) -> list[dict[str, Any]]:
    """Evaluation scores of a run by rung: {"rung", "no_tool", "greedy", "sampled"}; what was not measured is None."""
    rows = []
    for phase, title in RUNGS.items():
        found = {m.name: m.value for m in run.db.metrics("eval/*", phase)}
        if found:
            rows.append({"rung": title} | {w: found.get(f"eval/score_{w}") for w in ("no_tool", "greedy", "sampled")})
    return rows
