"""A learner of two processes makes the updates that one makes, and says so when one of them is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import ondol
from ondol.cli import main
from ondol.errors import OndolError
from ondol.train.parallel import Leader
from ondol.train.report import Reporter
from small_run import RECIPE, importable  # noqa: F401

pytestmark = pytest.mark.timeout(240)
# micro-batches small enough that there is something to share
SMALL = ("train.tokens_per_microbatch=40", "train.checkpoint_every_steps=1", "rollout.max_batch=1")


def outcome(run):
    metrics = {
        (m.name, m.phase, m.step): m.value
        for m in run.db.metrics()
        if m.name.split("/")[0] in ("score", "loss", "gradient", "policy", "value", "mismatch", "groups")
    }
    return metrics, load_file(run.path / "model" / "model.safetensors")


def assert_close(found, want):
    assert found[0].keys() == want[0].keys()
    for key, value in want[0].items():
        assert found[0][key] == pytest.approx(value, rel=1e-6, abs=1e-9), key
    assert found[1].keys() == want[1].keys()
    for name, value in want[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(
            (
                "method={name='grpo',kl_coef=0.1,minibatches=2}",
                "warm_start={problems=4,from_task=true,epochs=1}",
                "task.calls=false",
            ),
            id="imitation, then two updates a step with a reference",
        ),
        pytest.param(("method={name='ppo',value_pretraining_steps=1}",), id="a critic, trained before"),
    ],
)
def test_two_are_one(tmp_path, more):
    with ondol.run(RECIPE, *SMALL, *more, runs=tmp_path / "one") as run:
        want = outcome(run)
    with ondol.run(RECIPE, *SMALL, *more, "train.learners=2", runs=tmp_path / "two") as run:
        assert_close(outcome(run), want)
    assert len(want[0]) > 10


class Stop(Reporter):
    """Ctrl-C after the first step."""

    told = False

    def advance(self, part, values):
        if "step/seconds" in values and not self.told:
            self.told = True
            os.kill(os.getpid(), signal.SIGINT)


def test_saved_with_two_and_resumed_with_one(tmp_path, monkeypatch):
    with ondol.run(RECIPE, *SMALL, "train.steps=3", runs=tmp_path / "one") as run:
        want = outcome(run)
    with pytest.raises(KeyboardInterrupt):
        ondol.run(RECIPE, *SMALL, "train.steps=3", "train.learners=2", runs=tmp_path / "two", reporter=Stop())
    monkeypatch.setattr("ondol.train.loop.Crew", None)  # any more than one would need it
    with ondol.open_run("last", runs=tmp_path / "two") as run:
        recipe = run.path / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("learners = 2", "learners = 1"))
    assert main(["resume", "last", "--runs", str(tmp_path / "two")]) == 0
    with ondol.open_run("last", runs=tmp_path / "two") as run:
        assert_close(outcome(run), want)


def test_one_is_killed(tmp_path, monkeypatch):
    """The run ends with the reason, at once; the checkpoint before it is good."""
    together, steps = Leader._together, []

    def killed(self: Leader, what, *args):
        steps.append(what)
        if len(steps) == 2:
            os.kill(self.crew._started[0].pid, signal.SIGKILL)
        return together(self, what, *args)

    monkeypatch.setattr(Leader, "_together", killed)
    with pytest.raises(OndolError, match=r"was lost.*\(process 1 ended \(signal 9\)"):
        ondol.run(RECIPE, *SMALL, "train.learners=2", runs=tmp_path)
    assert main(["resume", "last", "--runs", str(tmp_path)]) == 0
    with ondol.open_run("last", runs=tmp_path) as run:
        assert [m.step for m in run.db.metrics("score/mean", "rl")] == [1, 2]


@pytest.mark.parametrize("bad", [0, 11])
def test_not_finite_in_one_process(tmp_path, bad):
    """What one of them finds in its share, all hear of; nothing is changed, and the next run can be made."""
    with pytest.raises(OndolError, match="loss is not finite at step 1 of 'rl'"):
        ondol.run(RECIPE, *SMALL, "train.learners=2", f"method={{name='toy:OneNaN',bad={bad}}}", runs=tmp_path)
    with ondol.open_run("last", runs=tmp_path) as run:
        assert run.state == "failed" and not list(run.db.metrics("loss/policy"))


def test_under_torchrun(tmp_path):
    """Started by torchrun, all processes learn together, and one of them writes."""
    recipe = tmp_path / "recipe.json"
    with ondol.run(RECIPE, *SMALL, runs=tmp_path / "one") as run:
        want = outcome(run)
        recipe = run.path / "recipe.toml"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ondol"]
    done = subprocess.run(
        [*command, "train", str(recipe), "--runs", str(tmp_path / "two"), "--json"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with ondol.open_run("last", runs=tmp_path / "two") as run:
        assert_close(outcome(run), want)
