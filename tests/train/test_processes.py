"""Rollouts by processes give the run that one process gives, bit for bit, also when a process is killed."""

from __future__ import annotations

import os
import signal

import pytest

import ondol
from ondol.cli import main
from ondol.errors import OndolError
from ondol.train.processes import ProcessRollouts
from ondol.train.report import Reporter
from small_run import RECIPE, has_learned, importable  # noqa: F401

pytestmark = pytest.mark.timeout(240)


def outcome(run):
    assert has_learned(run)
    trajectories = [t.to_dict() for t in run.db.trajectories(phase="rl")]
    metrics = {
        (m.name, m.step): m.value
        for m in run.db.metrics()
        if m.name.split("/")[0] in ("score", "loss", "gradient", "policy")
    }
    return trajectories, metrics, (run.path / "model" / "model.safetensors").read_bytes()


def test_two_processes_are_one(tmp_path, monkeypatch):
    with ondol.run(RECIPE, runs=tmp_path / "one") as run:
        want = outcome(run)
    assert want[1] and len(want[0]) == 24 and any(t["sampled"] for t in want[0])

    killed = []
    told = ProcessRollouts._tell

    def tell(self, owner, pending):
        told(self, owner, pending)
        if pending.asked.step == 2 and not killed:  # the worker has just been given work
            killed.append(owner)
            os.kill(self._workers[owner].pid, signal.SIGKILL)

    monkeypatch.setattr(ProcessRollouts, "_tell", tell)
    with ondol.run(RECIPE, "rollout.processes=2", runs=tmp_path / "two") as run:
        found = outcome(run)
        versions = {t.key[0]: set(t.version) - {-1} for t in run.db.trajectories(phase="rl")}
        gaps = [m.value for m in run.db.metrics("mismatch/max_abs")]
    # what is sampled after an update is sampled with it, and the learner finds the workers' log-probs again
    assert versions[1] == {0} and min(versions[2]) >= 1 and max(gaps, default=0.0) < 1e-9
    assert killed and found[0] == want[0] and found[1] == want[1] and found[2] == want[2]


def test_sampling_ahead(tmp_path, capsys):
    """Staleness is bounded and shown; a run that was stopped and resumed, with more workers now, is the run that was not."""
    steps = ("rollout.processes=1", "train.steps=5", "train.staleness=2", "train.checkpoint_every_steps=2")
    with ondol.run(RECIPE, *steps, runs=tmp_path / "whole") as run:
        want = outcome(run)
        lags = [m.value for m in run.db.metrics("rollout/staleness")]
        waits = [m.value for m in run.db.metrics("learner/waited_seconds")]
    assert lags[0] == 0 and max(lags) == 2 and len(waits) == 5 and all(w >= 0 for w in waits)
    versions = {t["key"][0]: max(t["version"]) for t in want[0]}
    assert versions[1] == versions[2] == versions[3] == 0 < versions[4]

    class Stop(Reporter):
        def __init__(self):
            self.steps = 0

        def advance(self, part, values):
            self.steps += "step/seconds" in values
            if self.steps == 3:
                self.steps += 1
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        ondol.run(RECIPE, *steps, runs=tmp_path / "stopped", reporter=Stop())
    resume = ["resume", "last", "--runs", str(tmp_path / "stopped"), "--set"]
    assert main([*resume, "train.steps=6"]) == 1
    assert "rollout.processes" in (said := capsys.readouterr().err) and "begin a new run" in said
    assert main([*resume, "rollout.processes=2"]) == 0
    with ondol.open_run("last", runs=tmp_path / "stopped") as run:
        found = outcome(run)
    assert found[0] == want[0] and found[2] == want[2]


def test_new_weights_in_the_middle_of_rollouts(tmp_path):
    """Rollouts that are under way go on with new weights; every token says whose it is, and what is stale is corrected for."""
    steps = (
        "rollout.processes=2",
        "train.steps=6",
        "train.staleness=2",
        "train.in_flight=true",
        "sampling.max_tokens=40",
    )
    longer = (
        "model.path=tiny:hidden=128,layers=4,context=128",
        "train.off_policy=decoupled",
        "optimizer.learning_rate=1e-3",
    )
    with ondol.run(RECIPE, *steps, *longer, runs=tmp_path) as run:
        trajectories = list(run.db.trajectories(phase="rl"))
        metrics = {
            name: [m.value for m in run.db.metrics(name)] for name in ("rollout/staleness", "rollout/switched_share")
        }
        gaps = [m.value for m in run.db.metrics("mismatch/max_abs")]
        stale = [m.value for m in run.db.metrics("off_policy/stale_share")]
    assert len(trajectories) == 6 * 12
    for t in trajectories:
        used = [v for v, s in zip(t.version, t.sampled) if s]
        assert used == sorted(used) and t.key[0] - 1 >= used[-1] and used[0] >= t.key[0] - 3
    # whether a rollout is caught in the middle is a matter of luck; that any of 72 is, is not
    assert max(metrics["rollout/switched_share"]) > 0 and max(metrics["rollout/staleness"]) <= 2
    assert max(gaps, default=0.0) < 1e-9 and max(stale) > 0


def test_wrong_settings():
    with pytest.raises(OndolError, match=r"rollout\.processes"):
        ondol.load_recipe(RECIPE, ["train.staleness=1"])
    with pytest.raises(OndolError, match=r"train\.staleness"):
        ondol.load_recipe(RECIPE, ["train.in_flight=true", "rollout.processes=1"])
    assert ondol.load_recipe(
        RECIPE, ["train.staleness=1", "rollout.processes=1", "method.name=rloo", "train.off_policy=decoupled"]
    )
    with pytest.raises(OndolError, match="older weights"):
        ondol.load_recipe(RECIPE, ["train.staleness=1", "rollout.processes=1", "method.name=rloo"])
