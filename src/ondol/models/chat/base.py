"""What every chat format shares: from messages to token ids, and from a model's text to tool calls.

Token ids are the record. A conversation's prompt is rendered once (`prompt`), sampled turns are kept as ids, and what
the environment says is appended as ids of its own (`observation`). Nothing is ever decoded and encoded again.

A family renders *pieces*: plain text, or the id of one control token (`<|im_end|>`...). Adjacent text is joined before
it is encoded, so the ids equal those of the tokenizer's own template. Control tokens come only from the format itself:
the same characters inside a message are encoded as ordinary text, so that a tool's output cannot close a turn. Equality
with the template is therefore promised for contents without control-token strings only.

Images: none of these families sees any, so a message's images become a line of text that says so (`readable`).
"""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from ondol.errors import OndolError
from ondol.records import Message, ToolCall

Piece = str | int

#: Deeper JSON than any tool needs; without a bound a model could make later recursive code (asdict, json) fail.
_MAX_DEPTH = 32


class Codec:
    """A tokenizer reduced to what renderers need: ids of control tokens, and text encoded as nothing but text.

    Works on its own copy of the fast backend: the flag that turns special-token splitting off is state of the backend,
    and other users of the tokenizer (in other threads, too) set it back.

    Args:
        tokenizer: a fast `transformers` tokenizer.
        control: tokens of chat formats that must never come from text, even where the tokenizer does not call them
            special. Added tokens outside this list that are not special (Qwen's `<tool_call>`) stay one token.
    """

    def __init__(self, tokenizer: Any, control: Iterable[str]) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise OndolError(
                f"a chat renderer needs a fast tokenizer, not {type(tokenizer).__name__}",
                "load it with transformers.AutoTokenizer, from a folder that has a tokenizer.json",
            )
        from tokenizers import Tokenizer

        state = json.loads(backend.to_str())
        known = set(control)
        for token in state["added_tokens"]:
            token["special"] = token["special"] or token["content"] in known
        self._backend = Tokenizer.from_str(json.dumps(state))
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        for token in known:
            identity = self._backend.token_to_id(token)
            if identity is not None and identity in self.text(token):
                raise OndolError(
                    f"this tokenizer cannot encode the characters '{token}' as plain text, so text could close a turn",
                    "use the tokenizer the model was published with",
                )

    def find(self, token: str) -> int | None:
        """Id of `token`, None if the vocabulary lacks it."""
        return self._backend.token_to_id(token)

    def control(self, token: str) -> int:
        """Id of a control token that the format cannot do without."""
        identity = self.find(token)
        if identity is None:
            raise OndolError(
                f"the tokenizer has no token '{token}', which this chat format needs",
                "choose another chat format with `chat` in the recipe's [model]",
            )
        return identity

    def text(self, text: str) -> list[int]:
        """Ids of `text`, no control token among them. A lone surrogate (no UTF-8 for it) becomes '?'."""
        return self._backend.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False).ids

    def ends(self, text: str, most: int, first: int, last: int) -> tuple[str, str] | None:
        """Text of the first and of the last so many tokens (`first + last <= most`), whole characters only; None for a text
        of no more than `most` tokens."""
        text = text.encode("utf-8", "replace").decode()
        offsets = self._backend.encode(text, add_special_tokens=False).offsets
        n = len(offsets)
        if n <= most:
            return None
        # several tokens may share a character: its offsets are then those of each of them
        head = min(offsets[first - 1][1], offsets[first][0]) if first else 0
        tail = max(offsets[n - last][0], offsets[n - last - 1][1]) if last else len(text)
        return text[:head], text[tail:]


