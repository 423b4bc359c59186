"""All arms and seeds of a comparison: what is left is run, in turn or in several processes, and what came out is read."""

from __future__ import annotations

import json
import os
import platform
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ondol.compare.arms import Arm
from ondol.compare.jobs import Job, execute, method_settings, plan, to_json
from ondol.compare.statistics import paired, summary
from ondol.errors import OndolError
from ondol.store import Run
from ondol.train.interrupt import Interrupt

#: numbers of one finished run, by name
Measure = Callable[[Run, str], dict[str, float]]

_PATIENCE_S = 120.0  # for workers to save


class Watch:
    """Hears of progress; the default says nothing. `done` of `total` are in units of work."""

    def begin(self, left: int, cached: int) -> None:
        """So many runs are to be made, so many were made before."""

    def advance(self, done: float, total: float, values: dict[str, float]) -> None:
        """More is done."""

    def ended(self, job: Job, error: OndolError | None, seconds: float) -> None:
        """A run has ended."""


class Comparison:
    """Arms times seeds in a folder. Nothing runs until `run` is called; made again, it finds what was done.

    Args:
        arms: the first is what the others are compared to.
        seeds: every arm gets each.
        folder: runs are kept in `<folder>/runs`.
    Raises OndolError for recipes that are not sound, before anything runs.
    """

    def __init__(self, arms: Sequence[Arm], seeds: Sequence[int], folder: Path) -> None:
        if not arms:
            raise OndolError("there is nothing to compare", "name methods, such as: grpo dapo")
        if not seeds:
            raise OndolError("0 seeds compare nothing", "give at least 1; 3 and more have intervals worth the name")
        self.arms, self.seeds, self.folder = list(arms), list(seeds), Path(folder)
        self.jobs: dict[tuple[str, int], Job] = {}
        self.failures: dict[str, OndolError] = {}  # by the job's key
        self._order: dict[str, Job] = {}  # all jobs, each once, what others start from first
        for seed in self.seeds:
            for arm in self.arms:
                jobs = plan(arm.recipe(seed), seed, self.folder)
                self._order |= {j.key: j for j in jobs if j.key not in self._order}
                self.jobs[arm.label, seed] = jobs[-1]

    # -- running --------------------------------------------------------------------------------------------------

    def run(self, processes: int = 1, watch: Watch | None = None) -> None:
        """Do what is left. A run that fails is noted in `failures`, and the others go on.

        Args:
            processes: runs at once; with more than one each has a process of its own, with one thread.
        Raises KeyboardInterrupt when stopped by a signal; everything is saved and the next call goes on from there.
        """
        if processes < 1:
            raise OndolError(f"{processes} processes do nothing", "at least 1")
        watch = watch or Watch()
        arms_left = {k for k, j in self._order.items() if not j.finished}
        needed = {j.start.key for k in arms_left if (j := self._order[k]).start is not None}
        starts = {j.start.key for j in self._order.values() if j.start is not None}
        left = [j for k, j in self._order.items() if k in arms_left and (k not in starts or k in needed)]
        self.failures = {}
        watch.begin(len(left), len({j.key for j in self.jobs.values()}) - sum(j.key not in starts for j in left))
        if left:
            (_InTurn if processes == 1 else _Together)(self, left, watch, processes).run()

    def fail(self, job: Job, error: OndolError) -> None:
        self.failures[job.key] = error

    # -- reading --------------------------------------------------------------------------------------------------

    def runs(self, label: str) -> dict[int, Path]:
        """Finished runs of an arm, by seed."""
        found = {seed: self.jobs[label, seed].finished for seed in self.seeds}
        return {seed: path for seed, path in found.items() if path is not None}

    def curves(self, label: str, metric: str = "score/mean") -> dict[int, list[tuple[int, float]]]:
        """A metric of RL by step, of each finished seed."""
        out = {}
        for seed, path in self.runs(label).items():
            with Run.open(path) as run:
                out[seed] = [(m.step, m.value) for m in run.db.metrics(metric, "rl")]
        return out

    def results(self, measure: Measure | None = None) -> dict[str, Any]:
        """Everything that came out, as plain data.

        {"arms": {label: {"method", "runs": [{"seed", "run", "seconds", "measured"}], "mean", "spread",
        "difference": {metric: {"mean", "low", "high", "n"}}}}}; differences are to the first arm, over common seeds.
        """
        measure = measure or outcome
        arms: dict[str, Any] = {}
        by_seed: dict[str, dict[str, dict[int, float]]] = {}  # arm -> metric -> seed -> value
        for arm in self.arms:
            rows, values = [], {}
            for seed, path in self.runs(arm.label).items():
                with Run.open(path) as run:
                    measured = measure(run, arm.label)
                    rows.append(
                        {
                            "seed": seed,
                            "run": str(path),
                            "seconds": round(run.db.meta("seconds", 0.0), 1),
                            "measured": measured,
                        }
                    )
                for name, value in measured.items():
                    values.setdefault(name, {})[seed] = value
            by_seed[arm.label] = values
            summaries = {name: summary(list(v.values())) for name, v in values.items()}
            arms[arm.label] = {
                "method": method_settings(self.jobs[arm.label, self.seeds[0]].table),
                "runs": rows,
                "failed": {str(s): e.what for s in self.seeds if (e := self.failures.get(self.jobs[arm.label, s].key))},
                "mean": {name: s["mean"] for name, s in summaries.items()},
                "spread": {name: s["spread"] for name, s in summaries.items()},
            }
        base = by_seed[self.arms[0].label]
        for label, values in by_seed.items():
            if label != self.arms[0].label:
                found = {name: paired(v, base[name]) for name, v in values.items() if name in base}
                arms[label]["difference"] = found
        return {"seeds": self.seeds, "arms": arms}


