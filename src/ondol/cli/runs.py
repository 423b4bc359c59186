"""`ondol runs`: the list."""

from __future__ import annotations

import time
from argparse import Namespace

from rich.console import Console

from ondol.cli._common import print_json, runs_root
from ondol.store import Run
from ondol.view.console import table


def run(args: Namespace) -> int:
    found = Run.list(runs_root(args))
    if args.json:
        print_json(
            [
                {
                    "name": r.name,
                    "path": str(r.path),
                    "created": r.created,
                    "state": r.state,
                    "steps": r.steps,
                    "last": r.last,
                }
                for r in found
            ]
        )
        return 0
    if not found:
        print(f"no runs in {runs_root(args)}; start one with: ondol train arithmetic")
        return 0
    rows = [
        (
            r.name,
            time.strftime("%Y-%m-%d %H:%M", time.localtime(r.created)),
            r.state,
            r.steps.get("rl", 0),
            r.last.get("eval/score_greedy"),
            r.last.get("eval/score_sampled"),
        )
        for r in found
    ]
    Console().print(table(rows, ["run", "made", "state", "steps", "greedy", "sampled"]))
    return 0
