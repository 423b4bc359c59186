"""Between a client's conversation and a model's: tools described, calls written and read, as this model learned it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ondol.engines.base import Completion
from ondol.engines.chat_api import Asked, Said
from ondol.records import Finish, Message, ToolCall
from ondol.tools.calls import CallStyle, Described, Json, Tags, tags_text


@dataclass(frozen=True)
class _Named:
    """A client's function as the call styles see a tool."""

    name: str
    main_argument: str
    description: str


class Speaker:
    """Renders conversations for a model and reads what it says.

    Args:
        renderer, tokenizer: the model's.
        calls: how it writes calls: the family's own JSON, or tags (`ondol.envs.tool`).
        known: tools that the model was trained with; a client's function of that name is described as it was then.
        system: the system message that it was trained with, for clients that give tools and no system message of their own.
        result_role: the role of a tool's result under tags.
    """

    def __init__(
        self,
        renderer: Any,
        tokenizer: Any,
        *,
        calls: Literal["json", "tags"] = "json",
        known: Sequence[Described] = (),
        system: str | None = None,
        result_role: Literal["tool", "user"] = "user",
    ) -> None:
        self.renderer, self.tokenizer, self.calls = renderer, tokenizer, calls
        self.known = {t.name: t for t in known}
        self.system = system
        self.result_role: Literal["tool", "user"] = result_role

    def style(self, asked: Asked) -> CallStyle | None:
        if not asked.tools:
            return None
        return Tags(self._named(asked)) if self.calls == "tags" else Json(self.renderer)

    def first(self, asked: Asked) -> tuple[list[int], list[Message]]:
        """A whole conversation as token ids and as the messages that they stand for."""
        native = self.calls == "json" and self.renderer.renders_tools
        messages = self.opening(asked, native=native)
        return self.renderer.prompt(messages, asked.tools if native else ()), messages

    def opening(self, asked: Asked, *, native: bool = False) -> list[Message]:
        """A whole conversation as messages. Tools, calls and results are text in them, but for `native`: then the chat format has places
        of its own for them.
        """
        messages = list(asked.messages)
        text = ""
        if asked.tools and self.calls == "tags":
            text = tags_text(self._named(asked)) if self.system is None else self.system
        elif asked.tools and not native:
            text = self.renderer.tools_text(asked.tools)
        if text and messages[0].role != "system":
            messages.insert(0, Message("system", text))
        elif text and self.system is None:
            messages[0] = dataclasses.replace(messages[0], content=f"{messages[0].content}\n\n{text}".strip())
        return self.written(messages, asked, native=native)

    def more(self, messages: Sequence[Message], asked: Asked, ended: bool) -> tuple[list[int], list[Message]]:
        """What users and tools said since, as ids that follow the sampled ones."""
        new = self.written(messages, asked, native=self.calls == "json" and self.renderer.renders_tools)
        return self.renderer.observation(new, ended=ended), new

    def said(self, done: Completion, asked: Asked) -> Said:
        style = self.style(asked)
        calls = style.parse(done.text) if style is not None else []
        text = done.text
        if calls and not any(c.error for c in calls):
            text = text[: self._begin(text, calls)].rstrip()
        else:
            calls = []
            ends = [text.index(s) for s in asked.stop if s in text]
            text = text[: min(ends, default=len(text))] if done.finish is Finish.STOP else text
        tokens = self._pieces(done.ids, done.logp) if asked.logprobs else []
        return Said(text, tuple(calls), done.finish, done.ids, tokens)

    def _pieces(self, ids: Sequence[int], logp: Sequence[float]) -> list[tuple[str, float]]:
        return [(self.tokenizer.decode([i], skip_special_tokens=False), lp) for i, lp in zip(ids, logp, strict=True)]

    def _named(self, asked: Asked) -> list[Described]:
        out: list[Described] = []
        for tool in asked.tools:
            function = tool["function"]
            properties = list(function["parameters"].get("properties") or {})
            required = function["parameters"].get("required")
            argument = (required if isinstance(required, list) and required else properties or ["input"])[0]
            known = self.known.get(function["name"])
            described = function["description"] if known is None else known.description
            out.append(_Named(function["name"], str(argument), described))
        return out

    def written(self, messages: Sequence[Message], asked: Asked, *, native: bool = False) -> list[Message]:
        """Calls and results as this model writes and reads them; see `opening`."""
        if native:
            return list(messages)
        out: list[Message] = []
        for m in messages:
            if m.calls:
                style = self.style(asked)
                written = "".join(_show(style, c) for c in m.calls)
                out.append(dataclasses.replace(m, content="\n".join(filter(None, (m.content, written))), calls=()))
            elif m.role == "tool" and self.calls == "tags":
                text = f"<result>{m.content}</result>"
                if out and out[-1].role == self.result_role and out[-1].content.startswith("<result>"):
                    out[-1] = dataclasses.replace(out[-1], content=f"{out[-1].content}\n{text}")
                else:
                    out.append(Message(self.result_role, text, name=m.name))
            else:
                out.append(m)
        return out

    def _begin(self, text: str, calls: Sequence[ToolCall]) -> int:
        """Where the first call begins; what comes before it was said to the reader."""
        marks = (
            [f"<{c.name}>" for c in calls] if self.calls == "tags" else ["<tool_call>", "<|python_tag|>", "```", "{"]
        )
        found = [text.index(m) for m in marks if m in text]
        return min(found, default=0)


def _show(style: CallStyle | None, call: ToolCall) -> str:
    if style is None:
        return f"{call.name}({call.arguments})"
    return style.show(call)
