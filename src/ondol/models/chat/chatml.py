"""ChatML, the format of SmolLM2, Qwen 2 and Qwen 2.5: `<|im_start|>role\\ncontent<|im_end|>\\n`.

Templates differ in two things only: the system message they add when there is none, and whether they have a place for
tools (Qwen 2.5 does, in the Hermes format: `<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ondol.models.chat.base import Codec, Piece, Renderer, call_json, read_call, to_json
from ondol.records import Message, ToolCall

SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>{signatures}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML "
    'tags:\n<tool_call>\n{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
)


class ChatML(Renderer):
    """ChatML with Hermes tool calls.

    Args:
        system: system message of conversations that have none; None adds nothing.
        tools: tools, calls and tool messages are rendered as Qwen 2.5 does; else tools and calls are left out and
            `tool` is a role like any other, as in SmolLM2's template.
    """

    family = "chatml"
    call_stop = (_CLOSE,)
    end_token = "<|im_end|>"
    control_tokens = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    after_end = "\n"

    def __init__(self, codec: Codec, system: str | None = None, tools: bool = False) -> None:
        super().__init__(codec)
        self.start_id = codec.control("<|im_start|>")
        self.system = system
        self.renders_tools = tools

    @classmethod
    def candidates(cls, codec: Codec, sample: str) -> list[Renderer]:
        before = sample.partition("<|im_start|>user\n")[0]
        system = None
        if before.startswith("<|im_start|>system\n") and before.endswith("<|im_end|>\n"):
            system = before.removeprefix("<|im_start|>system\n").removesuffix("<|im_end|>\n")
        return [cls(codec, system, tools) for tools in (False, True)]

    def call_text(self, call: ToolCall) -> str:
        # The closing tag can occur only inside a JSON string, where `\/` is another way to write `/`.
        body = call_json(call, "arguments").replace(_CLOSE, _CLOSE.replace("/", "\\/"))
        return f"{_OPEN}\n{body}\n{_CLOSE}"

    def parse_calls(self, text: str) -> list[ToolCall]:
        """Calls between tags. What was only thought (before `</think>`) does not count; an unclosed tag is no call."""
        text = text.rpartition("</think>")[2]
        calls = []
        start = text.find(_OPEN)
        while start >= 0 and (end := text.find(_CLOSE, start)) >= 0:
            calls.append(read_call(text[start + len(_OPEN) : end], "arguments"))
            start = text.find(_OPEN, end)
        return calls

    def tools_text(self, tools: Sequence[dict[str, Any]]) -> str:
        return _TOOLS.format(signatures="".join("\n" + to_json(t) for t in tools))

    def _head(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> tuple[list[Piece], list[Message]]:
        rest = list(messages)
        system = rest.pop(0).content if rest[0].role == "system" else self.system
        parts = [] if system is None else [system]
        if tools and self.renders_tools:
            parts.append(self.tools_text(tools))
        return (self._turn("system", "\n\n".join(parts)) if parts else []), rest

    def _turns(self, messages: Sequence[Message]) -> list[Piece]:
        pieces: list[Piece] = []
        for i, message in enumerate(messages):
            if message.role == "tool" and self.renders_tools:
                # Results of one turn's calls share one user turn.
                if i == 0 or messages[i - 1].role != "tool":
                    pieces += [self.start_id, "user"]
                pieces.append(f"\n<tool_response>\n{message.content}\n</tool_response>")
                if i + 1 == len(messages) or messages[i + 1].role != "tool":
                    pieces += [self.end_id, "\n"]
            elif message.role == "assistant":
                pieces += self._turn("assistant", self._assistant(messages, i))
            else:
                pieces += self._turn(message.role, message.content)
        return pieces

    def _assistant(self, messages: Sequence[Message], i: int) -> str:
        message = messages[i]
        return self._with_calls(message.content, message)

    def _with_calls(self, text: str, message: Message) -> str:
        if not message.calls or not self.renders_tools:
            return text
        return "\n".join([*([text] if text else []), *(self.call_text(c) for c in message.calls)])

    def _turn(self, role: str, text: str) -> list[Piece]:
        return [self.start_id, f"{role}\n{text}", self.end_id, "\n"]

    def _generation(self) -> list[Piece]:
        return [self.start_id, "assistant\n"]
