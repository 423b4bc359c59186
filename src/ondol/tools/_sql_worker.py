"""The child of `ondol.tools.sql`: opens databases and runs one read-only query at a time on them.

{"engine", "path", "script", "query", "rows", "steps", "timeout_s"} in; out comes {"columns", "rows", "more"}, or
{"kind", "text"} for what went wrong. Limits that an engine keeps itself answer in words; the process's own (address
space, no file may grow) and being killed are for what an engine does not keep.
"""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import threading
import time
from functools import lru_cache
from typing import Any

from ondol.sandbox.child import serve

_KEPT = 8  # databases open at once
_CELL_CHARS = 2000
_EVERY = 1000  # SQLite's instructions between two looks at the limits

#: what SQLite's own limits are lowered to: (name, value); https://www.sqlite.org/limits.html
_SQLITE_LIMITS = (
    ("SQLITE_LIMIT_LENGTH", 1_000_000),
    ("SQLITE_LIMIT_SQL_LENGTH", 20_000),
    ("SQLITE_LIMIT_COLUMN", 200),
    ("SQLITE_LIMIT_EXPR_DEPTH", 200),
    ("SQLITE_LIMIT_COMPOUND_SELECT", 50),
    ("SQLITE_LIMIT_VDBE_OP", 100_000),
    ("SQLITE_LIMIT_LIKE_PATTERN_LENGTH", 100),
    ("SQLITE_LIMIT_ATTACHED", 0),
    ("SQLITE_LIMIT_TRIGGER_DEPTH", 10),
)
_READ = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}
_PRAGMAS = {"table_info", "table_xinfo", "table_list", "foreign_key_list", "index_list", "index_info"}
_FUNCTIONS = {"load_extension", "fts3_tokenizer", "readfile", "writefile", "edit"}  # not to be called

_DUCKDB_LOCKED = (
    "SET python_enable_replacements = false",  # or a table's name would find our variables
    "SET enable_external_access = false",  # no file, no network, no extension
    "SET lock_configuration = true",
)
_DUCKDB_KINDS = {"SELECT", "EXPLAIN", "MULTI"}  # MULTI: a PIVOT, which is made of several

_memory_mib = int(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1].isdigit() else 64


class SQLite:
    """A database of SQLite, which from now on only reads."""

    def __init__(self, path: str | None, script: str | None) -> None:
        target = f"file:{_quoted(path)}?mode=ro" if path is not None else ":memory:"
        self.connection = c = sqlite3.connect(target, uri=path is not None, isolation_level=None)
        c.text_factory = lambda raw: raw.decode("utf-8", "replace")
        if script:
            c.executescript(script)
        c.execute("SELECT count(*) FROM sqlite_master")  # a file that is no database is told now
        for pragma in ("query_only = ON", "temp_store = MEMORY", "trusted_schema = OFF", "cell_size_check = ON"):
            c.execute(f"PRAGMA {pragma}")
        c.execute(f"PRAGMA hard_heap_limit = {_memory_mib << 20}")
        for name, value in _SQLITE_LIMITS:
            c.setlimit(getattr(sqlite3, name), value)
        c.set_authorizer(_authorize)

    def run(self, query: str, rows: int, steps: int, timeout_s: float) -> dict[str, Any]:
        why, looks, ends = "", 0, time.monotonic() + timeout_s

        def look() -> bool:
            nonlocal why, looks
            looks += 1
            if looks * _EVERY > steps:
                why = f"more than {steps:,} steps"
            elif time.monotonic() > ends:
                why = f"longer than {timeout_s:g} s"
            return bool(why)

        self.connection.set_progress_handler(look, _EVERY)
        try:
            cursor = self.connection.execute(query)
            with contextlib.closing(cursor):
                columns = [d[0] for d in cursor.description or ()]
                return _table(columns, cursor.fetchmany(rows + 1), rows)
        except MemoryError:
            return _memory()
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as e:
            if why:
                return {"kind": "timeout", "text": f"TimeoutError: the query took {why}"}
            return _failed(str(e), "not authorized" in str(e) or "prohibited" in str(e))


