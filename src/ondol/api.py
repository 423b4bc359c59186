"""The library in a few calls; each command of the command line has its counterpart here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ondol.evaluate import ladder
from ondol.recipe import Recipe, load_recipe
from ondol.store import Run

__all__ = ["ladder", "load_recipe", "open_run", "run"]


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
    from ondol.models.load import load_model
    from ondol.recipe import to_table
    from ondol.train.loop import Trainer

    made = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    m = made.model
    root = Path(runs or os.environ.get("ONDOL_RUNS") or "runs")
    loaded = load_model(m.path, dtype=m.dtype, device=m.device, chat=m.chat, lora=m.lora, fused=m.fused)
    with Run.create(root, made.name, to_table(made)) as opened:
        state = Trainer(made, opened, loaded, reporter=reporter).train()
    if state == "stopped":  # saved; `ondol resume` goes on
        raise KeyboardInterrupt(f"{opened.name} was stopped")
    return Run.open(opened.path)


def open_run(text: str | Path = "last", runs: str | Path | None = None) -> Run:
    """A run by folder, name, unique part of it, or "last"; for reading."""
    return Run.open(Run.find(Path(runs or os.environ.get("ONDOL_RUNS") or "runs"), str(text)))
