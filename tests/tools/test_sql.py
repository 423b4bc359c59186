"""The SQL tool: what a query may not do, under either engine, and that limits are kept and told."""

from __future__ import annotations

import asyncio
import sqlite3
import time

import pytest

from ondol import parts
from ondol.envs.tool import ToolEnv
from ondol.errors import OndolError
from ondol.records import Message, Problem, ToolCall
from ondol.tools.base import call_tool
from ondol.tools.sql import Sql

SCRIPT = "CREATE TABLE t (a INTEGER, b TEXT); INSERT INTO t VALUES (1, 'x'), (2, 'y'), (3, NULL);"
ENGINES = [
    "sqlite",
    pytest.param("duckdb", marks=pytest.mark.skipif("not __import__('importlib.util').util.find_spec('duckdb')")),
]
engines = pytest.mark.parametrize("engine", ENGINES)


def ask(tool: Sql, *queries: str):
    async def go():
        session = tool.session("t")
        return [await call_tool(session, tool, ToolCall("sql", {"query": q})) for q in queries]

    return asyncio.run(go())


@engines
def test_results_are_shown_as_a_person_would(engine) -> None:
    tool = Sql(engine=engine, script=SCRIPT, rows=2)
    texts = [r.text for r in ask(tool, "SELECT a, b FROM t WHERE a > 1 ORDER BY a", "SELECT a FROM t WHERE a > 9",
                                 "SELECT a FROM t ORDER BY a", "SELECT 1.0 / 3", "SELECT NULL", "SELECT count(*) FROM t;")]  # fmt: skip
    assert texts == ["a | b\n2 | y\n3 | NULL", "a\n(no rows)", "a\n1\n2\n(more rows)", "0.3333333333", "NULL", "3"]


@engines
def test_nothing_is_written(engine, tmp_path) -> None:
    tool = Sql(engine=engine, script=SCRIPT)
    attempts = [
        "INSERT INTO t VALUES (9, 'z')",
        "UPDATE t SET a = 9",
        "DELETE FROM t",
        "DROP TABLE t",
        "CREATE TABLE u (a INTEGER)",
        "CREATE TEMP TABLE u (a INTEGER)",
        "WITH n AS (INSERT INTO t VALUES (9, 'z') RETURNING a) SELECT * FROM n",
        "SELECT 1; DROP TABLE t",
        f"ATTACH '{tmp_path}/new.db' AS new",
        f"VACUUM INTO '{tmp_path}/copy.db'",
        f"COPY t TO '{tmp_path}/t.csv'",
        f"EXPORT DATABASE '{tmp_path}/all'",
        "PRAGMA journal_mode = WAL",
        "PRAGMA query_only = OFF",
        "PRAGMA writable_schema = ON",
        "SET memory_limit = '9GB'",
        "SET enable_external_access = true",
        "BEGIN",
        "COMMIT",
    ]
    results = ask(tool, *attempts, "SELECT count(*), sum(a) FROM t")
    assert [a for a, r in zip(attempts, results) if r.ok] == []
    assert {r.kind for r in results[:-1]} == {"error"} and all(r.text.startswith("Error: ") for r in results[:-1])
    assert results[-1].text.endswith("3 | 6") and list(tmp_path.iterdir()) == []


@engines
def test_no_file_is_read_and_no_code_loaded(engine, tmp_path) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text("word\nxyzzy\n")
    tool = Sql(engine=engine, script=SCRIPT)
    attempts = [
        f"SELECT * FROM read_text('{secret}')",
        f"SELECT * FROM read_csv('{secret}')",
        f"SELECT * FROM '{secret}'",
        f"SELECT readfile('{secret}')",
        f"SELECT * FROM glob('{tmp_path}/*')",
        f"ATTACH '{secret}' AS s",
        f"SELECT load_extension('{secret}')",
        "SELECT fts3_tokenizer('simple')",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SELECT * FROM read_csv('http://127.0.0.1:9/x')",
        "SELECT * FROM question",  # a variable of the process
        "SELECT getenv('HOME')",
    ]
    results = ask(tool, *attempts)
    assert [a for a, r in zip(attempts, results) if r.ok] == []
    assert not any("xyzzy" in r.text for r in results)


LONG = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000000000) SELECT count(*) FROM n"


