"""`ondol show`: what a run did."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ondol.cli._common import print_json, runs_root, told
from ondol.errors import OndolError, nearest
from ondol.evaluate import ladder
from ondol.store import Run, metric
from ondol.view.console import before_after_table, number, table
from ondol.view.trajectory import render_trajectory

#: metrics of the table of steps, and short names for a narrow terminal
_COLUMNS = {
    "score/mean": "score",
    "policy/entropy": "entropy",
    "gradient/norm": "gradient",
    "policy/clip_share": "clipped",
    "groups/zero_advantage_share": "no signal",
    "mismatch/max_abs": "mismatch",
    "step/seconds": "seconds",
}


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
                    "tools": opened.facts().get("tools", {}),
                    "ladder": ladder(opened),
                    "metrics": [m._asdict() for m in opened.db.metrics()],
                    "trajectories": [t.to_dict() for t in wanted],
                    "plot": str(plot) if plot else None,
                }
            )
            return 0
        console = Console()
        console.print(Text(f"{opened.name}: {opened.state}", style="bold"))
        for line in told(opened.facts().get("tools", {})):
            console.print(Text(line, style="dim"))
        if rows := ladder(opened):
            console.print(before_after_table(rows))
        by_step: dict[int, dict[str, float]] = {}
        for m in opened.db.metrics(phase="rl"):
            by_step.setdefault(m.step, {})[m.name] = m.value
        if by_step:
            console.print()
            found = [m for m in _COLUMNS if any(m in v for v in by_step.values())]
            rows = [[str(step), *(_short(m, v.get(m)) for m in found)] for step, v in by_step.items()]
            console.print(table(rows, ["step", *(_COLUMNS[m] for m in found)]))
        for t in wanted:
            console.print()
            console.print(render_trajectory(t, images=opened.db.images))
        if plot:
            console.print(Text(f"curves: {plot}"))
        return 0


def _short(name: str, value: float | None) -> str:
    return "-" if value is None else number(value, "share" if metric(name).unit == "share" else "")
