"""Tools of MCP servers: seven real ones, and one of our own that goes wrong in every way."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mcp", reason="pip install 'ondol[mcp]'")

from mcp_servers import program

from ondol.envs.tool import ToolEnv
from ondol.errors import OndolError
from ondol.parts import make
from ondol.recipe import load_recipe, to_table
from ondol.records import ToolCall, ToolResult
from ondol.tools.base import Tool, call_tool
from ondol.tools.mcp import RESTARTED

pytestmark = pytest.mark.timeout(90)

FLAKY = [sys.executable, str(Path(__file__).parent / "flaky_server.py")]


def table(command: list[str], **settings: Any) -> dict[str, Any]:
    return {"name": "mcp", "command": command, "start_s": 40, **settings}


def tools(command: list[str], **settings: Any) -> dict[str, Tool]:
    return {t.name: t for t in make("tools", table(command, **settings)).tools()}


def call(known: dict[str, Tool], *calls: tuple[str, dict[str, Any]], trajectory: str = "t") -> list[ToolResult]:
    """The calls of one trajectory, one after the other."""

    async def go() -> list[ToolResult]:
        sessions = {name: known[name].session(trajectory) for name, _ in calls}
        try:
            return [await call_tool(sessions[n], known[n], ToolCall(n, a)) for n, a in calls]
        finally:
            for session in sessions.values():
                await session.close()
                await session.close()

    return asyncio.run(go())


def children() -> set[int]:
    """Our child processes."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(stat[1]) == os.getpid() and stat[0] != "Z":
                found.add(int(entry.name))
    return found


def real(name: str) -> str:
    path = program(name)
    if path is None:
        pytest.skip(f"{name} is not installed: python tests/tools/mcp_servers.py")
    return path


@pytest.mark.parametrize("version", ["1.30.0", None])
def test_another_package_is_refused_with_the_remedy(monkeypatch, version):
    from importlib import metadata

    from ondol.tools.server.mcp import mcp_server

    def other(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", other)
    with pytest.raises(OndolError, match=r"version 2[\s\S]*ondol\[mcp\]"):
        tools([sys.executable, "-c", "1"])
    with pytest.raises(OndolError, match=r"version 2[\s\S]*ondol\[mcp\]"):
        mcp_server(None)  # type: ignore[arg-type]


def test_time():
    known = tools([real("mcp-server-time"), "--local-timezone", "UTC"], only=["convert_time"])
    arguments = {"source_timezone": "UTC", "time": "12:00", "target_timezone": "Asia/Seoul"}
    (result,) = call(known, ("convert_time", arguments))
    assert result.ok and "T21:00:00+09:00" in result.text


def test_calculator():
    known = tools([real("mcp-server-calculator")])
    (result,) = call(known, ("calculate", {"expression": "123457 * 7919"}))
    assert (result.ok, result.text) == (True, str(123457 * 7919))


def test_sqlite_state_is_the_trajectorys_own():
    known = tools([real("mcp-server-sqlite"), "--db-path", "{folder}/test.db"])
    made = ("create_table", {"query": "CREATE TABLE t (x INTEGER)"})
    rows = ("write_query", {"query": "INSERT INTO t VALUES (40), (2)"})
    total = ("read_query", {"query": "SELECT SUM(x) AS total FROM t"})
    results = call(known, made, rows, total, trajectory="a")
    assert all(r.ok for r in results) and "42" in results[2].text
    assert "no such table" in call(known, total, trajectory="b")[0].text


def test_git(tmp_path: Path):
    import subprocess

    command = ["git", "-c", "user.name=T", "-c", "user.email=t@example.org", "-C", str(tmp_path)]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "the only commit"]):
        subprocess.run([*command, *words], check=True)
    known = tools([real("mcp-server-git"), "--repository", str(tmp_path)])
    (result,) = call(known, ("git_log", {"repo_path": str(tmp_path)}))
    assert result.ok and "the only commit" in result.text


def test_filesystem():
    known = tools(
        [real("mcp-server-filesystem"), "{folder}"], only=["list_allowed_directories", "write_file", "read_text_file"]
    )

    async def go() -> tuple[str, ToolResult, ToolResult, ToolResult]:
        sessions = {n: t.session("t") for n, t in known.items()}

        async def one(name: str, arguments: dict[str, Any]) -> ToolResult:
            return await call_tool(sessions[name], known[name], ToolCall(name, arguments))

        folder = (await one("list_allowed_directories", {})).text.splitlines()[-1].strip()
        written = await one("write_file", {"path": f"{folder}/a.txt", "content": "hello"})
        back = await one("read_text_file", {"path": f"{folder}/a.txt"})
        outside = await one("read_text_file", {"path": "/etc/passwd"})
        for session in sessions.values():
            await session.close()
        return folder, written, back, outside

    folder, written, back, outside = asyncio.run(go())
    assert written.ok and back.text == "hello"
    assert not outside.ok and "root:" not in outside.text
    assert not Path(folder).exists()  # it lives as long as the connection


