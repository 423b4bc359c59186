"""Agents that spend their time waiting: errands of seven turns with three tools, over a model that is far away.

The agent is written by hand and reads what its tools say; each of its turns takes as long as if a distant model had said it
(log-normal, median 0.4 s: card of arXiv 2508.20404). The tools are real: SQL on SQLite here, and CPython and files in a
sandbox of each trajectory on a tool server that is reached over MCP.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from ondol.cluster.ledger import Ledger
from ondol.cluster.workers import run_job, work_on
from ondol.engines.base import Completion, EngineStats, Request, Sampling
from ondol.envs.tool import ToolEnv
from ondol.errors import OndolError
from ondol.models.load import load_model
from ondol.papers.slow_tools import same_share
from ondol.records import Finish, Problem, Trajectory
from ondol.rollout.driver import Plan
from ondol.tasks.base import DrawnTask
from ondol.tools.mcp import McpTools
from ondol.tools.sql import Sql

LATENCY_S, LATENCY_SPREAD = 0.4, 0.8  # median of a turn's latency, and standard deviation of its logarithm
TURNS = 7
_ITEMS = 90
_STEP_S = 0.002  # most time that a step without any answer blocks for
_START_S = 60.0  # for the tool server

_RESULT = re.compile(r"<result>(.*?)</result>", re.DOTALL)
_QUESTION = re.compile(r"(\d+)\*(\d+)\+item(\d+)\+item(\d+)")


class Errands(DrawnTask):
    """`57*83+item12+item40`: a product, and the prices of two items in a database."""

    def draw(self, random: Random) -> Problem:
        a, b, item, other = *(random.randint(12, 98) for _ in range(2)), *(random.randrange(_ITEMS) for _ in range(2))
        return Problem("", f"{a}*{b}+item{item}+item{other}", str(a * b + price(item) + price(other)))

    def score(self, problem: Problem, response: str) -> float:
        return float(response.strip() == problem.answer)

    def near_misses(self, problem: Problem) -> list[str]:
        return ["", str(int(problem.answer) + 1), f"={problem.answer}"]


def price(item: int) -> int:
    return Random(f"price of {item}").randint(100, 999)


def prices() -> str:
    """A database of all items, as a script."""
    rows = ", ".join(f"({i}, {price(i)})" for i in range(_ITEMS))
    return f"create table items (item integer primary key, price integer); insert into items values {rows};"


def says(conversation: str) -> str:
    """What the agent says next, from what it was asked and what its tools have answered."""
    question = _QUESTION.search(conversation)
    if question is None:
        return "I was asked nothing."
    a, b, *items = question.groups()
    found = [_last_number(text) for text in _RESULT.findall(conversation)]
    match len(found):
        case 0:
            return f"<cpython>product = {a} * {b}; print(product)</cpython>"
        case 1 | 2:
            return f"<sql>select price from items where item = {items[len(found) - 1]}</sql>"
        case 3:
            return f"<cpython>print(product + {found[1]} + {found[2]})</cpython>"
        case 4:
            return f"<files>write note.txt\n{found[3]}</files>"
        case 5:
            return "<files>read note.txt</files>"
        case _:
            return str(found[5])


def _last_number(text: str) -> int:
    numbers = re.findall(r"\d+", text)
    return int(numbers[-1]) if numbers else 0


def latency(seed: int, key: tuple[int, ...]) -> float:
    """Seconds that a turn takes; of its trajectory and number alone."""
    return Random(f"{seed}/latency/{key}").lognormvariate(math.log(LATENCY_S), LATENCY_SPREAD)


class FarAway:
    """An engine that waits for each turn by itself, as for a model behind an endpoint with room for all.

    Args:
        calls: a file that gets a line for every turn that is asked for.
    """

    def __init__(self, loaded: Any, seed: int, calls: Path) -> None:
        self.renderer, self.tokenizer, self.seed, self.calls = loaded.renderer, loaded.tokenizer, seed, calls
        self.version, self.stats = 0, EngineStats()
        self._due: dict[str, tuple[float, Completion]] = {}

    @property
    def busy(self) -> bool:
        return bool(self._due)

    def submit(self, request: Request) -> None:
        key = request.seed[-3:]
        with self.calls.open("a") as out:
            out.write(f"{key}\n")
        text = says(self.tokenizer.decode(request.ids))
        stopped = text.endswith(request.stop)
        ids = [*self.renderer.codec.text(text), *([] if stopped else [self.renderer.end_id])]
        finish, wait = Finish.STOP if stopped else Finish.END, latency(self.seed, key)
        done = Completion(request.session, ids, [0.0] * len(ids), [], text, finish, self.version, seconds=wait)
        self._due[request.session] = (time.monotonic() + wait, done)

    def step(self) -> list[Completion]:
        if not self._due:
            return []
        now = time.monotonic()
        time.sleep(min(max(min(at for at, _ in self._due.values()) - now, 0.0), _STEP_S))
        now = time.monotonic()
        done = [session for session, (at, _) in self._due.items() if at <= now]
        return [self._due.pop(session)[1] for session in done]

    def release(self, session: str) -> None:
        self._due.pop(session, None)

    def sync(self, version: int) -> None:
        self.version = version


def job(seed: int, count: int, server: str, calls: str) -> tuple[Any, Any, Plan]:
    """`count` errands, for `ondol.cluster.workers`. `server`: where the tool server speaks MCP;  calls: see `FarAway`."""
    loaded, task = load_model("tiny:context=4096"), Errands(seed=seed)
    tools = (Sql(script=prices()), McpTools(url=server))
    env = ToolEnv(tools=tools, max_turns=TURNS, system="")
    problems = [task.problem(i) for i in range(count)]
    plan = Plan(task, env, problems, 1, Sampling(max_tokens=256), (seed, 0), overlap_tools=True)
    return FarAway(loaded, seed, Path(calls)), loaded.renderer, plan


@contextlib.contextmanager
def tool_server() -> Iterator[str]:
    """A tool server in a process of its own; where it speaks MCP."""
    command = [sys.executable, "-m", "ondol", "tools", "serve", "--json", "--port", "0", "--tools", "cpython,files"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise OndolError(f"the tool server ended with status {process.wait(_START_S)}")
        yield json.loads(line)["mcp"]
    finally:
        process.terminate()
        try:
            process.wait(_START_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


@dataclass
class Timed:
    """One way to play the errands. `episode_s`: what each took, where they came one after the other."""

    seconds: float
    trajectories: list[Trajectory]
    episode_s: list[float]


def in_process(seed: int, count: int, server: str, at_once: int, folder: Path) -> Timed:
    """Play them here, `at_once` at a time."""
    calls = folder / f"calls-{at_once}"
    engine, renderer, plan = job(seed, count, server, str(calls))
    path, ends = folder / f"episodes-{at_once}.sqlite", []
    ledger = Ledger(path, "here")
    ledger.add(plan.keys)
    plan.progress = lambda t: ends.append(time.monotonic())
    started = time.monotonic()
    work_on(engine, renderer, plan, partial(Ledger, path, "here"), at_once)
    seconds, done = time.monotonic() - started, ledger.results()
    ledger.close()
    episode_s = [b - a for a, b in zip([started, *ends], ends)]
    return Timed(seconds, [done[key] for key in plan.keys], episode_s)


def by_processes(
    seed: int, count: int, server: str, folder: Path, workers: int = 4, at_once: int = 8
) -> dict[str, Any]:
    """Play them in worker processes, and kill one when a quarter is done."""
    calls, killed = folder / "calls-processes", {"episodes": 0}
    words = {"seed": seed, "count": count, "server": server, "calls": str(calls)}

    def watch(processes: list[subprocess.Popen[bytes]]) -> None:
        if killed["episodes"]:
            return
        ledger = Ledger(folder / "episodes.sqlite", "watcher")
        held, done = ledger.holders(), ledger.counts()["done"]
        ledger.close()
        if done >= count / 4 and held:
            owner = max(held, key=lambda name: held[name][0])
            pid = next((p.pid for p in processes if owner in str(p.args)), None)
            if pid is not None:
                killed["episodes"] = held[owner][0]
                os.kill(pid, signal.SIGKILL)

    found = run_job(
        f"ondol.papers.errands:job?{json.dumps(words)}",
        workers=workers, at_once=at_once, folder=folder, timeout_s=600.0, watch=watch,
    )  # fmt: skip
    trajectories = [t for g in found.groups for t in g.trajectories]
    return {
        "seconds": found.seconds, "trajectories": trajectories, "again": found.again, "lost": found.lost,
        "held": killed["episodes"], "calls": _lines(calls),
    }  # fmt: skip


def measure(seed: int, count: int = 64, at_once: int = 16) -> dict[str, float]:
    """One after the other, `at_once` at a time, and by four processes of which one is killed."""
    with tempfile.TemporaryDirectory() as temporary, tool_server() as server:
        folder = Path(temporary)
        in_process(seed, 2, server, 2, folder)  # the sandboxes' own processes start once for all
        (folder / "episodes-2.sqlite").unlink()
        slow = in_process(seed, count, server, 1, folder)
        quick = in_process(seed, count, server, at_once, folder)
        many = by_processes(seed, count, server, folder)
    waited = sum(latency(seed, (p, 0, turn)) for p in range(count) for turn in range(TURNS))
    total, longest = sum(slow.episode_s), max(slow.episode_s)
    return {
        "sequential_s": slow.seconds,
        "concurrent_s": quick.seconds,
        "processes_s": many["seconds"],
        "speed_up": slow.seconds / quick.seconds,
        "expected_speed_up": min(at_once, total / longest),
        "of_expected": slow.seconds / quick.seconds / min(at_once, total / longest),
        "waiting_share": waited / slow.seconds,
        "right_share": sum(t.score for t in slow.trajectories) / count,
        "same_share": min(
            same_share(slow.trajectories, quick.trajectories), same_share(slow.trajectories, many["trajectories"])
        ),
        "lost_workers": float(many["lost"]),
        "held_by_lost": float(many["held"]),
        "again": float(many["again"]),
        "turns_again": float(many["calls"] - count * TURNS),
    }


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines())


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), *map(int, sys.argv[2:])), indent=1))
