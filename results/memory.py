"""Partial observability matters: recall with the memory action and without, in a context shorter than the episode.

    python results/memory.py                 # 3 seeds, two runs each; about 10 minutes on one core

The same model from scratch, recipe `tiny-recall`, learns from the same number of demonstrations and the same steps of RL. Without
the memory its demonstrations guess, for there is nothing else to do. Writes results/memory.json with every seed's scores, the
command, the commit and the machine; says whether the survey's rung holds (arXiv 2509.02547: solved, at least 0.90, with the memory
action; at most chance + 0.10 without).
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

import ondol

HERE = Path(__file__).parent
ARMS = {"memory": (), "without": ("env.tools=[]", "task.demonstrate=guess", "warm_start.gold_share=1.0")}
CHANCE = 0.1


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--first", type=int, default=0, help="the first seed; others that are in the file already are kept")
    p.add_argument("--runs", default="runs")
    args = p.parse_args()
    torch.set_num_threads(1)  # a model of this size has no work for a second one
    path = HERE / "memory.json"
    kept = json.loads(path.read_text())["seeds"] if args.first and path.exists() else []
    rows = [row for row in kept if row["seed"] < args.first]
    for seed in range(args.first, args.first + args.seeds):
        row: dict = {"seed": seed}
        for arm, overrides in ARMS.items():
            started = time.time()
            with ondol.run("tiny-recall", f"seed={seed}", f"task.seed={seed}", *overrides, runs=args.runs) as run:
                found = ondol.ladder(run)
                spans = [b - a for t in run.db.trajectories(phase="after/greedy") for a, b in t.contexts]
                episodes = [len(t.ids) for t in run.db.trajectories(phase="after/greedy")]
            row[arm] = {
                "ladder": found,
                "seconds": round(time.time() - started, 1),
                "longest_context_tokens": max(spans),
                "shortest_episode_tokens": min(episodes),
            }
            print(f"seed {seed}, {arm}: {found[-1]} in {row[arm]['seconds']} s", flush=True)
        rows.append(row)
        held = report(path, rows)
    sys.exit(0 if held else 1)


def report(path: Path, rows: list[dict]) -> bool:
    """Write what is known so far; whether all of it holds."""

    def last(arm: str, way: str) -> list[float]:
        return [row[arm]["ladder"][-1][way] for row in rows]

    means = {arm: {way: statistics.mean(last(arm, way)) for way in ("greedy", "sampled")} for arm in ARMS}
    claims = {
        "with the memory action: at least 0.90, greedy": means["memory"]["greedy"] >= 0.90,
        "without: at most chance + 0.10, greedy and sampled": max(means["without"].values()) <= CHANCE + 0.10,
        "the context is shorter than the episode": all(
            row["memory"]["longest_context_tokens"] < row["memory"]["shortest_episode_tokens"] for row in rows
        ),
    }
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout.strip()
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    out = {
        "command": "python results/memory.py",
        "commit": commit,
        "machine": machine,
        "chance": CHANCE,
        "mean": means,
        "claims": claims,
        "seeds": rows,
    }
    path.write_text(json.dumps(out, indent=1) + "\n")
    print(json.dumps({"mean": means, "claims": claims}, indent=1))
    return all(claims.values())


if __name__ == "__main__":
    main()
