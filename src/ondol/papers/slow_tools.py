"""How long rollouts over slow tools take: asynchronous, where no trajectory waits for another, and with a turn barrier.

The simulated engine's step takes the same time however many sequences run, as that of an accelerator that is not full.
Turns and tool calls have times drawn for each trajectory alone, so both ways do exactly the same work.
"""

from __future__ import annotations

import asyncio
import math
import time
from pathlib import Path
from random import Random
from typing import Any

from pydantic import Field

from ondol.engines.base import Completion, EngineStats, Request, Sampling
from ondol.envs.tool import ToolEnv
from ondol.models.load import load_model
from ondol.papers.tool_sums import Calc, ToolSums
from ondol.recipe import Recipe
from ondol.records import Finish, Problem, ToolResult, Trajectory
from ondol.rollout.driver import Plan, rollout
from ondol.tasks.base import Task
from ondol.tools.base import Tool, ToolSession
from ondol.tools.python import Python

STEP_S = 0.010  # of the simulated engine
TURN_TOKENS, TURN_SPREAD = 60, 0.5  # median of a turn's length, and standard deviation of its logarithm
WAIT_S, WAIT_SPREAD = 0.3, 0.8  # the same of a tool's wait; the median is the card's


class Traffic:
    """How many calls are under way, and the most there were."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def __enter__(self) -> None:
        self.now += 1
        self.peak = max(self.peak, self.now)

    def __exit__(self, *error: object) -> None:
        self.now -= 1


class Slow:
    """Mixed into a tool: its calls take as long as if they went far. A call's wait depends on its trajectory and number
    alone."""

    wait_s: float
    traffic: Any

    def session(self, trajectory_id: str) -> ToolSession:
        return _SlowSession(self, super().session(trajectory_id), trajectory_id)  # type: ignore[misc]


class SlowPython(Slow, Python):
    """The Python tool with waits."""

    wait_s: float = Field(default=WAIT_S, description="median wait")
    traffic: Any = Field(default_factory=Traffic, description="counts calls under way")


class SlowCalc(Slow, Calc):
    """The calculator with waits."""

    wait_s: float = Field(default=WAIT_S, description="median wait")
    timeout_s: float = Field(default=60.0, description="time limit of one call")
    traffic: Any = Field(default_factory=Traffic, description="counts calls under way")


class _SlowSession:
    def __init__(self, tool: Slow, inner: ToolSession, trajectory_id: str) -> None:
        self.tool, self.inner, self.id, self.calls = tool, inner, trajectory_id, 0

    async def call(self, arguments: dict[str, Any]) -> ToolResult:
        wait, self.calls = drawn_wait(self.tool.wait_s, self.id, self.calls), self.calls + 1
        with self.tool.traffic:
            await asyncio.sleep(wait)
            return await self.inner.call(arguments)

    async def close(self) -> None:
        await self.inner.close()


def drawn_wait(median_s: float, trajectory_id: str, number: int) -> float:
    return median_s and Random(f"{trajectory_id}/wait/{number}").lognormvariate(math.log(median_s), WAIT_SPREAD)


class SteadyEngine:
    """A step takes `step_s` and gives each running sequence one token of the text it was made to say."""

    def __init__(self, renderer: Any, says: Any, step_s: float) -> None:
        self.renderer, self.says, self.step_s = renderer, says, step_s
        self.version, self.stats = 0, EngineStats()
        self._left: dict[str, int] = {}
        self._ends: dict[str, Completion] = {}

    @property
    def busy(self) -> bool:
        return bool(self._left)

    def submit(self, request: Request) -> None:
        text = self.says(request.seed)
        stopped = text.endswith(request.stop)
        ids = [*self.renderer.codec.text(text), *([] if stopped else [self.renderer.end_id])]
        finish = Finish.STOP if stopped else Finish.END
        done = Completion(request.session, ids, [0.0] * len(ids), [], text, finish, self.version)
        self._left[request.session], self._ends[request.session] = len(ids), done

    def step(self) -> list[Completion]:
        if not self._left:
            return []
        time.sleep(self.step_s)
        self._left = {s: n - 1 for s, n in self._left.items()}
        done = [s for s, n in self._left.items() if n == 0]
        for session in done:
            del self._left[session]
        return [self._ends.pop(session) for session in done]

    def release(self, session: str) -> None:
        self._left.pop(session, None)
        self._ends.pop(session, None)

    def sync(self, version: int) -> None:
        self.version = version


def said(calls: int, seed: tuple[int, ...]) -> str:
    """A turn of a length drawn for it: `calls` turns with a product to compute, then one without."""
    random = Random(f"{seed}/turn")
    number = f"{random.randrange(1000, 10_000)}"
    text = f"<python>{number} * {random.randrange(1000, 10_000)}</python>" if seed[-1] < calls else number
    length = round(random.lognormvariate(math.log(TURN_TOKENS), TURN_SPREAD))
    return "." * (length - len(text)) + text


def simulated(seed: int, calls: int, count: int, step_s: float = STEP_S, wait_s: float = WAIT_S) -> dict[str, float]:
    """Wall times of `count` trajectories with `calls` calls each, both ways, and what the drawn times add up to.

    "ratio_N", "async_s_N", "sync_s_N", "expected_N" for N calls; "same_share" of trajectories that are equal both ways;
    "tools_at_once" when asynchronous.
    """
    renderer, task = load_model("tiny:context=4096").renderer, ToolSums()
    problems = [task.problem(i) for i in range(count)]
    # the sandbox's workers start once for all
    _timed(_engine(renderer, 1, 0.0), renderer, _env(SlowPython(wait_s=0.0), 2), task, problems, (seed, 0), False)
    found, traffic = {}, Traffic()
    for barrier in (True, False) if seed % 2 else (False, True):
        tool = SlowPython(wait_s=wait_s, traffic=Traffic() if barrier else traffic)
        env, engine = _env(tool, calls + 1), _engine(renderer, calls, step_s)
        found[barrier] = _timed(engine, renderer, env, task, problems, (seed, calls), barrier)
    (sync_s, sync), (async_s, asynchronous) = found[True], found[False]
    turns = [[t.turns[n].end - t.turns[n].start for n in range(calls + 1)] for t in sync]
    waits = [[drawn_wait(wait_s, _id(seed, calls, i), n) for n in range(calls)] for i in range(count)]
    alone = max(step_s * sum(a) + sum(b) for a, b in zip(turns, waits, strict=True))
    together = step_s * sum(map(max, zip(*turns, strict=True))) + sum(map(max, zip(*waits, strict=True)))
    return {
        f"ratio_{calls}": async_s / sync_s,
        f"async_s_{calls}": async_s,
        f"sync_s_{calls}": sync_s,
        f"expected_{calls}": alone / together,
        "same_share": same_share(sync, asynchronous),
        "tools_at_once": float(traffic.peak),
    }


def embedded(recipe: Recipe, model: Path, seed: int, count: int) -> dict[str, float]:
    """The same with a real model, greedily, in the embedded engine; the recipe's task and turns, a calculator with waits."""
    from ondol.evaluate import greedy, held_out
    from ondol.train.plans import make_engine

    loaded = load_model(str(model))
    problems, found = held_out(recipe.task, count), {}
    env = recipe.env.model_copy(update={"tools": (SlowCalc(),)})
    for barrier in (True, False) if seed % 2 else (False, True):
        engine, sampling = make_engine(recipe, loaded), greedy(recipe.sampling)
        found[barrier] = _timed(engine, loaded.renderer, env, recipe.task, problems, (seed, 0), barrier, sampling)
    (sync_s, sync), (async_s, asynchronous) = found[True], found[False]
    return {
        "ratio": async_s / sync_s,
        "async_s": async_s,
        "sync_s": sync_s,
        "same_share": same_share(sync, asynchronous),
        "calls_mean": sum(len(turn.results) for t in sync for turn in t.turns) / count,
    }


