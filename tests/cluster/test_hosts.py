"""Over several machines, each with its own address, files and processes: a Ray cluster, and a learner of several processes.

Part of `make chaos`, since they take minutes.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hosts
import pytest
import torch
from safetensors.torch import load_file

import ondol
from ondol.recipe import load_recipe, to_table
from ondol.store.toml import dump_toml
from small_run import RECIPE, has_learned

pytestmark = [
    pytest.mark.timeout(420),
    pytest.mark.skipif("ONDOL_FAULTS" not in os.environ, reason="minutes long; run by: make chaos"),
    pytest.mark.skipif(bool(lacking := hosts.why_not()), reason=f"no machines of one's own here: {lacking}"),
]
ENV = {
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *(p for p in sys.path if p)]),
    "OMP_NUM_THREADS": "1",
}
ONDOL = (sys.executable, "-m", "ondol")


def give(host: hosts.Host, *settings: str) -> str:
    """Put the recipe on a machine; where it is there."""
    text = dump_toml(to_table(load_recipe(RECIPE, settings)))
    (host.tmp / "recipe.toml").write_text(text)
    return "/tmp/recipe.toml"


def trajectories(run: Any) -> list[dict[str, Any]]:
    assert has_learned(run)
    return [t.to_dict() for t in run.db.trajectories(phase="rl")]


def folder(host: hosts.Host) -> Path | None:
    return next((host.tmp / "runs").glob("*-two"), None)


def steps(host: hosts.Host) -> int:
    with contextlib.suppress(Exception):  # it is just being made
        if (at := folder(host)) is not None:
            with ondol.open_run(str(at)) as run:
                return len(list(run.db.metrics("score/mean", "rl")))
    return 0


def until(true: Callable[[], Any], what: str, process: subprocess.Popen[str], limit_s: float = 120) -> None:
    end = time.monotonic() + limit_s
    while not true():
        if time.monotonic() > end or process.poll() is not None:
            process.kill()
            raise AssertionError(f"not {what}: {process.communicate(timeout=30)[0][-3000:]}")
        time.sleep(0.1)


def started(host: hosts.Host, *command: str) -> subprocess.Popen[str]:
    return host.start(*command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process: subprocess.Popen[str], limit_s: float = 180) -> str:
    try:
        said, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"it does not end: {process.communicate(timeout=30)[0][-3000:]}") from None
    return said


@pytest.fixture
def ray_cluster(tmp_path) -> Iterator[list[hosts.Host]]:
    """host1 has the head and no worker, host2 and host3 have room for two; host4 is outside, and has the run."""
    pytest.importorskip("ray")
    ray = (sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats")
    with hosts.hosts(4, tmp_path) as machines:
        head, *others, _ = machines
        options = ["--head", "--port", "6379", "--num-cpus", "0", "--include-dashboard", "false"]
        options += ["--ray-client-server-port", "10001"]
        head(*ray, *options, "--node-ip-address", head.address, env=ENV, timeout_s=120)
        for host in others:
            options = ["--address", f"{head.address}:6379", "--num-cpus", "2", "--object-store-memory", "100000000"]
            host(*ray, *options, "--node-ip-address", host.address, env=ENV, timeout_s=120)
        yield machines


def test_a_ray_cluster_of_which_a_machine_is_cut_off(ray_cluster, tmp_path):
    """The run, its machine outside the cluster, is that of one process; also when a machine with a worker is no longer heard of."""
    with ondol.run(RECIPE, "train.steps=20", runs=tmp_path) as run:
        want, model = trajectories(run), (run.path / "model/model.safetensors").read_bytes()
    *_, cut, outside = ray_cluster
    settings = ("train.steps=20", "rollout.processes=3", "rollout.cluster=ray://host1:10001", "rollout.lease_s=3")
    process = started(outside, *ONDOL, "train", give(outside, *settings), "--runs", "/tmp/runs", "--json")
    until(lambda: steps(outside) >= 1, "begun", process, 180)
    outside.cut()  # for a moment the run reaches nobody
    time.sleep(4)
    outside.cut(False)
    now = steps(outside)
    until(lambda: steps(outside) > now, "going on", process)
    cut.cut()
    said = ended(process)
    assert process.returncode == 0 and said.count("go on elsewhere") >= 1, said[-3000:]
    at = folder(outside)
    assert at is not None
    with ondol.open_run(str(at)) as run:
        assert trajectories(run) == want
    assert (at / "model/model.safetensors").read_bytes() == model


def test_a_ray_cluster_whose_head_is_switched_off(ray_cluster, tmp_path):
    """The run ends with a word on how to go on, and goes on elsewhere from its last checkpoint."""
    with ondol.run(RECIPE, "train.steps=20", runs=tmp_path) as run:
        want, model = trajectories(run), (run.path / "model/model.safetensors").read_bytes()
    head, *_, outside = ray_cluster
    settings = (
        "train.steps=20",
        "train.checkpoint_every_steps=1",
        "rollout.processes=2",
        "rollout.cluster=ray://host1:10001",
    )
    process = started(outside, *ONDOL, "train", give(outside, *settings), "--runs", "/tmp/runs", "--json")
    until(lambda: steps(outside) >= 3, "begun", process, 180)
    head.switch_off()
    said = ended(process)
    assert process.returncode == 1 and "Ray cluster 'ray://host1:10001' is gone" in said, said[-3000:]
    outside(*ONDOL, "resume", "last", "--cluster", "none", "--runs", "/tmp/runs", "--json", env=ENV, timeout_s=180)
    at = folder(outside)
    assert at is not None
    with ondol.open_run(str(at)) as run:
        assert trajectories(run) == want
    assert (at / "model/model.safetensors").read_bytes() == model


def learners(machines: list[hosts.Host], *program: str) -> list[subprocess.Popen[str]]:
    """One learner's processes, one a machine, as torchrun starts them."""
    how = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "host1:29500")
    torchrun = (sys.executable, "-m", "torch.distributed.run", *how)
    train = ("train", "/tmp/recipe.toml", "--runs", "/tmp/runs", "--json")
    return [started(m, *torchrun, *program, *train) for m in machines]


