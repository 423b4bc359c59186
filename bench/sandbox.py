"""How many sandboxed calls a second, by tier. Writes bench/results/sandbox.json.

    python bench/sandbox.py

Tier 1 is Monty (the tool `python`), tier 2 full CPython at each level of walls (`cpython`, and the code judge). A call is
`x = 6 * 7; x + 1`, made as an agent makes it (`call_tool`), from 1, 8 and 32 trajectories at once; best of 3. Opening is the
time from nothing to the first answer of a new trajectory. The judge's jobs are programs that read five numbers and print a
sum; over HTTP they go one after the other, and through the batching client.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import time
from pathlib import Path

from ondol import parts
from ondol.records import ToolCall
from ondol.sandbox.judge import CodeJudge
from ondol.sandbox.judge_trial import batches, healthy_job
from ondol.sandbox.levels import LEVELS, try_level
from ondol.tools.base import Tool, call_tool

CODE = "x = 6 * 7\nx + 1"
AT_ONCE = (1, 8, 32)
OUT = Path(__file__).parent / "results" / "sandbox.json"


async def calls_per_s(tool: Tool, at_once: int, count: int) -> float:
    """Best of 3 rounds of `count` calls from `at_once` trajectories, whose sandboxes are open."""
    sessions = [tool.session(f"bench-{i}") for i in range(at_once)]
    call = ToolCall(tool.name, {tool.main_argument: CODE})

    async def many(session, number):
        for _ in range(number):
            result = await call_tool(session, tool, call)
            assert result.text == "43", result

    try:
        await asyncio.gather(*(many(s, 2) for s in sessions))
        best = 0.0
        for _ in range(3):
            started = time.perf_counter()
            await asyncio.gather(*(many(s, count // at_once) for s in sessions))
            best = max(best, count // at_once * at_once / (time.perf_counter() - started))
        return best
    finally:
        for s in sessions:
            await s.close()


async def opening_ms(tool: Tool) -> float:
    """Median of 9: a new trajectory's first answer."""
    times = []
    for i in range(10):
        session = tool.session(f"open-{i}")
        started = time.perf_counter()
        await call_tool(session, tool, ToolCall(tool.name, {tool.main_argument: CODE}))
        times.append(1000 * (time.perf_counter() - started))
        await session.close()
    return sorted(times[1:])[4]


async def judged_per_s(level: str, workers: int) -> float:
    """Healthy jobs of one long batch, in process; best of 3."""
    import random

    r = random.Random(0)
    work = [healthy_job(r).submission for _ in range(300)]
    async with CodeJudge(workers, level=level) as judge:
        await judge.run_batch(work[:10], long=True)
        best = 0.0
        for _ in range(3):
            started = time.perf_counter()
            await judge.run_batch(work, long=True)
            best = max(best, len(work) / (time.perf_counter() - started))
        return best


def measure(tool: Tool, count: int) -> dict[str, float]:
    out = {f"calls_per_s_from_{n}": round(asyncio.run(calls_per_s(tool, n, count)), 1) for n in AT_ONCE}
    return out | {"opening_ms": round(asyncio.run(opening_ms(tool)), 1)}


def main() -> None:
    cores = os.cpu_count() or 1
    found: dict[str, object] = {
        "command": "python bench/sandbox.py",
        "machine": {"cores": cores, "kernel": platform.release(), "python": platform.python_version()},
        "call": CODE,
    }
    found["tier 1"] = measure(parts.make("tools", "python"), 6400)
    print(json.dumps(found["tier 1"]), flush=True)
    works = [level for level in LEVELS if try_level(level) is None]
    found["left out"] = {level: try_level(level) for level in LEVELS if level not in works}
    judged = {}  # before the tools, whose packages stay loaded in what sandboxes are forked from
    for level in works:
        over_http = asyncio.run(batches(200, workers=cores, level=level))
        judged[level] = {
            "jobs_per_s": round(asyncio.run(judged_per_s(level, cores)), 1),
            "over HTTP": {k: round(v, 2) for k, v in over_http.items()},
        }
    for level in works:
        row = {
            "session": measure(parts.make("tools", {"name": "cpython", "level": level}), 960),
            "stateless": measure(parts.make("tools", {"name": "cpython", "level": level, "stateful": False}), 160),
            "judge": judged[level],
        }
        found[f"tier 2, {level}"] = row
        print(level, json.dumps(row, indent=1), flush=True)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
