"""Jobs for worker processes: real models and tools, small."""

from __future__ import annotations

from typing import Any

from ondol.engines.base import Sampling
from ondol.envs.tool import ToolEnv
from ondol.models.load import load_model
from ondol.papers.slow_tools import SteadyEngine, said
from ondol.papers.tool_sums import ToolSums
from ondol.rollout.driver import Plan
from ondol.tools.python import Python


def steady(count: int = 12, calls: int = 3, step_s: float = 0.002) -> tuple[Any, Any, Plan]:
    """An engine that says what is drawn for each turn, a token a step; the real Python tool."""
    renderer, task = load_model("tiny:context=4096").renderer, ToolSums()
    env = ToolEnv(tools=(Python(),), max_turns=calls + 1, system="")
    engine = SteadyEngine(renderer, lambda seed: said(calls, seed), step_s)
    plan = Plan(
        task,
        env,
        [task.problem(i) for i in range(count // 2)],
        2,
        Sampling(max_tokens=4096),
        (7, 0),
        overlap_tools=True,
    )
    return engine, renderer, plan


def broken() -> tuple[Any, Any, Plan]:
    engine, renderer, plan = steady(4)
    engine.step = lambda: (_ for _ in ()).throw(RuntimeError("no memory left"))
    return engine, renderer, plan
