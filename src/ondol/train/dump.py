"""Recorded trajectories as training data: from a JSONL export or from another run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ondol.errors import OndolError
from ondol.records import Group, Trajectory
from ondol.store import Run

_PHASES = ("warm_start", "rl")


def read_trajectories(source: str | Path) -> list[Trajectory]:
    """Trajectories of a JSONL file (one `Trajectory.to_dict()` a line) or of a run's folder, of its phases for training.

    A line that names another phase, an evaluation's, is left out: held-out problems are never trained on. Raises
    OndolError naming file and line for anything that is not a trajectory.
    """
    path = Path(source)
    if path.is_dir():
        run = Run.open(path)
        try:
            found = [t for phase in _PHASES for t in run.db.trajectories(phase=phase)]
        finally:
            run.close()
        if not found:
            raise OndolError(f"{path} has recorded no trajectories to train on", "name a run that sampled some")
        return found
    out: list[Trajectory] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    data = json.loads(line)
                    if not isinstance(data, dict):
                        raise TypeError("not a JSON object")
                    if data.pop("phase", "rl") in _PHASES:
                        out.append(_checked(Trajectory.from_dict(data)))
                except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
                    what = f"no '{e.args[0]}'" if isinstance(e, KeyError) else str(e)
                    raise OndolError(
                        f"{path}:{number}: not a trajectory ({what})", "export one with: ondol export RUN trajectories"
                    ) from e
    except (OSError, UnicodeDecodeError) as e:
        raise OndolError(f"{path} cannot be read: {e}", "give a JSONL export of trajectories, or a run's folder") from e
    if not out:
        raise OndolError(f"{path} holds no trajectories", "export some with: ondol export RUN trajectories")
    return out


def _checked(t: Trajectory) -> Trajectory:
    n = len(t.ids)
    kinds = {"ids": int, "sampled": bool, "trained": bool, "logp": (int, float), "version": int}
    for name, kind in kinds.items():
        values = getattr(t, name)
        if len(values) != n:
            raise ValueError(f"'{name}' has {len(values)} entries for {n} ids")
        wrong = next((v for v in values if not isinstance(v, kind)), None)
        if wrong is not None:
            raise ValueError(f"'{name}' holds {wrong!r:.40}")
    if not 0 <= t.prompt_length <= n or any(t.trained[: t.prompt_length]):
        raise ValueError(f"'prompt_length' is {t.prompt_length}, which does not fit its {n} ids and masks")
    cuts = [t.prompt_length, *t.restarts, n]
    if not all(isinstance(r, int) for r in cuts) or cuts != sorted(cuts):
        raise ValueError(f"'restarts' are {t.restarts!r:.80}, which do not fit its {n} ids")
    if not isinstance(t.reward, (int, float)) or not isinstance(t.score, (int, float)):
        raise ValueError("'score' and 'reward' must be numbers")
    if len(t.key) != 3 or not all(isinstance(k, int) for k in t.key):
        raise ValueError("'key' must be three whole numbers: step, problem, sample")
    return t


def groups_of(trajectories: Iterable[Trajectory]) -> list[Group]:
    """Trajectories of one step as groups, problems and samples in order."""
    by_problem: dict[int, list[Trajectory]] = {}
    for t in trajectories:
        by_problem.setdefault(t.key[1], []).append(t)
    return [Group(ts[0].problem, sorted(ts, key=lambda t: t.key)) for _, ts in sorted(by_problem.items())]
