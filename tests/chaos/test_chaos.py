"""Whatever dies, the run ends with the same trajectories and the same model: faults at random moments, and no silent hang.

`make chaos` throws 50 of them, CI a few: ONDOL_FAULTS says how many, ONDOL_CHAOS_SEED which.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import ondol
from ondol.recipe import load_recipe, to_table
from small_run import has_learned

FAULTS = int(os.environ.get("ONDOL_FAULTS", "4"))
SEED = int(os.environ.get("ONDOL_CHAOS_SEED", "0"))
STEPS = 10
PATIENCE_S = 90.0  # without a trajectory, a step or a word: that is a hang
KINDS = (
    "kill worker",
    "freeze worker",
    "kill learner",
    "spoil checkpoint",
    "disk full",
    "interrupt",
    "freeze all workers",
    "kill judge",
)

pytestmark = pytest.mark.timeout(60 + 45 * FAULTS)

RECIPE = {
    "name": "chaos",
    "seed": 7,
    # float64 and one row at a time: then not even the last bit depends on who else is sampled
    "model": {"path": "tiny:hidden=32,layers=1,context=128", "dtype": "float64"},
    "task": {"name": "toy:Toy", "calls": False},
    "env": {"max_turns": 1},
    "sampling": {"max_tokens": 24},
    "optimizer": {"learning_rate": 1e-3},
    "rollout": {"max_batch": 1, "processes": 2, "lease_s": 2.0, "reward_workers": 1},
    "train": {"steps": STEPS, "prompts_per_step": 4, "samples_per_prompt": 4, "checkpoint_every_steps": 1},
    "method": {"name": "grpo", "kl_coef": 0.0},
    "evaluate": {"problems": 0},
}


def outcome(run):
    assert has_learned(run)
    trajectories = [t.to_dict() for t in run.db.trajectories(phase="rl")]
    return trajectories, (run.path / "model" / "model.safetensors").read_bytes()


class Battle:
    """A run in a process of its own, and somebody who does it harm."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng, self.runs = folder, rng, folder / "runs"
        self.recipe = folder / "chaos.toml"
        self.pids: set[psutil.Process] = set()  # of all workers ever seen
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self.done: list[str] = []
        self.moved = time.monotonic()
        self.seen: object = None

    def start(self, limit: int | None = None) -> None:
        """Begin the run, or go on with it; `limit` is the most bytes that a file may have."""
        command = ["resume", "last"] if self.run_folder() is not None else ["train", str(self.recipe)]
        full = None
        if limit is not None:
            full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: E731
        # a file for each start: with a full disk there must be room for its last words
        with (self.folder / f"log-{self.starts:03d}.txt").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ondol", *command, "--runs", str(self.runs), "--json"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=full,
                env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])},
            )
        self.starts += 1

    def run_folder(self) -> Path | None:
        return next(iter(self.runs.glob("*-chaos")), None)

    def said(self, since: int = 0) -> str:
        return "".join(p.read_text(errors="replace") for p in sorted(self.folder.glob("log-*.txt"))[since:])

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def workers(self, module: str = "ondol.train.start_worker") -> list[psutil.Process]:
        assert self.process is not None
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
            found = [c for c in children if module in c.cmdline()]
            self.pids |= set(found)
            return found
        except psutil.Error:
            return []

    def steps(self) -> int:
        folder = self.run_folder()
        if folder is None:
            return 0
        try:
            with ondol.open_run(str(folder)) as run:
                return len(list(run.db.metrics("score/mean", "rl")))
        except Exception:  # it is just being made
            return 0

    def finished(self) -> bool:
        folder = self.run_folder()
        try:
            assert folder is not None
            with ondol.open_run(str(folder)) as run:
                return run.state == "finished"
        except Exception:
            return False

    def watch(self) -> None:
        """The watchdog: nothing moves, and it says who waits for whom."""
        now = (self.starts, self.steps(), len(self.said()))
        if now != self.seen:
            self.seen, self.moved = now, time.monotonic()
        if time.monotonic() - self.moved > PATIENCE_S:
            states = [(w.pid, w.status()) for w in self.workers()]
            raise AssertionError(f"hung after {self.done}: workers {states}, step {now[1]}; {self.said()[-1500:]}")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(timeout=30)

    def fault(self, kind: str) -> bool:
        """Do it; False where there was nothing to do it to."""
        assert self.process is not None
        workers = self.workers("ondol.cluster.score_worker" if "judge" in kind else "ondol.train.start_worker")
        if "worker" in kind or "judge" in kind:
            if not workers:
                return False
            victims = workers if "all" in kind else [self.rng.choice(workers)]
            for victim in victims:
                try:
                    victim.send_signal(signal.SIGKILL if "kill" in kind else signal.SIGSTOP)
                except psutil.Error:
                    return False
            return True
        if kind == "interrupt":
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(timeout=PATIENCE_S)
            except subprocess.TimeoutExpired:
                raise AssertionError(f"Ctrl-C is not heard: {self.said()[-1500:]}") from None
            return True
        folder = self.run_folder()
        saved = list((folder / "checkpoints").glob("*/model.safetensors")) if folder is not None else []
        if kind == "spoil checkpoint" and not saved:
            return False
        self.kill()
        if kind == "disk full":
            before = self.starts
            self.start(limit=self.rng.choice([4, 64, 512]) * 1024)
            while self.alive():
                self.watch()
                time.sleep(0.1)
            assert self.process is not None
            # it did all that was left within the limit, or it says what is wrong and what to do
            new = self.said(since=before)
            assert self.process.returncode == 0 or "->" in new or '"error"' in new or "remedy" in new, new[-1500:]
        if kind == "spoil checkpoint":
            newest = max(saved, key=lambda p: p.stat().st_mtime)
            content = bytearray(newest.read_bytes())
            content[self.rng.randrange(len(content))] ^= 0xFF
            newest.write_bytes(content[: self.rng.choice([len(content), len(content) // 2])])
        return True


def test_the_run_ends_as_if_nothing_had_happened(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with ondol.run(RECIPE, "rollout.processes=0", "rollout.reward_workers=0", runs=tmp_path / "calm") as run:
        want = outcome(run)
    rng = random.Random(SEED)
    count, rounds = 0, 0
    told: list[str] = []
    kinds = [KINDS[i % len(KINDS)] for i in range(FAULTS)]
    rng.shuffle(kinds)
    while count < FAULTS:
        rounds += 1
        battle = Battle(tmp_path / f"battle-{rounds}", rng)
        battle.runs.mkdir(parents=True)
        battle.recipe.write_text(as_toml(to_table(load_recipe(RECIPE))))
        battle.start()
        due: float | None = None  # the next fault: some time after there is something to harm
        while True:
            battle.watch()
            if not battle.alive():
                if battle.finished():  # a fault may have hit it after its last word: then its exit status says nothing
                    break
                battle.start()  # killed, interrupted, or out of disk: go on
                due = None
            if due is None and battle.workers():
                due = time.monotonic() + rng.uniform(0.0, 4.0)
            if count < FAULTS and due is not None and time.monotonic() > due:
                if battle.fault(kinds[count]):
                    battle.done.append(kinds[count])
                    count += 1
                due = None
            assert battle.starts < 4 * FAULTS + 8, battle.said()[-3000:]
            time.sleep(0.05)
        told += battle.done
        with ondol.open_run("last", runs=battle.runs) as run:
            found = outcome(run)
        keys = [tuple(t["key"]) for t in found[0]]
        assert len(keys) == len(set(keys)) == STEPS * 16  # none counted twice, none lost
        assert found == want, battle.done
        time.sleep(1.0)
        assert not [
            p for p in battle.pids if p.is_running() and p.status() != psutil.STATUS_ZOMBIE
        ]  # frozen ones too are gone
        assert not (battle.run_folder() / "workers").exists()
        print(
            f"run {rounds}: {len(battle.done)} faults, {battle.starts} starts, the same trajectories and model: {battle.done}"
        )
    assert count == FAULTS and len(told) == FAULTS


def as_toml(table: dict) -> str:
    """JSON is TOML, value by value."""

    def value(v):
        if isinstance(v, dict):
            return "{" + ", ".join(f"{json.dumps(k)} = {value(x)}" for k, x in v.items()) + "}"
        if isinstance(v, list):
            return "[" + ", ".join(map(value, v)) + "]"
        return json.dumps(v)

    return "\n".join(f"{k} = {value(v)}" for k, v in table.items())
