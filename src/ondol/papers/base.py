"""What a paper is here: claims, arms to train, numbers to read off their runs, and a judgement that is made of these alone.

A claim's state is never written down: it is computed by the claim's `judge` from the measurements of a result file, each
time it is shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ondol.compare.statistics import summary
from ondol.errors import OndolError, nearest

if TYPE_CHECKING:
    from ondol.compare.arms import Arm
    from ondol.compare.comparison import Comparison
    from ondol.store import Run

STATES = ("held", "not held", "not run", "planned")
SCALES = ("laptop", "gpu", "full")


class Missing(Exception):
    """A judge asked for a number that was not measured: the claim is not run."""


@dataclass(frozen=True)
class Outcome:
    """What was seen of a claim: did it hold, and the numbers in a few words."""

    held: bool
    measured: str


class Measured:
    """Numbers of a result: arm -> seed -> name -> value. Asking for what is not there raises Missing.

    `asked` has the arms that were asked for, in order.
    """

    def __init__(self, arms: Mapping[str, Mapping[int, Mapping[str, float]]]) -> None:
        self.arms = arms
        self.asked: dict[str, None] = {}

    def values(self, arm: str, name: str) -> list[float]:
        """One value a seed, by rising seed."""
        self.asked[arm] = None
        found = [row[name] for _, row in sorted(self.arms.get(arm, {}).items()) if name in row]
        if not found:
            raise Missing(f"{arm}: {name}")
        return found

    def mean(self, arm: str, name: str) -> float:
        values = self.values(arm, name)
        return math.fsum(values) / len(values)

    def text(self, arm: str, name: str, digits: int = 2) -> str:
        """Mean and standard deviation over seeds, for `Outcome.measured`."""
        found = summary(self.values(arm, name))
        spread = "" if found["spread"] is None else f" ± {found['spread']:.{digits}f}"
        return f"{found['mean']:.{digits}f}{spread}"


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper that can be looked at.

    Attributes:
        text: the claim, at the scale that we can run.
        paper: the paper's own number.
        how: how we measure it.
        must: what must be seen at laptop scale, on the mean over seeds.
        judge: the measurements -> Outcome; asking for what was not measured makes the claim "not run". None: it cannot be
            run yet, and `how` says what it waits for.
    """

    text: str
    paper: str
    how: str
    must: str
    judge: Callable[[Measured], Outcome] | None = None

    def outcome(self, measured: Measured | None) -> Outcome | None:
        """What was seen; None when the claim was not run."""
        if measured is None or self.judge is None:
            return None
        try:
            return self.judge(measured)
        except Missing:
            return None


#: a measurement that needs no training of its own: (comparison, seed, folder for its files) -> numbers by name
Study = Callable[["Comparison", int, Path], dict[str, float]]


def _no_arms() -> Sequence[Arm]:
    return ()


def _nothing(run: Run, arm: str) -> dict[str, float]:
    return {}


@dataclass(frozen=True)
class Paper:
    """A paper that runs; its title, family and line are those of the catalogue.

    Attributes:
        id: arXiv number.
        claims: in the order shown.
        arms: makes the arms at laptop scale; each is a whole recipe of its own, so that arms may differ in anything.
        long_arms: makes those that take hours, which are run when asked for.
        measure: (finished run, arm's label) -> numbers that the claims look at; the run's database has every metric of
            every step, and all trajectories.
        studies: name -> what is measured beside the arms, for each seed; in results it is an arm of that name.
        scales: scale -> what would be run, and on what.
        scale_up: settings of the laptop's result that matter, in a sentence or two.
    """

    id: str
    claims: tuple[Claim, ...]
    arms: Callable[[], Sequence[Arm]] = _no_arms
    long_arms: Callable[[], Sequence[Arm]] = _no_arms
    measure: Callable[[Run, str], dict[str, float]] = _nothing
    studies: Mapping[str, Study] = field(default_factory=dict)
    scales: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A line of the catalogue. `paper` is None for one that is only planned."""

    id: str
    title: str
    family: str
    adds: str
    paper: Paper | None = None


#: arXiv number -> where its `Paper` is; strings, so that listing the catalogue imports little
RUNNING: dict[str, str] = {
    "2508.20404": "ondol.papers.aworld:PAPER",
    "2508.20722": "ondol.papers.rstar2_agent:PAPER",
    "2509.01055": "ondol.papers.verltool:PAPER",
    "2509.01563": "ondol.papers.keye:PAPER",
    "2509.02333": "ondol.papers.dcpo:PAPER",
    "2509.02479": "ondol.papers.simpletir:PAPER",
    "2509.02522": "ondol.papers.pacs:PAPER",
    "2509.02534": "ondol.papers.darling:PAPER",
    "2509.02544": "ondol.papers.ui_tars:PAPER",
    "2509.02547": "ondol.papers.survey:PAPER",
}


def catalogue() -> dict[str, Entry]:
    """All papers by id."""
    import importlib
    import tomllib

    table = tomllib.loads(Path(__file__).with_name("catalogue.toml").read_text(encoding="utf-8"))
    out = {}
    for key, row in sorted(table.items()):
        paper = None
        if key in RUNNING:
            module, _, name = RUNNING[key].partition(":")
            paper = getattr(importlib.import_module(module), name)
        out[key] = Entry(key, row["title"], row["family"], row["adds"], paper)
    return out


def find(text: str) -> Entry:
    """A paper by its arXiv number. Raises OndolError with the nearest one."""
    entries = catalogue()
    key = text.strip().lower().removeprefix("arxiv:").removeprefix("arxiv ").strip()
    if key not in entries:
        close = [e for e in entries.values() if key and key in e.title.lower()]
        if len(close) == 1:
            return close[0]
        raise OndolError(f"there is no paper '{text}'", nearest(key, entries))
    return entries[key]
