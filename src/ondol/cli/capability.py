"""`ondol evaluate --by capability`: a model on one environment for each capability."""

from __future__ import annotations

from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ondol.benchmarks import BENCHMARKS, Row, matrix
from ondol.cli._common import find_model, print_json
from ondol.errors import OndolError
from ondol.recipe import Recipe, load_recipe
from ondol.records import StopReason
from ondol.view.console import Progress, number, table

PROBLEMS = 16


def run(args: Namespace) -> int:
    from ondol.cli.evaluate import open_model

    if args.samples is not None:
        raise OndolError("--samples: the capability matrix is greedy, a sample a problem", "leave --samples out")
    recipe, path, folder = _model(args)
    console = Console(stderr=args.json, highlight=False)
    problems, rows = args.problems or PROBLEMS, []
    with ExitStack() as stack:
        engine, renderer, name = open_model(args, recipe, path, folder, console, stack)
        console.print(Text(f"evaluating {name}", "bold"))
        complete = _measure(recipe, engine, renderer, problems, rows, console)
    if args.json:
        print_json({"model": name, "complete": complete, "capabilities": [_plain(r) for r in rows]})
        return 0 if complete else 130
    console.print()
    columns = ["capability", "environment", "score", "±", "chance", "needs", "available"]
    console.print(table([_shown(r) for r in rows], columns))
    for row in rows:
        if row.reason is not None:
            console.print(Text(f"{row.benchmark.capability}: {row.reason}", "yellow"))
        elif row.result is not None and (error := _error(row)):
            console.print(
                Text(f"{row.benchmark.capability}: episodes failed and count as 0; the first: {error}", "yellow")
            )
    if not complete:
        console.print(Text("stopped: the capabilities that are missing were not measured"))
    return 0 if complete else 130


def _model(args: Namespace) -> tuple[Recipe, str, Path | None]:
    """What `args.run` means: a run, a recipe, or a model's own path."""
    from ondol.models.bundled import NAME

    try:
        return find_model(args, trained=args.endpoint is None)
    except OndolError:
        word = args.run
        hub = "/" in word and not word.endswith(".toml") and not Path(word).exists() and word.count("/") == 1
        if not (word == NAME or word.startswith("tiny") or (Path(word) / "config.json").is_file() or hub):
            raise
    table: dict[str, Any] = {"name": "capability", "model": {"path": word}, "task": "two-addends"}
    return load_recipe(table, args.set), word, None


def _measure(recipe: Recipe, engine: Any, renderer: Any, problems: int, rows: list[Row], console: Console) -> bool:
    """Fill `rows`. False when stopped by Ctrl-C."""
    from ondol.train.interrupt import Interrupt, Interrupted

    weights = {b.capability: float(b.env.get("max_turns", 8)) for b in BENCHMARKS if b.available() is None}
    with Interrupt() as interrupt, Progress(weights=weights, console=console) as progress:
        try:
            for row in matrix(
                engine,
                renderer,
                problems,
                seed=recipe.seed,
                timeout_s=recipe.rollout.timeout_s,
                begin=lambda b: progress.phase(b.capability, problems),
                progress=lambda t: progress.advance(1),
                stop=interrupt.check,
            ):
                rows.append(row)
        except Interrupted:
            return False
    return True


def _error(row: Row) -> str:
    assert row.result is not None
    failed = [t for t in row.result.trajectories if t.stop_reason is StopReason.ERROR]
    return str(failed[0].info.get("error", "unknown")) if failed else ""


def _shown(row: Row) -> list[Any]:
    b, r = row.benchmark, row.result
    score, error = (number(r.score, "share"), number(r.error, "share")) if r is not None else (None, None)
    return [
        b.capability,
        b.environment,
        score,
        error,
        number(b.chance, "share"),
        b.needs,
        "no" if row.reason else "yes",
    ]


def _plain(row: Row) -> dict[str, Any]:
    b, r = row.benchmark, row.result
    out: dict[str, Any] = {
        "capability": b.capability,
        "environment": b.environment,
        "needs": b.needs,
        "chance": b.chance,
        "available": row.reason is None,
        "reason": row.reason,
    }
    if r is not None:
        statistics = r.statistics
        out |= {
            "score": r.score,
            "standard_error": r.error,
            "problems": r.problems,
            "turns": statistics["rollout/turns"],
            "calls_per_trajectory": statistics["tools/calls_per_trajectory"],
            "stop": {k.removeprefix("stop/"): v for k, v in statistics.items() if k.startswith("stop/") and v},
        }
    return out
