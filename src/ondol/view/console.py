"""Long work as a person watches it: a live line on a terminal, plain lines in a log; tables."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ondol.errors import OndolError
from ondol.store.metrics import metric
from ondol.view.trajectory import safe_text

_LABELS = {
    "score/mean": "score",
    "reward/mean": "reward",
    "rollout/tokens_per_s": "sampling",
    "learner/tokens_per_s": "learning",
    "eval/score_greedy": "greedy",
    "eval/score_sampled": "sampled",
    "loss/sft": "loss",
    "warm_start/accepted_share": "accepted",
    "policy/entropy": "entropy",
    "gradient/norm": "gradient",
}
_PLAIN_EVERY_S = 5.0
_TELLING, _PATIENCE_S = (
    0.02,
    60.0,
)  # the time left is not guessed from less than this share of the work, unless it takes long
_now = time.monotonic


class Progress:
    """Progress of a run. On a terminal: a bar and a line of values that stay in place. Elsewhere (a file, a pipe):
    one plain line an update, at most one in five seconds, and always the last of a phase.

    Args:
        total_steps: steps of a phase that does not say how many it has.
        weights: how long each phase takes relative to the others; with it the time left is that of the whole run.
        console: where to draw (default: standard output).
    """

    def __init__(
        self,
        total_steps: int | None = None,
        weights: Mapping[str, float] | None = None,
        console: Console | None = None,
    ) -> None:
        self.console = console or Console(file=sys.stdout)
        self.weights = {name: weight for name, weight in (weights or {}).items() if weight > 0}
        self.total_steps = total_steps
        self._live: Live | None = None
        self._lock = threading.RLock()
        self._name, self._total, self._done, self._first_done = "", total_steps, 0.0, 0.0
        self._values: dict[str, float] = {}
        self._start = self._phase_start = _now()
        self._finished: set[str] = set()
        self._skipped = 0.0  # share of the whole run that was done before this process began
        self._printed_at, self._unprinted = -math.inf, False

    def __enter__(self) -> Progress:
        self._start = self._phase_start = _now()
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            live = Live(get_renderable=self._draw, console=self.console, refresh_per_second=4)
            live.start()
            self._live = live
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._flush()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def phase(self, name: str, total: int | None = None, done: int = 0) -> None:
        """Begin a phase of `total` steps, `done` of which an earlier process has made."""
        with self._lock:
            self._flush()
            if self._name:
                self._finished.add(self._name)
            self._name, self._total = name, self.total_steps if total is None else total
            self._done = self._first_done = done
            self._values = {}
            self._phase_start = _now()
            if self._total and name in self.weights:
                self._skipped += self.weights[name] * done / self._total / sum(self.weights.values())
            self._printed_at = -math.inf
        self._refresh()

    def advance(self, steps: float = 1, /, **values: float) -> None:
        """`steps` (or part of one) more are done; `values` are the current numbers under their metric names (`**metrics`)."""
        with self._lock:
            self._done += steps
            self._values.update(values)
            self._unprinted = True
            if self._live is None and _now() - self._printed_at >= _PLAIN_EVERY_S:
                self._flush()
        self._refresh()

    def note(self, text: str) -> None:
        """A line that stays."""
        self.show(Text(safe_text(text)))

    def show(self, renderable: RenderableType) -> None:
        """Anything rich can draw, above the bar."""
        with self._lock:
            self._flush()
        self.console.print(renderable, soft_wrap=isinstance(renderable, Text) and self._live is None)

    def eta(self) -> tuple[float, bool] | None:
        """(seconds left, whether of the whole run or only of this phase); None while it cannot be known."""
        share = self._done / self._total if self._total else None
        if share is None:
            return None
        all_weights = sum(self.weights.values())
        if self._name in self.weights:
            done = sum(self.weights.get(name, 0.0) for name in self._finished)
            whole = (done + self.weights[self._name] * min(share, 1.0)) / all_weights
            made, spent = whole - self._skipped, _now() - self._start
            if made <= 1e-9 or (made < _TELLING and spent < _PATIENCE_S):
                return None
            return spent * (1 - whole) / made, True
        made, spent = self._done - self._first_done, _now() - self._phase_start
        left = max(self._total - self._done, 0) if self._total else 0
        if made <= 0 or (made < _TELLING * (made + left) and spent < _PATIENCE_S):
            return None
        return spent * left / made, False

    def _flush(self) -> None:
        """Print the pending plain line."""
        if self._unprinted and self._live is None:
            line = Text("  ").join(part for part in (self._head(), self._current()) if part)
            self.console.print(line, soft_wrap=True, highlight=False)
            self._printed_at = _now()
        self._unprinted = False

    def _refresh(self) -> None:
        """Make sure that the last state of a phase is seen.

        Never called under our lock: rich draws under its own and then asks for ours, so the other order could hang.
        """
        live = self._live
        if live is not None and self._total and self._done >= self._total - 1e-6:
            live.refresh()

    def _head(self) -> Text:
        done = int(self._done + 1e-6)
        count = f"{done}/{self._total}" if self._total else f"{done}"
        words = [Text(safe_text(self._name), "bold"), Text(count), Text(f"{duration(_now() - self._start)} so far")]
        eta = self.eta()
        if eta is not None and eta[0] > 0:
            words.append(Text(f"{duration(eta[0])} left" + ("" if eta[1] else " in this phase")))
        return Text("  ").join(word for word in words if word)

    def _current(self) -> Text:
        return Text("  ").join(_shown(name, value) for name, value in _ordered(self._values))

    def _draw(self) -> RenderableType:
        with self._lock:
            width = max(10, min(40, self.console.width - 4))
            grid = Table.grid()  # a bar alone ends without a new line; in a grid each has its own
            grid.add_row(self._head())
            if self._total:
                grid.add_row(ProgressBar(total=self._total, completed=min(self._done, self._total), width=width))
            if self._values:
                grid.add_row(self._current())
            return grid


def duration(seconds: float) -> str:
    """3725 -> "1h02m", 65 -> "1m05s", 5 -> "5s"."""
    whole = round(max(seconds, 0))
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def number(value: float, unit: str = "") -> str:
    """A number with its unit, as short as it can be read: shares in percent, big ones whole, small ones to 3 digits."""
    if not math.isfinite(value):
        return str(value)
    if unit == "share":
        return f"{100 * value:.1f}%"
    if value == int(value) or abs(value) >= 100:
        text = f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3g}"
    else:
        text = f"{value:.3g}"
    return f"{text} {unit}".rstrip()


def table(rows: Iterable[Mapping[str, Any] | Sequence[Any]], columns: Sequence[str]) -> Table:
    """A table of dicts (by column name) or sequences (in the order of the columns).

    Numbers stand right; a column named as a metric shows them in its unit. What is missing is a dash.
    """
    listed = [[row.get(c) for c in columns] if isinstance(row, Mapping) else list(row) for row in rows]
    out = Table(header_style="bold", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        cells = [row[i] for row in listed if row[i] is not None]
        right = bool(cells) and all(isinstance(cell, int | float) and not isinstance(cell, bool) for cell in cells)
        out.add_column(Text(safe_text(column)), justify="right" if right else "left", overflow="fold")
    units = [_unit(column) for column in columns]
    for row in listed:
        out.add_row(*(_cell(cell, unit) for cell, unit in zip(row, units, strict=True)))
    return out


def before_after_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """The ladder: one row a rung (before, after warm start, after RL), columns no tool, greedy, sampled.

    Args:
        rows: {"rung": str, "no_tool": share or None, "greedy": ..., "sampled": ...}, in the order of time. Behind
            a score stands its change, in percentage points, from the first rung that has one.
    """
    ways = ("no_tool", "greedy", "sampled")
    out = Table(header_style="bold", box=None, pad_edge=False)
    out.add_column("rung", overflow="fold")
    for way in ways:
        out.add_column(way.replace("_", " "), justify="right")
    first: dict[str, float] = {}
    for row in rows:
        cells = [Text(safe_text(str(row["rung"])))]
        for way in ways:
            value = row.get(way)
            if value is None or math.isnan(value):
                cells.append(Text("-", "dim"))
                continue
            cell = Text(number(value, "share"), "bold")
            if way in first:
                change = 100 * (value - first[way])
                cell.append(f" ({change:+.1f})", "green" if change > 0 else "red" if change < 0 else "dim")
            first.setdefault(way, value)
            cells.append(cell)
        out.add_row(*cells)
    return out


def _cell(value: Any, unit: str) -> Text:
    if value is None:
        return Text("-", "dim")
    if isinstance(value, float) or (isinstance(value, int) and unit):
        return Text(number(value, "share" if unit == "share" else ""))
    return Text(safe_text(str(value)))


def _unit(name: str) -> str:
    try:
        return metric(name).unit
    except OndolError:
        return ""


def _ordered(values: Mapping[str, float]) -> list[tuple[str, float]]:
    """The best-known values first, then others as they came, then why trajectories stopped: largest first, no zeros."""
    known = [(name, values[name]) for name in _LABELS if name in values]
    stops = sorted((item for item in values.items() if item[0].startswith("stop/") and item[1]), key=lambda i: -i[1])
    others = [item for item in values.items() if item[0] not in _LABELS and not item[0].startswith("stop/")]
    return known + others + stops


def _shown(name: str, value: float) -> Text:
    label = _LABELS.get(name, name.removeprefix("stop/"))
    text = number(value, _unit(name)).replace("tokens/s", "tok/s")
    return Text(f"{safe_text(label)} ", "dim").append(text, "default not dim")
