"""A run is a folder: recipe.toml, environment.json, run.sqlite, images/, checkpoints/, and a lock that its one writer holds."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import time
import tomllib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ondol.errors import OndolError, nearest
from ondol.store.database import Database
from ondol.store.environment import environment
from ondol.store.exchange import trl_rows, verl_rows
from ondol.store.toml import dump_toml

STATES = ("created", "running", "stopped", "finished", "failed")
_STAMP = re.compile(r"\d{8}-\d{6}(?:\.\d+)?-")  # of a run folder's name, before its label
_LOCKS: weakref.WeakSet[_Lock] = weakref.WeakSet()


@dataclass(frozen=True)
class RunSummary:
    """A line in the list of runs.

    Attributes:
        created: seconds since 1970.
        state: one of STATES; "died" (running, but nobody holds its lock); "damaged" (its database cannot be read).
        steps: the last step of each phase.
        last: the newest value of every metric.
    """

    path: Path
    name: str
    created: float
    state: str
    steps: dict[str, int]
    last: dict[str, float]


class Run:
    """One run's folder. Make it with `create` or `open`; close it, or use it in a `with`.

    Attributes:
        path, name: the folder and its name.
        db: the run's `Database`.
        checkpoints: folder for `save_checkpoint`.
    """

    def __init__(self, path: Path, db: Database, lock: _Lock | None) -> None:
        self.path, self.db, self._lock = path, db, lock

    @classmethod
    def create(cls, root: Path, name: str, recipe: Mapping[str, Any]) -> Run:
        """A new folder `<root>/<YYYYmmdd-HHMMSS>-<name>` (local time), open for writing."""
        text = dump_toml(recipe)  # before anything is made: a recipe that cannot be written leaves no folder
        label = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
        try:
            path = _new_folder(Path(root), time.strftime("%Y%m%d-%H%M%S"), label)
            lock = _Lock(path)
            (path / "recipe.toml").write_text(text, encoding="utf-8", newline="\n")
            facts = json.dumps(environment(), indent=1) + "\n"
            (path / "environment.json").write_text(facts, encoding="utf-8")
        except OSError as e:
            raise OndolError(f"no run folder can be made in {root}: {e}", "choose another folder, or free space") from e
        try:
            db = Database(path / "run.sqlite")
            with db.step():
                db.set_meta("created", time.time())
                db.set_meta("state", "created")
        except BaseException:
            lock.release()
            raise
        return cls(path, db, lock)

    @classmethod
    def open(cls, path: Path, write: bool = False) -> Run:
        """An existing run. Reading never locks; writing takes the run's lock.

        Raises:
            OndolError: not a run's folder, or another process is writing to it.
        """
        path = Path(path)
        if not (path / "run.sqlite").is_file():
            raise OndolError(f"{path} is not the folder of a run", "it should hold a run.sqlite; see the list of runs")
        if not write:
            return cls(path, Database(path / "run.sqlite", write=False), None)
        lock = _Lock(path)
        try:
            db = Database(path / "run.sqlite")
            db.event("opened", **environment())
        except BaseException:
            lock.release()
            raise
        return cls(path, db, lock)

    def facts(self) -> dict[str, Any]:
        """What is known of the run's environment: versions, machine, its tools' sandboxes. Empty where the file is spoilt."""
        try:
            found = json.loads((self.path / "environment.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def add_facts(self, facts: Mapping[str, Any]) -> None:
        """Add to what is known of the run's environment: to environment.json, and an event, since a resumed run may have
        moved. Nothing is done for no facts."""
        if not facts:
            return
        place = self.path / "environment.json"
        try:
            known = json.loads(place.read_text(encoding="utf-8"))
            part = place.with_name(place.name + ".part")
            part.write_text(json.dumps({**known, **facts}, indent=1) + "\n", encoding="utf-8")
            os.replace(part, place)
        except (OSError, ValueError) as e:
            raise OndolError(f"{place} cannot be written again: {e}", "free space, or start a new run") from e
        self.db.event("facts", **facts)

    @staticmethod
    def find(root: Path, text: str) -> Path:
        """The run that `text` means: "last", a path, a folder's name, its label, or a unique beginning or end of it.

        Raises:
            OndolError: none or several; the remedy lists the nearest, or the several.
        """
        if text != "last" and (Path(text) / "run.sqlite").is_file():
            return Path(text)
        runs = _folders(Path(root))
        if not runs:
            raise OndolError(f"there is no run in {root}", "train first, or name the folder that holds your runs")
        if text == "last":
            return runs[-1]
        names = [run.name for run in runs]
        if text:
            for matches in (
                [n for n in names if n == text],
                [n for n in names if _STAMP.sub("", n, count=1) == text],
                [n for n in names if n.startswith(text) or n.endswith(text)],
            ):
                if len(matches) == 1:
                    return Path(root) / matches[0]
                if matches:
                    shown = ", ".join(matches[-8:])
                    raise OndolError(f"'{text}' means {len(matches)} runs in {root}", f"say which: {shown}")
        labels = {_STAMP.sub("", n, count=1) for n in names[-200:]}
        raise OndolError(f"no run in {root} is called '{text}'", nearest(text, {*labels, *names[-3:]}))

    @staticmethod
    def list(root: Path) -> list[RunSummary]:
        """All runs of a folder, oldest first. One with a damaged database is listed as such."""
        return [_summary(path) for path in _folders(Path(root))]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe, as it was given to `create`."""
        return tomllib.loads((self.path / "recipe.toml").read_text(encoding="utf-8"))

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def state(self) -> str:
        """One of STATES, or "died" when it says running and no process holds its lock."""
        state = self.db.meta("state", "created")
        return "died" if state == "running" and _holder(self.path) is None else state

    @state.setter
    def state(self, value: str) -> None:
        if value not in STATES:
            raise OndolError(f"no run is ever '{value}'", nearest(value, STATES))
        self.db.set_meta("state", value)

    def export(self, what: Literal["metrics", "trajectories", "events", "trl", "verl"], path: Path) -> int:
        """Write JSONL, one record a line; returns how many. The file appears when it is whole. For a path that ends with .parquet the
        datasets of other trainers ("trl", "verl") are written as that instead.

        An image is a reference: the file is `images/<sha256>.png` in the run's folder. A metric that is not finite is written as the string "nan", "inf" or "-inf": JSON has no number for it.
        """
        rows: Iterator[dict[str, Any]]
        if what == "metrics":
            rows = ({**row._asdict(), "value": _plain(row.value)} for row in self.db.metrics())
        elif what == "events":
            rows = (event._asdict() for event in self.db.events())
        elif what == "trajectories":
            phases = dict.fromkeys(row.phase for row in self.db.trajectory_rows())
            rows = ({"phase": phase, **t.to_dict()} for phase in phases for t in self.db.trajectories(phase=phase))
        elif what == "trl":
            rows = trl_rows(self)
        elif what == "verl":
            rows = verl_rows(self)
        else:
            raise OndolError(
                f"there is no '{what}' to export", nearest(what, ("metrics", "trajectories", "events", "trl", "verl"))
            )
        path, count = Path(path), 0
        if path.suffix == ".parquet":
            return _parquet(list(rows), what, path)
        part = path.with_name(path.name + ".part")
        try:
            with part.open("w", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps(row) + "\n")
                    count += 1
            part.replace(path)
        except OSError as e:
            raise OndolError(f"{path} cannot be written: {e}", "choose another place, or free space") from e
        finally:
            part.unlink(missing_ok=True)
        return count

    def close(self) -> None:
        self.db.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Lock:
    """The one writer's exclusive lock on `<run>/lock`. The kernel frees it when the process ends, however it ends."""

    def __init__(self, run: Path) -> None:
        self.handle = -1
        handle = -1
        try:
            handle = os.open(run / "lock", os.O_RDWR | os.O_CREAT, 0o644)
            # A reader asking whether a run is alive holds a shared lock for an instant: try again a few times.
            for attempt in range(10):
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if attempt == 9:
                        pid = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
                        raise OndolError(
                            f"{run} is being written by another process (pid {pid})",
                            f"wait for it, stop it (kill {pid}), or start a new run",
                        ) from None
                    time.sleep(0.03)
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        except BaseException as e:
            if handle >= 0:
                os.close(handle)
            if isinstance(e, OSError):
                remedy = "keep runs where you may write, on a disk that supports file locks"
                raise OndolError(f"{run} cannot be locked for writing: {e}", remedy) from e
            raise
        self.handle = handle
        _LOCKS.add(self)

    def release(self) -> None:
        """Closing is enough: the lock goes with the last copy of the handle."""
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1


