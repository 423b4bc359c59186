"""Rubbish in: parsers of tool calls give calls or nothing, and the server refuses it in its own words. No 500, no hang."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ondol.models.chat.chatml import ChatML
from ondol.models.chat.gemma3 import Gemma3
from ondol.models.chat.llama3 import Llama3
from ondol.models.chat.qwen3 import Qwen3
from ondol.parts import make
from ondol.records import ToolCall
from ondol.tools.actions import find_action, find_blocks, printable
from ondol.tools.calls import Json, Tags

pytestmark = pytest.mark.timeout(120)

RENDERERS = {"chatml": ChatML, "qwen3": Qwen3, "llama3": Llama3, "gemma3": Gemma3}
PIECES = [
    "<tool_call>", "</tool_call>", "<python>", "</python>", "<calculator>", "</calculator>", "```python\n", "```tool_code\n",
    "```json\n", "```", "```output", "<|python_tag|>", "<think>", "</think>", "\n", " ", ";", "{", "}", "[", "]", '"', ":",
    ",", '{"name": "python", "arguments": {"code": "1"}}', '{"name": "python", "parameters": {"code": "1"}}', '"name"',
    '"arguments"', "python", "null", "true", "1e999", "-0", "NaN", "9" * 400, "\\u0000", "\\ud800", "\ud800", "\x00", "é",
    "[" * 200, '{"a":' * 200, "}" * 200,
]  # fmt: skip
texts = st.one_of(st.lists(st.sampled_from(PIECES), max_size=24).map("".join), st.text(max_size=200))
rounds = settings(max_examples=100, deadline=None)


def good(calls: list[ToolCall], text: str) -> None:
    """Calls that what comes later (records, JSON, tools) can live with."""
    assert len(calls) <= len(text)
    for call in calls:
        assert isinstance(call.name, str) and isinstance(call.arguments, dict)
        assert call.error is None or isinstance(call.error, str)
        assert json.loads(json.dumps(call.arguments)) is not None
        assert all(isinstance(k, str) for k in call.arguments)


@pytest.mark.parametrize("family", RENDERERS)
@rounds
@given(text=texts)
def test_renderers(family: str, text: str):
    renderer = RENDERERS[family].__new__(RENDERERS[family])  # parsing needs no tokenizer
    calls = renderer.parse_calls(text)
    good(calls, text)
    assert Json(renderer).parse(text) == calls == renderer.parse_calls(text)


@rounds
@given(text=texts)
def test_tags(text: str):
    style = Tags([make("tools", "python"), make("tools", "calculator")])
    calls = style.parse(text)
    good(calls, text)
    assert all(call.error is None and f"<{call.name}>" in text for call in calls)
    assert style.parse("".join(map(style.show, calls))) == calls


@rounds
@given(text=texts)
def test_actions(text: str):
    clean = printable(text)
    assert clean == printable(clean) == clean.encode().decode()
    for action in (find_action(clean, "python", "code"), find_blocks(clean, "python", "code", ("python", "py"))):
        if action is not None:
            good([action.call], clean)
            assert action.call.name == "python" and isinstance(action.show("x"), str)


@pytest.mark.parametrize("family", RENDERERS)
@pytest.mark.parametrize(
    "piece", ["<tool_call>", "<|python_tag|>{", "```tool_code\n", '{"name":', "[", '{"a":[', "<think>"]
)
def test_parsers_take_linear_time(family: str, piece: str):
    renderer = RENDERERS[family].__new__(RENDERERS[family])
    started = time.monotonic()
    renderer.parse_calls(piece * (200_000 // len(piece)))
    assert time.monotonic() - started < 2


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    pytest.importorskip("uvicorn", reason="pip install 'ondol[server]'")
    from servers import serving

    faulty = '{name = "faulty_tool:Faulty", timeout_s = 0.2}'
    with serving("--tools", "python,calculator", "--tool", faulty, "--in-process") as (process, start):
        yield start["url"]
        assert process.poll() is None, "the server died"


@pytest.mark.parametrize("path", ["/get_observation", "/call", "/finish", "/tools", "/health"])
def test_the_server_keeps_to_its_own_schema(server: str, path: str):
    """Schemathesis draws requests from /openapi.json, right ones and wrong ones; every reply must fit it."""
    schemathesis = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_url(f"{server}/openapi.json")
    reads = path in ("/tools", "/health")
    operation = schema[path]["GET" if reads else "POST"]
    seen: set[int] = set()

    def equally_long(case: Any) -> Any:
        """What JSON Schema cannot say: the lists of a batch belong together."""
        if path == "/get_observation":
            n = len(case.body["trajectory_ids"])
            for name, filler in (("actions", ""), ("extra_fields", {}), ("finish", False), ("is_last_step", False)):
                if case.body.get(name) is not None:
                    case.body[name] = (case.body[name] + [filler] * n)[:n]
        return case

    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(case=operation.as_strategy().map(equally_long))
    def right(case: Any) -> None:
        seen.add(case.call_and_validate(timeout=20).status_code)

    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE))
    def wrong(case: Any) -> None:
        seen.add(case.call_and_validate(timeout=20).status_code)

    right()
    if not reads:  # nothing to get wrong there
        wrong()
        assert seen & {400, 422}
    assert 200 in seen and not any(status >= 500 for status in seen)
