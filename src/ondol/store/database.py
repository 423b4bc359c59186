"""A run's SQLite file: metrics, trajectories, events and a few facts about the run, in whole steps.

WAL mode: one process writes while others read. What is not finite stays honest: SQLite keeps infinities as they
are and turns a NaN into NULL, so in the table `metrics` NULL means NaN and nothing else, and reads give NaN back.
A trajectory's JSON is Python's (NaN and Infinity as bare words), so every float comes back with every bit.
"""

from __future__ import annotations

import json
import math
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ondol.errors import OndolError
from ondol.records import Trajectory
from ondol.store.images import Images
from ondol.store.metrics import metric

_VERSION = 1
_SCHEMA = """
CREATE TABLE metrics(id INTEGER PRIMARY KEY, phase TEXT NOT NULL, step INT NOT NULL, name TEXT NOT NULL, value REAL,
    UNIQUE(phase, step, name));
CREATE TABLE trajectories(id INTEGER PRIMARY KEY, phase TEXT NOT NULL, step INT NOT NULL, problem INT NOT NULL,
    sample INT NOT NULL, problem_id TEXT, score REAL, reward REAL, stop_reason TEXT, tokens INT, data TEXT NOT NULL,
    UNIQUE(phase, step, problem, sample));
CREATE TABLE events(id INTEGER PRIMARY KEY, time REAL NOT NULL, kind TEXT NOT NULL, data TEXT NOT NULL);
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
_PAGE = 64  # trajectories read at once: an open cursor would hold back SQLite's clean-up of the write-ahead log


class MetricRow(NamedTuple):
    phase: str
    step: int
    name: str
    value: float


class TrajectoryRow(NamedTuple):
    """A trajectory's line in a list: all but its data. `tokens` counts the whole episode."""

    phase: str
    step: int
    problem: int
    sample: int
    problem_id: str
    score: float
    reward: float
    stop_reason: str
    tokens: int


class Event(NamedTuple):
    """Something that happened. `time` is in seconds since 1970."""

    time: float
    kind: str
    data: dict[str, Any]


