"""The tool server over HTTP, its client, and MCP at the same address: what a client in another process sees."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette", reason="pip install 'ondol[server]'")
pytest.importorskip("uvicorn", reason="pip install 'ondol[server]'")
httpx2 = pytest.importorskip("httpx2", reason="pip install 'ondol[server]'")

from servers import COMMAND, environment, serving  # noqa: E402

from ondol.cli import main  # noqa: E402
from ondol.errors import OndolError  # noqa: E402
from ondol.parts import make  # noqa: E402
from ondol.recipe import load_recipe, to_table  # noqa: E402
from ondol.records import ToolCall, ToolResult  # noqa: E402
from ondol.tools.base import Tool, call_tool  # noqa: E402
from ondol.tools.remote import ToolClient  # noqa: E402

pytestmark = pytest.mark.timeout(90)

FAULTY = '{name = "faulty_tool:Faulty", timeout_s = 0.5}'
OK = 200


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving("--tools", "python,calculator", "--tool", FAULTY) as (_, start):
        assert start["tools"] == ["python", "calculator", "faulty"] and start["token"] is False
        yield start["url"]


def post(url: str, body: Any, **settings: Any) -> Any:
    headers = {"Content-Type": "application/json", **settings.pop("headers", {})}
    content = body if isinstance(body, (str, bytes)) else json.dumps(body)
    return httpx2.post(url, content=content, headers=headers, timeout=30, trust_env=False, **settings)


def get(url: str, **settings: Any) -> Any:
    return httpx2.get(url, timeout=30, trust_env=False, **settings)


def health(url: str) -> dict[str, Any]:
    return get(url + "/health").json()


def no_state_left(url: str) -> bool:
    """Closing requests are sent and forgotten: give them a moment."""
    for _ in range(100):
        if health(url)["trajectories"] == 0:
            return True
        time.sleep(0.05)
    return False


def results(tool: Tool, *texts: str, trajectory: str = "t") -> list[ToolResult]:
    async def go() -> list[ToolResult]:
        session = tool.session(trajectory)
        try:
            return [await call_tool(session, tool, ToolCall(tool.name, {tool.main_argument: t})) for t in texts]
        finally:
            await session.close()

    return asyncio.run(go())


def test_what_verltools_client_sends_and_gets(url: str):
    body = {
        "trajectory_ids": ["1", "2", "3", "4"],
        "actions": ["<python>6 * 7</python>", "<calculator>1/0</calculator>", "hm", ""],
        "extra_fields": [{}, {"question": "?"}, {}, {"finish": True}],
        "is_last_step": [False, False, True, True],
    }
    reply = post(url + "/get_observation", body)
    said = reply.json()
    assert reply.status_code == OK
    assert set(said) == {"observations", "dones", "valids", "processing_time_ms", "queue_time_ms"}
    assert said["observations"][:2] == ["<result>42</result>", "<result>Error: division by zero</result>"]
    assert set(said["observations"][2]) == {"obs", "invalid_reason", "available_tools"}
    assert said["observations"][3] == ""
    assert said["dones"] == [False, False, False, True] and said["valids"] == [True, True, False, True]
    assert said["processing_time_ms"] > 0 and said["queue_time_ms"] >= 0
    finish = post(url + "/get_observation", {"trajectory_ids": ["1", "2"], "actions": ["", ""], "finish": [True, True]})
    assert finish.json()["dones"] == [True, True] and no_state_left(url)
    verl = {
        "status",
        "concurrent_requests",
        "thread_pool_size",
        "active_tasks",
        "max_concurrent",
        "tools",
        "uptime_seconds",
    }
    assert verl <= set(health(url)) and health(url)["tools"][-1] == "finish"


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"trajectory_ids": ["1", "2"], "actions": ["x"]}, 422, "2 trajectory_ids but 1 actions"),
        ({"trajectory_ids": ["1"], "actions": ["x"], "extra_fields": []}, 422, "0 extra_fields"),
        ({"trajectory_ids": ["1"], "actions": ["x"], "finish": [True, False]}, 422, "2 finish"),
        ({"trajectory_ids": [], "actions": []}, 422, "trajectory_ids"),
        ({"trajectory_ids": [1], "actions": ["x"]}, 422, "valid string"),
        ({"actions": ["x"]}, 422, "required"),
        ([], 422, "object"),
        ("{", 400, "JSON"),
        ("[" * 100_000, 400, "JSON"),
        (b"\xff\xfe", 400, "JSON"),
        ('{"trajectory_ids": ["\\ud800"], "actions": ["x"]}', 400, "JSON"),
    ],
)
def test_what_is_refused(url: str, body: Any, status: int, said: str):
    reply = post(url + "/get_observation", body)
    assert reply.status_code == status and said in json.dumps(reply.json()["detail"]) and reply.json()["remedy"]


def test_other_refusals(url: str):
    assert post(url + "/call", {"trajectory_id": "1", "tool": "python", "argument": {}}).status_code == 422
    assert post(url + "/call", "{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert get(url + "/nowhere").status_code == 404 and get(url + "/call").status_code == 405
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}):
        assert get(url + "/health", headers=headers).status_code == 403
    assert get(url + "/health", headers={"Origin": "http://localhost:3000"}).status_code == OK


def test_control_characters_are_stripped(url: str):
    reply = post(
        url + "/get_observation", {"trajectory_ids": ["c\x001"], "actions": ["<python>6 *\x00\x08 7</python>"]}
    )
    assert reply.json()["observations"] == ["<result>42</result>"]
    assert post(url + "/finish", {"trajectory_ids": ["c1"]}).json() == {"finished": 1}


def test_the_same_request_at_the_same_time_is_done_once(url: str):
    body = {"trajectory_id": "same", "tool": "faulty", "arguments": {"what": "wait 0.3"}}
    served = health(url)["served"]
    threads = [threading.Thread(target=post, args=(url + "/call", body)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(20)
    assert health(url)["served"] == served + 1
    post(url + "/finish", {"trajectory_ids": ["same"]})


def test_tools_behind_a_server_are_tools(url: str):
    env = load_recipe(
        {"task": "arithmetic", "env": {"tools": [{"name": "remote", "url": url, "only": ["python"]}], "max_turns": 2}}
    )
    assert to_table(env)["env"]["tools"] == [{"name": "remote", "url": url, "only": ["python"], "timeout_s": 60.0}]
    remote = {t.name: t for t in make("tools", {"name": "remote", "url": url}).tools()}
    here = make("tools", "python")
    assert list(remote) == ["python", "calculator", "faulty"]
    assert remote["python"].schema() == here.schema() and remote["python"].main_argument == here.main_argument
    codes = ["x = 41", "x + 1", "1/0", "(", "while True: pass", "'é'"]
    ours, theirs = results(here, *codes), results(remote["python"], *codes)
    assert [(r.text, r.ok, r.kind) for r in ours] == [(r.text, r.ok, r.kind) for r in theirs]
    assert no_state_left(url)


def test_two_clients_do_not_share_a_trajectory(url: str):
    def count() -> list[str]:
        (tool,) = make("tools", {"name": "remote", "url": url, "only": ["faulty"]}).tools()
        return [r.text for r in results(tool, "count", "count")]

    assert count() == count() == ["1", "2"]


def test_nothing_raises_into_a_trajectory(url: str):
    (tool,) = make("tools", {"name": "remote", "url": url, "only": ["faulty"], "timeout_s": 20}).tools()
    words = ["raise", "hang", "rubbish", "die", "block", "echo fine"]
    kinds = [r.kind for r in results(tool, *words)]
    assert kinds == ["crashed", "timeout", "crashed", "crashed", "timeout", "ok"]
    client = ToolClient(url, timeout_s=0.3)
    result = asyncio.run(client.call("slow", ToolCall("faulty", {"what": "wait 0.45"})))
    assert (result.text, result.ok, result.kind) == ("Tool call timeout after 0.3 seconds.", False, "timeout")
    (answer,) = asyncio.run(client.observe(["slow2"], ["<faulty>wait 0.45</faulty>"]))
    assert answer == ("Tool call timeout after 0.3 seconds.", True, False)
    assert asyncio.run(client.observe(["a"], ["b"], finish=[True, False]))[0][1:] == (True, False)
    client.finish("slow")
    asyncio.run(client.observe(["slow2"], [""], finish=[True]))
    assert no_state_left(url)


def test_a_server_that_is_not_there():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        gone = f"http://127.0.0.1:{sock.getsockname()[1]}"
    client = ToolClient(gone, timeout_s=5)
    result = asyncio.run(client.call("t", ToolCall("python", {"code": "1"})))
    assert (result.ok, result.kind) == (False, "crashed") and "Tool server error" in result.text
    (answer,) = asyncio.run(client.observe(["t"], ["x"]))
    assert "Tool server error" in answer[0] and answer[1:] == (True, False)
    client.finish("t")
    with pytest.raises(OndolError, match="ondol tools serve"):
        make("tools", {"name": "remote", "url": gone}).tools()
    with pytest.raises(OndolError, match="is not the URL"):
        make("tools", {"name": "remote", "url": "here"}).tools()


@pytest.mark.parametrize("reply", [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", b"rubbish\r\n\r\n", b""])
def test_a_server_that_is_mad(reply: bytes):
    def answer(sock: socket.socket) -> None:
        while True:
            try:
                connection, _ = sock.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                connection.recv(65536)
                connection.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as sock:
        threading.Thread(target=answer, args=(sock,), daemon=True).start()
        client = ToolClient(f"http://127.0.0.1:{sock.getsockname()[1]}", timeout_s=5)
        result = asyncio.run(client.call("t", ToolCall("python", {"code": "1"})))
        (observed,) = asyncio.run(client.observe(["t"], ["x"]))
        with pytest.raises(OndolError):
            client.tools()
    assert result.kind == "crashed" and observed[1:] == (True, False) and "Tool server error" in observed[0]


def test_a_token_is_asked_for_on_every_request(monkeypatch: pytest.MonkeyPatch):
    with serving("--tools", "calculator", ONDOL_TOOLS_TOKEN="geheim") as (_, start):
        url = start["url"]
        assert start["token"] is True
        for path in ("/health", "/tools", "/openapi.json", "/mcp", "/nowhere"):
            for headers in ({}, {"Authorization": "Bearer geheim2"}, {"Authorization": "geheim"}):
                assert get(url + path, headers=headers).status_code == 401, path
        for path in ("/get_observation", "/call", "/finish", "/mcp"):
            assert post(url + path, "{}").status_code == 401
        assert get(url + "/health", headers={"Authorization": "Bearer geheim"}).status_code == OK
        monkeypatch.delenv("ONDOL_TOOLS_TOKEN", raising=False)
        with pytest.raises(OndolError, match="wants a token"):
            make("tools", {"name": "remote", "url": url}).tools()
        monkeypatch.setenv("ONDOL_TOOLS_TOKEN", "geheim")
        (tool,) = make("tools", {"name": "remote", "url": url}).tools()
        assert results(tool, "6 * 7")[0].text == "42"
        pytest.importorskip("mcp")
        (tool,) = make("tools", {"name": "mcp", "url": f"{url}/mcp", "token_env": "ONDOL_TOOLS_TOKEN"}).tools()
        assert results(tool, "6 * 7")[0].text == "42"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "there is no token"),
        (["--host", "::"], "there is no token"),
        (["--token", ""], "cannot stand in a header"),
        (["--tools", "pyhton"], "did you mean 'python'"),
        (["--tools", ""], "cannot be served"),
        (["--tools", "python,python"], "called the same"),
        (["--tool", "{"], "not a table"),
        (["--tool", "5"], "no tool is called '5'"),
        (["--port", "99999999"], "cannot listen"),
        (["--max-running", "0"], "above 0"),
    ],
)
def test_wrong_use_of_the_command(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert main(["tools", "serve", *words]) == 1
    assert said in capsys.readouterr().err


def test_list(capsys: pytest.CaptureFixture[str]):
    assert main(["tools", "list", "--json"]) == 0
    rows = {r["name"]: r for r in json.loads(capsys.readouterr().out)}
    assert rows["python"]["argument"] == "code" and rows["python"]["parameters"]["required"] == ["code"]
    assert rows["mcp"]["parameters"] is None
    assert main(["tools", "list"]) == 0 and "calculator" in capsys.readouterr().out


def test_a_full_server_says_when_to_ask_again():
    with serving("--tool", FAULTY, "--in-process", "--max-running", "1", "--max-waiting", "1") as (_, start):
        url = start["url"]
        body = {"trajectory_id": "a", "tool": "faulty", "arguments": {"what": "wait 1.5"}}
        bodies = [{**body, "trajectory_id": f"{i}"} for i in range(2)]
        threads = [threading.Thread(target=post, args=(url + "/call", b)) for b in bodies]
        for t in threads:
            t.start()
        for _ in range(500):
            if health(url)["waiting"] == 1:
                break
            time.sleep(0.01)
        reply = post(url + "/call", {**body, "trajectory_id": "c"})
        assert reply.status_code == 429 and reply.headers["retry-after"] == "1"
        assert "ask again" in reply.json()["detail"] and reply.json()["remedy"]
        large = {"trajectory_ids": ["a"] * 3, "actions": ["<faulty>count</faulty>"] * 3}
        assert post(url + "/get_observation", large).status_code == 413
        # Our client waits and asks again by itself.
        result = asyncio.run(ToolClient(url, timeout_s=20).call("d", ToolCall("faulty", {"what": "echo in the end"})))
        assert result.text == "in the end"
        for t in threads:
            t.join(20)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_lets_calls_end(number: signal.Signals):
    with serving("--tool", '{name = "faulty_tool:Faulty", timeout_s = 20}') as (process, start):
        url, replies = start["url"], []
        body = {"trajectory_id": "a", "tool": "faulty", "arguments": {"what": "wait 1.0"}}
        thread = threading.Thread(target=lambda: replies.append(post(url + "/call", body)))
        thread.start()
        for _ in range(200):
            if health(url)["concurrent_requests"] == 1:
                break
            time.sleep(0.02)
        process.send_signal(number)
        for _ in range(50):
            if (
                refused := post(url + "/call", {**body, "trajectory_id": "b", "arguments": {"what": "count"}})
            ).status_code != OK:
                break
            time.sleep(0.01)
        assert refused.status_code == 503 and "closing" in refused.json()["detail"] and refused.headers["retry-after"]
        thread.join(20)
        assert replies[0].json()["text"] == "waited"
        assert process.wait(15) == 0


def test_told_twice_it_ends_at_once_and_quietly(tmp_path):
    with (
        (tmp_path / "said").open("w+") as said,
        serving("--tool", '{name = "faulty_tool:Faulty", timeout_s = 60}', stderr=said) as (process, start),
    ):
        url = start["url"]
        body = {"trajectory_id": "a", "tool": "faulty", "arguments": {"what": "wait 30"}}

        def ask() -> None:
            with contextlib.suppress(Exception):  # cut off, or answered: either will do
                post(url + "/call", body)

        thread = threading.Thread(target=ask)
        thread.start()
        for _ in range(200):
            if health(url)["concurrent_requests"] == 1:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(15) == 0
        thread.join(20)
        said.seek(0)
        assert said.read() == ""


def test_mcp_over_http_and_stdio(url: str):
    pytest.importorskip("mcp", reason="pip install 'ondol[mcp]'")
    from mcp import Client, StdioServerParameters

    async def use(server: Any, mode: str) -> tuple[list[str], list[tuple[str, bool]]]:
        async with Client(server, mode=mode) as client:
            names = [t.name for t in (await client.list_tools()).tools]
            said = []
            for name, arguments in (
                ("faulty", {"what": "count"}),
                ("faulty", {"what": "count"}),
                ("calculator", {"expression": "6 * 7"}),
                ("calculator", {"expression": "six"}),
                ("calculator", {}),
                ("faulty", {"what": "raise"}),
                ("nothing", {}),
            ):
                result = await client.call_tool(name, arguments)
                said.append((result.content[0].text, result.is_error))
            return names, said

    command = StdioServerParameters(
        command=COMMAND[0],
        args=[*COMMAND[1:], "--stdio", "--tools", "python,calculator", "--tool", FAULTY],
        env=environment(),
    )
    for server, mode, second in ((f"{url}/mcp", "legacy", "2"), (f"{url}/mcp", "auto", "1"), (command, "legacy", "2")):
        names, said = asyncio.run(asyncio.wait_for(use(server, mode), 60))
        assert names == ["python", "calculator", "faulty"]
        # A session remembers; the protocol without sessions does not.
        assert said[:3] == [("1", False), (second, False), ("42", False)], mode
        assert all(failed for _, failed in said[3:]) and "KeyError" in said[5][0] and "known: python" in said[6][0]
    assert no_state_left(url)


def test_our_mcp_client_with_our_mcp_server(url: str):
    pytest.importorskip("mcp", reason="pip install 'ondol[mcp]'")
    known = {t.name: t for t in make("tools", {"name": "mcp", "url": f"{url}/mcp"}).tools()}
    assert [r.text for r in results(known["faulty"], "count", "count")] == ["1", "2"]
    assert [r.text for r in results(known["faulty"], "count")] == ["1"]
    assert no_state_left(url)


def test_served_again(url: str):
    """Tools of another server (and so of any MCP server) can be served in turn."""
    with serving("--tool", f'{{name = "remote", url = "{url}", only = ["calculator"]}}') as (_, start):
        (tool,) = make("tools", {"name": "remote", "url": start["url"]}).tools()
        assert results(tool, "2 ** 10")[0].text == "1024"


def test_the_client_needs_no_server_packages():
    code = "import sys, ondol.tools.remote, ondol.tools.mcp, ondol.cli.tools; print([m for m in ('starlette', 'uvicorn', 'mcp', 'httpx2', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
