"""How a model's text becomes tool calls, and a tool's result the text that the model reads."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from ondol.errors import OndolError, nearest
from ondol.records import ToolCall, ToolResult

if TYPE_CHECKING:
    from ondol.models.chat.base import Renderer


class CallStyle(Protocol):
    """A way to write calls. `stop` holds the strings that end one: sampling stops after them."""

    stop: tuple[str, ...]

    def parse(self, text: str) -> list[ToolCall]:
        """All calls in the text, in order; one that cannot be read has `error` set. Never raises."""
        ...

    def show(self, call: ToolCall) -> str:
        """The call as a model would write it."""
        ...

    def result(self, result: ToolResult, name: str) -> str:
        """Text of the observation that answers a call of the tool `name`."""
        ...


class Named(Protocol):
    """What `Tags` needs of a tool. `main_argument` is the argument that the text between the tags becomes."""

    @property
    def name(self) -> str: ...

    @property
    def main_argument(self) -> str: ...


class Described(Named, Protocol):
    @property
    def description(self) -> str: ...


def tags_text(tools: Iterable[Described]) -> str:
    """A system message that tells of tools and how to call them with tags."""
    usage = " ".join(
        f"{t.description} To use it, write {t.main_argument} between <{t.name}> and </{t.name}>." for t in tools
    )
    return f"{usage} The result comes back between <result> and </result>. When you know the answer, reply with the answer alone."


class Tags:
    """Calls as tags: `<python>print(1)</python>` is `ToolCall("python", {"code": "print(1)"})`.

    A call goes from the exact opening tag `<name>` to the first `</name>`; without the latter there is no call. The
    text between is taken as it is. Needs no JSON, so small models learn it fastest.
    """

    def __init__(self, tools: Iterable[Named]) -> None:
        self._arguments = {t.name: t.main_argument for t in tools}
        self._opening = re.compile("<(" + "|".join(map(re.escape, self._arguments)) + ")>")
        self.stop = tuple(f"</{name}>" for name in self._arguments)

    def parse(self, text: str) -> list[ToolCall]:
        calls: list[ToolCall] = []
        unclosed: set[str] = set()  # names without a closing tag in what is left: looking again would take n^2 time
        position = 0
        while self._arguments and (opening := self._opening.search(text, position)):
            name, position = opening[1], opening.end()
            end = -1 if name in unclosed else text.find(f"</{name}>", position)
            if end < 0:
                unclosed.add(name)
                continue
            calls.append(ToolCall(name, {self._arguments[name]: text[position:end]}))
            position = end + len(f"</{name}>")
        return calls

    def show(self, call: ToolCall) -> str:
        if call.name not in self._arguments:
            raise OndolError(f"no tool is called '{call.name}'", nearest(call.name, self._arguments))
        return f"<{call.name}>{call.arguments.get(self._arguments[call.name], '')}</{call.name}>"

    def result(self, result: ToolResult, name: str) -> str:
        return f"<result>{result.text}</result>"


class Json:
    """Calls in the model family's own JSON format. The renderer frames results, so their text is left as it is."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self.stop = renderer.call_stop

    def parse(self, text: str) -> list[ToolCall]:
        return self._renderer.parse_calls(text)

    def show(self, call: ToolCall) -> str:
        return self._renderer.call_text(call)

    def result(self, result: ToolResult, name: str) -> str:
        return result.text