@pytest.mark.parametrize("fsdp", ["false", "true"])
def test_a_learner_of_two_machines(fsdp, tmp_path):
    """Its updates are those of one process."""
    settings = ("train.tokens_per_microbatch=40", f"train.fsdp={fsdp}")
    with ondol.run(RECIPE, *settings[:1], runs=tmp_path) as run:
        want, model = trajectories(run), load_file(run.path / "model/model.safetensors")
    with hosts.hosts(2, tmp_path) as machines:
        for m in machines:
            give(m, *settings)
        processes = learners(machines, "-m", "ondol")
        said = [ended(p) for p in processes]
        assert [p.returncode for p in processes] == [0, 0], said[0][-3000:] + said[1][-3000:]
        at = folder(machines[0])
        assert at is not None and folder(machines[1]) is None
        with ondol.open_run(str(at)) as run:
            found = trajectories(run)
        weights = load_file(at / "model/model.safetensors")
    assert [t["ids"] for t in found] == [t["ids"] for t in want]
    assert weights.keys() == model.keys()
    for name, value in model.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-6, atol=1e-9)


HASTY = """
from ondol.cli import main
from ondol.train.parallel import Processes
Processes.__init__.__defaults__ = (15.0,)  # ten minutes otherwise
raise SystemExit(main())
"""


def test_a_learner_whose_second_machine_is_cut_off(tmp_path):
    """The first does not wait for ever: the run ends with the reason, and goes on alone from its last checkpoint."""
    settings = ("train.tokens_per_microbatch=40", "train.steps=40", "train.checkpoint_every_steps=1")
    with hosts.hosts(2, tmp_path) as machines:
        first, second = machines
        for m in machines:
            give(m, *settings)
            (m.tmp / "hasty.py").write_text(HASTY)
        leader, _ = learners(machines, "/tmp/hasty.py")
        until(lambda: steps(first) >= 2, "begun", leader, 180)
        second.cut()
        said = ended(leader, 90)
        assert leader.returncode != 0 and "was lost" in said, said[-3000:]
        first(*ONDOL, "resume", "last", "--runs", "/tmp/runs", "--json", env=ENV, timeout_s=180)
        at = folder(first)
        assert at is not None
        with ondol.open_run(str(at)) as run:
            assert run.state == "finished" and [m.step for m in run.db.metrics("score/mean", "rl")] == [*range(1, 41)]
