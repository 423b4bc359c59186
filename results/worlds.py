"""Are the worlds sound? python results/worlds.py [PROBLEMS] writes results/worlds.json.

Each MiniWoB++ page and each setting of the other worlds: the gold answers are played in the world itself, and so are near
misses. All gold must score 1, no near miss may. Pages are timed as well, as one agent meets them.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from ondol.envs.miniwob import MiniwobEnv
from ondol.records import Message
from ondol.tasks.base import Task
from ondol.tasks.gymnasium import Gymnasium
from ondol.tasks.miniwob import SOLVERS, Miniwob
from ondol.tasks.widgets import Widgets
from ondol.tools.chromium import find_chromium

OUT = Path(__file__).with_name("worlds.json")


def sound(task: Task, count: int) -> dict[str, float]:
    """Of `count` problems: the lowest score of a gold answer, the highest of a near miss, and how many those were."""
    golds, misses = [], []
    for index in range(count):
        problem = task.problem(index)
        golds.append(task.score(problem, task.gold(problem)))
        misses += [task.score(problem, m) for m in task.near_misses(problem)]
    return {"problems": count, "gold_min": min(golds), "near_miss_max": max(misses), "near_misses": len(misses)}


def timed(task: Miniwob, pictures: bool) -> dict[str, float]:
    """Milliseconds of an episode's reset and of a step, in the environment."""

    async def go() -> dict[str, float]:
        episode = MiniwobEnv(pictures=pictures).episode(task, task.problem(0), "t", None)
        begun = time.perf_counter()
        await episode.reset()
        ready = time.perf_counter()
        for _ in range(10):
            await episode.step(Message("assistant", "press(Tab)"), False)
        done = time.perf_counter()
        await episode.close()
        return {"reset_ms": round((ready - begun) * 1e3), "step_ms": round((done - ready) * 1e2)}

    return asyncio.run(go())


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    out: dict[str, object] = {"command": f"python results/worlds.py {count}", "cores": os.cpu_count()}
    program = find_chromium()
    out["chromium"] = subprocess.run([str(program), "--version"], capture_output=True, text=True).stdout.strip()
    out["python"] = platform.python_version()
    pages = {}
    for page in SOLVERS:
        pages[page] = sound(Miniwob(pages=(page,)), count)
        print(page, pages[page], flush=True)
    out["miniwob"] = pages
    task = Miniwob(pages=("login-user",))
    timed(task, False)  # the browser starts
    out["miniwob_text"], out["miniwob_pictures"] = timed(task, False), timed(task, True)
    out["widgets"] = {
        f"{way}, {look}": sound(Widgets(tabs=3, widgets=20, goals=(1, 5), actions=way, look=look), 20 * count)
        for way in ("short", "numbers", "places")
        for look in ("phone", "desktop")
    }
    games = ("FrozenLake-v1", "FrozenLake8x8-v1", "Taxi-v4", "CliffWalking-v1", "Blackjack-v1")
    out["gymnasium"] = {name: sound(Gymnasium(id=name), count) for name in games}
    OUT.write_text(json.dumps(out, indent=1) + "\n")
    worlds = [v for key in ("miniwob", "widgets", "gymnasium") for v in out[key].values()]  # type: ignore[union-attr]
    held = all(v["gold_min"] == 1 and v["near_miss_max"] < 1 for v in worlds)
    print(f"{len(worlds)} worlds, {'all sound' if held else 'NOT all sound'}: {OUT}")


if __name__ == "__main__":
    main()
