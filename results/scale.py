"""Where the bottleneck lies with 1, 8, 64 and 512 rollout workers: service times measured here, the rest simulated.

    python results/scale.py            # about a minute; writes results/scale.json

Measured on this machine with the bundled model: a transaction of the ledger, writing and loading one version of the weights, a turn of an engine with 8 rows, a token of the learner.
Assumed, and said so: links between machines of 1.25 GB/s (10 Gbit), and for the second table a 7B model on GPUs.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from ondol.cluster.ledger import Ledger
from ondol.cluster.scale import Service, Setting, step
from ondol.engines.base import Sampling
from ondol.models.load import load_model
from ondol.models.save import load_weights, weights
from ondol.recipe import OptimizerSettings, load_recipe
from ondol.rollout.driver import rollout
from ondol.train.learner import Learner
from ondol.train.optimizer import Optimizer
from ondol.train.plans import Asked, make_engine, plan_of

LINK = 1.25e9


def measure() -> tuple[Service, dict[str, float]]:
    from safetensors.torch import save_file

    recipe = load_recipe("arithmetic", ["rollout.max_batch=8", "model.dtype=float32"])
    loaded = load_model(recipe.model.path, dtype="float32", device="cpu")
    engine = make_engine(recipe, loaded)
    plan = plan_of(recipe, Asked("rl", 1, 0, 2, 8, examples=False))
    plan.sampling = Sampling(temperature=1.0, max_tokens=recipe.sampling.max_tokens)
    rollout(engine, loaded.renderer, plan)  # warm
    started = time.perf_counter()
    groups = rollout(engine, loaded.renderer, plan)
    took = time.perf_counter() - started
    episodes = [t for g in groups for t in g.trajectories]
    turns = statistics.mean(len(t.turns) for t in episodes)
    turn_s = took / (len(episodes) / 8) / turns  # 8 at once
    learner = Learner(loaded.model, Optimizer(loaded.model, OptimizerSettings(learning_rate=1e-12)))
    learner.imitate(episodes)
    learned = learner.imitate(episodes)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "w.safetensors"
        started = time.perf_counter()
        save_file(weights(loaded.model), file)
        wrote = time.perf_counter() - started
        started = time.perf_counter()
        load_weights(loaded.model, file)
        loaded_in = time.perf_counter() - started
        ledger = Ledger(Path(folder) / "l.sqlite", "w", 60)
        ledger.add([(0, i) for i in range(400)])
        started = time.perf_counter()
        for _ in range(400):
            for claimed in ledger.claim(1):
                ledger.save(claimed.key, episodes[0])
                ledger.finish(claimed.key, episodes[0])
        ledger_s = (time.perf_counter() - started) / 1200
        ledger.close()
        size = file.stat().st_size
    service = Service(
        turn_s=turn_s,
        tool_s=0.001,
        ledger_s=ledger_s,
        weights_bytes=size,
        bytes_per_s=LINK,
        load_s=loaded_in,
        tokens_per_episode=learned["learner/tokens"] / len(episodes),  # prompts are shared,
        learner_tokens_per_s=learned["learner/tokens_per_s"],
        turns=max(1, round(turns)),
    )
    return service, {"weights_written_s": wrote, "turns": turns}


def assumed(here: Service) -> Service:
    """A 7B model in bfloat16, workers of one GPU, a tool that takes a second; only the ledger is measured."""
    return Service(
        turn_s=12.0, tool_s=1.0, ledger_s=here.ledger_s, weights_bytes=15e9, bytes_per_s=12.5e9, load_s=2.0,
        tokens_per_episode=3000, learner_tokens_per_s=20_000, turns=3,
    )  # fmt: skip


def table(service: Service, at_once: int, learners_per_workers: float) -> list[dict]:
    rows = []
    for workers in (1, 8, 64, 512):
        for learners in sorted({1, max(1, round(workers * learners_per_workers))}):
            for asynchronous in (False, True):
                found = step(service, setting := Setting(workers, at_once, 2 * at_once * 4, learners, asynchronous))
                rows.append(
                    {
                        **asdict(setting),
                        **{k: v if isinstance(v, str) else round(v, 4) for k, v in asdict(found).items()},
                    }
                )
                print(
                    f"{workers:4d} workers, {learners:3d} learners, {'async' if asynchronous else 'sync '}: step {found.seconds:8.1f} s "
                    f"(rollouts {found.rollouts_s:.1f}, weights {found.weights_s:.2f}, learner {found.learner_s:.1f}), ledger busy {found.ledger_share:.2f}, "
                    f"efficiency {found.efficiency:.2f}, bottleneck {found.bottleneck}"
                )
    return rows


def main() -> None:
    torch.manual_seed(0)
    here, more = measure()
    print(here, more)
    print("the bundled model on CPUs, measured; 10 Gbit links assumed")
    found = {
        "measured": asdict(here) | more,
        "cpu": table(here, 8, here.tokens_per_episode * 8 / (here.turn_s * here.turns) / here.learner_tokens_per_s),
    }
    gpu = assumed(here)
    print("a 7B model on GPUs, assumed but for the ledger")
    found |= {
        "assumed": asdict(gpu),
        "gpu": table(gpu, 64, gpu.tokens_per_episode * 64 / (gpu.turn_s * gpu.turns) / gpu.learner_tokens_per_s),
    }
    found |= {
        "command": "python results/scale.py",
        "machine": platform.processor() or platform.machine(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }
    (Path(__file__).parent / "scale.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
