"""One small environment for each capability of an agent (survey of agentic RL, arXiv 2509.02547): the capability matrix.

All are made at random and need no data; a row says what it needs and, where that is not there, why it cannot be run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ondol.engines.base import Engine, Sampling
from ondol.envs.base import Env
from ondol.errors import OndolError
from ondol.evaluate import Evaluation, evaluate, held_out
from ondol.parts import make
from ondol.records import Trajectory
from ondol.tasks.base import Task


@dataclass(frozen=True)
class Benchmark:
    """An environment that asks for one capability.

    Attributes:
        environment: what it is, in a few words.
        needs: what a policy needs for it.
        chance: score of a policy that guesses, where it is not about 0.
        package: an optional package without which it cannot run: (module, how to get it).
        max_tokens: of a turn.
    """

    capability: str
    environment: str
    needs: str
    task: dict[str, Any]
    env: dict[str, Any]
    max_tokens: int
    chance: float = 0.0
    package: tuple[str, str] | None = None

    def available(self) -> str | None:
        """Why this cannot be run here, with the remedy; None when it can."""
        if self.package is not None and importlib.util.find_spec(self.package[0]) is None:
            return f"the package {self.package[0]} is not installed: {self.package[1]}"
        try:
            self.make()
        except OndolError as e:
            return e.what
        return None

    def make(self) -> tuple[Task, Env]:
        return make("tasks", self.task), make("envs", self.env)


_GYM = ("reasoning_gym", "pip install 'ondol[tasks]'")

BENCHMARKS = (
    Benchmark(
        capability="planning",
        environment="tower of Hanoi",
        needs="many turns",
        task={
            "name": "reasoning-gym",
            "dataset": "tower_of_hanoi",
            "options": {"min_disks": 2, "max_disks": 4, "min_pegs": 3, "max_pegs": 4},
        },
        env={"name": "moves", "max_turns": 24},
        max_tokens=16,
        package=_GYM,
    ),
    Benchmark(
        capability="tool use",
        environment="arithmetic",
        needs="calculator",
        task={"name": "arithmetic"},
        env={"name": "tool", "tools": ["calculator"], "max_turns": 3},
        max_tokens=48,
    ),
    Benchmark(
        capability="memory",
        environment="recall, 6 pairs",
        needs="memory tool",
        task={"name": "recall", "pairs": 6},
        env={"name": "stream", "tools": ["memory"]},
        max_tokens=32,
        chance=0.1,
    ),
    Benchmark(
        capability="reasoning",
        environment="leg counting",
        needs="one turn",
        task={"name": "reasoning-gym", "dataset": "leg_counting", "options": {"min_animals": 2, "max_animals": 4}},
        env={"name": "tool", "max_turns": 1},
        max_tokens=160,
        package=_GYM,
    ),
    Benchmark(
        capability="self-improvement",
        environment="sums, 4 tries",
        needs="feedback",
        task={"name": "arithmetic", "forms": ["a + b"], "low": 100, "high": 999},
        env={"name": "feedback", "max_turns": 4},
        max_tokens=32,
    ),
    Benchmark(
        capability="perception",
        environment="far digits",
        needs="zoom tool",
        task={"name": "digits"},
        env={"name": "tool", "tools": ["zoom"], "max_turns": 4},
        max_tokens=32,
        chance=0.1,
    ),
)


@dataclass
class Row:
    """A benchmark's outcome: an evaluation, or the reason why there is none."""

    benchmark: Benchmark
    reason: str | None = None
    result: Evaluation | None = field(default=None, repr=False)


def matrix(
    engine: Engine,
    renderer: Any,
    problems: int,
    *,
    benchmarks: Sequence[Benchmark] = BENCHMARKS,
    seed: int = 0,
    timeout_s: float = 600.0,
    begin: Callable[[Benchmark], None] = lambda b: None,
    progress: Callable[[Trajectory], None] = lambda t: None,
    stop: Callable[[], None] = lambda: None,
) -> Iterator[Row]:
    """Rows of the matrix as they are done: greedy, on `problems` held-out problems of each benchmark."""
    for number, benchmark in enumerate(benchmarks):
        reason = benchmark.available()
        if reason is not None:
            yield Row(benchmark, reason)
            continue
        begin(benchmark)
        task, env = benchmark.make()
        sampling = Sampling(temperature=0, max_tokens=benchmark.max_tokens)
        result = evaluate(
            engine,
            renderer,
            task,
            env,
            held_out(task, problems),
            sampling,
            seed=(seed, number),
            timeout_s=timeout_s,
            progress=progress,
            stop=stop,
        )
        yield Row(benchmark, None, result)