def test_memory():
    known = tools([real("mcp-server-memory")], env={"MEMORY_FILE_PATH": "{folder}/memory.json"})
    entity = {"name": "Ondol", "entityType": "heating", "observations": ["one fire warms every room"]}
    remembered = call(known, ("create_entities", {"entities": [entity]}), ("read_graph", {}), trajectory="a")
    assert remembered[1].ok and "one fire" in remembered[1].text
    assert "one fire" not in call(known, ("read_graph", {}), trajectory="b")[0].text


def test_everything():
    known = tools([real("mcp-server-everything")], prefix="all_")
    results = call(
        known,
        ("all_echo", {"message": "hi"}),
        ("all_get-sum", {"a": 2, "b": 40}),
        ("all_get-tiny-image", {}),
        ("all_get-sum", {"a": "two", "b": 1}),
    )
    assert results[0].text == "Echo: hi" and "42" in results[1].text and "image/png" in results[2].text
    assert results[2].images[0].png and results[2].images[0].width > 1  # and it comes back as a picture
    assert results[3].kind == "bad_arguments"


def test_a_crash_harms_its_own_call():
    known = tools(FLAKY)
    before = children()
    results = call(
        known, ("count", {"text": ""}), ("count", {"text": ""}), ("crash", {"text": ""}), ("count", {"text": ""})
    )
    assert [r.text for r in results[:2]] == ["1", "2"]
    assert results[2].kind == "crashed" and "ended during the call" in results[2].text
    assert results[3].ok and results[3].text == f"1\n{RESTARTED}"
    assert children() <= before


def test_hanging_failing_and_pictures():
    known = tools(FLAKY, timeout_s=0.5)
    t = {"text": "x"}
    results = call(known, ("hang", t), ("echo", t), ("fail", t), ("image", t), ("echo", {"text": 5}), ("echo", {}))
    assert [r.kind for r in results] == ["timeout", "ok", "error", "ok", "bad_arguments", "bad_arguments"]
    assert results[0].seconds < 10 and results[2].text == "it failed" and results[3].text == "[image: image/png]"


def test_slow_to_start():
    started = time.monotonic()
    with pytest.raises(OndolError, match=r"did not start in 0\.5 s"):
        tools([*FLAKY, "--slow", "30"], start_s=0.5)
    assert time.monotonic() - started < 15
    known = tools([*FLAKY, "--slow", "1.0"])
    (result,) = call(known, ("echo", {"text": "late"}))
    assert (result.ok, result.text) == (True, "late")


def test_a_server_that_cannot_start_says_why():
    with pytest.raises(OndolError, match="no database at /nowhere"):
        tools([*FLAKY, "--die-at-start"])
    with pytest.raises(OndolError, match="no-such-program"):
        tools(["no-such-program"])
    with pytest.raises(OndolError, match="did you mean 'echo'"):
        tools(FLAKY, only=["ehco"])
    with pytest.raises(OndolError, match="either command"):
        make("tools", {"name": "mcp"})
    with pytest.raises(OndolError, match="cannot be used"):
        make("tools", {"name": "mcp", "url": "http://127.0.0.1:9/mcp", "start_s": 10}).tools()


def test_shared_and_own_connections():
    async def counts(known: dict[str, Tool]) -> list[str]:
        sessions = [known["count"].session(f"t{i}") for i in range(2)]
        texts = [(await s.call({"text": ""})).text for s in sessions for _ in range(2)]
        for s in sessions:
            await s.close()
        return texts

    assert asyncio.run(counts(tools(FLAKY))) == ["1", "2"] * 2
    assert asyncio.run(counts(tools(FLAKY, shared=True))) == ["1", "2", "3", "4"]


def test_in_a_recipe():
    recipe = load_recipe(
        {
            "task": "arithmetic",
            "env": {"tools": [table(FLAKY, only=["echo", "count"]), "calculator"], "max_turns": 3, "calls": "json"},
        }
    )
    env = recipe.env
    assert isinstance(env, ToolEnv)
    assert [s["function"]["name"] for s in env.schemas(None)] == ["echo", "count", "calculator"]
    # What a run stores is the entry, not what it stood for.
    assert to_table(recipe)["env"]["tools"][0]["command"] == FLAKY
    assert load_recipe(to_table(recipe)).env == env
    bare = env.model_copy(update={"tools": (), "max_turns": 1})
    assert bare.schemas(None) == [] and bare.call_style(None) is None
    with pytest.raises(ValueError, match="called the same"):
        ToolEnv(tools=[env.tools[0], env.tools[0]], max_turns=3)
