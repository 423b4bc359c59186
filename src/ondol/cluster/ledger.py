"""Who works on which episode: one SQLite file that many processes share, so that none is lost and none counts twice.

An episode is waiting, at work or done. Who works on it holds a lease, renewed by a heartbeat; when that stops (killed, frozen, cut off), the lease ends and another
takes the episode from its last saved turn. Whoever comes back too late is told so and drops what it has.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ondol.records import Trajectory
from ondol.store.database import explain_sqlite

_TABLE = """
create table if not exists episodes (
    problem integer, sample integer, state text not null default 'waiting', owner text, lease real, taken integer not null default 0,
    trajectory text, primary key (problem, sample))
"""
_BUSY_S = 30.0  # for another process's transaction to end

Key = tuple[int, int]


@dataclass(frozen=True)
class Claimed:
    """An episode to work on. `begun`: what somebody else did of it before; `taken`: how often it was taken up, this time included."""

    key: Key
    begun: Trajectory | None
    taken: int


class Bookkeeping(Protocol):
    """A ledger as one worker, or the parent, sees it: the file itself (`Ledger`), or one kept elsewhere. See `Ledger` for what each does."""

    lease_s: float

    def add(self, keys: Iterable[Key]) -> None: ...
    def claim(self, most: int) -> list[Claimed]: ...
    def renew(self) -> int: ...
    def save(self, key: Key, t: Trajectory) -> bool: ...
    def finish(self, key: Key, t: Trajectory) -> bool: ...
    def release(self, owner: str) -> int: ...
    def counts(self) -> dict[str, int]: ...
    def holders(self) -> dict[str, tuple[int, float]]: ...
    def results(self) -> dict[Key, Trajectory]: ...
    def close(self) -> None: ...


class Ledger:
    """One process's view of the file. Close it."""

    def __init__(self, path: Path, owner: str, lease_s: float = 10.0) -> None:
        self.path, self.owner, self.lease_s = path, owner, lease_s
        try:
            self._db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
            self._db.execute("pragma journal_mode=wal")
            self._db.execute("pragma synchronous=normal")
            self._db.execute(_TABLE)
        except sqlite3.Error as e:
            raise explain_sqlite(e, path) from e

    def _do(self, statement: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        """Raises OndolError where the file cannot be read or written (disk full, say)."""
        try:
            return self._db.execute(statement, values)
        except sqlite3.Error as e:
            raise explain_sqlite(e, self.path) from e

    def add(self, keys: Iterable[Key]) -> None:
        """Episodes to be done; those that are there already stay as they are."""
        with self._db:  # all of them or none
            self._do("begin")
            for key in keys:
                self._do("insert or ignore into episodes (problem, sample) values (?, ?)", key)
            self._do("commit")

    def claim(self, most: int, now: float | None = None) -> list[Claimed]:
        """Take up to `most` episodes that nobody works on (any more), the lowest first."""
        now = time.time() if now is None else now
        if most < 1:
            return []
        rows = self._do(
            "update episodes set state = 'at work', owner = ?, lease = ?, taken = taken + 1 where rowid in (select rowid from episodes "
            "where state = 'waiting' or (state = 'at work' and lease < ?) order by problem, sample limit ?) "
            "returning problem, sample, trajectory, taken",
            (self.owner, now + self.lease_s, now, most),
        ).fetchall()
        return [
            Claimed((p, s), None if t is None else Trajectory.from_dict(json.loads(t)), n)
            for p, s, t, n in sorted(rows)
        ]

    def renew(self, now: float | None = None) -> int:
        """The heartbeat; how many episodes are ours."""
        now = time.time() if now is None else now
        return self._do(
            "update episodes set lease = ? where owner = ? and state = 'at work'", (now + self.lease_s, self.owner)
        ).rowcount

    def save(self, key: Key, t: Trajectory) -> bool:
        """Keep what there is of an episode; False when it is no longer ours."""
        return self._write(key, t, "at work")

    def finish(self, key: Key, t: Trajectory) -> bool:
        """It is done, once and for all; False when it is no longer ours, and then it does not count."""
        return self._write(key, t, "done")

    def _write(self, key: Key, t: Trajectory, state: str) -> bool:
        row = (json.dumps(t.to_dict()), state, *key, self.owner)
        return (
            self._do(
                "update episodes set trajectory = ?, state = ? where problem = ? and sample = ? and owner = ? and state = 'at work'",
                row,
            ).rowcount
            == 1
        )

    def release(self, owner: str) -> int:
        """Somebody is known to be gone: what it worked on waits again, at once."""
        return self._do(
            "update episodes set state = 'waiting', owner = null where owner = ? and state = 'at work'", (owner,)
        ).rowcount

    def counts(self) -> dict[str, int]:
        """Episodes by state."""
        found = dict(self._do("select state, count(*) from episodes group by state").fetchall())
        return {state: found.get(state, 0) for state in ("waiting", "at work", "done")}

    def holders(self, now: float | None = None) -> dict[str, tuple[int, float]]:
        """Owner -> (episodes at work, seconds since its last heartbeat)."""
        now = time.time() if now is None else now
        rows = self._do("select owner, count(*), max(lease) from episodes where state = 'at work' group by owner")
        return {owner: (n, now - (lease - self.lease_s)) for owner, n, lease in rows}

    def taken(self) -> dict[Key, int]:
        """How often each episode was taken up."""
        return {(p, s): n for p, s, n in self._do("select problem, sample, taken from episodes")}

    def results(self) -> dict[Key, Trajectory]:
        """All that are done, in order."""
        rows = self._do(
            "select problem, sample, trajectory from episodes where state = 'done' order by problem, sample"
        )
        return {(p, s): Trajectory.from_dict(json.loads(t)) for p, s, t in rows}

    def close(self) -> None:
        self._db.close()
