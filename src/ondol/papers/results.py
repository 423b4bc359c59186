"""Reproducing a paper, and what result files say. A result file holds measurements; states are computed from them here."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ondol.compare.arms import Arm
from ondol.compare.comparison import Comparison, Watch, machine
from ondol.compare.statistics import summary
from ondol.errors import OndolError, nearest
from ondol.papers.base import SCALES, Claim, Entry, Measured, Paper
from ondol.recipe import override

_SHIPPED = Path(__file__).parent / "results"  # in a checkout a link to results/papers
_FILE_VERSION = 1


def default_folder() -> Path:
    """Where results are written: results/papers of the checkout that this package runs from, else of the working folder."""
    root = Path(__file__).resolve().parents[3]
    return root / "results" / "papers" if (root / "pyproject.toml").is_file() else Path("results") / "papers"


def check_scale(scale: str) -> str:
    """The scale's name. Raises OndolError for an unknown one."""
    if scale not in SCALES:
        raise OndolError(f"there is no scale '{scale}'", nearest(scale, SCALES))
    return scale


def runnable(entry: Entry) -> Paper:
    """The paper's file. Raises OndolError where there is none yet."""
    if entry.paper is None:
        raise OndolError(f"{entry.id} ({entry.title}) is planned: there is nothing to run yet", "see: ondol papers")
    return entry.paper


# -- reproduce -----------------------------------------------------------------------------------------------------------


class Reproduction:
    """A paper's arms and studies at laptop scale. Finished runs are kept and found again, also those of other papers.

    Args:
        seeds: 0 ... seeds-1.
        folder: of the runs.
        changes: "a.b=value" settings of all arms, for a trial; its result has a name of its own.
        only: these arms and studies; what an earlier result says of the others can be kept (`added`). () stands for all but those that take hours.
    """

    def __init__(
        self, paper: Paper, seeds: int, folder: Path, changes: Sequence[str] = (), only: Sequence[str] = ()
    ) -> None:
        if seeds < 1:
            raise OndolError(f"{seeds} seeds reproduce nothing", "at least 1; the claims are stated over 3 or more")
        arms = list(paper.arms())
        long = list(paper.long_arms())
        known = [*(a.label for a in (*arms, *long)), *paper.studies]
        for name in only:
            if name not in known:
                raise OndolError(f"{paper.id} has no arm or study '{name}'", nearest(name, known))
        self.only, self.arms = list(only), list(only) if only else [a.label for a in arms]
        arms = [
            a for a in (*arms, *long) if a.label in self.arms
        ] or arms  # studies may ask for arms that were run before
        for arm in arms:
            for text in changes:
                override(arm.table, text)
        self.paper, self.changes = paper, list(changes)
        self.comparison = Comparison(arms, range(seeds), folder)
        self.studied: dict[str, dict[int, dict[str, float]]] = {}

    def run(self, processes: int = 1, watch: Watch | None = None, note: Callable[[str], None] = lambda t: None) -> None:
        """Do what is left. Raises KeyboardInterrupt when stopped (saved), OndolError when an arm failed."""
        if any(arm.label in self.arms for arm in self.comparison.arms):
            self.comparison.run(processes, watch)
        for error in self.comparison.failures.values():
            raise error
        for name, study in self.paper.studies.items():
            if self.only and name not in self.only:
                continue
            for seed in self.comparison.seeds:
                note(f"{name}, seed {seed}")
                self.studied.setdefault(name, {})[seed] = study(self.comparison, seed, self.comparison.folder)

    def result(self, command: str) -> dict[str, Any]:
        """Everything that was measured, with what it was measured on."""
        from ondol.store.environment import git_state

        git = git_state(Path(__file__).parent) or {}
        origin = {"command": command, "commit": git.get("commit"), "dirty": git.get("dirty"), "machine": machine()}
        found = self.comparison.results(self.paper.measure)
        arms: dict[str, Any] = {}
        for arm in (a for a in self.comparison.arms if a.label in self.arms):
            one = found["arms"][arm.label]
            rows = [{k: _plain(v) for k, v in row.items() if k != "run"} for row in one["runs"]]
            table = self.comparison.jobs[arm.label, self.comparison.seeds[0]].table
            recipe = {k: v for k, v in table.items() if k not in ("seed", "name")}
            arms[arm.label] = {"recipe": recipe, **origin, **_with_summaries(rows)}
        for name, seeds in self.studied.items():
            rows = [{"seed": seed, "measured": _plain(values)} for seed, values in seeds.items()]
            arms[name] = origin | _with_summaries(rows)
        out = {
            "version": _FILE_VERSION,
            "paper": self.paper.id,
            "scale": "laptop",
            **origin,
            "changes": self.changes,
            "seeds": self.comparison.seeds,
            "arms": arms,
        }
        return out | {"claims": claims_of(self.paper, out)}

    def added(self, result: dict[str, Any], earlier: dict[str, Any] | None) -> dict[str, Any]:
        """`result` beside what an earlier one of the same paper says of arms and studies that were not run now."""
        if earlier is None or self.changes or earlier["changes"]:
            return result
        own = {
            k: earlier[k] for k in ("command", "commit", "dirty", "machine")
        }  # of files that say it once for all arms
        kept = {label: own | arm for label, arm in earlier["arms"].items() if label not in result["arms"]}
        out = (earlier if self.only else result) | {"arms": kept | result["arms"]}
        return out | {"claims": claims_of(self.paper, out)}


