"""Qwen 3: ChatML with Hermes tool calls, and thoughts between `<think>` and `</think>`.

Its template rewrites the past: thoughts before the last user message are dropped, and the last assistant message gets
an empty thought if it has none. `prompt` and `conversation` do the same; `observation` never changes earlier ids, so a
trajectory keeps its thoughts as they were sampled.
"""

from __future__ import annotations

from collections.abc import Sequence

from ondol.models.chat.base import Codec, Renderer
from ondol.models.chat.chatml import ChatML
from ondol.records import Message


class Qwen3(ChatML):
    """Qwen 3 in its default, thinking mode. The non-thinking 2507 models need no more than `ChatML` with tools."""

    family = "qwen3"

    def __init__(self, codec: Codec) -> None:
        super().__init__(codec, system=None, tools=True)

    @classmethod
    def candidates(cls, codec: Codec, sample: str) -> list[Renderer]:
        return [cls(codec), ChatML(codec, tools=True)]

    def _assistant(self, messages: Sequence[Message], i: int) -> str:
        message, content, thought = messages[i], messages[i].content, ""
        if "</think>" in content:
            before = content.split("</think>")[0]
            thought = before.rstrip("\n").split("<think>")[-1].strip("\n")
            content = content.split("</think>")[-1].lstrip("\n")
        text = content
        if i > _last_query(messages) and (i + 1 == len(messages) or thought):
            text = "<think>\n" + thought + "\n</think>\n\n" + content.lstrip("\n")
        if not message.calls:
            return text
        # The template asks whether there is content, not whether there is text, before it breaks the line.
        return text + ("\n" if content else "") + self._with_calls("", message)


def _last_query(messages: Sequence[Message]) -> int:
    """Index of the last user message that is not a tool's result in disguise; the last index if there is none."""
    for i in reversed(range(len(messages))):
        content = messages[i].content
        disguised = content.startswith("<tool_response>") and content.endswith("</tool_response>")
        if messages[i].role == "user" and not disguised:
            return i
    return len(messages) - 1
