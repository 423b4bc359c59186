"""A run in one picture: score, stop reasons, entropy and gradient, speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ondol.errors import OndolError
from ondol.records import StopReason
from ondol.store.database import MetricRow
from ondol.store.metrics import metric
from ondol.store.run import Run

# Okabe and Ito's colours: told apart with any kind of colour vision. https://jfly.uni-koeln.de/color/
_BLUE, _ORANGE, _GREEN, _RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_SKY, _PINK, _YELLOW, _BLACK, _GREY = "#56B4E9", "#CC79A7", "#F0E442", "#222222", "#777777"
_STOPS = {
    StopReason.ANSWERED: _GREEN,
    StopReason.ENV_DONE: _SKY,
    StopReason.MAX_TURNS: _ORANGE,
    StopReason.TURN_LENGTH: _RED,
    StopReason.RESPONSE_LENGTH: _BLUE,
    StopReason.CONTEXT: _PINK,
    StopReason.EMPTY: "#BBBBBB",
    StopReason.TIMEOUT: _YELLOW,
    StopReason.ERROR: _BLACK,
}
_EVAL = {
    "eval/score_greedy": ("greedy", "o", _RED, _RED),
    "eval/score_sampled": ("sampled", "o", "white", _RED),
    "eval/score_no_tool": ("no tool", "s", "white", _BLACK),
}


class _Series(NamedTuple):
    steps: np.ndarray  # [n] ascending
    values: np.ndarray  # [n], NaN where nothing finite was recorded


_RUNGS = {"warm": "after warm start", "after": "after RL"}  # phases of evaluation, as people call them


def plot_run(run: Run, path: Path) -> Path:
    """Draw a run as a PNG of 1200 x 800 pixels. What was not recorded is left open and said so.

    The steps are those of the RL phase: the one that records "loss/policy", else the one with most "score/mean".
    Evaluations made outside it stand where they were made: left of step 0 or after the step before them.
    """
    rows = run.db.metrics()
    phase = _main_phase(rows)
    series = {name: _series(rows, phase, name) for name in sorted({r.name for r in rows if r.phase == phase})}
    figure = Figure(figsize=(12, 8), dpi=100, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)  # type: ignore[union-attr]
    figure.suptitle(f"{run.name.replace('$', chr(92) + '$')}   ({run.state})", fontsize=13, color=_BLACK)
    axes = figure.subplots(2, 2)
    _draw_score(axes[0, 0], rows, phase, series)
    _draw_stops(axes[0, 1], series)
    _draw_pair(axes[1, 0], "Entropy and gradient", series, ("policy/entropy", _BLUE), ("gradient/norm", _RED))
    _draw_speed(axes[1, 1], series)
    for ax in axes.flat:
        if ax.axison:
            ax.set_xlabel(f"step of {phase}", color=_GREY)
    return save(figure, Path(path))


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG. Raises OndolError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
    except OSError as e:
        raise OndolError(f"{path} cannot be written: {e}", "choose another place, or free space") from e
    return path


def _main_phase(rows: Sequence[MetricRow]) -> str:
    counts: dict[str, int] = {}
    for row in rows:
        weight = {"loss/policy": 10**9, "score/mean": 10**3}.get(row.name, 1)
        counts[row.phase] = counts.get(row.phase, 0) + weight
    return max(counts, key=lambda phase: counts[phase]) if counts else "the run"


def _series(rows: Sequence[MetricRow], phase: str, name: str) -> _Series:
    found = sorted((r.step, r.value) for r in rows if r.phase == phase and r.name == name)
    values = np.array([v if math.isfinite(v) else math.nan for _, v in found], dtype=float)
    return _Series(np.array([s for s, _ in found], dtype=float), values)


def _draw_score(ax: Axes, rows: Sequence[MetricRow], phase: str, series: dict[str, _Series]) -> None:
    _dress(ax, "Score: share of problems solved")
    points = _evaluations(rows, phase)
    if "score/mean" not in series and not points:
        return _nothing(ax)
    if "score/mean" in series:
        score = series["score/mean"]
        smooth = _smooth(score)
        _line(ax, score, _BLUE, "training", faint=smooth is not None)
        if smooth is not None:
            ax.plot(smooth.steps, smooth.values, color=_BLUE, lw=2.2, label="running mean")
    drawn = set()
    notes: dict[float, tuple[str, float]] = {}
    for x, where, name, value in points:
        if name not in _EVAL or not math.isfinite(value):
            continue
        label, marker, face, edge = _EVAL[name]
        legend = None if name in drawn else f"held out: {label}" if not drawn else label
        size = 7 if where else 5
        ax.plot(x, value, marker, mfc=face, mec=edge, mew=1.6, ms=size, ls="", label=legend, zorder=4, clip_on=False)
        drawn.add(name)
        if where:
            top = max(value, notes.get(x, (where, -1.0))[1])
            notes[x] = (where, top)
    for x, (where, top) in notes.items():
        text = _RUNGS.get(where, where).replace("_", " ").replace(" ", "\n", 1 if len(where) > 9 else 0)
        ax.annotate(text, (x, top), (0, 9), textcoords="offset points", ha="center", va="bottom", fontsize=8.5)
        ax.axvline(x, color=_GREY, lw=0.7, ls=":", zorder=0)
    ax.set_ylim(-0.02, 1.18)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    low, high = ax.get_xlim()
    ax.set_xlim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    _step_ticks(ax, keep_from=0)
    _legend(ax, columns=5)


def _evaluations(rows: Sequence[MetricRow], phase: str) -> list[tuple[float, str, str, float]]:
    """(x, name of its own phase or "", metric, value) of every evaluation."""
    steps = [r.step for r in rows if r.phase == phase and not r.name.startswith("eval/")]
    first, span = min(steps, default=0), max(steps, default=1) - min(steps, default=0)
    seen: int | None = None  # the last training step before the row at hand
    places: dict[str, float | None] = {}  # of evaluations in phases of their own; None: before all training
    found: list[tuple[float | None, str, str, float]] = []
    for row in rows:
        evaluation = row.name.startswith("eval/score")
        if row.phase == phase:
            seen = seen if row.name.startswith("eval/") else row.step
            if evaluation:
                found.append((row.step, "", row.name, row.value))
        elif evaluation:
            where = row.phase if row.step <= 0 else f"{row.phase} {row.step}"
            place = places.setdefault(where, seen)
            found.append((place, where, row.name, row.value))
    early = [where for where, place in places.items() if place is None]
    left = {where: first - 0.16 * max(span, 1) * (len(early) - i) for i, where in enumerate(early)}
    return [(left[where] if x is None else x, where, name, value) for x, where, name, value in found]


def _draw_stops(ax: Axes, series: dict[str, _Series]) -> None:
    shares = {name.removeprefix("stop/"): s for name, s in series.items() if name.startswith("stop/")}
    seen = sum(bool(np.nan_to_num(s.values).any()) for s in shares.values())
    _dress(ax, "How trajectories ended", pad=24 if seen <= 5 else 38)  # a second row in the legend
    if not shares:
        return _nothing(ax)
    steps = np.unique(np.concatenate([s.steps for s in shares.values()]))
    # Half-way edges between the recorded steps: gaps in the steps widen a bar instead of leaving holes.
    middle = (steps[1:] + steps[:-1]) / 2
    first, last = (0.5, 0.5) if len(steps) == 1 else (middle[0] - steps[0], steps[-1] - middle[-1])
    edges = np.concatenate([[steps[0] - first], middle, [steps[-1] + last]])
    base = np.zeros(len(steps))
    order = [reason.value for reason in _STOPS]
    for name in sorted(shares, key=lambda n: (order.index(n) if n in order else len(order), n)):
        values = np.zeros(len(steps))
        values[np.searchsorted(steps, shares[name].steps)] = np.nan_to_num(shares[name].values)
        if not values.any():
            continue
        color = _STOPS[StopReason(name)] if name in order else _GREY
        label = name.replace("_", " ")
        ax.stairs(base + values, edges, baseline=base, fill=True, color=color, lw=0, label=label)
        base = base + values
    ax.set_ylim(0, 1)
    ax.set_xlim(*((edges[0] - 1, edges[-1] + 1) if len(steps) == 1 else (edges[0], edges[-1])))
    ax.grid(False)
    ax.set_ylabel("share of trajectories", color=_GREY)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _step_ticks(ax)
    _legend(ax, columns=5)


def _draw_pair(ax: Axes, title: str, series: dict[str, _Series], left: tuple[str, str], right: tuple[str, str]) -> None:
    """Two metrics with axes of their own, each in its colour."""
    _dress(ax, title)
    shown = [(name, color) for name, color in (left, right) if name in series]
    if not shown:
        return _nothing(ax)
    for i, (name, color) in enumerate(shown):
        here = ax if i == 0 else ax.twinx()
        if i:
            here.spines[["top", "left", "bottom"]].set_visible(False)
            here.spines["right"].set_color("#CCCCCC")
        _line(here, series[name], color, name, faint=i > 0)  # a gradient's norm jumps: it stays in the background
        here.set_ylabel(_label(name), color=color)
        here.tick_params(axis="y", colors=color, length=0)
        _from_zero(here)
    _step_ticks(ax)


def _draw_speed(ax: Axes, series: dict[str, _Series]) -> None:
    _dress(ax, "Speed")
    shown = [("rollout/tokens_per_s", _BLUE, "sampling"), ("learner/tokens_per_s", _ORANGE, "learning")]
    shown = [item for item in shown if item[0] in series]
    if not shown:
        return _nothing(ax)
    for name, color, label in shown:
        _line(ax, series[name], color, label)
    ax.set_ylabel("tokens/s", color=_GREY)
    _from_zero(ax)
    _step_ticks(ax)
    _legend(ax, columns=2)


def _dress(ax: Axes, title: str, pad: float = 24) -> None:
    ax.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=_BLACK, pad=pad)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#CCCCCC")
    ax.tick_params(colors=_GREY, length=0, labelsize=9)
    ax.grid(axis="y", color="#EEEEEE", lw=0.8)
    ax.set_axisbelow(True)


def _line(ax: Axes, series: _Series, color: str, label: str, faint: bool = False) -> None:
    few = len(series.steps) <= 40
    style = {"color": color, "lw": 1.1 if faint else 1.8, "alpha": 0.45 if faint else 1.0}
    ax.plot(series.steps, series.values, marker="o" if few else "", ms=3.5, label=label, **style)
    lost = series.steps[np.isnan(series.values)]
    if len(lost):
        # A crossed step on the axis: there was a number, and it was NaN or infinite.
        place = ax.get_xaxis_transform()
        ax.plot(lost, np.full(len(lost), 0.02), "x", color=color, ms=6, mew=1.6, transform=place, clip_on=False)


def _smooth(series: _Series) -> _Series | None:
    """Running mean over a tenth of the steps (at least 5); None where there are too few to need it."""
    n = len(series.values)
    if n < 15:
        return None
    width = max(5, n // 10)
    known = np.isfinite(series.values).astype(float)
    total = np.convolve(np.nan_to_num(series.values), np.ones(width), "valid")
    count = np.convolve(known, np.ones(width), "valid")
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / count
    return _Series(np.convolve(series.steps, np.ones(width) / width, "valid"), mean)


def _label(name: str) -> str:
    entry = metric(name)
    words = name.replace("/", " ").replace("_", " ")
    return f"{words} ({entry.unit})" if entry.unit else words


def _from_zero(ax: Axes) -> None:
    low, high = ax.get_ylim()
    if low >= 0 or high > 0 > low > -0.2 * high:
        ax.set_ylim(0, high * 1.05)


def _step_ticks(ax: Axes, keep_from: float | None = None) -> None:
    """Whole steps only, and none where there are no steps."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))
    if keep_from is not None:
        limits = ax.get_xlim()
        ax.set_xticks([tick for tick in ax.get_xticks() if tick >= keep_from and limits[0] <= tick <= limits[1]])


def _legend(ax: Axes, columns: int) -> None:
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        place = {"loc": "lower left", "bbox_to_anchor": (-0.01, 1.0), "borderaxespad": 0.0, "ncols": columns}
        look = {"frameon": False, "fontsize": 8.5, "handlelength": 1.3, "columnspacing": 1.2, "handletextpad": 0.5}
        # Outside the layout: a long legend must not make its plot narrower than the others.
        ax.legend(handles, labels, **look, **place).set_in_layout(False)


def _nothing(ax: Axes) -> None:
    ax.set_axis_off()
    ax.text(0.5, 0.5, "not recorded", transform=ax.transAxes, ha="center", va="center", color=_GREY, fontsize=11)
