"""Recorded trajectories as training data: from a JSONL export or from another run."""

from __future__ import annotations

import json
from pathlib import Path

from ondol.errors import OndolError
from ondol.records import Trajectory
from ondol.store import Run


def read_trajectories(source: str | Path) -> list[Trajectory]:
    """Trajectories of a JSONL file (one `Trajectory.to_dict()` a line) or of a run's folder (its RL steps).

    Raises OndolError naming file and line for anything that is not a trajectory.
    """
    path = Path(source)
    if path.is_dir():
        run = Run.open(path)
        try:
            return list(run.db.trajectories(phase="rl"))
        finally:
            run.close()
    out: list[Trajectory] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    out.append(_checked(Trajectory.from_dict(_inner(json.loads(line)))))
                except (ValueError, TypeError, KeyError, AttributeError) as e:
                    what = f"{type(e).__name__}: {e}"
                    raise OndolError(
                        f"{path}:{number}: not a trajectory ({what})", "export one with: ondol export RUN trajectories"
                    ) from e
    except (OSError, UnicodeDecodeError) as e:
        raise OndolError(f"{path} cannot be read: {e}", "give a JSONL export of trajectories, or a run's folder") from e
    if not out:
        raise OndolError(f"{path} holds no trajectories", "export some with: ondol export RUN trajectories")
    return out


def _inner(data: dict) -> dict:
    """An export's line may wrap the trajectory with the phase and step it was recorded in."""
    return data["trajectory"] if "trajectory" in data else {k: v for k, v in data.items() if k != "phase"}


def _checked(t: Trajectory) -> Trajectory:
    n = len(t.ids)
    for name in ("sampled", "trained", "logp", "version"):
        if len(getattr(t, name)) != n:
            raise ValueError(f"'{name}' has {len(getattr(t, name))} entries for {n} ids")
    return t
