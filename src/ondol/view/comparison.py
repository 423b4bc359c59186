"""Arms beside each other: tables of means and paired differences, and a picture of curves and ends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.table import Table
from rich.text import Text

from ondol.view.console import duration
from ondol.view.plots import save
from ondol.view.trajectory import safe_text

#: Okabe and Ito's colours, as in plots.py; more arms than these begin anew with dashed lines
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222", "#F0E442")
#: first what counts most; the others follow in their order
_FIRST = ("score_sampled", "score_greedy")


def columns_of(arms: Mapping[str, Any]) -> list[str]:
    """Metrics worth a column: the score, every last pass@k, kinds of right answers; not those of the start."""
    found = list(dict.fromkeys(name for arm in arms.values() for name in arm["mean"] if not name.startswith("start/")))
    passes = sorted((n for n in found if n.startswith("pass@")), key=lambda n: int(n.removeprefix("pass@")))
    others = [n for n in found if n not in _FIRST and not n.startswith("pass@")]
    return [*(n for n in _FIRST if n in found), *passes[-1:], *others]


def arms_table(results: Mapping[str, Any], columns: Sequence[str] | None = None) -> Table:
    """One row an arm: how many seeds, mean and standard deviation of each metric, time."""
    arms = results["arms"]
    columns = columns_of(arms) if columns is None else columns
    out = Table(header_style="bold", box=None, pad_edge=False)
    out.add_column("arm", overflow="fold")
    for title in ("seeds", *columns, "time"):
        out.add_column(title.replace("_", " "), justify="right")
    for label, arm in arms.items():
        cells = [_number(arm["mean"].get(c), arm["spread"].get(c)) for c in columns]
        times = [r["seconds"] for r in arm["runs"]]
        took = duration(sum(times) / len(times)) if times else "-"
        out.add_row(Text(safe_text(label)), str(len(arm["runs"])), *cells, took)
    return out


def differences_table(results: Mapping[str, Any], columns: Sequence[str] | None = None) -> Table | None:
    """Paired differences to the first arm with their 95 % interval; None where there is one arm only."""
    arms = results["arms"]
    columns = columns_of(arms) if columns is None else columns
    others = {label: arm["difference"] for label, arm in arms.items() if "difference" in arm}
    if not others:
        return None
    out = Table(header_style="bold", box=None, pad_edge=False)
    out.add_column(f"vs {safe_text(next(iter(arms)))}", overflow="fold")
    for title in columns:
        out.add_column(title.replace("_", " "), justify="right")
    for label, found in others.items():
        out.add_row(Text(safe_text(label)), *(_difference(found.get(c)) for c in columns))
    return out


def _number(mean: float | None, spread: float | None) -> Text:
    if mean is None:
        return Text("-", "dim")
    text = Text(f"{mean:.3f}", "bold")
    return text if spread is None else text.append(f" ± {spread:.3f}", "not bold")


def _difference(d: Mapping[str, Any] | None) -> Text:
    if d is None or d["mean"] is None:
        return Text("-", "dim")
    if d["low"] is None:
        return Text(f"{d['mean']:+.3f} (1 seed)")
    style = "green" if d["low"] > 0 else "red" if d["high"] < 0 else ""
    return Text(f"{d['mean']:+.3f}", style).append(f" [{d['low']:+.3f}, {d['high']:+.3f}]", "not bold")


def plot_comparison(
    curves: Mapping[str, Mapping[int, Sequence[tuple[int, float]]]],
    results: Mapping[str, Any],
    path: Path,
    title: str = "",
    end: str = "score_sampled",
) -> Path:
    """A PNG: on the left the score of training by step, mean over seeds with a band from the lowest to the highest; on
    the right the metric `end` of every seed (points) with its mean (bar).

    Args:
        curves: arm -> seed -> [(step, score)], as `Comparison.curves` gives them.
        results: as `Comparison.results` gives them.
    """
    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained", facecolor="white")
    figure.suptitle(title.replace("$", r"\$"), fontsize=13)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for i, (label, seeds) in enumerate(curves.items()):
        style: dict[str, Any] = {"color": _COLORS[i % len(_COLORS)], "ls": "-" if i < len(_COLORS) else "--"}
        steps, values = _together(seeds)
        if not len(steps):
            continue
        width = max(1, len(steps) // 15)
        smooth = np.array([_running(row, width) for row in values])
        left.plot(steps, smooth.mean(0), lw=2, label=label.replace("$", r"\$"), **style)
        if len(values) > 1:
            left.fill_between(steps, smooth.min(0), smooth.max(0), color=style["color"], alpha=0.15, lw=0)
    left.set_title("score in training (running mean; band: all seeds)", loc="left", fontsize=11)
    left.set_xlabel("step")
    left.set_ylim(-0.02, 1.05)
    left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    if left.get_legend_handles_labels()[0]:
        left.legend(frameon=False, fontsize=9)
    _ends(right, results, end)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#EEEEEE")
        ax.set_axisbelow(True)
    return save(figure, path)


def _ends(ax: Any, results: Mapping[str, Any], end: str) -> None:
    """Every seed's last number, and the mean."""
    labels = list(results["arms"])
    for i, label in enumerate(labels):
        found = [r["measured"][end] for r in results["arms"][label]["runs"] if end in r["measured"]]
        found = [v for v in found if math.isfinite(v)]
        if found:
            color = _COLORS[i % len(_COLORS)]
            ax.bar(i, sum(found) / len(found), width=0.7, color=color, alpha=0.35)
            ax.plot(np.linspace(-0.2, 0.2, len(found)) + i if len(found) > 1 else [i], found, "o", color=color, ms=5)
    ax.set_title(f"{end.replace('_', ' ')} at the end, each seed", loc="left", fontsize=11)
    many = len(labels) > 4 or max(map(len, labels)) > 14
    ax.set_xticks(range(len(labels)), labels, rotation=60 if many else 0, ha="right" if many else "center", fontsize=9)


def _together(seeds: Mapping[int, Sequence[tuple[int, float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps [n] that all seeds have, and values [seeds, n]."""
    if not seeds:
        return np.array([]), np.array([[]])
    tables = [dict(points) for points in seeds.values()]
    steps = sorted(set.intersection(*(set(t) for t in tables)))
    return np.array(steps), np.array([[t[s] for s in steps] for t in tables])


def _running(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over the last `width` values, fewer at the beginning."""
    total = np.cumsum(np.nan_to_num(values))
    before = np.concatenate([np.zeros(width), total[:-width]]) if width < len(total) else np.zeros(len(total))
    return (total - before) / np.minimum(np.arange(len(values)) + 1, width)
