"""Chat formats: one small renderer per family, checked against the tokenizer's own template when it is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ondol.errors import OndolError, nearest
from ondol.models.chat.base import Codec, Renderer, template_message
from ondol.models.chat.chatml import QWEN25_SYSTEM, SMOLLM2_SYSTEM, ChatML
from ondol.models.chat.gemma3 import Gemma3
from ondol.models.chat.llama3 import Llama3, Llama31
from ondol.models.chat.qwen3 import Qwen3
from ondol.records import Message, ToolCall

__all__ = ["FAMILIES", "Renderer", "renderer_for", "template_message"]

_CLASSES: tuple[type[Renderer], ...] = (ChatML, Qwen3, Llama3, Llama31, Gemma3)

#: name -> (class, its form for a tokenizer without a template of that family)
FAMILIES: dict[str, tuple[type[Renderer], Callable[[Codec], Renderer]]] = {
    "chatml": (ChatML, ChatML),
    "smollm2": (ChatML, lambda codec: ChatML(codec, SMOLLM2_SYSTEM)),
    "qwen2.5": (ChatML, lambda codec: ChatML(codec, QWEN25_SYSTEM, tools=True)),
    "qwen3": (Qwen3, Qwen3),
    "llama3": (Llama3, Llama3),
    "llama3.1": (Llama31, Llama31),
    "llama3.2": (Llama31, Llama31),
    "gemma3": (Gemma3, Gemma3),
}


def renderer_for(tokenizer: Any, family: str | None = None, date: str | None = None) -> Renderer:
    """The renderer for a tokenizer's chat format.

    The tokenizer's template is rendered on a few sample conversations, and only a renderer that gives the same ids is
    taken. With `family` the search is among that family's forms, and if the template is of none of them (or missing),
    the family's usual form is used.

    Args:
        tokenizer: a fast `transformers` tokenizer.
        family: a key of `FAMILIES`; None detects it.
        date: what Llama 3.1 and later print as today's date; None leaves it to the template. Llama 3.2's asks the
            clock, once, here: give the date again when a run is resumed on another day.

    Raises:
        OndolError: unknown family; or none given and the template is missing or of no known family.
    """
    if family is not None and family not in FAMILIES:
        raise OndolError(f"no chat format is called '{family}'", nearest(family, FAMILIES))
    codec = Codec(tokenizer, {t for c in _CLASSES for t in c.control_tokens})
    classes = _CLASSES if family is None else (FAMILIES[family][0],)
    found = _fitting(tokenizer, codec, classes)
    if found is None and family is None:
        what = "has no chat template" if not tokenizer.chat_template else "has a chat template of no known family"
        raise OndolError(
            f"the tokenizer {what}",
            f'name the format in the recipe\'s [model], say `chat = "chatml"`; known: {", ".join(sorted(FAMILIES))}',
        )
    renderer = found or FAMILIES[family or ""][1](codec)
    if date is not None and isinstance(renderer, Llama31):
        renderer.date = date
    return renderer


def _fitting(tokenizer: Any, codec: Codec, classes: Sequence[type[Renderer]]) -> Renderer | None:
    """The first form that gives the ids of the tokenizer's template on all samples that both can render."""
    if not tokenizer.chat_template:
        return None
    expected = []
    for messages, tools in _SAMPLES:
        try:
            ids = tokenizer.apply_chat_template(
                [template_message(m) for m in messages], tools=tools, add_generation_prompt=True, return_dict=False
            )
        except Exception:  # a template may refuse a conversation, in any way it likes
            continue
        expected.append((messages, tools or (), ids))
    try:
        sample = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    except Exception:
        return None
    if not expected:
        return None
    for cls in classes:
        try:
            candidates = cls.candidates(codec, sample)
        except OndolError:  # the tokenizer lacks this family's tokens
            continue
        for candidate in candidates:
            if all(_agrees(candidate, *e) for e in expected):
                return candidate
    return None


def _agrees(renderer: Renderer, messages: Sequence[Message], tools: Sequence[dict[str, Any]], ids: list[int]) -> bool:
    try:
        return renderer.prompt(messages, tools) == ids
    except OndolError:
        return False


_ASK = Message("user", " What is 1+1?\n")
_CALL = Message("assistant", "", (ToolCall("add", {"a": 1, "b": [None, "é"]}),))
_TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "a + b", "parameters": {"type": "object", "properties": {}}},
}
#: Conversations that tell the families' templates, and forms of one, from each other.
_SAMPLES: list[tuple[list[Message], list[dict[str, Any]] | None]] = [
    ([_ASK], None),
    ([_ASK, Message("assistant", " 2 \n"), _ASK], None),
    ([Message("system", " Be brief.\n"), _ASK, Message("assistant", "<think>\nhm\n</think>\n\n2")], None),
    ([_ASK, Message("assistant", "<think>\nhm\n</think>\n\n2"), _ASK, Message("assistant", "2")], None),
    ([_ASK], [_TOOL]),
    ([Message("system", "Be brief."), _ASK, _CALL, Message("tool", "2", name="add")], [_TOOL]),
    ([_ASK, _CALL, Message("tool", "2"), Message("tool", "3"), Message("assistant", "2"), _ASK], None),
]
