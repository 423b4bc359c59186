"""Questions on small databases made at random; the answer is a query, and what it gives is what counts.

A right query gives what the gold query gives on the database that the agent can look at and on a second one with the
same tables and other rows, so that an answer read off the rows (`SELECT 7`) is not taken for a query.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

from pydantic import Field, model_validator

from ondol.records import Problem
from ondol.rewards.base import marked_answer
from ondol.tasks.base import DrawnTask
from ondol.tools.sql import Engine, Sql

_ROWS = 200  # of a result that are compared; gold results are far smaller
_FENCED = re.compile(r"```(?:sql)?\s*\n(.*?)```", re.S | re.I)


@dataclass(frozen=True)
class Theme:
    """Two tables: one of things with names, one of events that each belong to a thing."""

    thing: str
    names: tuple[str, ...]
    number: str  # a column of things: whole numbers
    event: str
    kind: str  # a column of events: words
    kinds: tuple[str, ...]
    amount: str  # a column of events: whole numbers


def _t(thing: str, names: str, number: str, event: str, kind: str, kinds: str, amount: str) -> Theme:
    return Theme(thing, tuple(names.split()), number, event, kind, tuple(kinds.split()), amount)


THEMES = (
    _t("customers", "Ana Bo Cleo Dov Eva Finn Gil Hana Ida Juno", "age", "orders", "product", "lamp chair desk rug shelf", "price"),
    _t("ships", "Aurora Borea Comet Delta Egret Fram Gull Heron", "length", "voyages", "port", "Bergen Gdansk Turku Tallinn", "days"),
    _t("authors", "Adler Brandt Castro Dumas Eco Frisch Grass", "birth_year", "books", "genre", "crime poetry travel satire", "pages"),
    _t("gardens", "Ashby Birch Cedar Dell Elm Fern Glade", "area", "harvests", "crop", "beans leeks plums kale pears", "weight"),
)  # fmt: skip


class SqlQuestions(DrawnTask):
    """Text to SQL: the response is one query, in a ```sql block, in <answer>, or alone. Scored by what it gives."""

    engine: Engine = Field(
        default="sqlite", description="sqlite, or duckdb (needs the package); the tool's should be the same"
    )
    things: tuple[int, int] = Field(default=(5, 7), description="fewest and most rows of the first table")
    events: tuple[int, int] = Field(default=(14, 24), description="fewest and most rows of the second table")
    timeout_s: float = Field(default=2.0, gt=0, le=600, description="time limit of a query that is scored")

    @model_validator(mode="after")
    def _sound(self) -> SqlQuestions:
        for name, (low, high), most in (("things", self.things, 7), ("events", self.events, 1000)):
            if not 1 <= low <= high <= most:
                raise ValueError(f"{name}: from at least 1 to at most {most}")
        _ = self._tool  # the engine is there
        return self

    def draw(self, random: Random) -> Problem | None:
        theme = random.choice(THEMES)
        asked, gold, ordered = _question(theme, random)
        question = f"{_schema(theme)}\n{asked} Answer with one SQL query."
        # the rows follow from the question: questions that are the same are of the same database
        databases = [self._rows(theme, Random(f"{which}/{self.things}/{self.events}/{question}")) for which in "ab"]
        results = [_reference(d, gold) for d in databases]
        if any(not _telling(r) for r in results) or same(results[0], results[1], ordered):
            return None
        if "LIMIT 1" in gold and any(_tied(d, gold) for d in databases):
            return None
        return Problem("", question, gold, {"database": databases[0], "hidden": databases[1], "ordered": ordered})

    def score(self, problem: Problem, response: str) -> float:
        query = query_of(response)
        if not query:
            return 0.0
        for which in ("database", "hidden"):
            script = problem.data[which]
            given = self._tool.ask(query, script, _ROWS)
            if "kind" in given or given["more"]:
                return 0.0
            gold = _gold(self.engine, self.timeout_s, problem.answer, script)
            if not same(given["rows"], gold, problem.data["ordered"]):
                return 0.0
        return 1.0

    def near_misses(self, problem: Problem) -> list[str]:
        """The visible result written down, the gold query cut or changed where that changes what it gives, and no queries."""
        gold, script = problem.answer, problem.data["database"]
        rows = _reference(script, gold)
        written = " UNION ALL ".join(
            "SELECT " + ", ".join(str(v) if isinstance(v, (int, float)) else f"'{v}'" for v in row) for row in rows
        )
        changed = [
            re.sub(r" WHERE .*?(?= GROUP| ORDER|$)", "", gold),
            gold.replace("count(*)", "count(*) + 1"),
            gold.replace("max(", "min(").replace("sum(", "max("),
            gold.replace(" DESC", ""),
            gold.replace("SELECT DISTINCT", "SELECT"),
            gold.replace(" > ", " <= "),
        ]
        different = [c for c in changed if not same(_reference(script, c), rows, problem.data["ordered"])]
        return ["", "SELECT", "I do not know", f"{gold}; {gold}", f"DELETE FROM {gold.split(' FROM ')[1].split()[0]}", written, *different]  # fmt: skip

    @property
    def _tool(self) -> Sql:
        return Sql(engine=self.engine, timeout_s=self.timeout_s)

    def _rows(self, theme: Theme, random: Random) -> str:
        """The script of a database."""
        things = random.sample(theme.names, random.randint(*self.things))
        numbers = random.sample(range(20, 90), len(things))
        lines = [
            f"CREATE TABLE {theme.thing} (id INTEGER PRIMARY KEY, name TEXT, {theme.number} INTEGER);",
            f"CREATE TABLE {theme.event} (id INTEGER PRIMARY KEY, {_key(theme)} INTEGER, {theme.kind} TEXT, {theme.amount} INTEGER);",
        ]
        lines += [
            f"INSERT INTO {theme.thing} VALUES ({i}, '{n}', {k});" for i, (n, k) in enumerate(zip(things, numbers), 1)
        ]
        for i in range(1, random.randint(*self.events) + 1):
            owner, kind, amount = random.randint(1, len(things)), random.choice(theme.kinds), random.randint(10, 99)
            lines.append(f"INSERT INTO {theme.event} VALUES ({i}, {owner}, '{kind}', {amount});")
        return "\n".join(lines)


def query_of(response: str) -> str:
    """The query in a response: of the last ```sql block, the last <answer>, or the whole text; without a last semicolon."""
    blocks = _FENCED.findall(response)
    text = blocks[-1] if blocks else marked_answer(response) or response
    return text.strip().rstrip(";").strip()


def same(a: Sequence[Any], b: Sequence[Any], ordered: bool) -> bool:
    """Whether two results have the same rows, in any order unless `ordered`; 2 and 2.0 are the same."""
    first, second = ([tuple(map(_plain, row)) for row in rows] for rows in (a, b))
    return first == second if ordered else sorted(first) == sorted(second)


def _plain(value: Any) -> tuple[str, Any]:
    """A value that can be compared with any other."""
    if isinstance(value, (bool, int, float)):
        return "number", round(float(value), 6)
    return ("null", "") if value is None else ("text", str(value))


def _key(theme: Theme) -> str:
    return f"{theme.thing[:-1]}_id"


def _schema(t: Theme) -> str:
    return f"Tables: {t.thing}(id, name, {t.number}), {t.event}(id, {_key(t)}, {t.kind}, {t.amount})."


def _question(t: Theme, random: Random) -> tuple[str, str, bool]:
    """A question, its gold query, and whether the order of its rows counts."""
    kind, limit, one = random.choice(t.kinds), random.randint(15, 85), t.thing[:-1]
    join = f"FROM {t.thing} JOIN {t.event} ON {t.event}.{_key(t)} = {t.thing}.id"
    forms = [
        (f"How many {t.event} have {t.kind} '{kind}' and {t.amount} above {limit}?",
         f"SELECT count(*) FROM {t.event} WHERE {t.kind} = '{kind}' AND {t.amount} > {limit}", False),
        (f"What is the largest {t.amount} of the {t.event} with {t.kind} '{kind}'?",
         f"SELECT max({t.amount}) FROM {t.event} WHERE {t.kind} = '{kind}'", False),
        (f"What is the total {t.amount} of the {t.event} with {t.kind} '{kind}' and {t.amount} above {limit}?",
         f"SELECT sum({t.amount}) FROM {t.event} WHERE {t.kind} = '{kind}' AND {t.amount} > {limit}", False),
        (f"For each {t.kind}, how many {t.event} with {t.amount} above {limit} are there? Give the {t.kind} and the number.",
         f"SELECT {t.kind}, count(*) FROM {t.event} WHERE {t.amount} > {limit} GROUP BY {t.kind}", False),
        (f"Which {t.thing} have at least one of the {t.event} with {t.kind} '{kind}' and {t.amount} above {limit}? "
         "Give each name once.",
         f"SELECT DISTINCT name {join} WHERE {t.kind} = '{kind}' AND {t.amount} > {limit}", False),
        (f"Give the names of the {t.thing} with {t.number} above {limit}, the largest {t.number} first.",
         f"SELECT name FROM {t.thing} WHERE {t.number} > {limit} ORDER BY {t.number} DESC", True),
        (f"Which {one} has the largest total {t.amount} of {t.event} with {t.amount} above {limit}? Give the name.",
         f"SELECT name {join} WHERE {t.amount} > {limit} GROUP BY {t.thing}.id, name ORDER BY sum({t.amount}) DESC LIMIT 1", False),
    ]  # fmt: skip
    return random.choice(forms)


def _telling(rows: list[Any]) -> bool:
    """A result that a guess would hardly give: not empty, not zero, not NULL."""
    return bool(rows) and all(v not in (None, 0) for row in rows for v in row)


def _tied(script: str, gold: str) -> bool:
    """Whether the first place of a query `SELECT name ... ORDER BY x DESC LIMIT 1` is shared."""
    head, rank = gold.removesuffix(" DESC LIMIT 1").split(" ORDER BY ")
    values = [
        v for (v,) in _reference(script, f"{head.replace('SELECT name', f'SELECT {rank}')} ORDER BY 1 DESC LIMIT 2")
    ]
    return len(set(values)) < len(values)


# Our own queries on our own databases need no sandbox; the engine of the tool answers them again when a score is asked for.
@lru_cache(maxsize=64)
def _opened(script: str) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", check_same_thread=False)
    connection.executescript(script)
    return connection


def _reference(script: str, query: str) -> list[Any]:
    return _opened(script).execute(query).fetchall()


@lru_cache(maxsize=4096)
def _gold(engine: Engine, timeout_s: float, query: str, script: str) -> list[Any]:
    found = Sql(engine=engine, timeout_s=timeout_s).ask(query, script, _ROWS)
    if "kind" in found:
        raise RuntimeError(f"the gold query {query!r} failed: {found['text']}")
    return found["rows"]
