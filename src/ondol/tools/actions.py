"""How a tool server finds a call in a model's text, and frames what goes back (arXiv 2509.01055, VerlTool).

A server gets the text of a whole turn and may know nothing of the model's chat format, so it accepts three ways to write
a call: tags (`<python>print(1)</python>`), a fenced block where the tool has a language, and JSON
(`<tool_call>{"name": "python", "arguments": {"code": "print(1)"}}</tool_call>`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ondol.records import ToolCall

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")  # NUL and C0 but tab, newline, carriage return
_MAX_DEPTH = 32  # of a call's JSON: later recursive code (asdict, json) must not fail


@dataclass(frozen=True)
class Action:
    """A call and how it was written, which decides how its result is framed."""

    call: ToolCall
    style: Literal["tags", "fence", "open_fence", "json"]

    def show(self, text: str) -> str:
        """The observation: a result's text, framed as the call was."""
        match self.style:
            case "tags":
                return f"<result>{text}</result>"
            case "fence":
                return f"\n```output\n{text}\n```\n"
            case "open_fence":  # the model itself opened the block for the output
                return f"\n{text}\n```\n"
            case _:
                return text


def printable(text: str) -> str:
    """The text without NUL and other control characters, and without halves of surrogate pairs."""
    return _CONTROL.sub("", text).encode("utf-8", "replace").decode()


def find_action(text: str, name: str, main_argument: str) -> Action | None:
    """The first call of the tool in tags; else the first one in JSON."""
    for block in between(text, f"<{name}>", f"</{name}>"):
        return Action(ToolCall(name, {main_argument: block}), "tags")
    for block in between(text, _OPEN, _CLOSE):
        arguments = _arguments(block, name)
        if arguments is not None:
            return Action(ToolCall(name, arguments), "json")
    return None


def find_blocks(text: str, name: str, main_argument: str, languages: Sequence[str]) -> Action | None:
    """All of the tool's blocks joined by newlines: those in tags, else in fences of the first language that has any.

    A call in JSON counts when there are no blocks.
    """
    blocks = [b.strip("\n") for b in between(text, f"<{name}>", f"</{name}>")]
    if blocks:
        return Action(ToolCall(name, {main_argument: "\n".join(blocks)}), "tags")
    for language in languages:
        blocks = [b.strip("\n") for b in between(text, f"```{language}\n", "```")]
        if blocks:
            style = "open_fence" if text.rstrip(" ").endswith("```output") else "fence"
            return Action(ToolCall(name, {main_argument: "\n".join(blocks)}), style)
    return find_action(text, name, main_argument)


def between(text: str, opening: str, closing: str) -> list[str]:
    """What stands between each `opening` and the first `closing` after it, in order. Linear in the text's length."""
    found, position = [], 0
    while (start := text.find(opening, position)) >= 0:
        end = text.find(closing, start + len(opening))
        if end < 0:
            break
        found.append(text[start + len(opening) : end])
        position = end + len(closing)
    return found


def _arguments(block: str, name: str) -> dict[str, Any] | None:
    """The arguments of a JSON call of the tool `name`; None if it is no such call."""
    try:
        value = json.loads(block)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or value.get("name") != name:
        return None
    arguments = value.get("arguments", {})
    return arguments if isinstance(arguments, dict) and _depth(arguments) <= _MAX_DEPTH else None


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level and depth <= _MAX_DEPTH:
        depth += 1
        level = [x for v in level for x in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())]
    return depth
