"""A trial of the code judge: many jobs, some of them hostile, whose right verdicts are known; and what batches are worth.

The mix is that of rStar2-Agent's card: of 500 jobs 10 loop for ever, 10 take memory without end, 10 are no Python, and 10
fork: half of these leave processes behind that must not live on, half multiply.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ondol.errors import OndolError
from ondol.sandbox.judge import CodeJudge, CodeJudgeClient, Judge, Reason, Result, Submission
from ondol.sandbox.judge_http import HttpJudge, judge_app
from ondol.sandbox.levels import reached

HOSTILE = 10  # of each kind

_LOOP = (
    "while True: pass",
    "import time\nwhile True: time.sleep(1)",
    "import signal\nsignal.alarm(0)\nwhile 1: 2 ** 64",
)
_MEMORY = ("b = bytearray(1 << 32)", "x = []\nwhile True: x.append(bytes(1 << 20))", "s = 'x'\nwhile True: s += s")
_SYNTAX = ("print(1", "def f(:\n  pass", "  x = 1\n y = 2", "for", "a = = 1")
_LEAVING = """import os
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execv('/bin/sleep', ['sleep', '{mark}'])
        os._exit(0)
print('left')
"""
_MULTIPLYING = "import os, time\nfor _ in range(7): os.fork()\nprint('done', flush=True)\ntime.sleep(0.3)"


@dataclass(frozen=True)
class Job:
    """A submission, and whether a result is the right verdict on it."""

    kind: str
    submission: Submission
    right: Callable[[Result], bool]


def healthy_job(r: random.Random) -> Job:
    """A short program that is right, or (1 in 10) prints something else than expected."""
    numbers = [r.randint(1, 999) for _ in range(5)]
    wrong = r.random() < 0.1
    code = "numbers = [int(t) for t in input().split()]\nprint(sum(n * n for n in numbers))"
    expected = str(sum(n * n for n in numbers) + wrong)
    submission = Submission(code, " ".join(map(str, numbers)) + "\n", expected)
    return Job("healthy", submission, lambda x: x.run_success and x.success is not wrong and x.reason is Reason.NONE)


def jobs(count: int, seed: int, mark: str, hostile: int = HOSTILE) -> list[Job]:
    """The mix, shuffled, `hostile` of each kind. `mark` is in the command line of every process that a job leaves behind."""
    r = random.Random(seed)

    def failed(text: str) -> Callable[[Result], bool]:
        return lambda x: not x.run_success and x.reason is Reason.NONE and text in (x.stderr or "")

    out = []
    for i in range(hostile):
        out.append(Job("loop", Submission(_LOOP[i % 3]), lambda x: x.reason is Reason.WORKER_TIMEOUT))
        out.append(Job("memory", Submission(_MEMORY[i % 3]), failed("MemoryError")))
        out.append(Job("syntax", Submission(_SYNTAX[i % 5]), failed("Error")))
        if i % 2:
            leaving = Submission(_LEAVING.replace("{mark}", mark), expected_output="left")
            out.append(Job("forking", leaving, lambda x: x.success and x.reason is Reason.NONE))
        else:  # its own process may end well, but what is printed is not what one process prints
            many = Submission(_MULTIPLYING, expected_output="done")
            out.append(Job("forking", many, lambda x: not x.success and x.reason is Reason.NONE))
    out += [healthy_job(r) for _ in range(count - len(out))]
    r.shuffle(out)
    return out


def left_behind(mark: str) -> int:
    """Processes on this machine whose command line has the mark."""
    count = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                count += mark.encode() in Path("/proc", name, "cmdline").read_bytes()
    return count


async def verdicts(
    count: int = 500,
    seed: int = 0,
    workers: int = 4,
    execution_s: float = 4.0,
    level: str | None = None,
    hostile: int = HOSTILE,
) -> dict[str, float]:
    """Judge the mix in one long batch: shares of right verdicts (all, and of healthy jobs), and processes left behind."""
    mark = f"30.{random.SystemRandom().randrange(10**11, 10**12)}"
    mix = jobs(count, seed, mark, hostile)
    async with CodeJudge(workers, level=level, execution_s=execution_s) as judge:
        started = time.perf_counter()
        results = await judge.run_batch([j.submission for j in mix], long=True)
        seconds = time.perf_counter() - started
        orphans = left_behind(mark)
    right = [j.right(result) for j, result in zip(mix, results)]
    healthy = [ok for ok, j in zip(right, mix) if j.kind == "healthy"]
    return {
        "right_reasons": sum(right) / len(right),
        "healthy_right": sum(healthy) / len(healthy),
        "orphans": float(orphans),
        "jobs_per_s": count / seconds,
    }


async def batches(count: int = 200, seed: int = 0, workers: int = 4, level: str | None = None) -> dict[str, float]:
    """Healthy jobs over HTTP on loopback: one call after the other, and through a client that makes batches."""
    r = random.Random(seed)
    work = [healthy_job(r) for _ in range(count)]
    async with served(CodeJudge(workers, level=level, queue_life_s=60.0)) as url, HttpJudge(url) as judge:
        await judge.run_batch([j.submission for j in work[: 2 * workers]])  # each worker's sandbox is open
        started = time.perf_counter()
        results = [await judge.run(j.submission) for j in work]
        single_s = time.perf_counter() - started
        started = time.perf_counter()
        batched = await _through_client(judge, [j.submission for j in work])
        batch_s = time.perf_counter() - started
    if not all(j.right(x) and j.right(y) for j, x, y in zip(work, results, batched)):
        raise OndolError("the code judge gave a wrong verdict on a healthy job", "run the trial again, and look at it")
    return {"single_per_s": count / single_s, "batch_per_s": count / batch_s, "batch_speedup": single_s / batch_s}


async def _through_client(judge: Judge, submissions: Sequence[Submission]) -> list[Result]:
    async with CodeJudgeClient(judge) as client:
        return await client.judge_all(submissions)


@contextlib.asynccontextmanager
async def served(judge: CodeJudge, token: str | None = None) -> AsyncIterator[str]:
    """The judge's HTTP API on a free port of loopback, in a thread of its own; gives the URL."""
    try:
        import uvicorn
    except ImportError as e:
        raise OndolError("serving the code judge needs uvicorn", "pip install 'ondol[server]'") from e
    config = uvicorn.Config(judge_app(judge, token), host="127.0.0.1", port=0, log_level="error", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        end = time.monotonic() + 60
        while not server.started:
            if not thread.is_alive() or time.monotonic() > end:
                raise OndolError("the code judge's server does not start", "is a sandbox there? see: ondol doctor")
            await asyncio.sleep(0.02)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await asyncio.to_thread(thread.join, 30)


def main() -> None:
    """`python -m ondol.sandbox.judge_trial -o FILE`: both trials, for some seeds."""
    p = argparse.ArgumentParser(
        description="The code judge tried: 500 jobs, 40 of them hostile, and batches over HTTP."
    )
    p.add_argument("--seeds", type=int, default=3, help="seeds 0 ... N-1")
    p.add_argument("-o", "--output", type=Path, help="JSON file to write")
    args = p.parse_args()
    runs = [{"seed": s} | asyncio.run(verdicts(seed=s)) | asyncio.run(batches(seed=s)) for s in range(args.seeds)]
    level = reached().level
    found = {"command": "python -m ondol.sandbox.judge_trial -o results/code-judge.json", "level": level, "runs": runs}
    text = json.dumps(found | {"cores": os.cpu_count()}, indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
