"""A run that is killed, or stopped, at any moment and resumed ends as one that was left alone: bit for bit.

By default a few kills, several in the life of one run; ONDOL_LONG_TESTS=1 makes 20 random ones, one in each run.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from forks import PLACES, Ended, Forks
from ondol.store import Run

LONG = os.environ.get("ONDOL_LONG_TESTS") == "1"
RECIPE = """
name = "toy"
[model]
path = "tiny:hidden=32,layers=1,context=192"
[task]
name = "toy:Toy"
[env]
tools = ["calculator"]
system = ""
[sampling]
max_tokens = 28
[warm_start]
from_task = true
problems = 6
samples_per_problem = 8
traces_per_update = 8
epochs = 5
learning_rate = 1e-2
[method]
name = "grpo"
minibatches = 2
kl_coef = 0.01
[optimizer]
learning_rate = 1e-3
[train]
steps = 5
prompts_per_step = 4
samples_per_prompt = 4
checkpoint_every_steps = 2
[evaluate]
problems = 3
every_steps = 3
"""
CLOCKS = ("seconds", "tokens_per_s", "memory/")


@pytest.fixture(scope="module")
def forks():
    with Forks() as forks:
        yield forks


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "toy.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def whole(forks, recipe, tmp_path_factory) -> tuple[Ended, dict]:
    """A run that nobody disturbs: how it ended, and all that must come out again."""
    root = tmp_path_factory.mktemp("whole")
    ended = forks.run("train", str(recipe), "--runs", str(root))
    assert ended.status == 0, ended.text
    return ended, outcome(root)


def outcome(root: Path) -> dict:
    """All that a run leaves, without what a clock or the machine's memory says."""
    path = Run.find(root, "last")
    with Run.open(path) as run:
        assert run.state == "finished"
        metrics = {
            (m.phase, m.step, m.name): m.value for m in run.db.metrics() if not any(clock in m.name for clock in CLOCKS)
        }
        trajectories = {}
        for phase in dict.fromkeys(row.phase for row in run.db.trajectory_rows()):
            for t in run.db.trajectories(phase=phase):
                data = t.to_dict()
                for turn in data["turns"]:
                    for result in turn["results"]:
                        del result["seconds"]
                trajectories[phase, t.version[-1] if phase == "rl" else 0, t.key] = data
        files = [path / "reference.safetensors", *path.glob("checkpoints/*/*.safetensors"), *path.glob("model/*")]
        return {
            "metrics": metrics,
            "trajectories": trajectories,
            "files": {str(f.relative_to(path)): f.read_bytes() for f in files},
        }


def assert_same(found: dict, expected: dict) -> None:
    for kind in ("metrics", "trajectories", "files"):
        assert found[kind].keys() == expected[kind].keys(), kind
        odd = [key for key, value in expected[kind].items() if found[kind][key] != value]
        assert not odd, (kind, odd[:5])


def until_finished(forks: Forks, root: Path) -> None:
    for _ in range(3):
        ended = forks.run("resume", "last", "--runs", str(root))
        if ended.status == 0 or " is finished" in ended.text:  # killed after the end, while the plot was drawn
            return
    raise AssertionError(ended.text)


def test_the_run_does_all_that_it_should(whole) -> None:
    """The test above all: what is compared below has tools, updates, checkpoints and evaluations in it."""
    ended, result = whole
    metrics, trajectories = result["metrics"], result["trajectories"].values()
    assert any(r["ok"] for t in trajectories for turn in t["turns"] for r in turn["results"]), "no tool was called"
    assert any(key[0] == "rl" and key[2] == "eval/score_greedy" and key[1] == 3 for key in metrics)
    assert metrics["rl", 1, "gradient/norm"] > 0
    assert metrics["rl", 1, "mismatch/max_abs"] < 1e-4
    assert {f"checkpoints/rl-{n:06d}/optimizer.safetensors" for n in (4, 5)} <= result["files"].keys()
    for place in ("sampling", "loss", "update", "tensors", "rotate", "evaluation", "model"):
        assert ended.calls[place] > 0, place


