"""OpenAI's chat completions as data: what a client asks, and what it is answered. No server and no model here.

A conversation arrives whole with every request. `Dialogue` recognises what it has seen, so that turns that were sampled stay the very
token ids that were sampled.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ondol.engines.base import Sampling
from ondol.records import Finish, Message, ToolCall

_MOST_MESSAGES = 4096
_MOST_STOPS = 16
_ROLES = ("system", "developer", "user", "assistant", "tool")


class BadRequest(Exception):
    """What is wrong with a request, as a client is told. `param` is the field."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Asked:
    """A request. `messages` have the calls of assistant turns in `calls`; a tool's answer has the tool's name."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    seed: int | None = None
    choices: int = 1
    stream: bool = False
    usage_in_stream: bool = False
    logprobs: bool = False
    ids: bool = False  # ours: the token ids of prompt and answer are wanted


def parse(body: Any, default: Sampling) -> Asked:
    """Read the JSON of a request; what it does not say is as in `default`. Raises BadRequest."""
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    for name in ("audio", "functions", "function_call", "logit_bias", "response_format"):
        if body.get(name) and body[name] != {"type": "text"}:
            raise BadRequest(f"'{name}' is not supported", name)
    if body.get("top_logprobs"):
        raise BadRequest("only the sampled token's log-probability is known: leave top_logprobs out", "top_logprobs")
    for name in ("presence_penalty", "frequency_penalty"):
        if body.get(name):
            raise BadRequest(f"'{name}' must be 0: what is sampled is the policy itself", name)
    tools = _tools(body.get("tools"))
    choice = body.get("tool_choice", "auto")
    if choice == "none":
        tools = ()
    elif choice != "auto":
        raise BadRequest("tool_choice is 'auto' or 'none'", "tool_choice")
    given = body.get("stop") or []
    stop: tuple[Any, ...] = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list) else ("",)
    if len(stop) > _MOST_STOPS or not all(isinstance(s, str) and s for s in stop):
        raise BadRequest(f"stop is a string, or a list of at most {_MOST_STOPS}", "stop")
    choices = _number(body, "n", 1, 1, 128, whole=True)
    stream = body.get("stream") or False
    if not isinstance(stream, bool):
        raise BadRequest("stream is true or false", "stream")
    if stream and choices > 1:
        raise BadRequest("a stream has one choice", "n")
    options = body.get("stream_options")
    seed = body.get("seed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise BadRequest("seed is a whole number", "seed")
    return Asked(
        _messages(body.get("messages")),
        tools,
        _sampling(body, default),
        stop,
        None if seed is None else seed % 2**63,
        int(choices),
        stream,
        isinstance(options, dict) and bool(options.get("include_usage")),
        body.get("logprobs") is True,
        body.get("return_token_ids") is True,
    )


def _sampling(body: dict[str, Any], default: Sampling) -> Sampling:
    given = body.get("max_completion_tokens")
    most = "max_tokens" if given is None else "max_completion_tokens"
    return Sampling(
        temperature=_number(body, "temperature", default.temperature, 0, 100),
        top_p=_number(body, "top_p", default.top_p, 1e-6, 1),
        top_k=int(_number(body, "top_k", default.top_k, 0, 2**31, whole=True)),
        min_p=_number(body, "min_p", default.min_p, 0, 0.999999),
        max_tokens=int(_number(body, most, default.max_tokens, 1, 2**31, whole=True)),
    )


def _number(body: dict[str, Any], name: str, default: float, low: float, high: float, *, whole: bool = False) -> float:
    value = body.get(name)
    if value is None:
        return default
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not low <= value <= high or (whole and value != int(value)):
        raise BadRequest(f"{name} is a {'whole ' if whole else ''}number from {low:g} to {high:g}", name)
    return value


def _messages(found: Any) -> tuple[Message, ...]:
    if not isinstance(found, list) or not found or len(found) > _MOST_MESSAGES:
        raise BadRequest(f"messages is a list of 1 to {_MOST_MESSAGES} messages", "messages")
    names: dict[str, str] = {}  # id of a call -> the tool it called
    out = []
    for number, row in enumerate(found):
        where = f"messages[{number}]"
        role = row.get("role") if isinstance(row, dict) else None
        if role not in _ROLES:
            raise BadRequest(f"{where} needs a role: {', '.join(_ROLES)}", where)
        text = _text(row.get("content"), where)
        calls = []
        for call in row.get("tool_calls") or ():
            function = call.get("function") if isinstance(call, dict) else None
            if role != "assistant" or not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise BadRequest(f"{where}.tool_calls are an assistant's, each with a function", where)
            try:
                arguments = json.loads(function.get("arguments") or "{}")
            except (ValueError, TypeError, RecursionError):
                arguments = None
            if not isinstance(arguments, dict):
                raise BadRequest(f"{where}: the arguments of a call are a JSON object, as text", where)
            calls.append(ToolCall(function["name"], arguments))
            if isinstance(call.get("id"), str):
                names[call["id"]] = function["name"]
        name = row.get("name") if role != "tool" else names.get(str(row.get("tool_call_id")), row.get("name"))
        out.append(
            Message(
                "system" if role == "developer" else role, text, tuple(calls), name if isinstance(name, str) else None
            )
        )
    return tuple(out)


def _text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts: list[Any] = content if isinstance(content, list) else [{}]
    if not all(
        isinstance(p, dict) and p.get("type") in ("text", "refusal") and isinstance(p.get("text"), str) for p in parts
    ):
        raise BadRequest(f"{where}.content is a text: this model reads nothing else", where)
    return "".join(p["text"] for p in parts)


def _tools(found: Any) -> tuple[dict[str, Any], ...]:
    out = []
    for number, row in enumerate(found or ()) if isinstance(found or [], list) else [(0, None)]:
        function = row.get("function") if isinstance(row, dict) and row.get("type") == "function" else None
        name = function.get("name") if isinstance(function, dict) else None
        parameters = (
            function.get("parameters") or {"type": "object", "properties": {}} if isinstance(function, dict) else None
        )
        if not isinstance(name, str) or not name or not isinstance(parameters, dict):
            raise BadRequest(f"tools[{number}] is not a function with a name and parameters", "tools")
        assert isinstance(function, dict)
        clean = {"name": name, "description": str(function.get("description") or ""), "parameters": parameters}
        out.append({"type": "function", "function": clean})
    if len({t["function"]["name"] for t in out}) < len(out):
        raise BadRequest("two tools have the same name", "tools")
    return tuple(out)


# -- answers ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """One sampled turn as a client sees it. `tokens` are (text, log-probability) of each new token."""

    content: str
    calls: tuple[ToolCall, ...]
    finish: Finish
    ids: Sequence[int] = ()
    tokens: Sequence[tuple[str, float]] = ()
    call_ids: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        if self.calls:
            return "tool_calls"
        return "length" if self.finish in (Finish.LENGTH, Finish.CONTEXT, Finish.TIMEOUT) else "stop"

    def message(self) -> Message:
        return Message("assistant", self.content, self.calls)


def new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex[:24]}"


def usage(prompt: int, new: int, cached: int = 0) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def completion(
    model: str, asked: Asked, prompt: Sequence[int], said: Sequence[Said], cached: int = 0
) -> dict[str, Any]:
    """The answer to a request without `stream`. `prompt`: its token ids."""
    choices = []
    for index, turn in enumerate(said):
        message: dict[str, Any] = {
            "role": "assistant",
            "content": turn.content if turn.content or not turn.calls else None,
        }
        if turn.calls:
            message["tool_calls"] = _calls(turn)
        choice: dict[str, Any] = {
            "index": index,
            "message": message,
            "finish_reason": turn.reason,
            "logprobs": _logprobs(turn.tokens) if asked.logprobs else None,
        }
        if asked.ids:  # where vLLM puts them
            choice["token_ids"] = list(turn.ids)
        choices.append(choice)
    out: dict[str, Any] = {
        "id": new_id("chatcmpl"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": usage(len(prompt), sum(len(t.ids) for t in said), cached),
    }
    if asked.ids:
        out["prompt_token_ids"] = list(prompt)
    return out


class Chunks:
    """The pieces of a streamed answer, as server-sent events."""

    def __init__(self, model: str, asked: Asked) -> None:
        self.asked = asked
        self.head = {
            "id": new_id("chatcmpl"),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }

    def _event(self, **fields: Any) -> str:
        return f"data: {json.dumps({**self.head, **fields}, ensure_ascii=False)}\n\n"

    def _choice(self, delta: dict[str, Any], reason: str | None = None, **more: Any) -> str:
        return self._event(choices=[{"index": 0, "delta": delta, "finish_reason": reason, **more}])

    def first(self) -> str:
        return self._choice({"role": "assistant", "content": ""})

    def text(self, piece: str, tokens: Sequence[tuple[str, float]] = ()) -> str:
        return self._choice({"content": piece}, logprobs=_logprobs(tokens) if self.asked.logprobs else None)

    def last(self, said: Said, prompt: int, cached: int = 0) -> Iterable[str]:
        if said.calls:
            rows = [{"index": i, **call} for i, call in enumerate(_calls(said))]
            yield self._choice({"tool_calls": rows})
        yield self._choice({}, said.reason, **({"token_ids": list(said.ids)} if self.asked.ids else {}))
        if self.asked.usage_in_stream:
            yield self._event(choices=[], usage=usage(prompt, len(said.ids), cached))
        yield "data: [DONE]\n\n"

    def error(self, problem: BadRequest) -> str:
        return f"data: {json.dumps(problem.body())}\n\ndata: [DONE]\n\n"


def _calls(said: Said) -> list[dict[str, Any]]:
    ids = said.call_ids or tuple(new_id("call") for _ in said.calls)
    return [
        {
            "id": i,
            "type": "function",
            "function": {"name": c.name, "arguments": json.dumps(c.arguments, ensure_ascii=False)},
        }
        for i, c in zip(ids, said.calls, strict=True)
    ]


def _logprobs(tokens: Sequence[tuple[str, float]]) -> dict[str, Any]:
    rows = [
        {"token": text, "logprob": lp, "bytes": list(text.encode("utf-8", "replace")), "top_logprobs": []}
        for text, lp in tokens
    ]
    return {"content": rows, "refusal": None}


# -- conversations that come back ------------------------------------------------------------------------------------------


class Dialogue:
    """One client's conversation. It tells what a request adds to what was already said."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def added(self, asked: Asked) -> tuple[Message, ...] | None:
        """The messages that are new, or None when the request is another conversation (it then begins anew).

        It goes on when the messages seen so far come first, the last of them our answer, and only users and tools spoke since. What a
        client makes of whitespace at the ends of a text does not matter: the sampled ids stay.
        """
        seen = len(self.messages)
        known = seen and self.messages[-1].role == "assistant" and len(asked.messages) > seen
        if known and all(_same(a, b) for a, b in zip(self.messages, asked.messages)):
            new = asked.messages[seen:]
            if all(m.role in ("user", "tool") for m in new):
                return new
        return None

    def take(self, messages: Sequence[Message], *, anew: bool) -> None:
        self.messages = [*([] if anew else self.messages), *messages]


def _same(a: Message, b: Message) -> bool:
    return (a.role, a.content.strip(), a.calls) == (b.role, b.content.strip(), b.calls)
