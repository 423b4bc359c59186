"""One battery over every registered tool, and the calculator's arithmetic against Python's."""

from __future__ import annotations

import asyncio
import json
import time
from fractions import Fraction
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from ondol import parts
from ondol.errors import OndolError
from ondol.records import Image, ToolCall, ToolResult
from ondol.tools.base import Sees, Tool, Toolset, call_tool
from ondol.tools.calculator import evaluate, plain
from ondol.tools.image import png_of

# What stands for several tools needs a server: test_remote.py, test_mcp_client.py, test_tool_server.py.
TOOLS = sorted(n for n in parts.BUILT_IN["tools"] if not issubclass(parts.find("tools", n), Toolset))
SIMPLE: dict[str, tuple[str, ...]] = {  # main arguments that must work, the last of them with the answer 42
    "python": ("6 * 7",),
    "calculator": ("6 * 7",),
    "cpython": ("6 * 7",),
    "files": ("write a.txt\n42\n", "read a.txt"),
    "shell": ("echo 42",),
    "memory": ("write x: 42",),
    "search": ("apothecary",),
    "sql": ("SELECT 6 * 7",),
    "zoom": ("b1",),
    "image": ("1, 2, 5, 9",),
    "browser": ("goto(data:text/html,<title>t</title>42)",),
}
SAYS = {  # what comes back (of it), where that is not 42 alone
    "memory": "ok",
    "search": "apothecary",
    "zoom": "42",
    "image": "picture 1, area 1, 2, 5, 9, 2x: 8x14",
    "browser": "page: t (data:text/html,<title>t</title>42)\n42",
}
PICTURE = Image.of(png_of(Pillow.new("RGB", (20, 10), "red")))
TABLES = {  # settings without which there is nothing to work on
    "search": {"corpus": "archive", "results": 1},
    "zoom": {"size": 2, "picture": ["..42", "...."]},
}


def make(name: str, **settings: Any) -> Tool:
    return parts.make("tools", {"name": name, **TABLES.get(name, {}), **settings})


def call(tool: Tool, *calls: ToolCall) -> list[ToolResult]:
    if reason := tool.unavailable():
        pytest.skip(f"{tool.name}: {reason}")

    async def go():
        session = tool.session("t")
        if isinstance(session, Sees):
            session.see([PICTURE])
        try:
            return [await call_tool(session, tool, c) for c in calls]
        finally:
            await session.close()
            await session.close()

    return asyncio.run(go())


def main(tool: Tool, text: Any) -> ToolCall:
    return ToolCall(tool.name, {tool.main_argument: text})


@pytest.mark.parametrize("name", TOOLS)
def test_schema(name):
    tool = make(name)
    schema = json.loads(json.dumps(tool.schema()))
    function = schema["function"]
    assert schema["type"] == "function" and function["name"] == tool.name == name and function["description"]
    assert function["parameters"]["type"] == "object"
    assert tool.main_argument in function["parameters"]["properties"]
    assert set(function["parameters"].get("required", [])) <= set(function["parameters"]["properties"])
    assert tool.deadline_s >= tool.timeout_s > 0
    assert type(tool).model_validate(tool.model_dump()) == tool


@pytest.mark.parametrize("name", TOOLS)
def test_a_simple_call(name):
    tool = make(name)
    *_, result = call(tool, *(main(tool, text) for text in SIMPLE[name]))
    assert (result.ok, result.kind) == (True, "ok") and 0 < result.seconds < 30
    assert SAYS[name] in result.text if name in SAYS else result.text == "42"


@pytest.mark.parametrize("name", TOOLS)
def test_bad_calls_are_data(name):
    tool = make(name)
    key = tool.main_argument
    calls = [
        ToolCall(name, {}),
        ToolCall(name, {key: 5}),
        ToolCall(name, {key: None}),
        ToolCall(name, {key: ["1"]}),
        ToolCall(name, {key: "1", "other": 1}),
        ToolCall(name, [key]),  # type: ignore[arg-type]
        ToolCall("", {}, error="no closing tag"),
    ]
    results = call(tool, *calls)
    assert [r.kind for r in results] == ["bad_arguments"] * len(calls)
    assert not any(r.ok for r in results) and key in results[0].text and "no closing tag" in results[-1].text
    assert call(tool, ToolCall("nope", {key: "1"}))[0].kind == "unknown_tool"


@pytest.mark.parametrize("name", TOOLS)
@settings(max_examples=40, deadline=None)
@given(
    text=st.one_of(
        st.text(),
        st.sampled_from(["(" * 5000, "9**9**9", "\0", "\ud800", "9" * 5000, "1/0", "</answer>", "-" * 300 + "1"]),
    )
)
def test_hostile_input(name, text):
    tool = make(name, timeout_s=1)
    (result,) = call(tool, main(tool, text))
    assert result.kind in {"ok", "error", "memory", "timeout"} and result.seconds < 10
    result.text.encode()


