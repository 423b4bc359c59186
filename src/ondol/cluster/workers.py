"""Rollouts by several processes: the same episodes as `ondol.rollout.driver.rollout` in this one, and none lost when a process is.

A job is a function by reference that makes (engine, renderer, plan) in the process that works on it. Workers take episodes from a ledger, a few at once,
and save each after every turn. One that dies is replaced, and its episodes go on from their last turn; one that freezes loses them to the others.

    python -m ondol.cluster.workers JOB LEDGER OWNER AT_ONCE LEASE_S      # what a worker process runs
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ondol.cluster.ledger import Bookkeeping, Claimed, Key, Ledger
from ondol.errors import OndolError
from ondol.records import Group, Trajectory
from ondol.rollout.driver import Plan, Rollout

_LOOK_S = 0.05  # between two looks of the parent, and of a worker that finds nothing to do
_CLAIM_S = 1.0  # after which a worker with room asks for more, though none of its episodes has ended
_TELL_S = 20.0  # without any progress, until it is said who waits for whom
_LOG_CHARS = 2000

Job = Callable[..., tuple[Any, Any, Plan]]


@dataclass(frozen=True)
class Finished:
    """What came of a job.

    Attributes:
        groups: as of `rollout`.
        again: episodes that were taken up more than once, as their worker was lost.
        lost: worker processes that ended before their time.
        seconds: wall time.
    """

    groups: list[Group]
    again: int
    lost: int
    seconds: float


def load_job(job: str) -> tuple[Any, Any, Plan]:
    """Make a job's engine, renderer and plan: `module:function` or `module:function?{"argument": 1}`."""
    from ondol.parts import find

    reference, _, given = job.partition("?")
    try:
        arguments = json.loads(given) if given else {}
    except ValueError as e:
        raise OndolError(f"the job's arguments are not JSON: {e}", 'such as my_module:make?{"seed": 1}') from e
    return find("tasks", reference)(**arguments)


def run_job(
    job: str,
    *,
    workers: int = 2,
    at_once: int = 8,
    lease_s: float = 10.0,
    timeout_s: float = 3600.0,
    replacements: int = 8,
    folder: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    watch: Callable[[list[subprocess.Popen[bytes]]], None] = lambda processes: None,
) -> Finished:
    """Roll out a job's plan with several processes.

    Args:
        at_once: episodes that each worker has under way.
        lease_s: a worker that gives no sign for so long loses its episodes.
        timeout_s: of the whole; then it raises, and what is done stays in the ledger.
        replacements: how many workers may be lost and replaced before that is an error.
        folder: where the ledger is kept; a job that was interrupted goes on from there. By default a temporary one.
        say: told of lost workers, and now and then who waits for whom.
        watch: called now and then with the worker processes.
    """
    started = time.monotonic()
    _, _, plan = load_job(job)
    keys = plan.keys
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(folder or temporary)
        place.mkdir(parents=True, exist_ok=True)
        ledger = Ledger(place / "episodes.sqlite", "parent", lease_s)
        ledger.add(keys)
        crew = _Crew(job, ledger, place, at_once, lease_s)
        try:
            for _ in range(workers):
                crew.start()
            moved, before = time.monotonic(), ledger.counts()
            while (counts := ledger.counts())["done"] < len(keys):
                now = time.monotonic()
                if counts != before:
                    moved, before = now, counts
                if now - moved > _TELL_S:
                    say(who_waits(counts, ledger, crew.processes))
                    moved = now
                if now - started > timeout_s:
                    raise OndolError(
                        f"after {timeout_s:g} s: {who_waits(counts, ledger, crew.processes)}",
                        f"go on with folder={place}",
                    )
                for owner, why in crew.gone():
                    freed = ledger.release(owner)
                    say(f"worker {owner} ended ({why}); {freed} episodes go on elsewhere")
                    if crew.lost > replacements:
                        raise OndolError(
                            f"{crew.lost} workers were lost; the last: {why}", "see the workers' logs above"
                        )
                    crew.start()
                watch([p for p, _ in crew.processes.values()])
                time.sleep(_LOOK_S)
            done, again = ledger.results(), sum(n > 1 for n in ledger.taken().values())
        finally:
            crew.stop()
            ledger.close()
    return Finished(plan.grouped([done[key] for key in keys]), again, crew.lost, time.monotonic() - started)