class Renderer(ABC):
    """A family's chat format. Made by `ondol.models.chat.renderer_for`.

    Attributes:
        family: the name a recipe uses.
        end_id: the token that closes an assistant turn;  end_ids: all tokens that end one when sampled.
        call_stop: strings at which sampling may stop because a tool call is complete; empty where a call is closed by
            an end token only.
        renders_tools: the format has a place for tools. If not, `prompt` leaves `tools` and `Message.calls` out, as
            the tokenizer's template does: put `tools_text` into the system message, `call_text` into the content.
    """

    family: ClassVar[str]
    call_stop: ClassVar[tuple[str, ...]] = ()
    end_token: ClassVar[str]
    other_end_tokens: ClassVar[tuple[str, ...]] = ()
    control_tokens: ClassVar[tuple[str, ...]]
    after_end: ClassVar[str] = ""  # text between the end-of-turn token and the next turn
    renders_tools: bool = False

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.end_id = codec.control(self.end_token)
        ends = {self.end_id, codec.eos_id, *(codec.find(t) for t in self.other_end_tokens)}
        self.end_ids = frozenset(i for i in ends if i is not None)

    @classmethod
    def candidates(cls, codec: Codec, sample: str) -> list[Renderer]:
        """Forms of this family a tokenizer's template may have; `sample` is what it makes of one user message `x`."""
        return [cls(codec)]

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Ids of the whole conversation and the opening of the assistant's turn.

        Equal to `tokenizer.apply_chat_template(..., add_generation_prompt=True)`. `tools` are JSON-schema functions,
        `{"type": "function", "function": {"name", "description", "parameters"}}`.
        """
        return self._encode([*self._conversation(messages, tools), *self._generation()])

    def conversation(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """As `prompt`, without the opening of the next turn."""
        return self._encode(self._conversation(messages, tools))

    def observation(self, messages: Sequence[Message], ended: bool) -> list[int]:
        """Ids that follow a sampled assistant turn: its closing, then `messages` (tool, user), then the next opening.

        `ended` says that the sampled ids already hold an end-of-turn token. For a turn of text T,
        `prompt(ms) + encode(T) + [end_id] + observation(new, True) == prompt([*ms, assistant T, *new])`
        where the format keeps T as it is: T without whitespace at its start (Llama and Gemma trim both ends; elsewhere
        it may fuse with the line break of the opening), and for Qwen 3 a T that holds a non-empty thought and is
        followed by tools (a user message makes its template drop old thoughts). Where the template would rewrite
        earlier turns, the ids here do not: what was sampled stays.
        """
        for message in messages:
            if message.role not in ("tool", "user"):
                raise ValueError(f"an observation has tool and user messages, not '{message.role}'")
        closing: list[Piece] = [self.after_end] if ended else [self.end_id, self.after_end]
        return self._encode([*closing, *self._turns([readable(m) for m in messages]), *self._generation()])

    @abstractmethod
    def call_text(self, call: ToolCall) -> str:
        """The call as the family writes it; `parse_calls` gives it back."""

    @abstractmethod
    def parse_calls(self, text: str) -> list[ToolCall]:
        """All calls in a sampled turn, in order. One that cannot be read has `error` set; never raises."""

    @abstractmethod
    def tools_text(self, tools: Sequence[dict[str, Any]]) -> str:
        """Text that tells the model of its tools and how to call them, for a system message."""

    @abstractmethod
    def _head(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> tuple[list[Piece], list[Message]]:
        """What comes before the ordinary turns, and the messages left for those."""

    @abstractmethod
    def _turns(self, messages: Sequence[Message]) -> list[Piece]:
        """Ordinary turns, one after the other."""

    @abstractmethod
    def _generation(self) -> list[Piece]:
        """Opening of the assistant's turn."""

    def _conversation(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[Piece]:
        if not messages:
            raise OndolError("a conversation needs at least one message", "give a system or user message")
        head, rest = self._head([readable(m) for m in messages], tools)
        return [*head, *self._turns(rest)]

    def _encode(self, pieces: Iterable[Piece]) -> list[int]:
        ids: list[int] = []
        text = ""
        for piece in pieces:
            if isinstance(piece, str):
                text += piece
                continue
            ids += self.codec.text(text) if text else []
            ids.append(piece)
            text = ""
        return ids + (self.codec.text(text) if text else [])


def readable(message: Message) -> Message:
    """The message for a model that reads text only: each image is named in a line of its own."""
    if not message.images:
        return message
    lines = (f"[{image}: not shown, this model reads text only]" for image in message.images)
    return dataclasses.replace(message, content="\n".join(filter(None, (message.content, *lines))), images=())


def template_message(message: Message) -> dict[str, Any]:
    """The message as `apply_chat_template` and OpenAI-compatible endpoints take it, its images named in text."""
    message = readable(message)
    out: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        out["name"] = message.name
    if message.calls:
        out["tool_calls"] = [
            {"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in message.calls
        ]
    return out


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON exactly as transformers' `tojson` filter writes it in templates."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def call_json(call: ToolCall, key: str) -> str:
    """`{"name": ..., KEY: {...}}`, spaced as the families' templates do."""
    return to_json({"name": call.name, key: call.arguments})


def read_call(source: str, key: str) -> ToolCall:
    """The call that the JSON text `source` holds, its arguments under `key`."""
    try:
        data = json.loads(source)
    except (ValueError, RecursionError) as e:
        return failed_call(f"not valid JSON: {e}")
    return call_of(data, key)


def call_of(data: Any, key: str) -> ToolCall:
    """The call that decoded JSON stands for. A call without arguments may leave `key` out."""
    if not isinstance(data, dict):
        return failed_call("a call must be a JSON object")
    name, arguments = data.get("name"), data.get(key, {})
    if not isinstance(name, str) or not name:
        return failed_call('a call needs a "name", a string')
    if not isinstance(arguments, dict):
        return failed_call(f'"{key}" must be a JSON object')
    if _deep(arguments):
        return failed_call(f'"{key}" is nested deeper than {_MAX_DEPTH} levels')
    try:
        # Python reads NaN, 1e999 and lone surrogates; neither strict JSON nor UTF-8 has them.
        json.dumps([name, arguments], ensure_ascii=False, allow_nan=False).encode()
    except ValueError as e:
        return failed_call(f"not valid JSON: {e}")
    return ToolCall(name, arguments)


def failed_call(error: str) -> ToolCall:
    return ToolCall("", {}, error)


def _deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH):
        containers = [v for v in level if isinstance(v, (dict, list))]
        level = [v for c in containers for v in (c.values() if isinstance(c, dict) else c)]
        if not level:
            return False
    return True
