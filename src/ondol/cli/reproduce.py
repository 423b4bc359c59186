"""`ondol reproduce`: run what a paper claims, and say what held."""

from __future__ import annotations

import shlex
from argparse import Namespace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ondol.cli._common import print_json
from ondol.cli.compare import make
from ondol.cli.papers import detail
from ondol.errors import OndolError
from ondol.papers.base import find
from ondol.papers.results import Reproduction, check_scale, claims_of, default_folder, overview, read, runnable, write
from ondol.view.comparison import plot_comparison


def run(args: Namespace) -> int:
    entry = find(args.paper)
    scale = check_scale(args.scale)
    for option in ("seeds", "jobs"):
        if getattr(args, option) < 1:
            raise OndolError(f"--{option} {getattr(args, option)}: at least 1 is needed", f"for example --{option} 3")
    paper = runnable(entry)
    console = Console(stderr=args.json, highlight=False)
    if scale != "laptop":
        what = paper.scales.get(scale, "nothing is laid out yet")
        if args.json:
            print_json({"id": entry.id, "scale": scale, "state": "not run", "would_run": what})
        else:
            console.print(Text(f"{entry.id}, {scale}: {what}", "bold"))
            console.print("not run here: only the laptop scale is")
        return 0
    folder = Path(args.folder) if args.folder else Path("compare") / "papers"
    only = [*args.only, *(arm.label for arm in paper.long_arms() if args.long)]
    if args.long and not paper.long_arms():
        raise OndolError(f"{entry.id} has nothing that takes hours", "run it without --long")
    work = Reproduction(paper, args.seeds, folder, args.set, only)
    command = _command(args, entry.id)
    console.print(Text(f"{entry.id}  {entry.title}: {paper.scales['laptop']}", "bold"))
    ended = make(
        lambda watch: work.run(args.jobs, watch, lambda line: console.print(Text(line, "dim"))), console, command
    )
    if not ended:
        return 130
    results = Path(args.results) if args.results else default_folder()
    result = work.added(work.result(command), read(entry, Path(args.results) if args.results else None))
    path = write(result, results)
    comparison = work.comparison
    curves = {arm.label: comparison.curves(arm.label) for arm in comparison.arms}
    plot = plot_comparison(
        curves, comparison.results(paper.measure), folder / f"{entry.id}.png", f"{entry.id}  {entry.title}"
    )
    if args.json:
        print_json(
            {**overview(entry, results), "claims": claims_of(paper, result), "result": str(path), "plot": str(plot)}
        )
        return 0
    console.print()
    console.print(detail(entry, result))
    console.print(Text(f"numbers  {path}"))
    console.print(Text(f"curves   {plot}"))
    return 0


def _command(args: Namespace, paper: str) -> str:
    """What gives this result again, wherever it was run."""
    words = ["ondol", "reproduce", paper, "--scale", args.scale, "--seeds", str(args.seeds)]
    for text in args.set:
        words += ["--set", text]
    for name in args.only:
        words += ["--only", name]
    words += ["--long"] if args.long else []
    return shlex.join(words + (["--jobs", str(args.jobs)] if args.jobs != 1 else []))
