"""Parts by name: every built-in one is there, and a reference or an entry point finds any other."""

from __future__ import annotations

import importlib.metadata
import sys

import pytest
from pydantic import Field

from ondol import parts
from ondol.errors import OndolError, nearest
from ondol.parts import BUILT_IN, Part, find, make, names


@pytest.mark.parametrize("room, name", [(room, name) for room, table in BUILT_IN.items() for name in table])
def test_built_in_parts(room, name) -> None:
    """Each exists, refuses unknown settings by name, and describes every setting."""
    cls = find(room, name)
    assert issubclass(cls, Part)
    with pytest.raises(OndolError) as caught:
        make(room, {"name": name, "no_such_setting": 1}, "here")
    assert "here.no_such_setting: there is no such key" in caught.value.what
    assert all(field.description for key, field in cls.model_fields.items()), name


def test_an_unknown_name() -> None:
    with pytest.raises(OndolError, match="no method is called 'grop'") as caught:
        find("methods", "grop")
    assert "did you mean 'grpo'?" in str(caught.value)


def test_entry_points(monkeypatch) -> None:
    """An installed package's part is known by the name it chose; a built-in name stays ours."""
    own = [
        importlib.metadata.EntryPoint("toy", "toy:Toy", "ondol.tasks"),
        importlib.metadata.EntryPoint("arithmetic", "toy:Toy", "ondol.tasks"),
        importlib.metadata.EntryPoint("gone", "nowhere:Gone", "ondol.tasks"),
    ]
    monkeypatch.setattr(parts, "entry_points", lambda group: own if group == "ondol.tasks" else [])
    assert {"toy", "arithmetic"} <= set(names("tasks"))
    assert find("tasks", "toy").__name__ == "Toy"
    assert find("tasks", "arithmetic").__name__ == "Arithmetic"
    with pytest.raises(OndolError, match="'nowhere:Gone' cannot be loaded"):
        find("tasks", "gone")


class Inner(Part):
    size: int = Field(1, description="how large")


class Outer(Part):
    one: Inner = Inner()
    maybe: Inner | None = None
    many: tuple[Inner, ...] = ()


@pytest.mark.parametrize(
    "table, path",
    [
        ({"one": {"sise": 1}}, "x.one.sise"),
        ({"maybe": {"sise": 1}}, "x.maybe.sise"),
        ({"many": [{"size": 1}, {"sise": 1}]}, "x.many.1.sise"),
    ],
)
def test_nested_keys(monkeypatch, table, path) -> None:
    """The whole path is named, and the nearest key of that very table."""
    monkeypatch.setitem(sys.modules, "outer_module", sys.modules[__name__])
    with pytest.raises(OndolError) as caught:
        make("tools", {"name": "outer_module:Outer", **table}, "x")
    assert caught.value.what == f"{path}: there is no such key"
    assert caught.value.remedy == "did you mean 'size'? known: size"


def test_a_wrong_value_is_explained(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "outer_module", sys.modules[__name__])
    with pytest.raises(OndolError) as caught:
        make("tools", {"name": "outer_module:Outer", "one": {"size": "big"}}, "x")
    assert "x.one.size: " in caught.value.what and "(got 'big')" in caught.value.what
    assert caught.value.remedy == "x.one.size: how large"


def test_parts_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Inner().size = 2  # type: ignore[misc]


def test_nearest() -> None:
    assert nearest("stepz", ["steps", "seed"]) == "did you mean 'steps'? known: seed, steps"
    assert nearest("zzz", ["steps", "seed"]) == "known: seed, steps"