class _Crew:
    """The worker processes."""

    def __init__(self, job: str, ledger: Ledger, folder: Path, at_once: int, lease_s: float) -> None:
        self.job, self.ledger, self.folder, self.at_once, self.lease_s = job, ledger, folder, at_once, lease_s
        self.processes: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}
        self.count = self.lost = 0

    def start(self) -> None:
        owner = f"w{self.count}-{os.getpid()}-{time.time_ns()}"
        self.count += 1
        log = self.folder / f"{owner}.log"
        command = [
            sys.executable,
            "-m",
            "ondol.cluster.workers",
            self.job,
            str(self.ledger.path),
            owner,
            str(self.at_once),
        ]
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, str(self.lease_s)], stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
        self.processes[owner] = (process, log)

    def gone(self) -> list[tuple[str, str]]:
        """(owner, why) of those that ended without being told to; a worker ends by itself only when nothing is left."""
        out = []
        for owner, (process, log) in list(self.processes.items()):
            code = process.poll()
            if code is None:
                continue
            del self.processes[owner]
            if code != 0:
                self.lost += 1
                last = log.read_text(errors="replace").strip()[-_LOG_CHARS:].splitlines()[-1:]
                out.append((owner, " ".join([f"signal {-code}" if code < 0 else f"exit {code}", *last])))
        return out

    def stop(self) -> None:
        for process, _ in self.processes.values():
            process.send_signal(signal.SIGKILL)  # also one that is frozen; what counts is in the ledger
        for process, _ in self.processes.values():
            process.wait(timeout=30)


def who_waits(counts: dict[str, int], ledger: Bookkeeping, workers: Iterable[str]) -> str:
    """A sentence for a person who wonders why nothing moves."""
    holders = ledger.holders()
    said = [f"{owner} has {n} episodes, its last sign {ago:.0f} s ago" for owner, (n, ago) in holders.items()]
    idle = [owner for owner in workers if owner not in holders]
    return f"{counts['done']} episodes done, {counts['waiting']} wait, {counts['at work']} are at work: " + "; ".join(
        [*said, *(f"{owner} has none" for owner in idle)]
    )


class _Worker(Rollout):
    """Takes episodes as it has room, until none is left."""

    def __init__(self, engine: Any, renderer: Any, plan: Plan, ledger: Bookkeeping, at_once: int, stay: bool) -> None:
        self.stay = stay
        self.begun: dict[tuple[int, int, int], Trajectory] = {}
        self.ours: dict[Key, asyncio.Task[Trajectory]] = {}
        super().__init__(engine, renderer, replace(plan, recorded=self.begun, saved=self._save))
        self.ledger, self.at_once = ledger, at_once

    async def work(self) -> None:
        try:
            while True:
                for claimed in self.ledger.claim(self.at_once - len(self.ours)):
                    self._begin(claimed)
                if not self.ours:
                    counts = self.ledger.counts()
                    if not (counts["waiting"] or (self.stay and counts["at work"])):
                        return
                    await asyncio.sleep(_LOOK_S)  # others are at work, and may be lost
                    continue
                until = time.monotonic() + _CLAIM_S
                await self._drive(
                    lambda until=until: any(t.done() for t in self.ours.values()) or time.monotonic() > until
                )
                for key in [k for k, t in self.ours.items() if t.done()]:
                    task = self.ours.pop(key)
                    if not task.cancelled():
                        self.ledger.finish(key, task.result())
        finally:
            for task in self.ours.values():
                task.cancel()
            await asyncio.gather(*self.ours.values(), return_exceptions=True)

    def _begin(self, claimed: Claimed) -> None:
        p, s = claimed.key
        key = (self.plan.step, p, s)
        self.begun.pop(key, None)
        if claimed.begun is not None and claimed.begun.turns:
            self.begun[key] = claimed.begun
        self.away += 1
        problem = self.plan.problems[p - self.plan.first]
        self.ours[claimed.key] = asyncio.create_task(self._episode(problem, p, s))

    def _save(self, t: Trajectory) -> None:
        key = (t.key[1], t.key[2])
        if not self.ledger.save(key, t) and key in self.ours:
            self.ours[key].cancel()  # we were taken for lost, and another has it


def work_on(
    engine: Any, renderer: Any, plan: Plan, ledger: Callable[[], Bookkeeping], at_once: int, *, stay: bool = True
) -> None:
    """Work on the episodes of a ledger until none is left, with a heartbeat beside it. `ledger` opens this worker's view of it.

    With `stay` it waits while others are at work, as they may be lost; without, somebody else has to see to that.
    """
    mine = ledger()
    over, parent = threading.Event(), os.getppid()

    def beat() -> None:
        beating = ledger()
        while not over.wait(min(beating.lease_s / 3, 1.0)):
            beating.renew()
            if os.getppid() != parent:  # nobody waits for us any more
                os._exit(1)
        beating.close()

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        asyncio.run(_Worker(engine, renderer, plan, mine, at_once, stay).work())
    finally:
        over.set()
        heart.join(timeout=10)
        mine.close()


def main(job: str, path: str, owner: str, at_once: int, lease_s: float) -> None:
    work_on(*load_job(job), partial(Ledger, Path(path), owner, lease_s), at_once)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), float(sys.argv[5]))
