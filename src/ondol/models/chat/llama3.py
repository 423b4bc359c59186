"""Llama 3 and Llama 3.1 to 3.3: `<|start_header_id|>role<|end_header_id|>\\n\\ncontent<|eot_id|>`, content trimmed.

3.1 and later add a dated system message, and tool calls as bare JSON, `{"name": ..., "parameters": {...}}`, one call a
turn; results come back in the role `ipython`, as a JSON string. Built-in tools (`<|python_tag|>x.call(...)`) are not
supported. Llama 3.2's template prints the day of the rendering.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from ondol.errors import OndolError
from ondol.models.chat.base import Codec, Piece, Renderer, call_json, call_of, failed_call, to_json
from ondol.records import Message, ToolCall

#: What the templates print when they are given no date and no clock.
DEFAULT_DATE = "26 Jul 2024"

_TOOLS = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
    "answers the given prompt.\n\n"
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)


class Llama3(Renderer):
    """Llama 3.0. Its template has no place for tools."""

    family = "llama3"
    end_token = "<|eot_id|>"
    other_end_tokens = ("<|eom_id|>",)
    control_tokens = (
        *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
        *("<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
    )

    def __init__(self, codec: Codec) -> None:
        super().__init__(codec)
        self.start_id, self.stop_id = codec.control("<|start_header_id|>"), codec.control("<|end_header_id|>")

    def call_text(self, call: ToolCall) -> str:
        return call_json(call, "parameters")

    def parse_calls(self, text: str) -> list[ToolCall]:
        """Calls of a turn that is JSON from its first character on; several may follow each other (`;` between)."""
        text = text.strip().removeprefix("<|python_tag|>").lstrip()
        calls: list[ToolCall] = []
        position = 0
        while text.startswith("{", position):
            try:
                data, position = json.JSONDecoder().raw_decode(text, position)
            except (ValueError, RecursionError) as e:
                return [*calls, failed_call(f"not valid JSON: {e}")]
            calls.append(call_of(data, "parameters"))
            while position < len(text) and text[position] in "; \n\t\r":
                position += 1
        return calls

    def tools_text(self, tools: Sequence[dict[str, Any]]) -> str:
        return _TOOLS + "".join(to_json(t, indent=4) + "\n\n" for t in tools)

    def _head(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> tuple[list[Piece], list[Message]]:
        return self._bos(), list(messages)

    def _bos(self) -> list[Piece]:
        return [] if self.codec.bos_id is None else [self.codec.bos_id]

    def _turns(self, messages: Sequence[Message]) -> list[Piece]:
        return [piece for m in messages for piece in self._turn(m.role, m.content.strip())]

    def _turn(self, role: str, text: str) -> list[Piece]:
        return [self.start_id, role, self.stop_id, "\n\n" + text, self.end_id]

    def _generation(self) -> list[Piece]:
        return [self.start_id, "assistant", self.stop_id, "\n\n"]


class Llama31(Llama3):
    """Llama 3.1, 3.2 and 3.3.

    Args:
        date: printed as `Today Date`, like "26 Jul 2024".
    """

    family = "llama3.1"

    def __init__(self, codec: Codec, date: str = DEFAULT_DATE) -> None:
        super().__init__(codec)
        self.date = date
        self.renders_tools = True

    @classmethod
    def candidates(cls, codec: Codec, sample: str) -> list[Renderer]:
        date = re.search(r"Today Date: (.*)\n", sample)
        return [cls(codec, date[1])] if date else []

    def _head(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> tuple[list[Piece], list[Message]]:
        rest = list(messages)
        system = rest.pop(0).content.strip() if rest[0].role == "system" else ""
        ipython = "Environment: ipython\n" if tools else ""
        dated = f"{ipython}Cutting Knowledge Date: December 2023\nToday Date: {self.date}\n\n"
        pieces = [*self._bos(), *self._turn("system", dated + system)]
        if tools:
            if not rest:
                raise OndolError("Llama 3.1 shows tools in the first user message, and there is none", "add one")
            pieces += self._turn("user", self.tools_text(tools) + rest.pop(0).content.strip())
        return pieces, rest

    def _turns(self, messages: Sequence[Message]) -> list[Piece]:
        pieces: list[Piece] = []
        for message in messages:
            if message.role == "tool":
                pieces += self._turn("ipython", to_json(message.content))
            elif message.calls:
                call, *more = message.calls
                if more:
                    raise OndolError("Llama 3.1 makes one tool call a turn", "split the calls over several turns")
                # The template drops the content of a message that calls.
                pieces += self._turn("assistant", self.call_text(call))
            else:
                pieces += self._turn(message.role, message.content.strip())
        return pieces