def _drop_locks() -> None:
    """A forked child is not the writer; its copy of the handle would keep the lock after the writer's death."""
    for lock in list(_LOCKS):
        lock.release()


os.register_at_fork(after_in_child=_drop_locks)


def _holder(run: Path) -> str | None:
    """The pid of the process that holds the run's lock; None when it is free."""
    try:
        handle = os.open(run / "lock", os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
    finally:
        os.close(handle)
    return None


def _new_folder(root: Path, stamp: str, label: str) -> Path:
    """`<stamp>-<label>`; the second of the same second is `<stamp>.2-<label>`."""
    root.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = root / f"{stamp if number == 1 else f'{stamp}.{number}'}-{label}"
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1


def _folders(root: Path) -> list[Path]:
    """Run folders, oldest first: by the stamp in the name, then by when the recipe was written (it never changes)."""
    if not root.is_dir():
        return []

    def age(path: Path) -> tuple[str, int, str]:
        recipe = path / "recipe.toml"
        return path.name[:15], recipe.stat().st_mtime_ns if recipe.exists() else 0, path.name

    return sorted((p for p in root.iterdir() if (p / "run.sqlite").is_file()), key=age)


def _summary(path: Path) -> RunSummary:
    created = path.stat().st_mtime
    try:
        with Run.open(path) as run:
            created = float(run.db.meta("created", created))
            return RunSummary(path, path.name, created, run.state, run.db.marks(), run.db.last_metrics())
    except OndolError:
        return RunSummary(path, path.name, created, "damaged", {}, {})


def _parquet(rows: list[dict[str, Any]], what: str, path: Path) -> int:
    if what not in ("trl", "verl"):
        raise OndolError(f"'{what}' is written as JSON lines", "give a path that ends with .jsonl")
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as e:
        raise OndolError(
            "parquet files need the package pyarrow", "pip install pyarrow, or a path that ends with .jsonl"
        ) from e
    part = path.with_name(path.name + ".part")
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), part)
        part.replace(path)
    except OSError as e:
        raise OndolError(f"{path} cannot be written: {e}", "choose another place, or free space") from e
    finally:
        part.unlink(missing_ok=True)
    return len(rows)


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
