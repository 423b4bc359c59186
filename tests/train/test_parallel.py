"""A learner of two processes makes the updates that one makes, and says so when one of them is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import ondol
from ondol.cli import main
from ondol.errors import OndolError
from ondol.train.parallel import Leader
from ondol.train.report import Reporter
from ondol.train.shards import local
from small_run import RECIPE, has_learned, importable  # noqa: F401

pytestmark = pytest.mark.timeout(240)
# micro-batches small enough that there is something to share
SMALL = ("train.tokens_per_microbatch=40", "train.checkpoint_every_steps=1", "rollout.max_batch=1")


def outcome(run):
    assert has_learned(run)
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


HOW = pytest.mark.parametrize("how", [pytest.param((), id="whole"), pytest.param(("train.fsdp=true",), id="in shards")])


@HOW
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
        pytest.param(("method={name='ppo',critic='shared'}",), id="a critic on the policy's trunk"),
        pytest.param(
            ("train.staleness=1", "rollout.processes=1", "train.off_policy='decoupled'", "method.name='grpo'"),
            id="sampled ahead",
        ),
    ],
)
def test_two_are_one(tmp_path, more, how):
    with ondol.run(RECIPE, *SMALL, *more, runs=tmp_path / "one") as run:
        want = outcome(run)
    with ondol.run(RECIPE, *SMALL, *more, *how, "train.learners=2", runs=tmp_path / "two") as run:
        assert_close(outcome(run), want)
    assert len(want[0]) > 10


class Stop(Reporter):
    """Ctrl-C after the first step."""

    told = False

    def advance(self, part, values):
        if "step/seconds" in values and not self.told:
            self.told = True
            os.kill(os.getpid(), signal.SIGINT)


@HOW
def test_saved_with_two_and_resumed_with_one(tmp_path, monkeypatch, how):
    with ondol.run(RECIPE, *SMALL, "train.steps=3", runs=tmp_path / "one") as run:
        want = outcome(run)
    with pytest.raises(KeyboardInterrupt):
        ondol.run(RECIPE, *SMALL, *how, "train.steps=3", "train.learners=2", runs=tmp_path / "two", reporter=Stop())
    monkeypatch.setattr("ondol.train.loop.Crew", None)  # any more than one would need it
    assert main(["resume", "last", "--set", "train.learners=1", "--runs", str(tmp_path / "two")]) == 0
    with ondol.open_run("last", runs=tmp_path / "two") as run:
        assert_close(outcome(run), want)


@HOW
def test_one_is_killed(tmp_path, monkeypatch, how):
    """The run ends with the reason, at once; the checkpoint before it is good."""
    together, steps = Leader._together, []

    def killed(self: Leader, what, *args):
        steps.append(what)
        if len(steps) == 2:
            os.kill(self.crew._started[0].pid, signal.SIGKILL)
        return together(self, what, *args)

    monkeypatch.setattr(Leader, "_together", killed)
    with pytest.raises(OndolError, match=r"was lost.*\(process 1 ended \(signal 9\)"):
        ondol.run(RECIPE, *SMALL, *how, "train.learners=2", runs=tmp_path)
    assert main(["resume", "last", "--runs", str(tmp_path)]) == 0
    with ondol.open_run("last", runs=tmp_path) as run:
        assert [m.step for m in run.db.metrics("score/mean", "rl")] == [1, 2]


@HOW
@pytest.mark.parametrize("end", ["kill", "raise"])
def test_one_ends_in_the_middle_of_its_pass(tmp_path, how, end):
    """With shards the others wait for it there; either way the run ends at once, with the reason."""
    started = time.monotonic()
    said = {"kill": r"process 1 ended \(signal 9\)", "raise": "out of luck"}[end]
    with pytest.raises(OndolError, match=said):
        ondol.run(RECIPE, *SMALL, *how, "train.learners=2", f"method={{name='toy:OneEnds',how='{end}'}}", runs=tmp_path)
    assert time.monotonic() - started < 60


@HOW
@pytest.mark.parametrize("bad", [0, 11])
def test_not_finite_in_one_process(tmp_path, bad, how):
    """What one of them finds in its share, all hear of; nothing is changed, and the next run can be made."""
    with pytest.raises(OndolError, match="loss is not finite at step 1 of 'rl'"):
        ondol.run(RECIPE, *SMALL, *how, "train.learners=2", f"method={{name='toy:OneNaN',bad={bad}}}", runs=tmp_path)
    with ondol.open_run("last", runs=tmp_path) as run:
        assert run.state == "failed" and not list(run.db.metrics("loss/policy"))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param("model.dtype='float32'", id="plain"),
        pytest.param("model={path='tiny:hidden=32,layers=1,context=128',dtype='float32',lora={rank=4}}", id="adapters"),
        pytest.param("model.dtype='bfloat16'", id="half precision"),
    ],
)
def test_three_hold_a_share_each(tmp_path, model):
    """Three rows of passes rarely come out even: some are idle. What is learned is near to what one learns, in the precision there is."""
    made = {}
    for name, more in {
        "start": ("optimizer.learning_rate=1e-12",),
        "one": ("optimizer.learning_rate=1e-3",),
        "three": ("optimizer.learning_rate=1e-3", "train.fsdp=true", "train.learners=3"),
    }.items():
        with ondol.run(RECIPE, *SMALL, model, "train.steps=1", *more, runs=tmp_path / name) as run:
            made[name] = outcome(run)
    norm = "gradient/norm", "rl", 1
    assert made["three"][0][norm] == pytest.approx(made["one"][0][norm], rel=2e-2)
    start, one, three = (torch.cat([w.float().flatten() for w in made[n][1].values()]) for n in made)
    far = (three - one).norm() / (one - start).norm()
    assert far < (0.3 if "bfloat16" in model else 0.02), far


def test_a_share_is_a_share(tmp_path, monkeypatch):
    """What this process holds of the decoder layers, of gradients and of Adam's means is about a half."""
    held = {}
    together = Leader._together

    def seen(self: Leader, what, *args):
        found = together(self, what, *args)
        layers = [(n, p) for n, p in zip(self.optimizer.names, self.optimizer.masters) if ".layers." in n]
        held["layers"] = [p for _, p in layers]
        held["means"] = [v for n, v in self.optimizer.state().items() if n.startswith("exp_avg/") and ".layers." in n]
        return found

    monkeypatch.setattr(Leader, "_together", seen)
    with ondol.run(RECIPE, *SMALL, "train.fsdp=true", "train.learners=2", runs=tmp_path) as run:
        whole = load_file(run.path / "model" / "model.safetensors")
    total = sum(v.numel() for n, v in whole.items() if ".layers." in n)
    for kind in ("layers", "means"):
        assert sum(local(t).numel() for t in held[kind]) == pytest.approx(total / 2, rel=0.05)


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