class Database:
    """One run's database. Threads may share it; other processes may read while this one writes.

    Args:
        path: the SQLite file; made when it is not there and `write` is on.
        write: False opens it for reading only and never makes or locks anything.
    Attributes:
        images: the pictures of its trajectories, in the folder `images` beside it.
    """

    def __init__(self, path: Path, write: bool = True) -> None:
        self.path, self.write = Path(path), write
        self.images = Images(self.path.with_name("images"))
        self._lock = threading.RLock()
        if not write and not self.path.exists():
            raise OndolError(f"{self.path}: there is no such run database", "give the folder of a run")
        with self._errors():
            self._db = self._connect("rwc" if write else "ro")
            if write:
                try:
                    self._prepare()
                except BaseException:
                    self._db.close()
                    raise
                return
            try:
                version = self._version()
            except sqlite3.OperationalError:
                # A read-only disk has no place for the WAL index; with no log to read, the file alone is the truth.
                self._db.close()
                log = self.path.with_name(self.path.name + "-wal")
                if log.exists() and log.stat().st_size:
                    raise
                self._db = self._connect("ro&immutable=1")
                version = self._version()
        if version != _VERSION:
            self._db.close()
            raise OndolError(f"{self.path}: not a run database of this version of Ondol ({version})", "update Ondol")

    def _connect(self, mode: str) -> sqlite3.Connection:
        uri = f"{self.path.absolute().as_uri()}?mode={mode}"
        db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=30)
        db.execute("PRAGMA busy_timeout = 30000")
        return db

    def _version(self) -> int:
        self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()  # touches the file, so that damage shows now
        return self._db.execute("PRAGMA user_version").fetchone()[0]

    def _prepare(self) -> None:
        # Where WAL cannot be had (some network disks) SQLite stays with its rollback journal: slower, as safe.
        self._db.execute("PRAGMA journal_mode = WAL")
        # FULL: a checkpoint must never be more durable than the steps that led to it.
        self._db.execute("PRAGMA synchronous = FULL")
        version = self._version()
        if version == 0:
            self._db.execute("BEGIN IMMEDIATE")
            for statement in _SCHEMA.split(";"):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {_VERSION}")
            self._db.execute("COMMIT")
        elif version != _VERSION:
            raise OndolError(f"{self.path}: written by another version of Ondol (format {version})", "update Ondol")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as e:
            raise explain_sqlite(e, self.path) from e

    # Writing

    @contextmanager
    def step(self) -> Iterator[None]:
        """All that is written inside appears at once, or not at all. Nested ones join the outer.

        Other threads wait meanwhile, so gather first and write last.
        """
        if not self.write:
            raise OndolError(f"{self.path} was opened for reading only", "open the run with write=True")
        with self._lock:
            if self._db.in_transaction:
                yield
                return
            with self._errors():
                self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                with self._errors():
                    self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def add_metrics(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Record numbers of one step; a name written again in the same step is replaced.

        Raises:
            OndolError: a name is not registered (see `store.metrics`), or a value is not a number.
        """
        rows = []
        for name, value in values.items():
            metric(name)
            try:
                rows.append((phase, step, name, float(value)))
            except (TypeError, ValueError) as e:
                raise OndolError(f"the metric '{name}' is not a number: {value!r:.80}") from e
        with self.step(), self._errors():
            self._db.executemany(
                "INSERT INTO metrics(phase, step, name, value) VALUES(?, ?, ?, ?) "
                "ON CONFLICT DO UPDATE SET value = excluded.value",
                rows,
            )

    def add_trajectories(self, phase: str, step: int, trajectories: Sequence[Trajectory]) -> None:
        """Record whole trajectories; (phase, step, problem, sample) written again is replaced.

        Images are stored first, so that no record ever refers to one that is not there.
        """
        rows = []
        for t in trajectories:
            _, problem, sample = t.key
            data = _dumps(t.to_dict(), f"trajectory {t.key}")
            shown = (t.problem.id, t.score, t.reward, t.stop_reason.value, len(t.ids))
            rows.append((phase, step, problem, sample, *shown, data))
            self.images.save(t.images)
        with self.step(), self._errors():
            self._db.executemany(
                "INSERT OR REPLACE INTO trajectories"
                "(phase, step, problem, sample, problem_id, score, reward, stop_reason, tokens, data) "
                "VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                rows,
            )

    def event(self, kind: str, **data: Any) -> None:
        """Record that something happened, now. Events are history: rewinding keeps them."""
        with self.step(), self._errors():
            row = (time.time(), kind, _dumps(data, f"event '{kind}'"))
            self._db.execute("INSERT INTO events(time, kind, data) VALUES(?, ?, ?)", row)

    def set_meta(self, key: str, value: Any) -> None:
        """Set a fact about the run (any JSON value)."""
        with self.step(), self._errors():
            self._db.execute("INSERT OR REPLACE INTO meta VALUES(?, ?)", (key, _dumps(value, f"meta '{key}'")))

    def forget_after(self, phase: str, step: int) -> int:
        """Delete metrics and trajectories of `phase` with a later step, for exact resume. Returns the rows deleted."""
        with self.step(), self._errors():
            where = "WHERE phase = ? AND step > ?"
            return sum(
                self._db.execute(f"DELETE FROM {table} {where}", (phase, step)).rowcount
                for table in ("metrics", "trajectories")
            )

    def marks(self) -> dict[str, int]:
        """The last step recorded of each phase, in the order the phases began. Keep it in a checkpoint."""
        rows = self._rows(
            "SELECT phase, max(step) FROM (SELECT phase, step, id FROM metrics "
            "UNION ALL SELECT phase, step, 1e18 FROM trajectories) GROUP BY phase ORDER BY min(id), phase"
        )
        return dict(rows)

    def rewind(self, marks: Mapping[str, int]) -> int:
        """Go back to `marks`: later steps of its phases, and other phases whole, are forgotten.

        Returns the rows deleted; when there were any, an event "rewound" says so.
        """
        with self.step():
            deleted = sum(self.forget_after(phase, step) for phase, step in marks.items())
            for phase in set(self.marks()) - set(marks):
                deleted += self.forget_after(phase, -(2**62))
            if deleted:
                self.event("rewound", marks=dict(marks), rows=deleted)
        return deleted

    # Reading

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock, self._errors():
            return self._db.execute(query, values).fetchall()

    def metrics(self, name: str | None = None, phase: str | None = None) -> list[MetricRow]:
        """Rows in the order written. `name` may be a family ("stop/*")."""
        where, values = ["1"], []
        if name is not None:
            family = name.endswith("*")
            where.append("substr(name, 1, ?) = ?" if family else "name = ?")
            values += [len(name) - 1, name[:-1]] if family else [name]
        if phase is not None:
            where.append("phase = ?")
            values.append(phase)
        query = f"SELECT phase, step, name, value FROM metrics WHERE {' AND '.join(where)} ORDER BY id"
        return [MetricRow(p, s, n, _number(v)) for p, s, n, v in self._rows(query, values)]

    def last_metrics(self) -> dict[str, float]:
        """The newest value of every metric."""
        rows = self._rows("SELECT name, value FROM metrics WHERE id IN (SELECT max(id) FROM metrics GROUP BY name)")
        return {name: _number(value) for name, value in rows}

    def trajectories(self, **filters: Any) -> Iterator[Trajectory]:
        """Trajectories in the order of (phase's writing, step, problem, sample). Filters: see `trajectory_rows`."""
        rows = self._select("id", **filters)
        for start in range(0, len(rows), _PAGE):
            ids = [row[0] for row in rows[start : start + _PAGE]]
            marks = ",".join("?" * len(ids))
            found = dict(self._rows(f"SELECT id, data FROM trajectories WHERE id IN ({marks})", ids))
            yield from (Trajectory.from_dict(json.loads(found[i])) for i in ids if i in found)

    def trajectory_rows(self, **filters: Any) -> list[TrajectoryRow]:
        """The list of trajectories without their data.

        Filters: phase, step, problem, sample, problem_id, stop_reason (equal to), score_min, score_max
        (inclusive), limit.
        """
        rows = self._select(", ".join(TrajectoryRow._fields), **filters)
        found = (TrajectoryRow(*row) for row in rows)
        return [row._replace(score=_number(row.score), reward=_number(row.reward)) for row in found]

    def _select(
        self,
        columns: str,
        phase: str | None = None,
        step: int | None = None,
        problem: int | None = None,
        sample: int | None = None,
        problem_id: str | None = None,
        stop_reason: str | None = None,
        score_min: float | None = None,
        score_max: float | None = None,
        limit: int | None = None,
    ) -> list[tuple[Any, ...]]:
        tests = {
            "phase = ?": phase,
            "step = ?": step,
            "problem = ?": problem,
            "sample = ?": sample,
            "problem_id = ?": problem_id,
            "stop_reason = ?": stop_reason,
            "score >= ?": score_min,
            "score <= ?": score_max,
        }
        used = {test: value for test, value in tests.items() if value is not None}
        query = (
            f"SELECT {columns} FROM trajectories "
            "JOIN (SELECT phase AS p, min(id) AS began FROM trajectories GROUP BY phase) ON p = phase "
            f"WHERE {' AND '.join(['1', *used])} ORDER BY began, step, problem, sample LIMIT ?"
        )
        return self._rows(query, [*used.values(), -1 if limit is None else limit])

    def events(self, kind: str | None = None) -> list[Event]:
        """Events in the order they happened."""
        query = "SELECT time, kind, data FROM events WHERE kind = ? OR ? IS NULL ORDER BY id"
        return [Event(t, k, json.loads(data)) for t, k, data in self._rows(query, (kind, kind))]

    def meta(self, key: str, default: Any = None) -> Any:
        """A fact about the run."""
        rows = self._rows("SELECT value FROM meta WHERE key = ?", (key,))
        return json.loads(rows[0][0]) if rows else default

    def close(self) -> None:
        with self._lock, self._errors():
            self._db.close()


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _dumps(value: Any, where: str) -> str:
    def plain(item: Any) -> Any:
        if hasattr(item, "item"):  # a NumPy or torch scalar
            return item.item()
        raise TypeError(f"a {type(item).__name__}")

    try:
        return json.dumps(value, default=plain)
    except (TypeError, ValueError) as e:
        raise OndolError(f"{where} holds what JSON cannot carry: {e}", "use numbers, strings, lists and dicts") from e


def explain_sqlite(error: sqlite3.Error, path: Path) -> OndolError:
    """SQLite's failure in our words."""
    what, remedy = _FAILURES.get(getattr(error, "sqlite_errorcode", 0) & 0xFF, (None, None))  # low byte: primary code
    return OndolError(f"{path}: {what} ({error})" if what else f"{path}: {error}", remedy)


_FAILURES = {
    sqlite3.SQLITE_FULL: ("the disk is full", "free some space, then resume: the steps recorded so far are safe"),
    sqlite3.SQLITE_READONLY: ("it cannot be written", "check its permissions, and whether the disk is read-only"),
    sqlite3.SQLITE_CANTOPEN: ("it cannot be opened", "check that the folder exists and may be read and written"),
    sqlite3.SQLITE_BUSY: ("another process has been writing to it for 30 s", "stop the other writer"),
    sqlite3.SQLITE_CORRUPT: ("the file is damaged", "restore it, or start a new run from the last checkpoint"),
    sqlite3.SQLITE_NOTADB: ("this is not an SQLite file", "give the folder of a run"),
    sqlite3.SQLITE_IOERR: ("the disk failed or is full", "check the disk, then resume the run"),
}
