"""The SQL tool: one read-only query at a time on a database of SQLite or DuckDB, in a process that can be killed."""

from __future__ import annotations

import asyncio
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from ondol.errors import OndolError
from ondol.records import Problem, ToolResult
from ondol.sandbox.child import Judges
from ondol.sandbox.monty import clean
from ondol.tools.base import Tool

Engine = Literal["sqlite", "duckdb"]

_KILL_S = 1.0  # beyond the engine's own limit, before its process is killed
_TURN_S = 120.0  # for a query to wait for a process


class Sql(Tool):
    """Query a database. Nothing can be written, no file but the database can be read, no extension can be loaded.

    The database is the problem's own (`problem.data["database"]`, a script), else `path`, else what `script` makes.
    """

    name: ClassVar[str] = "sql"
    main_argument: ClassVar[str] = "query"
    parameters: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {"query": {"type": "string", "description": "One SELECT statement."}},
        "required": ["query"],
    }

    description: str = Field(
        default="Runs one SQL query on the database, read-only, and returns its rows.",
        description="what the model reads about the tool",
    )
    timeout_s: float = Field(default=2.0, gt=0, le=600, description="wall time of one query")
    engine: Engine = Field(default="sqlite", description="sqlite, or duckdb (needs the package)")
    path: Path | None = Field(default=None, description="a database file; it is opened for reading only")
    script: str | None = Field(default=None, description="SQL that makes a database in memory")
    rows: int = Field(
        default=20, ge=1, le=10_000, description="most rows of a result; further ones are counted as more"
    )
    output_chars: int = Field(default=1000, ge=64, description="longer output is cut in the middle")
    steps: int = Field(
        default=5_000_000, ge=1000, description="sqlite: instructions of its virtual machine; the same on every machine"
    )
    memory_mib: int = Field(default=64, ge=16, le=4096, description="memory of the engine, in MiB")

    @model_validator(mode="after")
    def _usable(self) -> Sql:
        if self.path is not None and self.script is not None:
            raise ValueError("path and script are two databases: give one of them")
        if self.path is not None and not self.path.is_file():
            raise ValueError(f"path: there is no file {self.path}")
        if self.engine == "duckdb" and importlib.util.find_spec("duckdb") is None:
            raise OndolError("the engine 'duckdb' needs the package duckdb", "pip install 'ondol[data]'")
        return self

    @property
    def deadline_s(self) -> float:
        return (
            self.timeout_s + _TURN_S + 90.0
        )  # the query's limit is kept elsewhere; opening its database may take time

    def session(self, trajectory_id: str) -> SqlSession:
        return SqlSession(self, self.script)

    def open(self, trajectory_id: str, problem: Problem) -> SqlSession:
        return SqlSession(self, problem.data.get("database", self.script))

    def ask(self, query: str, script: str | None = None, rows: int | None = None) -> dict[str, Any]:
        """Run a query; {"columns", "rows", "more"}, or {"kind", "text"} of what went wrong. Blocks.

        `script` makes the database, instead of the settings. Raises OndolError for one that cannot be opened.
        """
        own = script is not None and script != self.script
        question = {
            "engine": self.engine,
            "path": str(self.path.absolute()) if self.path is not None and not own else None,
            "script": script if own else self.script,
            "query": query.encode("utf-8", "replace").decode(),
            "rows": rows or self.rows,
            "steps": self.steps,
            "timeout_s": self.timeout_s,
        }
        try:
            found = _processes(self.memory_mib).ask(question, self.timeout_s + _KILL_S)
        except TimeoutError as e:
            return {"kind": "timeout", "text": f"TimeoutError: {e}"}
        if found is None:
            return {"kind": "timeout", "text": f"TimeoutError: the query took longer than {self.timeout_s:g} s"}
        if found.get("kind") == "unusable":
            raise OndolError(f"the database of the tool 'sql' cannot be used: {found['text']}", "check path and script")
        return found


class SqlSession:
    """It remembers nothing: the database is never changed."""

    def __init__(self, tool: Sql, script: str | None) -> None:
        self.tool, self.script = tool, script

    async def call(self, arguments: dict[str, Any]) -> ToolResult:
        found = await asyncio.to_thread(self.tool.ask, arguments["query"], self.script)
        if "kind" in found:
            return ToolResult(clean(found["text"], self.tool.output_chars), ok=False, kind=found["kind"])
        return ToolResult(clean(as_text(found), self.tool.output_chars))

    async def close(self) -> None:
        pass


def as_text(found: dict[str, Any]) -> str:
    """A result as a person would write it down: a single value alone, else a line of names and a line for each row."""
    columns, rows = found["columns"], found["rows"]
    if len(rows) == len(columns) == 1 and not found["more"]:
        return _shown(rows[0][0])
    if not columns:
        return "(no result)"
    lines = [" | ".join(columns), *(" | ".join(map(_shown, row)) for row in rows)]
    if not rows:
        lines.append("(no rows)")
    return "\n".join([*lines, "(more rows)"] if found["more"] else lines)


def _shown(value: Any) -> str:
    if value is None:
        return "NULL"
    return f"{value:.10g}" if isinstance(value, float) else " ".join(str(value).split("\n"))


@lru_cache(maxsize=4)
def _processes(memory_mib: int) -> Judges:
    """They serve every tool of this process with the same limit on memory."""
    return Judges("ondol.tools._sql_worker", str(memory_mib), turn_s=_TURN_S)