@engines
def test_limits_are_kept_and_the_next_query_works(engine) -> None:
    tool = Sql(engine=engine, script=SCRIPT, timeout_s=0.5, steps=10**9, memory_mib=16)
    started = time.perf_counter()
    long, big, after = ask(
        tool,
        LONG,
        "SELECT count(DISTINCT a || b) FROM (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3000000) "
        "SELECT i AS a, 'some text that takes room, and then some more of it' AS b FROM n)",
        "SELECT sum(a) FROM t",
    )
    assert long.kind == "timeout" and "longer than 0.5 s" in long.text
    assert big.kind in ("memory", "timeout") and after.text == "6"
    assert time.perf_counter() - started < 20


def test_steps_are_the_same_on_every_machine() -> None:
    tool = Sql(script=SCRIPT, steps=100_000, timeout_s=60)
    count = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT {}) SELECT count(*) FROM n"
    few, many = ask(tool, count.format(100), count.format(100_000))
    assert few.text == "100" and many.kind == "timeout" and many.text.endswith("more than 100,000 steps")


def test_memory_is_bounded() -> None:
    tool = Sql(script=SCRIPT, steps=10**9, timeout_s=30, memory_mib=16)
    query = "WITH RECURSIVE n(i, s) AS (SELECT 1, '' UNION SELECT i + 1, hex(zeroblob(5000)) || i FROM n LIMIT 100000) SELECT max(length(s)) FROM n"
    (result,) = ask(tool, query)
    assert result.kind == "memory" and "16 MiB" in result.text


def test_a_process_that_dies_harms_its_own_call_only() -> None:
    from ondol.tools import sql

    tool = Sql(script=SCRIPT, memory_mib=17)
    assert ask(tool, "SELECT sum(a) FROM t")[0].text == "6"
    for judge in sql._processes(17).all:
        judge.stop()
    assert ask(tool, "SELECT sum(a) FROM t")[0].text == "6"


@engines
def test_a_file_is_opened_for_reading(engine, tmp_path) -> None:
    path = tmp_path / "some data.db"
    if engine == "sqlite":
        with sqlite3.connect(path) as c:
            c.executescript(SCRIPT)
    else:
        import duckdb

        with duckdb.connect(str(path)) as c:
            c.execute(SCRIPT)
    before = path.read_bytes()
    tool = Sql(engine=engine, path=path)
    wrong, right = ask(tool, "DELETE FROM t", "SELECT sum(a) FROM t")
    assert not wrong.ok and right.text == "6" and path.read_bytes() == before


def test_wrong_settings_are_told(tmp_path) -> None:
    (tmp_path / "no.db").write_text("this is no database, whatever its name says " * 50)
    for table in (
        {"path": str(tmp_path / "none.db")},
        {"path": str(tmp_path / "no.db"), "script": SCRIPT},
        {"engine": "oracle"},
    ):
        with pytest.raises(OndolError):
            parts.make("tools", {"name": "sql", **table})
    for tool in (Sql(path=tmp_path / "no.db"), Sql(script="CREATE NONSENSE")):
        with pytest.raises(OndolError, match="cannot be used"):
            ask(tool, "SELECT 1 FROM t")


def test_the_problem_brings_its_database() -> None:
    env = ToolEnv(tools=["sql"], max_turns=3)
    problem = Problem("p", "How many?", "3", {"database": SCRIPT})

    async def go():
        episode = env.episode(parts.make("tasks", "sql"), problem, "t", None)
        await episode.reset()
        call = ToolCall("sql", {"query": "SELECT count(*) FROM t"})
        result = await episode.step(Message("assistant", "", (call,)), False)
        await episode.close()
        return result

    assert asyncio.run(go()).messages[0].content == "<result>3</result>"


@engines
def test_many_at_once_get_their_own_answers(engine) -> None:
    tools = [Sql(engine=engine, script=f"CREATE TABLE t (a INTEGER); INSERT INTO t VALUES ({n});") for n in range(5)]

    async def go():
        asked = [
            call_tool(tools[n % 5].session(str(n)), tools[n % 5], ToolCall("sql", {"query": f"SELECT a + {n} FROM t"}))
            for n in range(40)
        ]
        return [r.text for r in await asyncio.gather(*asked)]

    assert asyncio.run(go()) == [str(n % 5 + n) for n in range(40)]
