"""Call styles: tags, and the families' JSON."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.errors import OndolError
from ondol.records import ToolCall, ToolResult
from ondol.tools.calls import CallStyle, Json, Tags


@dataclass
class Tool:
    name: str
    main_argument: str


TAGS = Tags([Tool("python", "code"), Tool("calc", "expression"), Tool("py", "x")])


def by_regex(text: str) -> list[ToolCall]:
    """The rule, written independently (and in quadratic time)."""
    argument = {"python": "code", "calc": "expression", "py": "x"}
    found = re.finditer(r"<(python|calc|py)>(.*?)</\1>", text, re.DOTALL)
    return [ToolCall(m[1], {argument[m[1]]: m[2]}) for m in found]


def test_one_call():
    assert TAGS.parse("So: <python>print(1)</python>") == [ToolCall("python", {"code": "print(1)"})]
    assert TAGS.stop == ("</python>", "</calc>", "</py>")
    assert TAGS.result(ToolResult("1"), "python") == "<result>1</result>"
    assert TAGS.show(ToolCall("calc", {"expression": "1 + 1"})) == "<calc>1 + 1</calc>"


@pytest.mark.parametrize(
    "text", ["<python>print(1)", "<python >1</python>", "<Python>1</Python>", "</python>", "<other>1</other>", "<>1</>"]
)
def test_no_call(text):
    assert TAGS.parse(text) == []


bits = ["<python>", "</python>", "<calc>", "</calc>", "<py>", "</py>", "<result>", "a", "\n", " ", "<", ">", "é"]


@given(st.lists(st.sampled_from(bits), max_size=14).map("".join))
def test_parsing_is_the_rule(text):
    assert TAGS.parse(text) == by_regex(text)


@given(st.lists(st.tuples(st.sampled_from(["python", "calc", "py"]), st.text()), max_size=4))
def test_calls_round_trip(pairs):
    argument = {"python": "code", "calc": "expression", "py": "x"}
    calls = [ToolCall(name, {argument[name]: text}) for name, text in pairs if f"</{name}>" not in text]
    assert TAGS.parse("\n".join(map(TAGS.show, calls))) == calls


def test_many_unclosed_tags_take_linear_time():
    assert TAGS.parse("<python><calc>" * 100_000) == []


def test_no_tools_and_unknown_tools():
    assert Tags([]).parse("<>1</>") == [] and Tags([]).stop == ()
    with pytest.raises(OndolError, match="did you mean 'python'"):
        TAGS.show(ToolCall("pythn", {}))


def test_json_delegates_to_the_renderer():
    class Fake:
        call_stop = ("!",)

        def parse_calls(self, text):
            return [ToolCall(text, {})]

        def call_text(self, call):
            return call.name + "!"

    style: CallStyle = Json(Fake())  # type: ignore[arg-type]
    assert style.stop == ("!",)
    assert style.parse("f") == [ToolCall("f", {})]
    assert style.show(ToolCall("f", {})) == "f!"
    assert style.result(ToolResult("raw <b>"), "f") == "raw <b>"
