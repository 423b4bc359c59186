"""Rollouts on a Ray cluster give the run that one process gives, bit for bit, also when a worker, or a whole node, is killed."""

from __future__ import annotations

import os
import signal
import time

import pytest

import ondol
from judged import scorers
from ondol.cli import main
from ondol.errors import OndolError
from small_run import RECIPE, has_learned, importable  # noqa: F401

ray = pytest.importorskip("ray")

from ondol.recipe import load_recipe  # noqa: E402
from ondol.train import on_ray  # noqa: E402
from ondol.train.on_ray import RayRollouts  # noqa: E402
from ondol.train.plans import load  # noqa: E402

pytestmark = pytest.mark.timeout(280)


def outcome(run):
    assert has_learned(run)
    trajectories = [t.to_dict() for t in run.db.trajectories(phase="rl")]
    return trajectories, (run.path / "model" / "model.safetensors").read_bytes()


def test_two_workers_of_a_local_cluster_are_one_process(tmp_path, monkeypatch):
    with ondol.run(RECIPE, runs=tmp_path / "one") as run:
        want = outcome(run)
    assert any(t["sampled"] for t in want[0])
    killed, told = [], RayRollouts._tell

    def tell(self, owner, pending):
        if pending.asked.step == 2 and not killed:  # the worker has just done the first step
            killed.append(ray.get(self._actors[owner].pid.remote(), timeout=120))
            os.kill(killed[0], signal.SIGKILL)
        told(self, owner, pending)

    monkeypatch.setattr(RayRollouts, "_tell", tell)
    with ondol.run(RECIPE, "rollout.processes=2", "rollout.cluster=local", runs=tmp_path / "two") as run:
        assert outcome(run) == want
    assert killed and not ray.is_initialized()


def test_reward_workers_are_actors(tmp_path, monkeypatch):
    """One of them is killed; scores come from neither the rollout worker nor this process, and are the same."""
    found, killed = [], []
    for name, settings in (
        ("one", ()),
        ("ray", ("rollout.processes=1", "rollout.cluster=local", "rollout.reward_workers=2")),
    ):
        (tmp_path / name).mkdir()
        task = {"name": "judged:Judged", "log": str(tmp_path / name)}
        workers, started = [], RayRollouts._start

        def start(self, owner, workers=workers, started=started):
            started(self, owner)
            workers.append(ray.get(self._actors[owner].pid.remote(), timeout=120))

        told = RayRollouts._tell

        def tell(self, owner, pending, name=name, told=told):
            if pending.asked.step == 2 and not killed:
                killed.append(sorted(scorers(tmp_path / name))[0])
                os.kill(killed[0], signal.SIGKILL)
            told(self, owner, pending)

        with monkeypatch.context() as m:
            m.setattr(RayRollouts, "_start", start)
            m.setattr(RayRollouts, "_tell", tell)
            with ondol.run({**RECIPE, "task": task}, *settings, runs=tmp_path / "runs" / name) as run:
                assert has_learned(run)
                said = [(t.key, t.ids, t.logp, t.score, t.reward) for t in run.db.trajectories(phase="rl")]
                found.append((said, (run.path / "model" / "model.safetensors").read_bytes()))
    assert found[0] == found[1] and killed
    assert workers and not scorers(tmp_path / "ray") & {os.getpid(), *workers}
    assert len(scorers(tmp_path / "ray")) in (2, 3)


def test_a_node_is_killed(tmp_path, monkeypatch):
    """Two nodes beside the head, one worker each; a node dies, and its worker is begun anew on the other."""
    from ray.cluster_utils import Cluster

    with ondol.run(RECIPE, runs=tmp_path / "one") as run:
        want = outcome(run)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        here = ray.get_runtime_context().get_node_id()  # all nodes are on this machine; this process is on one of them
        nodes = [n for n in nodes if n.node_id != here]
        before = len(nodes)
        told = RayRollouts._tell

        def tell(self, owner, pending):
            told(self, owner, pending)
            if pending.asked.step == 2 and len(nodes) == before:
                cluster.remove_node(nodes.pop(), allow_graceful=False)

        monkeypatch.setattr(RayRollouts, "_tell", tell)
        with ondol.run(RECIPE, "rollout.processes=3", "rollout.cluster=auto", runs=tmp_path / "two") as run:
            assert outcome(run) == want
        assert len(nodes) == before - 1 and ray.is_initialized()
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_weights_travel_while_workers_are_busy():
    """They come to a worker's node as soon as there are new ones, not when it asks for them."""
    from ray.cluster_utils import Cluster
    from ray.experimental import get_object_locations

    recipe = load_recipe(RECIPE, ["model.path=tiny:hidden=128,layers=2", "rollout.processes=1", "rollout.cluster=auto"])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        other = cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        assert ray.get_runtime_context().get_node_id() != other.node_id
        rollouts = RayRollouts(recipe, load(recipe), 1)
        try:
            rollouts.announce(1)
            [state] = ray.get(rollouts._keeper.state.remote(1), timeout=60)
            for _ in range(600):
                if other.node_id in get_object_locations([state])[state]["node_ids"]:
                    break
                time.sleep(0.1)
            else:
                raise AssertionError("the weights stayed where they were")
            assert not rollouts._open  # nobody has been asked to play
        finally:
            rollouts.close()
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_the_cluster_is_gone(tmp_path, monkeypatch):
    """The run says so instead of beginning a cluster of its own, and goes on without one."""
    with ondol.run(RECIPE, runs=tmp_path / "one") as run:
        want = outcome(run)
    told = RayRollouts._tell

    def tell(self, owner, pending):
        told(self, owner, pending)
        if pending.asked.step == 2:
            ray.shutdown()

    steps = ("rollout.processes=1", "rollout.cluster=local", "train.checkpoint_every_steps=1")
    with monkeypatch.context() as m, pytest.raises(OndolError, match="Ray cluster 'local' is gone"):
        m.setattr(RayRollouts, "_tell", tell)
        ondol.run(RECIPE, *steps, runs=tmp_path / "two")
    assert not ray.is_initialized()
    assert main(["resume", "last", "--cluster", "none", "--runs", str(tmp_path / "two")]) == 0
    with ondol.open_run("last", runs=tmp_path / "two") as run:
        assert outcome(run) == want and run.recipe["rollout"]["cluster"] == "local"
    assert not ray.is_initialized()


def test_a_client_is_refused_at_first(monkeypatch):
    """Ray's server for clients fails its first one now and then."""
    asked = []

    def init(**settings):
        asked.append(settings["address"])
        if len(asked) < refusals:
            raise ConnectionAbortedError("Initialization failure from server:\nTraceback ...\nRuntimeError: no fork")

    monkeypatch.setattr(ray, "init", init)
    refusals = 3
    on_ray._connect(ray, "auto", 1, None)
    assert len(asked) == 3
    refusals, asked = 9, []
    with pytest.raises(OndolError, match="from server: RuntimeError: no fork"):
        on_ray._connect(ray, "auto", 1, None)
    assert len(asked) == 3


def test_no_cluster_there(tmp_path):
    started = time.monotonic()
    with pytest.raises(OndolError, match="no connection to the Ray cluster"):
        ondol.run(RECIPE, "rollout.processes=1", "rollout.cluster=127.0.0.1:9", runs=tmp_path)
    assert time.monotonic() - started < 120
    with pytest.raises(OndolError, match=r"set rollout\.processes"):
        ondol.load_recipe(RECIPE, ["rollout.cluster=local"])
