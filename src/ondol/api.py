"""The library in a few calls; each command of the command line has its counterpart here."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ondol.evaluate import ladder
from ondol.recipe import Recipe, load_recipe
from ondol.store import Run

if TYPE_CHECKING:
    from ondol.benchmarks import Row
    from ondol.compare.comparison import Comparison

__all__ = ["capabilities", "comparison", "ladder", "load_recipe", "open_run", "reproduce", "run"]


def run(
    recipe: Recipe | str | Path | dict[str, Any], *overrides: str, runs: str | Path | None = None, reporter: Any = None
) -> Run:
    """Run a recipe; the finished run, open for reading.

    Args:
        recipe: a `Recipe`, a TOML file, the name of a built-in recipe, or a table.
        overrides: "a.b=value" settings.
        runs: folder of runs (default: $ONDOL_RUNS, else ./runs).
        reporter: an `ondol.train.report.Reporter` that hears of progress.
    Raises OndolError for anything a person can act on, KeyboardInterrupt when it was stopped by a signal (and saved).
    """
    from ondol.recipe import to_table
    from ondol.train.loop import Trainer
    from ondol.train.plans import load

    made = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    root = Path(runs or os.environ.get("ONDOL_RUNS") or "runs")
    loaded = load(made)
    with Run.create(root, made.name, to_table(made)) as opened:
        state = Trainer(made, opened, loaded, reporter=reporter).train()
    if state == "stopped":  # saved; `ondol resume` goes on
        raise KeyboardInterrupt(f"{opened.name} was stopped")
    return Run.open(opened.path)


def open_run(text: str | Path = "last", runs: str | Path | None = None) -> Run:
    """A run by folder, name, unique part of it, or "last"; for reading."""
    return Run.open(Run.find(Path(runs or os.environ.get("ONDOL_RUNS") or "runs"), str(text)))


def comparison(
    arms: Sequence[str],
    recipe: str | Path | dict[str, Any],
    *overrides: str,
    seeds: int = 3,
    folder: str | Path | None = None,
) -> Comparison:
    """Methods on the same work, one after the other; what was done before is found again.

    Args:
        arms: "[LABEL=]METHOD[:KEY=VALUE,...]", as `ondol compare` has them; the first is what others are compared to.
        seeds: 0 ... seeds-1 for every arm.
        folder: where runs are kept (default: compare/<recipe's name>).
    Returns it done: `.results()` has means, spreads and paired differences, `.curves(label)` the scores by step. Raises
    OndolError for anything a person can act on, KeyboardInterrupt when stopped (and saved).
    """
    from ondol.compare.arms import parse_arms
    from ondol.compare.comparison import Comparison
    from ondol.recipe import override, read_table

    table = copy.deepcopy(recipe) if isinstance(recipe, dict) else read_table(recipe)
    for text in overrides:
        override(table, text)
    made = parse_arms(arms, table)
    out = Comparison(made, range(seeds), Path(folder or Path("compare") / load_recipe(made[0].table).name))
    out.run()
    for error in out.failures.values():
        raise error
    return out


def capabilities(model: str | Path, problems: int = 16) -> list[Row]:
    """The capability matrix of a model (a path as recipes take it, or a run's `model` folder), greedy.

    A row has `benchmark`, and `result` (an `Evaluation`), or the `reason` why there is none.
    """
    from ondol.benchmarks import matrix
    from ondol.models.load import load_model
    from ondol.train.plans import make_engine

    loaded = load_model(str(model))
    recipe = load_recipe({"model": {"path": str(model)}, "task": "two-addends"})
    return list(matrix(make_engine(recipe, loaded), loaded.renderer, problems))


def reproduce(paper: str, *overrides: str, seeds: int = 3, folder: str | Path = "compare/papers") -> dict[str, Any]:
    """What a paper claims, run at laptop scale: the result as `ondol reproduce` writes it, claims included.

    `paper` is an arXiv number. Raises OndolError for anything a person can act on, KeyboardInterrupt when stopped (saved).
    """
    from ondol.papers.base import find
    from ondol.papers.results import Reproduction, runnable

    work = Reproduction(runnable(find(paper)), seeds, Path(folder), overrides)
    work.run()
    return work.result(f"ondol.reproduce({paper!r}, {', '.join([*map(repr, overrides), f'seeds={seeds}'])})")
