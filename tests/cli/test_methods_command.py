"""`ondol methods`: the table tells what is so, and nothing documented ever runs."""

from __future__ import annotations

import json

import pytest

from ondol.cli import main
from ondol.cli.methods import COLUMNS, table_of_methods
from ondol.errors import OndolError
from ondol.methods.documented import DOCUMENTED
from ondol.parts import BUILT_IN, find
from ondol.recipe import load_recipe

TASK = {"task": "two-addends"}


def test_rows_are_those_of_the_registry() -> None:
    rows = {r["name"]: r for r in table_of_methods()}
    assert {n for n, r in rows.items() if r["state"] == "implemented"} >= set(BUILT_IN["methods"])
    assert {n for n, r in rows.items() if r["state"] == "documented"} == set(DOCUMENTED)
    assert not set(DOCUMENTED) & set(BUILT_IN["methods"])
    for name, row in rows.items():
        assert tuple(row) == COLUMNS
        if row["state"] == "implemented" and name in BUILT_IN["methods"]:
            cls = find("methods", name)
            assert (row["clip"], row["kl"], row["family"]) == (cls.clip, cls.kl, cls.family)


def test_json(capsys) -> None:
    assert main(["methods", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == table_of_methods()
    assert main(["methods"]) == 0
    said = capsys.readouterr().out
    assert "vineppo" in said and "implemented" in said


@pytest.mark.parametrize("name", sorted(DOCUMENTED))
def test_a_documented_method_is_refused(name: str) -> None:
    for value in (name, {"name": name}, name.upper()):
        with pytest.raises(OndolError, match="only documented, not implemented"):
            load_recipe(TASK | {"method": value})


def test_an_unknown_method_has_a_nearest_one() -> None:
    with pytest.raises(OndolError, match="did you mean 'simpletir'"):
        load_recipe(TASK | {"method": "simpletri"})


def test_a_broken_plugin_does_not_hide_the_others(monkeypatch) -> None:
    from importlib.metadata import EntryPoint

    import ondol.parts as parts

    entry = EntryPoint("theirs", "no_such_module:X", "ondol.methods")
    monkeypatch.setattr(parts, "entry_points", lambda group: [entry] if group == "ondol.methods" else [])
    row = next(r for r in table_of_methods() if r["name"] == "theirs")
    assert row["state"] == "broken" and "no_such_module" in row["mechanism"]
