"""`ondol show`: what a run did."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ondol.cli._common import print_json, runs_root
from ondol.errors import OndolError, nearest
from ondol.evaluate import ladder
from ondol.store import Run
from ondol.view.console import before_after_table, table
from ondol.view.trajectory import render_trajectory

_COLUMNS = (
    "score/mean",
    "policy/entropy",
    "gradient/norm",
    "policy/clip_share",
    "groups/zero_advantage_share",
    "mismatch/max_abs",
)


def run(args: Namespace) -> int:
    with Run.open(Run.find(runs_root(args), args.run)) as opened:
        phases = dict.fromkeys(r.phase for r in opened.db.trajectory_rows())
        if args.phase is not None and args.phase not in phases:
            raise OndolError(f"{opened.name} has no trajectories of phase '{args.phase}'", nearest(args.phase, phases))
        wanted = opened.db.trajectories(
            phase=args.phase, step=args.step, score_max=0.999 if args.wrong else None, limit=args.trajectories or 0
        )
        plot = None
        if args.plot:
            from ondol.view.plots import plot_run

            plot = plot_run(opened, Path(args.plot))
        if args.json:
            print_json(
                {
                    "run": str(opened.path),
                    "state": opened.state,
                    "ladder": ladder(opened),
                    "metrics": [m._asdict() for m in opened.db.metrics()],
                    "trajectories": [t.to_dict() for t in wanted],
                    "plot": str(plot) if plot else None,
                }
            )
            return 0
        console = Console()
        console.print(Text(f"{opened.name}: {opened.state}", style="bold"))
        if rows := ladder(opened):
            console.print(before_after_table(rows))
        by_step: dict[int, dict[str, float]] = {}
        for m in opened.db.metrics(phase="rl"):
            by_step.setdefault(m.step, {})[m.name] = m.value
        if by_step:
            console.print()
            columns = [c for c in _COLUMNS if any(c in v for v in by_step.values())]
            console.print(table([{"step": s, **v} for s, v in by_step.items()], ["step", *columns]))
        for t in wanted:
            console.print()
            console.print(render_trajectory(t))
        if plot:
            console.print(Text(f"curves: {plot}"))
        return 0