def same_share(a: list[Trajectory], b: list[Trajectory]) -> float:
    """Share of trajectories with the same ids, masks, results and end."""
    return sum(_content(x) == _content(y) for x, y in zip(a, b, strict=True)) / len(a)


def _content(t: Trajectory) -> tuple[Any, ...]:
    results = [(r.text, r.kind) for turn in t.turns for r in turn.results]
    return t.ids, t.sampled, t.trained, results, t.stop_reason, t.score


def _engine(renderer: Any, calls: int, step_s: float) -> SteadyEngine:
    return SteadyEngine(renderer, lambda seed: said(calls, seed), step_s)


def _env(tool: Tool, max_turns: int) -> ToolEnv:
    return ToolEnv(tools=(tool,), max_turns=max_turns, system="")


def _id(seed: int, calls: int, problem: int) -> str:
    """What the rollout calls this trajectory."""
    return f"{seed}.{calls}/000000/{problem:06d}/0000"


def _timed(
    engine: Any,
    renderer: Any,
    env: ToolEnv,
    task: Task,
    problems: list[Problem],
    seed: tuple[int, ...],
    barrier: bool,
    sampling: Sampling | None = None,
) -> tuple[float, list[Trajectory]]:
    plan = Plan(task, env, problems, 1, sampling or Sampling(max_tokens=4096), seed)
    plan.turn_barrier, plan.overlap_tools = barrier, not barrier
    started = time.perf_counter()
    groups = rollout(engine, renderer, plan)
    return time.perf_counter() - started, [g.trajectories[0] for g in groups]
