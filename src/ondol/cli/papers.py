"""`ondol papers`: the map of papers, and what was seen of their claims."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ondol.cli._common import print_json
from ondol.papers.base import STATES, Entry, catalogue, find
from ondol.papers.results import claims_of, overview, read, state_of

_STYLE = {"held": "green", "not held": "red", "not run": "yellow", "planned": "dim"}
_MARK = {True: "held", False: "not held", None: "not run"}


def run(args: Namespace) -> int:
    folder = Path(args.results) if args.results else None
    entries = [find(args.paper)] if args.paper else list(catalogue().values())
    if args.json:
        print_json([overview(e, folder) for e in entries])
        return 0
    console = Console(highlight=False)
    if args.paper:
        console.print(detail(entries[0], read(entries[0], folder)))
        return 0
    rows = [overview(e, folder) for e in entries]
    rows.sort(key=lambda r: (STATES.index(r["state"]), r["id"]))
    out = Table(header_style="bold", box=None, pad_edge=False)
    for column in ("paper", "state", "claims", "what it is"):
        out.add_column(column, no_wrap=column in ("paper", "state"), overflow="fold")
    for row in rows:
        held = sum(c["held"] is True for c in row["claims"])
        claims = f"{held}/{len(row['claims'])}" if row["claims"] else ""
        what = Text(row["title"]).append(f" ({row['family']}): {row['adds']}", "dim")
        out.add_row(row["id"], Text(row["state"], _STYLE[row["state"]]), claims, what)
    console.print(out)
    count = Counter(row["state"] for row in rows)
    console.print(Text(", ".join(f"{count[s]} {s}" for s in STATES if count[s]), "bold"))
    console.print(Text("one in full: ondol papers 2509.02333    run it: ondol reproduce 2509.02333", "dim"))
    return 0


def detail(entry: Entry, result: dict[str, Any] | None) -> RenderableType:
    """One paper in full: claims, numbers, and how they came about."""
    claims = claims_of(entry.paper, result) if entry.paper else []
    state = state_of(entry, claims)
    lines: list[RenderableType] = [
        Text(f"{entry.id}  {entry.title}", "bold"),
        Text(f"{entry.family}: {entry.adds}"),
        Text(f"https://arxiv.org/abs/{entry.id}", "dim"),
        Text(state, _STYLE[state]),
    ]
    for claim in claims:
        word = _MARK[claim["held"]]
        grid = Table.grid(padding=(0, 2))
        for name, value in (
            ("paper", claim["paper"]),
            ("how", claim["how"]),
            ("must", claim["must"]),
            ("measured", claim["measured"] or "-"),
        ):
            grid.add_row(Text(name, "dim"), Text(value))
        title = Text(f"{word}: ", _STYLE[word]).append(claim["text"], "default")
        lines += [Text(), title, Padding(grid, (0, 0, 0, 2))]
    if result is not None:
        lines += [Text(), _arms(result), Text(), *_provenance(result)]
    elif entry.paper is not None:
        lines += [Text(), Text(f"not run: ondol reproduce {entry.id} --scale laptop --seeds 3")]
    if entry.paper is not None:
        scales = Table.grid(padding=(0, 2))
        for scale, what in entry.paper.scales.items():
            scales.add_row(Text(scale, "dim"), Text(what))
        lines += [Text(), scales]
    return Group(*lines)


def _arms(result: dict[str, Any]) -> Table:
    """Mean and spread of the numbers that most arms have."""
    arms = result["arms"]
    names = Counter(n for arm in arms.values() for n in arm["mean"])
    few = ("score_sampled", "distinct_right", "utilisation_last_quarter", "clipped", "score_last_quarter")
    passes = sorted((n for n in names if n.startswith("pass@")), key=lambda n: int(n.removeprefix("pass@")))[-1:]
    columns = [n for n in (*few[:1], *passes, *few[1:]) if n in names]
    out = Table(header_style="bold", box=None, pad_edge=False)
    out.add_column("arm", overflow="fold")
    for title in ("seeds", "start", *columns):
        out.add_column(title.replace("_", " "), justify="right")
    for label, arm in arms.items():
        if not any(c in arm["mean"] for c in columns):
            shown = ", ".join(f"{n} {v:.3g}" for n, v in arm["mean"].items() if v is not None)
            out.add_row(Text(label), str(len(arm["runs"])), "", Text(shown))
            continue
        start = _number(arm, "start/score_sampled")
        out.add_row(Text(label), str(len(arm["runs"])), start, *(_number(arm, c) for c in columns))
    return out


def _number(arm: dict[str, Any], name: str) -> Text:
    mean, spread = arm["mean"].get(name), arm["spread"].get(name)
    if mean is None:
        return Text("-", "dim")
    return Text(f"{mean:.3f}" + ("" if spread is None else f" ± {spread:.3f}"))


def _provenance(result: dict[str, Any]) -> list[Text]:
    """Each command that arms come of, with where it ran."""
    commands: dict[str, list[Text]] = {}
    for arm in ({**result, **arm} for arm in result["arms"].values()):
        m, commit = arm["machine"], (arm["commit"] or "no commit")[:12] + (", with changes" if arm["dirty"] else "")
        where = f"{len(arm['runs'])} seeds, {m.get('gpu') or m.get('cpu')}, torch {m.get('torch')}, {commit}"
        commands.setdefault(f"{arm['command']}\n{where}", [Text(arm["command"]), Text(where, "dim")])
    return [line for lines in commands.values() for line in lines]
