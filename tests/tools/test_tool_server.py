"""The tool server in process: routing, order, state, limits, and that a fault harms only its own call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

import faulty_tool
import pytest
from faulty_tool import Faulty

from ondol.errors import OndolError
from ondol.parts import make
from ondol.records import ToolCall, ToolResult
from ondol.sandbox import levels
from ondol.tools.actions import find_action, find_blocks
from ondol.tools.base import Tool, call_tool
from ondol.tools.isolated import RESTARTED
from ondol.tools.server.core import Busy, Item, Limits, ToolServer

pytestmark = pytest.mark.timeout(90)

FAULTS = {
    "raise": "crashed",
    "hang": "timeout",
    "stubborn": "timeout",
    "rubbish": "crashed",
    "number": "crashed",
    "exit": "crashed",
    "cannot": "crashed",
    "nothing": "error",
}


def serve(work: Callable[[ToolServer], Awaitable[Any]], *tools: Tool, **settings: Any) -> Any:
    async def go() -> Any:
        server = ToolServer(tools or (Faulty(timeout_s=0.3),), **settings)
        try:
            return await work(server)
        finally:
            await server.close()
            assert server.health()["trajectories"] == server.health()["sessions"] == server.admitted == 0

    return asyncio.run(go())


def faulty(what: str) -> ToolCall:
    return ToolCall("faulty", {"what": what})


def python_and_calculator() -> tuple[Tool, ...]:
    return make("tools", "python"), make("tools", "calculator")


def test_a_batch_is_routed_and_keeps_its_order():
    async def work(server: ToolServer) -> list[Any]:
        return await server.observe(
            [
                Item("a", "Let me see. <python>x = 41\nx + 1</python>"),
                Item("b", "```python\n6 * 7\n```"),
                Item("c", "<calculator>6 * 7</calculator>"),
                Item("d", "I think it is 42."),
                Item("a", "<python>x</python>"),  # the same trajectory: after the first, with its state
                Item("b", '<tool_call>{"name": "calculator", "arguments": {"expression": "1 + 1"}}</tool_call>'),
                Item("e", "<python>x</python>"),
                Item("f", '<tool_call>{"name": "calculator", "arguments": {"expression": 5}}</tool_call>'),
                Item("a", "", finish=True),
                Item("a", "<python>x</python>"),  # a fresh one
            ]
        )

    answers = serve(work, *python_and_calculator())
    said = [a.observation for a in answers]
    assert said[:3] == ["<result>42</result>", "\n```output\n42\n```\n", "<result>42</result>"]
    assert said[3]["obs"] == "" and said[3]["invalid_reason"] == "No valid tool found for action"
    assert "<python>" in said[3]["available_tools"] and "<calculator>" in said[3]["available_tools"]
    assert said[4:6] == ["<result>41</result>", "2"]
    assert "NameError" in said[6] and "must be of type string" in said[7]["obs"]
    assert said[8] == "" and "NameError" in said[9]
    assert [a.valid for a in answers] == [True, True, True, False, True, True, True, False, True, True]
    assert [a.done for a in answers] == [False] * 8 + [True, False]


def test_one_tool_alone_gets_every_action():
    async def work(server: ToolServer) -> Any:
        return await server.observe([Item("a", "hello")])

    (alone,) = serve(work, make("tools", "python"), done_if_invalid=True)
    assert (alone.done, alone.valid, alone.observation["obs"]) == (False, False, "")
    (none,) = serve(work, *python_and_calculator(), done_if_invalid=True)
    assert (none.done, none.valid) == (True, False)


def test_a_fault_harms_only_its_own_call():
    async def work(server: ToolServer) -> Any:
        good = [Item(f"g{i}", f"<faulty>echo {i}</faulty>") for i in range(50)]
        bad = [Item(f"b-{what}", f"<faulty>{what}</faulty>") for what in FAULTS]
        again = [Item(f"b-{what}", "<faulty>echo alive</faulty>") for what in FAULTS]
        mixed = [*good[:25], *bad, *good[25:], *again]
        answers = await server.observe(mixed)
        return dict(zip(mixed, answers)), server.left_behind

    answers, left_behind = serve(work)
    assert left_behind == 1  # the one that ignores that it is cancelled
    for item, answer in answers.items():
        word, _, rest = item.action.removeprefix("<faulty>").removesuffix("</faulty>").partition(" ")
        if word == "echo":
            assert (answer.observation, answer.done, answer.valid) == (f"<result>{rest}</result>", False, True)
        elif FAULTS[word] == "crashed":
            assert answer.observation["obs"] == "" and "failed" in answer.observation["error"]
            assert (answer.done, answer.valid, answer.observation["tool_type"]) == (True, False, "faulty")
        else:
            assert (answer.done, answer.valid) == (False, True) and isinstance(answer.observation, str)


def test_results_are_clean_text():
    async def work(server: ToolServer) -> Any:
        return (await server.call("t", faulty("control")))[0], (await server.call("t", faulty("echo a\x00\x07b")))[0]

    odd, echoed = serve(work)
    assert odd.text == "ab?c" and odd.text.encode() and echoed.text == "ab"


def test_calls_of_a_trajectory_run_in_order_and_others_meanwhile():
    async def work(server: ToolServer) -> Any:
        started = time.monotonic()
        steps = [server.call("a", faulty(f"add {i}")) for i in (1, 10, 100)]
        waits = [server.call(f"w{i}", faulty("wait 0.2")) for i in range(40)]
        results = [r.text for r, _ in await asyncio.gather(*steps, *waits)]
        return results, time.monotonic() - started

    results, seconds = serve(work)
    assert results == ["1", "11", "111", *["waited"] * 40]
    assert seconds < 2  # one after the other they would take 8


def test_limits():
    async def work(server: ToolServer) -> Any:
        waiting = [asyncio.create_task(server.call(f"w{i}", faulty("wait 0.1"))) for i in range(6)]
        await asyncio.sleep(0.05)
        assert (server.running, server.admitted) == (2, 6)
        with pytest.raises(Busy, match="ask again") as full:
            await server.call("x", faulty("count"))
        with pytest.raises(Busy, match="split") as never:
            await server.observe([Item(f"{i}", "<faulty>count</faulty>") for i in range(7)])
        assert (full.value.retry_s, never.value.retry_s) == (1.0, None)
        results = await asyncio.gather(*waiting)
        assert sorted(round(w, 1) for _, w in results) == [0.0, 0.0, 0.1, 0.1, 0.2, 0.2]
        with pytest.raises(Busy, match="finish some"):
            await server.observe([Item("new", "<faulty>count</faulty>")])
        await server.finish("w0")
        assert (await server.observe([Item("new", "<faulty>count</faulty>")]))[0].valid

    serve(work, limits=Limits(running=2, waiting=4, trajectories=6))


def test_a_request_has_a_deadline():
    async def work(server: ToolServer) -> Any:
        with pytest.raises(TimeoutError):
            await server.observe([Item("a", "<faulty>hang</faulty>"), Item("b", "<faulty>count</faulty>")])
        await asyncio.sleep(0)
        return (await server.call("a", faulty("count")))[0].text

    assert serve(work, Faulty(timeout_s=30), limits=Limits(request_s=0.2)) == "1"


def test_the_same_request_at_the_same_time_is_done_once():
    async def work(server: ToolServer) -> Any:
        async def count() -> str:
            await server.call("a", faulty("wait 0.05"))
            return (await server.call("a", faulty("count")))[0].text

        same = [server.once(b"same", count) for _ in range(5)]
        texts = await asyncio.gather(*same, server.once(b"other", count))
        texts.append(await server.once(b"same", count))
        assert not server._in_flight
        return texts

    assert serve(work) == ["1"] * 5 + ["2", "3"]


def test_finish_forgets_and_cancels():
    async def work(server: ToolServer) -> Any:
        await server.call("bad-close", faulty("count"))
        hanging = asyncio.create_task(server.call("a", faulty("hang")))
        await server.call("b", faulty("count"))
        assert {"a", "b", "bad-close"} == faulty_tool.OPEN
        assert await server.finish("a") and not await server.finish("a") and await server.finish("bad-close")
        result, _ = await hanging
        assert result.kind == "crashed" and "finished" in result.text and {"b"} == faulty_tool.OPEN
        # Another client's trajectory of the same id is another one.
        assert (await server.call("b", faulty("count"), "other"))[0].text == "1"

    serve(work, Faulty(timeout_s=30))
    assert set() == faulty_tool.OPEN


def test_forgotten_trajectories_are_forgotten():
    async def work(server: ToolServer) -> Any:
        await server.call("dead", faulty("count"))
        await asyncio.sleep(0.1)
        await server.call("alive", faulty("count"))
        await asyncio.sleep(0.02)
        return server.health()["trajectories"], set(faulty_tool.OPEN)

    assert serve(work, limits=Limits(idle_s=0.05)) == (1, {"alive"})


def test_drain():
    async def work(server: ToolServer) -> Any:
        at_work = asyncio.create_task(server.call("a", faulty("wait 0.2")))
        await asyncio.sleep(0.05)
        assert not await server.drain(0.05)
        with pytest.raises(Busy, match="closing"):
            await server.call("b", faulty("count"))
        assert (await server.observe([Item("a", "", finish=True)]))[0].done is True
        assert await server.drain(5)
        return (await at_work)[0]

    assert serve(work).kind == "crashed"  # its trajectory was finished


@pytest.mark.parametrize("tools", [[], [Faulty(), Faulty()]])
def test_what_cannot_be_served(tools: list[Tool]):
    with pytest.raises(OndolError, match="cannot be served"):
        ToolServer(tools)


ISOLATED = {"block": "timeout", "die": "crashed", "killed": "crashed", "memory": "crashed", "exit": "crashed"}


def test_isolated_tools_may_block_and_die():
    tool = make("tools", {"name": "isolated", "tool": {"name": "faulty_tool:Faulty", "timeout_s": 0.5}}).tools()[0]

    async def work(server: ToolServer) -> Any:
        words = [*FAULTS, *ISOLATED]
        words.remove("exit")
        await asyncio.gather(*(server.call(w, faulty("count")) for w in words))
        counting = [server.call(f"good{i % 10}", faulty("count")) for i in range(50)]
        results = await asyncio.gather(*(server.call(w, faulty(w)) for w in words), *counting)
        after = await asyncio.gather(*(server.call(w, faulty("count")) for w in words))
        pids = [(await server.call(f"good{i}", faulty("pid")))[0].text for i in range(10)]
        return dict(zip(words, results)), dict(zip(words, after)), results[len(words) :], pids

    bad, after, good, pids = serve(work, tool)
    assert {w: r.kind for w, (r, _) in bad.items()} == {**FAULTS, **ISOLATED}
    assert [r.text for r, _ in good] == [str(i // 10 + 1) for i in range(50)]
    assert len(set(pids)) == 10
    for word, (result, _) in after.items():
        restarted = word in ISOLATED or word == "stubborn"
        assert result.text == (f"1\n{RESTARTED}" if restarted else "2"), word
    import os

    for pid in pids:  # closed with their trajectories
        with pytest.raises(ProcessLookupError):
            for _ in range(100):
                os.kill(int(pid), 0)
                time.sleep(0.02)


def test_isolated_tools_that_cannot_be_made():
    with pytest.raises(OndolError, match="no_such_module"):
        make("tools", {"name": "isolated", "tool": "no_such_module:Tool"}).tools()
    with pytest.raises(OndolError, match="not a single tool"):
        make("tools", {"name": "isolated", "tool": {"name": "isolated", "tool": "python"}}).tools()


@pytest.mark.parametrize(
    ("text", "call", "style"),
    [
        ("<python>a</python> <python>\nb\n</python>", "a\nb", "tags"),
        ("```python\na\n```\nthen\n```python\nb\n```", "a\nb", "fence"),
        ("```py\na\n```", "a", "fence"),
        ("```python\na\n```\n```output", "a", "open_fence"),
        ("```py\na\n```<python>b</python>", "b", "tags"),
        ('<tool_call>{"name": "python", "arguments": {"code": "a"}}</tool_call>', "a", "json"),
    ],
)
def test_python_actions(text: str, call: str, style: str):
    action = make("tools", "python").parse_action(text)
    assert action is not None and (action.call.arguments, action.style) == ({"code": call}, style)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<python>a",
        "```python\na",
        "```js\na\n```",
        "<tool_call>{}</tool_call>",
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        "<tool_call>" + "[" * 100000 + "</tool_call>",
        '<tool_call>{"name": "python", "arguments": ' + '{"a":' * 100 + "1" + "}" * 100 + "}</tool_call>",
    ],
)
def test_no_action(text: str):
    assert find_blocks(text, "python", "code", ("python", "py")) is None


def test_actions_are_found_in_linear_time():
    started = time.monotonic()
    for text in ("<x>" * 300_000, "<tool_call>" * 100_000, "```python\n" * 100_000):
        find_action(text, "x", "y")
        find_blocks(text, "x", "y", ("python", "py"))
    assert time.monotonic() - started < 2


def test_call_tool_takes_richer_schemas():
    class Rich(Faulty):
        parameters: ClassVar[dict[str, Any]] = {
            "type": "object",
            "properties": {"what": {"type": ["string", "null"]}, "n": {"anyOf": [{"type": "integer"}]}},
            "additionalProperties": True,
        }

    async def kinds(*arguments: dict[str, Any]) -> list[ToolResult]:
        tool = Rich()
        return [await call_tool(tool.session("t"), tool, ToolCall("faulty", a)) for a in arguments]

    results = asyncio.run(kinds({"what": "echo 1", "n": "x"}, {"what": "echo 1", "more": 1}, {"what": 5}))
    assert [r.kind for r in results] == ["ok", "ok", "bad_arguments"]
    assert "string or null" in results[2].text


def test_health_tells_the_isolation_level():
    reached = levels.reached().level
    if reached is None:
        pytest.skip("no level of isolation works here")
    server = ToolServer([make("tools", "cpython"), make("tools", "calculator")])
    assert server.health()["sandbox"] == {"cpython": reached}
    if reached != levels.LEVELS[-1]:
        return
    with pytest.raises(OndolError, match="drop one"):
        ToolServer([make("tools", {"name": "cpython", "level": levels.LEVELS[0], "require": levels.LEVELS[-1]})])