def _authorize(action: int, first: str | None, second: str | None, database: str | None, trigger: str | None) -> int:
    allowed = (
        action in _READ
        or (action == sqlite3.SQLITE_FUNCTION and (second or "").lower() not in _FUNCTIONS)
        or (action == sqlite3.SQLITE_PRAGMA and (first or "").lower() in _PRAGMAS)
    )
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


class DuckDB:
    """A database of DuckDB, which from now on only reads, and nothing but itself."""

    def __init__(self, path: str | None, script: str | None) -> None:
        import duckdb

        self.duckdb = duckdb
        config: dict[str, Any] = {
            "threads": 1,
            "memory_limit": f"{_memory_mib}MiB",
            "max_temp_directory_size": "0B",
            "temp_directory": "",  # else one is made in the folder that the process was started in
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "allow_community_extensions": False,
        }
        self.connection = duckdb.connect(path or ":memory:", read_only=path is not None, config=config)
        for statement in (script or "", *_DUCKDB_LOCKED):
            self.connection.execute(statement)

    def run(self, query: str, rows: int, steps: int, timeout_s: float) -> dict[str, Any]:
        c, errors = self.connection, self.duckdb
        timer = threading.Timer(timeout_s, c.interrupt)
        timer.daemon = True
        try:
            statements = c.extract_statements(query)
            if len(statements) != 1:
                return _failed("one statement at a time" if statements else "the query is empty", False)
            if statements[0].type.name not in _DUCKDB_KINDS:
                return _failed("", True)
            timer.start()
            # a data-modifying CTE is a SELECT too: the transaction refuses it
            c.execute("BEGIN TRANSACTION READ ONLY")
            try:
                c.execute(query)
                return _table([d[0] for d in c.description or ()], c.fetchmany(rows + 1), rows)
            finally:
                with contextlib.suppress(errors.Error):
                    c.execute("ROLLBACK")
        except errors.InterruptException:
            return {"kind": "timeout", "text": f"TimeoutError: the query took longer than {timeout_s:g} s"}
        except (errors.OutOfMemoryException, MemoryError):
            return _memory()
        except (errors.Error, ValueError, RuntimeError) as e:
            first = str(e).strip().split("\n\n")[0]  # without the picture of the line
            return _failed(first, "read-only" in first or "launched in read" in first or "Permission Error" in first)
        finally:
            timer.cancel()


def _memory() -> dict[str, Any]:
    return {"kind": "memory", "text": f"MemoryError: the query needs more than {_memory_mib} MiB"}


def _failed(text: str, forbidden: bool) -> dict[str, Any]:
    said = "only reading the tables is allowed" if forbidden else " ".join(text.split())
    return {"kind": "error", "text": f"Error: {said}"[:400]}


def _table(columns: list[str], found: list[Any], rows: int) -> dict[str, Any]:
    return {"columns": columns, "rows": [[_plain(v) for v in row] for row in found[:rows]], "more": len(found) > rows}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (bytes, memoryview)):
        value = f"x'{bytes(value[: _CELL_CHARS // 2]).hex()}'"
    return str(value)[:_CELL_CHARS]


def _quoted(path: str | None) -> str:
    from urllib.parse import quote

    return quote(path or "")


@lru_cache(maxsize=_KEPT)
def _database(engine: str, path: str | None, script: str | None) -> SQLite | DuckDB | str:
    """The database, or why it cannot be opened."""
    try:
        return {"sqlite": SQLite, "duckdb": DuckDB}[engine](path, script)
    except ImportError:
        return "the package duckdb is not installed"
    except Exception as e:  # whatever an engine says of a file or a script that it cannot read
        return f"{type(e).__name__}: {e}"


def prepare(question: dict[str, Any]) -> None:
    _database(question["engine"], question["path"], question["script"])


def answer(question: dict[str, Any]) -> dict[str, Any]:
    opened = _database(question["engine"], question["path"], question["script"])
    if isinstance(opened, str):
        return {"kind": "unusable", "text": opened}
    return opened.run(question["query"], question["rows"], question["steps"], question["timeout_s"])


def _no_files() -> None:
    """No file may grow, whatever writes it."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


if __name__ == "__main__":
    _no_files()
    serve(answer, prepare)
