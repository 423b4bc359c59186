"""`ondol compare`: methods beside each other on the same work."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ondol.cli._common import print_json
from ondol.compare.arms import parse_arms
from ondol.compare.comparison import Comparison, Watch
from ondol.compare.jobs import Job
from ondol.errors import OndolError
from ondol.recipe import load_recipe, override, read_table
from ondol.view.comparison import arms_table, differences_table, plot_comparison
from ondol.view.console import Progress, duration


class Shown(Watch):
    """Progress as a person watches it, in percent of the work that is left."""

    def __init__(self, console: Console) -> None:
        self.console, self.progress = console, Progress(console=console)
        self._at, self._ended, self._left = 0.0, 0, 0

    def __enter__(self) -> Shown:
        self.progress.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.__exit__(*error)

    def begin(self, left: int, cached: int) -> None:
        self._left = left
        if cached:
            self.progress.note(f"{cached} finished run{'s' if cached != 1 else ''} found")
        if left:
            self.progress.note(f"{left} run{'s' if left != 1 else ''} to make")
            self.progress.phase("percent", 100)

    def advance(self, done: float, total: float, values: dict[str, float]) -> None:
        at = 100 * done / total if total else 100.0
        shown = {k: v for k, v in values.items() if k == "score/mean"}
        self.progress.advance(max(at - self._at, 0.0), **shown)
        self._at = max(at, self._at)

    def ended(self, job: Job, error: OndolError | None, seconds: float) -> None:
        self._ended += 1
        state = f"failed: {error.what}" if error else "done"
        self.progress.note(f"[{self._ended}/{self._left}] {job.folder.name}: {state} ({duration(seconds)})")


def run(args: Namespace) -> int:
    console = Console(stderr=args.json, highlight=False)
    if args.seeds < 1:
        raise OndolError(f"--seeds {args.seeds}: at least 1 is needed", "3 or more give an interval worth the name")
    if args.jobs < 1:
        raise OndolError(f"--jobs {args.jobs}: at least 1 is needed", "one for each core that is free, at most")
    base = read_table(args.recipe)
    for text in args.set:
        override(base, text)
    arms = parse_arms(args.arms, base)
    name = load_recipe(arms[0].table).name
    folder = Path(args.folder) if args.folder else Path("compare") / name
    comparison = Comparison(arms, range(args.seeds), folder)
    stopped = not make(
        lambda watch: comparison.run(args.jobs, watch), console, f"ondol compare {' '.join(args.arms)} ..."
    )
    results = comparison.results()
    if not any(arm["runs"] for arm in results["arms"].values()):
        if comparison.failures:
            raise next(iter(comparison.failures.values()))
        return 130
    out = draw(comparison, results, f"{name}, {args.seeds} seed{'s' if args.seeds != 1 else ''}")
    if args.json:
        print_json(out)
    else:
        tell(out, console)
    for error in dict.fromkeys(str(e) for e in comparison.failures.values()):
        console.print(Text(f"failed: {error}", "red"))
    return 130 if stopped else 1 if comparison.failures else 0


def make(work: Callable[[Watch], None], console: Console, again: str) -> bool:
    """Do what is left, with progress; False when it was stopped (and saved)."""
    try:
        with Shown(console) as watch:
            work(watch)
    except KeyboardInterrupt:
        console.print(Text(f"stopped and saved; the same command goes on: {again}"))
        return False
    return True


def draw(comparison: Comparison, results: dict[str, Any], title: str) -> dict[str, Any]:
    """Write results.json and curves.png beside the runs; the results with their places."""
    from ondol.store.environment import environment

    curves = {arm.label: comparison.curves(arm.label) for arm in comparison.arms}
    plot = plot_comparison(curves, results, comparison.folder / "curves.png", title)
    facts = environment()
    out = {
        "folder": str(comparison.folder),
        "plot": str(plot),
        "command": facts["command"],
        "git": facts["git"],
        **results,
    }
    path = comparison.folder / "results.json"
    part = path.with_name("results.json.part")
    part.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
    return out


def tell(out: dict[str, Any], console: Console) -> None:
    """Tables, and where everything is."""
    console.print()
    console.print(arms_table(out))
    if (table := differences_table(out)) is not None:
        console.print()
        console.print(table)
    seeds = len(out["seeds"])
    console.print(
        Text(
            "means ± standard deviation over seeds, on held-out problems; "
            + (
                "paired differences with Student's 95 % interval"
                if seeds > 1
                else "one seed has no spread: try --seeds 3"
            ),
            "dim",
        )
    )
    console.print()
    console.print(Text(f"curves   {out['plot']}"))
    console.print(Text(f"numbers  {out['folder']}/results.json"))
