"""The ladder of the arithmetic recipe over several seeds: before, after the warm start, after RL.

    python results/ladder.py                 # 3 seeds, about 6 minutes each on 2 cores
    python results/ladder.py --recipe letter-counting

A seed changes everything that is drawn: the problems, the order, every token. Writes results/<recipe>-ladder.json with every seed's
scores, their mean and spread, the command, the commit and the machine. Seeds are 0, 1, 2 ...: none is left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import ondol
from ondol.evaluate import RUNGS
from ondol.train.report import Reporter

HERE = Path(__file__).parent
CLAIMS = {
    "before, it cannot: sampled score at most 0.05": lambda m: m["before"]["sampled"] <= 0.05,
    "RL itself adds at least 0.20 to the sampled score": lambda m: (
        m["after RL"]["sampled"] - m["after warm start"]["sampled"] >= 0.20
    ),
}
ARITHMETIC = {
    "after RL, greedy at least 0.90": lambda m: m["after RL"]["greedy"] >= 0.90,
    "after RL, sampled at least 0.90": lambda m: m["after RL"]["sampled"] >= 0.90,
}


class Stamps(Reporter):
    """When each stage began, seconds since the start."""

    def __init__(self) -> None:
        self.start, self.began = time.time(), {}

    def stage(self, name: str, total: int) -> None:
        self.began[name] = round(time.time() - self.start, 1)
        print(f"  {self.began[name]:6.0f} s  {name}", flush=True)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--recipe", default="arithmetic")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--problems", type=int, default=64)
    p.add_argument("--runs", default="runs")
    args = p.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout.strip()
    rows = []
    for seed in range(args.seeds):
        print(f"{args.recipe}, seed {seed}", flush=True)
        watch = Stamps()
        overrides = (f"seed={seed}", f"task.seed={seed}", f"evaluate.problems={args.problems}")
        run = ondol.run(args.recipe, *overrides, runs=args.runs, reporter=watch)
        with run:
            steps = [
                {name: m.value for m in run.db.metrics(phase="rl") if m.step == step for name in [m.name]}
                for step in sorted({m.step for m in run.db.metrics(phase="rl")})
            ]
            rows.append(
                {
                    "seed": seed,
                    "ladder": ondol.ladder(run),
                    "began_s": watch.began,
                    "seconds": round(time.time() - watch.start, 1),
                    "warm_start": {m.name: m.value for m in run.db.metrics("warm_start/*")},
                    "score_by_step": [s["score/mean"] for s in steps],
                    "mismatch_max_abs": max((s.get("mismatch/max_abs", 0.0) for s in steps), default=None),
                }
            )
        print(f"  {rows[-1]['ladder']}", flush=True)
    claims = CLAIMS | (ARITHMETIC if args.recipe == "arithmetic" else {})
    mean, spread = {}, {}
    for rung in RUNGS.values():
        found = [r for row in rows for r in row["ladder"] if r["rung"] == rung]
        for way in ("no_tool", "greedy", "sampled"):
            values = [r[way] for r in found if r[way] is not None]
            if values:
                mean.setdefault(rung, {})[way] = round(statistics.mean(values), 4)
                spread.setdefault(rung, {})[way] = round(statistics.stdev(values), 4) if len(values) > 1 else None
    out = {
        "recipe": args.recipe,
        "command": "python results/" + " ".join([Path(__file__).name, *sys.argv[1:]]),
        "commit": commit,
        "machine": {
            "cpu": processor(),
            "cores": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "seeds": args.seeds,
        "problems": args.problems,
        "mean": mean,
        "standard_deviation": spread,
        "claims": {text: "held" if check(mean) else "not held" for text, check in claims.items()},
        "runs": rows,
    }
    path = HERE / f"{args.recipe}-ladder.json"
    path.write_text(json.dumps(out, indent=1) + "\n")
    print(json.dumps({k: out[k] for k in ("mean", "standard_deviation", "claims")}, indent=1))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