def test_the_same_recipe_twice_is_the_same_run(forks, recipe, whole, tmp_path) -> None:
    assert forks.run("train", str(recipe), "--runs", str(tmp_path)).status == 0
    assert_same(outcome(tmp_path), whole[1])


def test_killed_at_random_moments(forks, recipe, whole, tmp_path) -> None:
    """Half of the kills by place (each equally likely, at a random call), half by the clock."""
    (kills, lives), draw = (20, 20) if LONG else (6, 2), random.Random(2)
    places, died = [p for p in PLACES if whole[0].calls[p]], 0
    for life in range(lives):
        root, moments, deaths = tmp_path / str(life), [], 0
        while deaths < kills // lives:
            # what is left to do shrinks with each death, so later ones come earlier
            share = draw.random() / 2**deaths
            place = draw.choice(places) if len(moments) % 2 == life % 2 else ""
            how = {"place": place, "call": 1 + int(share * whole[0].calls[place])} if place else {}
            how = how or {"after_s": 0.8 * share * whole[0].seconds}
            started = any(root.glob("*/run.sqlite"))
            command = ("resume", "last") if started else ("train", str(recipe))
            ended = forks.run(*command, "--runs", str(root), **how)
            moments.append(how)
            assert ended.status in (0, -signal.SIGKILL), ended.text
            if ended.status == 0:
                break
            deaths += 1
        else:
            if not any(root.glob("*/run.sqlite")):  # it died before there was a run
                assert forks.run("train", str(recipe), "--runs", str(root)).status == 0
            else:
                until_finished(forks, root)
        try:
            assert_same(outcome(root), whole[1])
        except AssertionError as e:
            raise AssertionError(f"killed at {moments}: {e}") from e
        died += deaths
    assert died >= kills * 2 / 3, "too few of the children died: the test looks away"


@pytest.mark.parametrize("place, share", [("tensors", 0.5), ("update", 0.6), ("sync", 0.9)])
def test_killed_where_it_hurts(forks, recipe, whole, tmp_path, place, share) -> None:
    """In the middle of a checkpoint's files, between two minibatches of a step, in the last checkpoint."""
    call = max(1, round(share * whole[0].calls[place]))
    ended = forks.run("train", str(recipe), "--runs", str(tmp_path), place=place, call=call)
    assert ended.status == -signal.SIGKILL
    until_finished(forks, tmp_path)
    assert_same(outcome(tmp_path), whole[1])


@pytest.mark.parametrize("place, share", [("sampling", 0.5), ("loss", 0.9), ("update", 0.925), ("evaluation", 0.6)])
def test_ctrl_c_saves_and_resumes(forks, recipe, whole, tmp_path, place, share) -> None:
    """In sampling, in learning, between two minibatches of a step after one without a checkpoint, in evaluation."""
    call = max(1, round(share * whole[0].calls[place]))
    ended = forks.run("train", str(recipe), "--runs", str(tmp_path), place=place, call=call, sign=signal.SIGINT)
    assert ended.status == 130, ended.text
    name = Run.find(tmp_path, "last").name
    assert re.search(rf"ondol resume {name}", " ".join(ended.text.split())), ended.text
    with Run.open(tmp_path / name) as run:
        assert run.state == "stopped"
    until_finished(forks, tmp_path)
    assert_same(outcome(tmp_path), whole[1])


def test_a_run_has_one_writer(forks, recipe, tmp_path) -> None:
    """A second process is refused with the first one's pid; when that one is killed, the run is free at once."""
    from ondol.cli import main
    from ondol.errors import OndolError

    forks.start("train", str(recipe), "--runs", str(tmp_path), after_s=1.5)
    deadline = time.monotonic() + 10
    while not any(tmp_path.glob("*/run.sqlite")) and time.monotonic() < deadline:
        time.sleep(0.01)
    path = Run.find(tmp_path, "last")
    deadline = time.monotonic() + 5
    while not (pid := (path / "lock").read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(OndolError, match=f"pid {pid}"):
        Run.open(path, write=True)
    assert main(["resume", path.name, "--runs", str(tmp_path)]) == 1
    forks.end()
    Run.open(path, write=True).close()
