"""An agent written with the plain openai client gets better by being trained through its base URL: python results/agent.py

The agent is results/plain_agent.py; the model, the task and the warm start are those of the recipe tiny-addends, RL has its 350 steps. Writes results/agent.json with
every seed's scores on held-out problems, the command, the commit and the machine. It must gain at least 0.15 (card of arXiv 2508.20404: +15 points over
the SFT start).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # the agent is a file beside this one

import ondol  # noqa: E402
from ondol.recipe import read_table  # noqa: E402

STEPS, SAMPLES = 350, "evaluate.samples=16"


def ladder(seed: int, runs: str) -> list[dict]:
    """Before RL and after it: imitation first, without any agent; then RL on the agent's own requests."""
    seeds = (f"seed={seed}", f"task.seed={seed}", SAMPLES)
    with ondol.run("tiny-addends", *seeds, "train.steps=0", "warm_start.epochs=7", runs=runs) as start:
        model = start.path / "model"
    table = read_table("tiny-addends")
    del table["warm_start"]
    table["model"] = {"path": str(model)}
    table["env"] = {"name": "program", "function": "plain_agent:solve", "max_turns": 1}
    with ondol.run(table, *seeds, f"train.steps={STEPS}", runs=runs) as run:
        return ondol.ladder(run)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--runs", default="runs")
    args = p.parse_args()
    torch.set_num_threads(1)  # a model of this size has no work for a second one
    rows = []
    for seed in range(args.seeds):
        started = time.time()
        found = ladder(seed, args.runs)
        rows.append({"seed": seed, "ladder": found, "seconds": round(time.time() - started, 1)})
        print(f"seed {seed}: {found[0]} -> {found[-1]}", flush=True)
        gains = [row["ladder"][-1]["sampled"] - row["ladder"][0]["sampled"] for row in rows]
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout.strip()
        out = {
            "command": "python results/agent.py",
            "commit": commit,
            "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__},
            "mean_gain_sampled": statistics.mean(gains),
            "held": statistics.mean(gains) >= 0.15,
            "seeds": rows,
        }
        (HERE / "agent.json").write_text(json.dumps(out, indent=1) + "\n")
    print(json.dumps({k: out[k] for k in ("mean_gain_sampled", "held")}))
    sys.exit(0 if out["held"] else 1)


if __name__ == "__main__":
    main()
