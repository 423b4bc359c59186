"""Writes docs/recipe-reference.md from the settings themselves: python docs/make_reference.py"""

from __future__ import annotations

import re
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from ondol.parts import BUILT_IN, find
from ondol.recipe import Recipe


def show_type(t: Any) -> str:
    if typing.get_origin(t) is typing.Literal:
        return " \\| ".join(repr(a) for a in typing.get_args(t))
    if isinstance(t, types.UnionType) or typing.get_origin(t) is typing.Union:
        return " \\| ".join(show_type(a) for a in typing.get_args(t) if a is not type(None))
    if typing.get_origin(t) is tuple:
        return "list"
    return getattr(t, "__name__", str(t).removeprefix("typing."))


def rows(model: type[BaseModel], skip: tuple[str, ...] = ()) -> list[str]:
    out = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if name in skip:
            continue
        default = field.default if field.default is not PydanticUndefined else "required"
        if isinstance(default, BaseModel):
            default = "see below"
        shown = "-" if default is None else f"`{default}`" if default not in ("required", "see below") else default
        text = re.sub(r"\s+", " ", field.description or "").replace("|", "\\|")
        out.append(f"| `{name}` | {show_type(field.annotation)} | {shown} | {text} |")
    return out


def tables_of(model: type[BaseModel]) -> list[tuple[str, type[BaseModel]]]:
    found = []
    for name, field in model.model_fields.items():
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                found.append((name, candidate))
    return found


def page() -> str:
    lines = [
        "# Every key of a recipe",
        "",
        "Made from the settings themselves by `docs/make_reference.py`. `ondol check RECIPE` prints a recipe with all of them resolved.",
        "",
        "## Top level",
        "",
        *rows(Recipe),
    ]
    for name, model in tables_of(Recipe):
        lines += ["", f"## `[{name}]`", "", " ".join((model.__doc__ or "").split()), "", *rows(model)]
        for inner, inner_model in tables_of(model):
            lines += [
                "",
                f"### `{name}.{inner}`",
                "",
                " ".join((inner_model.__doc__ or "").split()),
                "",
                *rows(inner_model),
            ]
    for room, key in (
        ("tasks", "task"),
        ("envs", "env"),
        ("tools", "env.tools"),
        ("methods", "method"),
        ("verifiers", "verifier"),
    ):
        for name in sorted(BUILT_IN[room]):
            part = find(room, name)
            first = " ".join((part.__doc__ or "").split("\n\n")[0].split())
            lines += ["", f"## `{key}`: `{name}`", "", first, "", *rows(part)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("recipe-reference.md").write_text(page())
