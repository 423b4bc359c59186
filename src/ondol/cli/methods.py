"""`ondol methods`: the survey's table, from the registry."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ondol.cli._common import print_json
from ondol.errors import OndolError
from ondol.methods.base import Method
from ondol.methods.documented import DOCUMENTED
from ondol.parts import BUILT_IN, find, names

COLUMNS = ("name", "family", "objective", "clip", "kl", "mechanism", "signal", "state", "source")
_FEW = ("name", "family", "clip", "kl", "mechanism", "state")
_WIDE = 150  # columns of a terminal that has room for all
_FAMILIES = ("REINFORCE", "PPO", "GRPO", "DPO")


def run(args: Namespace) -> int:
    rows = table_of_methods()
    if args.json:
        print_json(rows)
        return 0
    console = Console()
    out = Table(header_style="bold", box=None, pad_edge=False)
    columns = COLUMNS if console.width >= _WIDE else _FEW
    for column in columns:
        out.add_column(column, overflow="fold", no_wrap=column in ("name", "family", "state"))
    for row in rows:
        dim = "" if row["state"] == "implemented" else "dim"
        out.add_row(*(Text(_cell(row[c]), style=dim) for c in columns))
    console.print(out)
    done = sum(r["state"] == "implemented" for r in rows)
    console.print(Text(f"{done} implemented, {len(rows) - done} not; settings of one: docs/recipe-reference.md", "dim"))
    if columns is _FEW:
        console.print(Text("objective, signal and source: in a wider terminal, or with --json", "dim"))
    return 0


def table_of_methods() -> list[dict[str, Any]]:
    """Every method that a recipe can name, then those that are only documented; by family."""
    rows = [_row(name) for name in names("methods")]
    known = {r["name"] for r in rows}
    rows += [{**row._asdict(), "state": "documented"} for name, row in DOCUMENTED.items() if name not in known]
    ordered = [{c: row[c] for c in COLUMNS} for row in rows]
    return sorted(ordered, key=lambda r: (r["state"] != "implemented", _place(r["family"]), r["name"]))


def _row(name: str) -> dict[str, Any]:
    try:
        cls = find("methods", name)
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise OndolError(f"it is no {Method.__module__}.{Method.__name__}")
        columns = {c: getattr(cls, c) for c in COLUMNS if c not in ("name", "state")}
    except (OndolError, AttributeError) as e:
        if name in BUILT_IN["methods"]:
            raise
        # an installed package's: its fault must not hide the others
        empty: dict[str, Any] = dict.fromkeys(COLUMNS)
        what = e.what if isinstance(e, OndolError) else str(e)
        return empty | {"name": name, "family": "-", "mechanism": what, "state": "broken"}
    return {"name": name, **columns, "state": "implemented"}


def _place(family: str) -> tuple[int, str]:
    return (_FAMILIES.index(family) if family in _FAMILIES else len(_FAMILIES), family)


def _cell(value: Any) -> str:
    return "-" if value is None else {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
