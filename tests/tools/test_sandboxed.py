"""The tools that work in a sandbox: one sandbox for a trajectory, levels that a recipe requires, and what a run records of them."""

from __future__ import annotations

import asyncio
import json
import sys

import pytest

from ondol import parts
from ondol.cli import main as command_line
from ondol.errors import OndolError
from ondol.records import ToolCall
from ondol.sandbox import levels
from ondol.sandbox.levels import Reached
from ondol.store import Run
from ondol.tools import sandboxed
from ondol.tools.base import call_tool

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sandboxes need Linux")


def play(*turns: tuple, trajectory: str = "t"):
    """Results of (tool, main argument) in one trajectory; each tool once."""

    async def go():
        sessions = {tool: tool.session(trajectory) for tool, _ in turns}
        try:
            return [await call_tool(sessions[t], t, ToolCall(t.name, {t.main_argument: text})) for t, text in turns]
        finally:
            for session in sessions.values():
                await session.close()
            assert not sandboxed._of_loop.get(asyncio.get_running_loop())

    return asyncio.run(go())


def make(name: str, **settings):
    return parts.make("tools", {"name": name, **settings})


def test_tools_of_a_trajectory_share_its_folder():
    files, cpython, shell = make("files"), make("cpython"), make("shell")
    results = play(
        (files, "write a.py\nprint(6 * 7)\n"),
        (shell, "python3 a.py; exit 3"),
        (cpython, "open('b.txt', 'w').write('from cpython')"),
        (shell, "cat b.txt"),
        (files, "list"),
        (files, "read ../../etc/passwd"),
    )
    assert [r.text for r in results] == [
        "wrote 13 characters to a.py",
        "42\n(exit code 3)",
        "12",
        "from cpython",
        "a.py  13 bytes\nb.txt  12 bytes",
        "Error: ../../etc/passwd is not in this folder",
    ]
    assert [r.kind for r in results] == ["ok", "error", "ok", "ok", "ok", "error"]
    assert play((files, "list"))[0].text == "(empty)"


def test_what_goes_wrong_is_said():
    cpython, shell = (
        make("cpython", timeout_s=0.4, memory_mib=64, disk_mib=4, processes=16),
        make("shell", timeout_s=0.4, memory_mib=64, disk_mib=4, processes=16),
    )
    texts = [
        (cpython, "x = 1\nwhile True: pass"),
        (cpython, "x"),
        (cpython, "bytearray(1 << 30)"),
        (shell, "sleep 9"),
        (cpython, "import os\nos.abort()"),
        (shell, "head -c 9M /dev/zero > large"),
    ]
    loop, name, memory, slept, crash, large = play(*texts)
    assert loop.kind == "timeout" and loop.text == f"TimeoutError: ran longer than 0.4 s\n{sandboxed.RESTARTED}"
    assert name.kind == "error" and "NameError" in name.text
    assert memory.kind == "memory" and memory.text.endswith("MemoryError")
    assert slept.kind == "timeout" and slept.text == "TimeoutError: ran longer than 0.4 s"
    assert crash.kind == "crashed" and crash.text.endswith(sandboxed.RESTARTED)
    assert large.kind != "ok"


def test_trajectories_of_one_name_do_not_meet():
    cpython = make("cpython")

    async def go():
        one, two = cpython.session("same"), cpython.session("same")
        try:
            await one.call({"code": "x = 1"})
            return (await two.call({"code": "x"})).kind, (await one.call({"code": "x"})).text
        finally:
            await one.close()
            await two.close()

    assert asyncio.run(go()) == ("error", "1")


def test_one_trajectory_draws_the_same_again():
    code = "import random, numpy as np\nprint(random.random(), np.random.rand(), list({'a', 'b', 'c', 'd'}))"
    cpython = make("cpython")
    first, again, other = (play((cpython, code), trajectory=t)[0].text for t in ("1", "1", "2"))
    assert first == again != other


def test_settings_that_are_shared_must_agree():
    with pytest.raises(OndolError, match="shares its sandbox with files"):
        play((make("files"), "list"), (make("shell", disk_mib=3), "ls"))


@pytest.fixture
def weak(monkeypatch):
    """A machine that reaches limits only."""
    here = Reached("rlimits", {"bubblewrap": "there is no bwrap", "namespaces": "not permitted"})
    monkeypatch.setattr(levels, "reached", lambda: here)
    monkeypatch.setattr(sandboxed, "reached", lambda: here)


def test_a_level_that_is_not_reached_is_refused(weak, tmp_path, capsys):
    tool = make("cpython", require="namespaces")
    with pytest.raises(OndolError, match="requires sandboxes of level 'namespaces'") as caught:
        tool.facts()
    assert "namespaces: not permitted" in str(caught.value)
    with pytest.raises(OndolError, match="requires"):
        play((tool, "1"))
    assert make("cpython").facts()["sandbox"] == "rlimits"
    assert play((make("cpython"), "6 * 7"))[0].text == "42"
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'task = "arithmetic"\n[env]\nmax_turns = 2\ntools = [{name = "cpython", require = "namespaces"}]\n[model]\npath = "tiny"\n'
    )
    assert command_line(["check", str(recipe)]) != 0
    assert "requires sandboxes of level 'namespaces'" in capsys.readouterr().err
    assert command_line(["check", str(recipe), "--json", "--set", 'env.tools=["cpython"]']) == 0
    assert json.loads(capsys.readouterr().out)["tools"]["cpython"]["sandbox"] == "rlimits"


def test_contradictions_and_unknown_levels(monkeypatch):
    monkeypatch.setattr(sandboxed, "check_level", lambda wanted, where: None)  # whatever this machine reaches
    with pytest.raises(OndolError, match="requires 'bubblewrap' and asks for 'rlimits'"):
        make("shell", require="bubblewrap", level="rlimits").facts()
    with pytest.raises(OndolError, match=r"require"):
        make("shell", require="prison")


def test_a_run_records_the_level(tmp_path, capsys):
    with Run.create(tmp_path, "r", {"a": 1}) as run:
        run.add_facts({})
        facts = {"cpython": make("cpython").facts()}
        run.add_facts({"tools": facts})
        known = json.loads((run.path / "environment.json").read_text())
        assert known["tools"] == facts and facts["cpython"]["sandbox"] in levels.LEVELS and "python" in known
        (event,) = run.db.events("facts")
        assert event.data["tools"] == facts
        assert run.facts() == known
    assert command_line(["show", "last", "--runs", str(tmp_path)]) == 0
    assert f"The tool 'cpython': sandbox {facts['cpython']['sandbox']}" in capsys.readouterr().out
    (run.path / "environment.json").write_text("spoilt")
    assert command_line(["show", "last", "--json", "--runs", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["tools"] == {}


def test_the_first_level_that_fails_is_explained(monkeypatch):
    """Without bwrap, and with a launcher that cannot make namespaces, the limits are left; the reasons are kept."""
    tried = {"bubblewrap": "no bwrap", "namespaces": "unshare: not permitted", "rlimits": None}
    monkeypatch.setattr(levels, "try_level", tried.get)
    levels.reached.cache_clear()
    try:
        found = levels.reached()
        assert found.level == "rlimits" and list(found.why) == ["bubblewrap", "namespaces"]
        tried["rlimits"] = "no forks"
        levels.reached.cache_clear()
        assert levels.reached().level is None
        with pytest.raises(OndolError, match="no sandbox opens on this machine: no forks"):
            levels.check_level("rlimits")
    finally:
        levels.reached.cache_clear()