def _with_summaries(rows: list[dict[str, Any]]) -> dict[str, Any]:
    names = dict.fromkeys(n for row in rows for n in row["measured"])
    found = {n: summary([row["measured"][n] for row in rows if _finite(row["measured"].get(n))]) for n in names}
    return {
        "runs": rows,
        "mean": {n: _short(s["mean"]) for n, s in found.items()},
        "spread": {n: _short(s["spread"]) for n, s in found.items()},
    }


def write(result: dict[str, Any], folder: Path) -> Path:
    """<paper>-<scale>.json; a trial with changed settings is <paper>-<scale>.changed.json, which is never shown as seen."""
    name = f"{result['paper']}-{result['scale']}{'.changed' if result['changes'] else ''}.json"
    path = Path(folder) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as e:
        raise OndolError(f"{path} cannot be written: {e}", "choose another place with --results") from e
    return path


# -- read ----------------------------------------------------------------------------------------------------------------


def read(entry: Entry, folder: Path | None = None, scale: str = "laptop") -> dict[str, Any] | None:
    """The result of a paper: in `folder`, or where one's own are written, else the one that ships. None: there is none."""
    name = f"{entry.id}-{scale}.json"
    for place in (default_folder(), _SHIPPED) if folder is None else (Path(folder),):
        path = place / name
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                if found["paper"] != entry.id or found["version"] != _FILE_VERSION:
                    raise ValueError(f"it is of paper {found['paper']}, version {found['version']}")
                measured_of(found)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
                raise OndolError(f"{path} is no result of {entry.id}: {e}", "write it again: ondol reproduce") from e
            return found
    return None


def measured_of(result: dict[str, Any]) -> Measured:
    """The numbers in a result, for claims to judge. What is not finite is stored as null and is NaN again here."""
    return Measured(
        {
            label: {
                int(row["seed"]): {n: math.nan if v is None else float(v) for n, v in row["measured"].items()}
                for row in arm["runs"]
            }
            for label, arm in result["arms"].items()
        }
    )


def claims_of(paper: Paper, result: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Each claim with what was seen of it: computed from the measurements, whatever the file says of claims."""
    return [_claim(c, result) for c in paper.claims]


def _claim(claim: Claim, result: dict[str, Any] | None) -> dict[str, Any]:
    measured = measured_of(result) if result is not None else None
    outcome = claim.outcome(measured)
    arms: list[dict[str, Any]] = []
    if outcome is not None and measured is not None and result is not None:
        arms = [result["arms"][label] for label in measured.asked]
    commands = dict.fromkeys(arm.get("command", result["command"]) for arm in arms) if result else {}
    return {
        "text": claim.text,
        "paper": claim.paper,
        "how": claim.how,
        "must": claim.must,
        "measured": outcome.measured if outcome else None,
        "held": outcome.held if outcome else None,
        "seeds": min((len(arm["runs"]) for arm in arms), default=0),
        "command": "; ".join(commands) or None,
    }


def state_of(entry: Entry, claims: Sequence[dict[str, Any]]) -> str:
    """planned without a file; not held if one claim is not; held if all are; else not run."""
    if entry.paper is None:
        return "planned"
    verdicts = [c["held"] for c in claims]
    if any(v is False for v in verdicts):
        return "not held"
    return "held" if verdicts and all(verdicts) else "not run"


def overview(entry: Entry, folder: Path | None = None) -> dict[str, Any]:
    """A paper as `ondol papers --json` lists it."""
    claims = claims_of(entry.paper, read(entry, folder)) if entry.paper else []
    shown = ("text", "paper", "measured", "held", "seeds", "command")
    return {
        "id": entry.id,
        "title": entry.title,
        "family": entry.family,
        "adds": entry.adds,
        "state": state_of(entry, claims),
        "claims": [{k: c[k] for k in shown} for c in claims],
    }


def arms_of(paper: Paper) -> list[Arm]:
    """The arms, checked: each recipe is sound."""
    arms = [*paper.arms(), *paper.long_arms()]
    for arm in arms:
        arm.recipe(0)
    return arms


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _short(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


def _plain(value: Any) -> Any:
    """Six decimals are plenty; what JSON has no number for is null."""
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value
