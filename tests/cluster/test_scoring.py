"""Reward workers: the task's own scores from other processes, side by side, whatever happens to those."""

from __future__ import annotations

import asyncio
import os
import time

import pytest

import ondol
from judged import Judged, scorers
from ondol.cluster.scoring import ChildScorer, RewardWorkers
from ondol.engines.base import Sampling
from ondol.envs.tool import ToolEnv
from ondol.errors import OndolError
from ondol.models.chat import renderer_for
from ondol.records import StopReason
from ondol.rollout.driver import Plan, rollout
from scripted import TOKENIZER, ScriptedEngine
from small_run import RECIPE, has_learned, importable  # noqa: F401

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def log(tmp_path):
    (tmp_path / "log").mkdir()
    return str(tmp_path / "log")


@pytest.fixture
def workers(log):
    made = []

    def make(count=2, timeout_s=60.0):
        task = Judged(log=log)
        table = {"name": "judged:Judged", "log": log}
        made.append(RewardWorkers(task, lambda: ChildScorer(table), count, timeout_s))
        return task, made[-1]

    yield make
    for found in made:
        found.close()


def score(task, *responses):
    async def run():
        return await asyncio.gather(*(task.judged(task.problem(0), r) for r in responses), return_exceptions=True)

    return asyncio.run(run())


def test_scores_are_the_tasks_own(workers, log):
    task, found = workers(3)
    responses = [f"answer {i}" for i in range(40)]
    assert score(task, *responses) == [Judged().score(task.problem(0), r) for r in responses]
    assert scorers(log) and os.getpid() not in scorers(log)
    found.close()
    assert score(task, "after") == [Judged().score(task.problem(0), "after")] and os.getpid() in scorers(log)


def test_side_by_side(workers):
    task, _ = workers(2)
    assert score(task, "together 1", "together 2") == [1.0, 1.0]


def test_a_worker_that_dies_is_replaced(workers, log):
    task, found = workers(1)
    assert score(task, "die once", "4", "5") == [Judged().score(task.problem(0), r) for r in ("die once", "4", "5")]
    assert found.lost == 1 and len(scorers(log)) == 2
    (died,) = score(task, "die")
    assert isinstance(died, OndolError) and "3 reward workers died" in str(died)
    assert score(task, "6") == [Judged().score(task.problem(0), "6")]


def test_what_goes_wrong_is_said(workers):
    task, found = workers(2, timeout_s=1.0)
    hung, refused, bug = score(task, "hang", "refuse", "bug")
    assert "longer than 1 s" in str(hung) and "no key" in str(refused) and "ZeroDivisionError: of the judge" in str(bug)
    assert all(isinstance(e, OndolError) for e in (hung, refused, bug)) and found.lost == 1
    nothing = RewardWorkers(Judged(), lambda: ChildScorer({"name": "judged:Nothing"}), 1, 5.0)
    try:
        (broken,) = score(nothing.task, "x")
        assert isinstance(broken, OndolError) and "does not start" in str(broken)
    finally:
        nothing.close()


def test_a_slow_judge_holds_up_no_other_episode(workers):
    """Two answers are scored at once; and a scoring that fails ends its own trajectory only."""
    task, _ = workers(2)
    said = {(0, 0): "together$", (0, 1): "together too$", (1, 0): "bug$", (1, 1): "fine$"}
    problems = [task.problem(i) for i in range(2)]
    plan = Plan(task, ToolEnv(tools=()), problems, 2, Sampling(max_tokens=32), (0,), timeout_s=60.0)
    engine = ScriptedEngine(lambda p, s, t: said[p, s], per_step=4)
    a, b, bug, fine = [t for g in rollout(engine, renderer_for(TOKENIZER), plan) for t in g.trajectories]
    assert (a.score, b.score) == (1.0, 1.0)
    assert bug.stop_reason is StopReason.ERROR and "of the judge" in bug.info["error"]
    assert fine.score == Judged().score(problems[1], "fine")


def test_the_same_run_with_and_without(tmp_path):
    """In this process and in two; no reward worker outlives its run."""
    found = []
    for name, settings in (
        ("none", ()),
        ("two", ("rollout.reward_workers=2",)),
        ("processes", ("rollout.reward_workers=1", "rollout.processes=2")),
    ):
        (tmp_path / name).mkdir()
        task = {"name": "judged:Judged", "log": str(tmp_path / name)}
        with ondol.run({**RECIPE, "task": task}, *settings, runs=tmp_path / "runs" / name) as run:
            assert has_learned(run)
            said = [(t.key, t.ids, t.logp, t.score, t.reward) for t in run.db.trajectories(phase="rl")]
            found.append((said, (run.path / "model" / "model.safetensors").read_bytes()))
        assert (os.getpid() in scorers(tmp_path / name)) == (name == "none")
    assert found[0] == found[1] == found[2]
    left = [p for p in scorers(tmp_path / "two") | scorers(tmp_path / "processes") if _alive(p)]
    assert not left


def _alive(pid: int) -> bool:
    for _ in range(50):
        if not os.path.exists(f"/proc/{pid}"):
            return False
        time.sleep(0.1)
    return True