def outcome(run: Run, arm: str = "") -> dict[str, float]:
    """What an arm is judged by: its evaluations, "start/..." before RL and the others after it, and its training time.

    Names are those of the metrics without "eval/".
    """
    out = {}
    phases = {m.phase for m in run.db.metrics("eval/*")}
    begin = "warm" if "warm" in phases else "before"
    for phase, prefix in (("after", ""), (begin, "start/")):
        for m in run.db.metrics("eval/*", phase):
            if not m.name.startswith("eval/error"):
                out[prefix + m.name.removeprefix("eval/")] = m.value
    return out


def machine() -> dict[str, Any]:
    """What the numbers were made on."""
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "gpu": device, "python": platform.python_version(), "torch": torch.__version__}


class _Work:
    """Common to both ways of running: what is done, and what depends on a failure."""

    def __init__(self, comparison: Comparison, left: list[Job], watch: Watch, processes: int) -> None:
        self.comparison, self.left, self.watch, self.processes = comparison, left, watch, processes
        self.total = sum(j.work for j in left)
        self.shares = {j.key: 0.0 for j in left}

    def tell(self, job: Job, part: float, values: dict[str, float]) -> None:
        self.shares[job.key] = max(part, self.shares[job.key])
        self.watch.advance(sum(j.work * self.shares[j.key] for j in self.left), self.total, values)

    def end(self, job: Job, error: OndolError | None, seconds: float) -> None:
        if error is not None:
            self.comparison.fail(job, error)
        self.shares[job.key] = 1.0
        self.tell(job, 1.0, {})
        self.watch.ended(job, error, seconds)

    def blocked(self, job: Job) -> OndolError | None:
        """Why a job cannot be done: its start failed."""
        failed = self.comparison.failures.get(job.start.key) if job.start else None
        return OndolError(f"its warm start failed: {failed.what}", failed.remedy) if failed else None


class _InTurn(_Work):
    """In this process, one after the other."""

    def run(self) -> None:
        for job in self.left:
            began = time.monotonic()
            error = self.blocked(job)
            if error is None:
                try:
                    execute(job, lambda part, values, job=job: self.tell(job, part, values))
                except OndolError as e:
                    error = e
            self.end(job, error, time.monotonic() - began)


class _Together(_Work):
    """In processes of their own."""

    def run(self) -> None:
        waiting, running = list(self.left), {}
        self.said: queue.Queue[tuple[Job, dict[str, Any]]] = queue.Queue()
        with Interrupt() as interrupt:
            try:
                while waiting or running:
                    if interrupt.asked:
                        break
                    self._start(waiting, running)
                    self._listen(running)
            except BaseException:  # the second signal, say
                for process, _ in running.values():
                    process.kill()
                raise
            if interrupt.asked:
                self._stop(running)
                raise KeyboardInterrupt("the comparison was stopped")

    def _start(self, waiting: list[Job], running: dict[str, Any]) -> None:
        unfinished = {j.key for j in waiting} | set(running)
        for job in list(waiting):
            if len(running) >= self.processes:
                break
            if job.start is not None and job.start.key in unfinished:
                continue
            waiting.remove(job)
            if error := self.blocked(job):
                self.end(job, error, 0.0)
                continue
            running[job.key] = (self._spawn(job), time.monotonic())

    def _spawn(self, job: Job) -> subprocess.Popen[str]:
        job.folder.mkdir(parents=True, exist_ok=True)
        # A session of its own: a Ctrl-C at the terminal reaches us only, and we ask each worker once to save.
        with (job.folder / "worker.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", "from ondol.compare.jobs import worker; worker()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ
                | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
                | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
                start_new_session=True,
            )
        assert process.stdin is not None
        process.stdin.write(json.dumps({"job": to_json(job), "sys_path": sys.path}))
        process.stdin.close()
        threading.Thread(target=self._read, args=(job, process), daemon=True).start()
        return process

    def _read(self, job: Job, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.said.put((job, json.loads(line)))
        self.said.put((job, {"code": process.wait()}))

    def _listen(self, running: dict[str, Any]) -> None:
        try:
            job, message = self.said.get(timeout=0.3)
        except queue.Empty:
            return
        if "part" in message:
            self.tell(job, message["part"], message["values"])
            return
        if "error" in message:
            self.comparison.fail(job, OndolError(message["error"], message["remedy"]))
        if "code" in message:
            _, began = running.pop(job.key)
            error = self.comparison.failures.get(job.key)
            if error is None and job.finished is None:
                error = OndolError(f"its process ended with status {message['code']}", f"see {job.folder}/worker.log")
            self.end(job, error, time.monotonic() - began)

    def _stop(self, running: dict[str, Any]) -> None:
        for process, _ in running.values():
            process.send_signal(signal.SIGINT)
        until = time.monotonic() + _PATIENCE_S
        for process, _ in running.values():
            try:
                process.wait(max(until - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
