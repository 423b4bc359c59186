"""What several commands share: where runs are, which model a word means, how JSON leaves."""

from __future__ import annotations

import json
import math
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ondol.errors import OndolError
from ondol.recipe import Recipe, load_recipe
from ondol.store import Run

if TYPE_CHECKING:
    from ondol.models.load import LoadedModel


def runs_root(args: Namespace) -> Path:
    return Path(args.runs or os.environ.get("ONDOL_RUNS") or "runs")


def print_json(value: Any) -> None:
    """One document; numbers that JSON does not have become null."""

    def plain(v: Any) -> Any:
        if isinstance(v, float) and not math.isfinite(v):
            return None
        if isinstance(v, dict):
            return {str(k): plain(x) for k, x in v.items()}
        return [plain(x) for x in v] if isinstance(v, (list, tuple)) else v

    print(json.dumps(plain(value), indent=2, default=str))


def told(tools: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each tool of which something is known: the sandbox that its calls run behind."""
    return [f"The tool '{name}': " + ", ".join(f"{k} {v}" for k, v in known.items()) for name, known in tools.items()]


def find_model(args: Namespace, trained: bool = True) -> tuple[Recipe, str, Path | None]:
    """What `args.run` means: (recipe, model path to load, run folder or None for a bare recipe).

    A run must hold a trained model, unless `trained` is off (its recipe is all that is wanted).
    """
    word, overrides = args.run, getattr(args, "set", [])
    try:
        folder = Run.find(runs_root(args), word)
    except OndolError as not_a_run:
        try:
            recipe = load_recipe(word, overrides)
        except OndolError as not_a_recipe:
            if word.endswith(".toml") or "there is no recipe" not in not_a_recipe.what:
                raise not_a_recipe from None
            raise not_a_run from None
        return recipe, recipe.model.path, None
    with Run.open(folder) as run:
        table = run.recipe
    from ondol.recipe import override

    for text in overrides:
        override(table, text)
    recipe = load_recipe(table)
    if trained and not (folder / "model").is_dir():
        raise OndolError(f"{folder.name} has no trained model yet", f"finish it first: ondol resume {folder.name}")
    return recipe, str(folder / "model"), folder


def load(recipe: Recipe, path: str, say: Any = None) -> LoadedModel:
    """The model at `path`, with the recipe's settings (adapters are merged in saved models)."""
    from ondol.models.load import load_model

    m = recipe.model
    lora = m.lora if path == m.path else None
    return load_model(path, dtype=m.dtype, device=m.device, chat=m.chat, lora=lora, fused=m.fused, progress=say)
