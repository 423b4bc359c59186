"""Gemma 3: `<start_of_turn>user\\n...<end_of_turn>\\n`, roles `user` and `model` in turns, contents trimmed.

There is no system role (its text opens the first user turn) and no official tool format. Ondol's own: a call is JSON
in a ```tool_code fence, a result a ```tool_output fence in a user turn, the fence names that Google's examples use.
The template knows neither, so equality with it is promised for conversations without tool messages.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ondol.errors import OndolError
from ondol.models.chat.base import Codec, Piece, Renderer, call_json, read_call, to_json
from ondol.records import Message, ToolCall

_OPEN = re.compile(r"```tool_code[ \t]*(?=\n)")
# JSON strings hold no raw line break, so a fence at the start of a line cannot be part of the call.
_CLOSE = "\n```"


class Gemma3(Renderer):
    """Gemma 3, text only. Neighbouring user and tool messages share a turn, as roles must alternate."""

    family = "gemma3"
    call_stop = ("}\n```",)
    end_token = "<end_of_turn>"
    control_tokens = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
    after_end = "\n"

    def __init__(self, codec: Codec) -> None:
        super().__init__(codec)
        self.start_id = codec.control("<start_of_turn>")

    def call_text(self, call: ToolCall) -> str:
        return f"```tool_code\n{call_json(call, 'arguments')}\n```"

    def parse_calls(self, text: str) -> list[ToolCall]:
        """Calls in closed fences."""
        calls = []
        position = 0
        while (opening := _OPEN.search(text, position)) and (end := text.find(_CLOSE, opening.end())) >= 0:
            calls.append(read_call(text[opening.end() : end], "arguments"))
            position = end + len(_CLOSE)
        return calls

    def tools_text(self, tools: Sequence[dict[str, Any]]) -> str:
        return (
            "You may call functions. To call one, write a fence that holds JSON:\n"
            '```tool_code\n{"name": <function name>, "arguments": <object of arguments>}\n```\n'
            "Its result comes back in a ```tool_output fence. The functions:\n" + "\n".join(to_json(t) for t in tools)
        )

    def _head(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> tuple[list[Piece], list[Message]]:
        bos: list[Piece] = [] if self.codec.bos_id is None else [self.codec.bos_id]
        rest = list(messages)
        opening = rest.pop(0).content + "\n\n" if rest[0].role == "system" else ""
        if not rest or rest[0].role not in ("user", "tool"):
            raise OndolError(
                "a conversation with Gemma 3 begins with a user message", "add one after the system message"
            )
        count = _run(rest, 0)
        return [*bos, *self._turn("user", opening + _join(rest[:count]))], rest[count:]

    def _turns(self, messages: Sequence[Message]) -> list[Piece]:
        pieces: list[Piece] = []
        i = 0
        while i < len(messages):
            if messages[i].role == "system":
                raise OndolError("Gemma 3 has a system message at the start only", "make it a user message")
            if messages[i].role == "assistant":
                pieces += self._turn("model", messages[i].content.strip())
                i += 1
            else:
                count = _run(messages, i)
                pieces += self._turn("user", _join(messages[i : i + count]))
                i += count
        return pieces

    def _turn(self, role: str, text: str) -> list[Piece]:
        return [self.start_id, f"{role}\n{text}", self.end_id, "\n"]

    def _generation(self) -> list[Piece]:
        return [self.start_id, "model\n"]


def _run(messages: Sequence[Message], start: int) -> int:
    """How many messages from `start` on share a user turn."""
    end = start
    while end < len(messages) and messages[end].role in ("user", "tool"):
        end += 1
    return end - start


def _join(messages: Sequence[Message]) -> str:
    return "\n\n".join(f"```tool_output\n{m.content}\n```" if m.role == "tool" else m.content.strip() for m in messages)