class Probe(Tool):
    name: ClassVar[str] = "probe"
    main_argument: ClassVar[str] = "what"
    parameters: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {
            "what": {"type": "string", "enum": ["raise", "hang", "text", "junk", "broken"]},
            "n": {"type": "integer"},
            "x": {"type": "number"},
            "b": {"type": "boolean"},
        },
        "required": ["what"],
    }
    description: str = "for tests"
    timeout_s: float = 0.1

    def session(self, trajectory_id: str):
        return self._Session()

    class _Session:
        async def call(self, arguments: dict[str, Any]):
            match arguments["what"]:
                case "raise":
                    raise KeyError("gone")
                case "hang":
                    await asyncio.sleep(60)
                case "text":
                    return "plain"
                case "broken":
                    raise OndolError("cannot work here")
            return 5

        async def close(self) -> None:
            pass


def test_failures_of_a_tool_are_data_and_deadlines_hold():
    tool = Probe()
    kinds = [r.kind for r in call(tool, *(main(tool, w) for w in ["raise", "hang", "text", "junk", "other"]))]
    assert kinds == ["crashed", "timeout", "ok", "crashed", "bad_arguments"]
    with pytest.raises(OndolError):
        call(tool, main(tool, "broken"))


@pytest.mark.parametrize(
    ("arguments", "ok"),
    [
        ({"n": 1}, True),
        ({"n": True}, False),
        ({"n": 1.5}, False),
        ({"x": 1}, True),
        ({"x": 1.5}, True),
        ({"x": "1"}, False),
        ({"b": True}, True),
        ({"b": 1}, False),
    ],
)
def test_types(arguments, ok):
    (result,) = call(Probe(), ToolCall("probe", {"what": "text", **arguments}))
    assert result.ok is ok


@pytest.mark.parametrize("name", ["python", "cpython"])
def test_python_keeps_state_unless_told_not_to(name):
    codes = ["x = 41", "x + 1"]
    tool = parts.make("tools", name)
    assert call(tool, *(main(tool, c) for c in codes))[1].text == "42"
    tool = parts.make("tools", {"name": name, "stateful": False})
    assert "NameError" in call(tool, *(main(tool, c) for c in codes))[1].text


def test_unknown_settings_are_refused():
    with pytest.raises(OndolError, match="timeout_s"):
        parts.make("tools", {"name": "python", "timeout": 2})


@st.composite
def expressions(draw, depth=3):
    if depth == 0 or draw(st.booleans()):
        return str(draw(st.integers(0, 999)))
    if draw(st.booleans()):
        return f"-({draw(expressions(depth=depth - 1))})"
    operator = draw(st.sampled_from(["+", "-", "*", "//", "%"]))
    return f"({draw(expressions(depth=depth - 1))}) {operator} ({draw(expressions(depth=depth - 1))})"


@given(expressions())
def test_calculator_integers_are_exact(expression):
    try:
        expected = eval(expression)
    except ZeroDivisionError:
        with pytest.raises(ZeroDivisionError):
            evaluate(expression)
        return
    assert evaluate(expression) == expected and plain(evaluate(expression)) == str(expected)


@given(st.integers(-(10**6), 10**6), st.integers(1, 10**6))
def test_calculator_division(a, b):
    text = plain(evaluate(f"({a}) / {b}"))
    assert "e" not in text
    assert abs(Fraction(text) - Fraction(a, b)) <= Fraction(abs(a), b) / 10**13
    assert (Fraction(a, b).denominator == 1) <= (text == str(a // b))


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("0.1 + 0.2", "0.3"),
        ("7/2", "3.5"),
        ("6/3", "2"),
        ("2**10", "1024"),
        ("2**-1", "0.5"),
        ("1e3", "1000"),
        ("3 × 4 ÷ 2 − 1", "5"),
        ("1/3", "0.333333333333333"),
        ("10**30", "1" + "0" * 30),
        ("-2**2", "-4"),
        ("1e-7 * 2", "0.0000002"),
    ],
)
def test_calculator_writes_plainly(expression, text):
    assert plain(evaluate(expression)) == text


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9",
        "9**9**9**9",
        "(-8)**0.5",
        "2^3",
        "x + 1",
        "__import__('os')",
        "[1]",
        "1,2",
        "1 if 1 else 2",
        "True",
        "1j",
        "'a'*3",
        "abs(1)",
        "",
        "1 = 1",
        "1e308*10",
        "10**5000",
        "9" * 399,
        "2**0.5**-9999",
        "1" + "+1" * 500,
        "(" * 150 + "1" + ")" * 150 + "**" * 2,
    ],
)
def test_calculator_refuses_fast(expression):
    started = time.perf_counter()
    with pytest.raises((ValueError, ArithmeticError)):
        if evaluate(expression) == int("9" * 399):
            raise ValueError("allowed: it is below the limit")
    assert time.perf_counter() - started < 0.2
