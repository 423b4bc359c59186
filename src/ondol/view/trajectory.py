"""One trajectory as a person reads it: who said what, what was sampled, what the tools answered, how it ended.

Text of models and tools is not trusted: whatever could steer a terminal is shown as an escape.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from rich.console import Group
from rich.rule import Rule
from rich.text import Text

from ondol.records import Image, Message, ToolCall, ToolResult, Trajectory, Turn
from ondol.store import Images

SAMPLED = "green"
CALL = "bold magenta"
DIM = "dim"
_ROLE = {"system": "bold blue", "user": "bold cyan", "assistant": "bold green", "tool": "bold yellow"}
_JOINERS = "\u200c\u200d"  # harmless, and part of ordinary writing
_TAGGED_CALL = re.compile(r"<tool_call>.*?(?:</tool_call>|$)|```(?:python|tool)\w*\n.*?(?:```|$)", re.S)


def safe_text(text: str) -> str:
    """`text` with every control, direction and format character (but newlines and tabs) as a visible escape."""

    def shown(char: str) -> str:
        if char in "\n\t" or char in _JOINERS or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            return char
        return repr(char)[1:-1]  # \x1b, \r, \u202e: Python's own escapes

    return "".join(map(shown, text))


def fold(text: str, characters: int = 2000, lines: int = 60) -> str:
    """Cut the middle out of a long text, and say how much is missing: two thirds of the limit from its beginning."""
    parts = text.split("\n")
    if len(parts) > lines:
        head, tail = lines * 2 // 3, lines // 3
        gap = f"[... {len(parts) - head - tail:,} lines folded ...]"
        text = "\n".join([*parts[:head], gap, *parts[-tail:]])
    if len(text) > characters:
        head, tail = characters * 2 // 3, characters // 3
        gap = f"\n[... {len(text) - head - tail:,} characters folded ...]\n"
        text = text[:head] + gap + text[-tail:]
    return text


def render_trajectory(
    trajectory: Trajectory, tokenizer: Any = None, fold_characters: int = 2000, images: Images | None = None
) -> Group:
    """The trajectory for a rich console.

    Args:
        tokenizer: anything with `decode(ids)`. With it the text shown is that of the token ids, special tokens
            included, which is what was trained on; without it that of the messages and turns.
        fold_characters: longer texts lose their middle.
        images: where the run keeps its pictures; those of the episode are listed with their files.
    """
    parts = [Rule(style=DIM), _title(trajectory)]
    body = _from_ids(trajectory, tokenizer) if tokenizer is not None else _from_messages(trajectory)
    for heading, role, text, style in body:
        if heading:
            parts.append(Text(safe_text(heading), style=_ROLE.get(role, "bold"), overflow="fold"))
        if text:
            parts.append(_text(text, style, fold_characters))
    parts += [Text(line, style=CALL, overflow="fold") for line in _images(trajectory.images, images)]
    if "error" in trajectory.info:
        parts.append(_text(f"error: {trajectory.info['error']}", "bold red", fold_characters))
    return Group(*parts, Rule(style=DIM))


def _title(t: Trajectory) -> Text:
    step, problem, sample = t.key
    title = Text(overflow="fold")
    title.append(f"step {step}, problem {problem}, sample {sample}", "bold")
    title.append("  score ")
    title.append(f"{t.score:.3g}", "bold green" if t.score >= 0.5 else "bold red")
    title.append(f"  reward {t.reward:.3g}  stopped: ")
    title.append(t.stop_reason.value, "bold")
    title.append(f"  {t.sampled_tokens} sampled of {len(t.ids)} tokens, {len(t.turns)} turns")
    title.append(f"\n{safe_text(t.problem.id)}: right answer ", DIM)
    title.append(fold(safe_text(t.problem.answer), 200, 5))
    return title


def _text(text: str, style: str, fold_characters: int) -> Text:
    out = Text(fold(safe_text(text), fold_characters), style=style, overflow="fold")
    if style == SAMPLED:
        out.highlight_regex(_TAGGED_CALL, CALL)
    return out


#: heading, role, text, style of the text
_Section = tuple[str, str, str, str]


def _from_messages(t: Trajectory) -> list[_Section]:
    """Sections from messages; the last `len(turns)` assistant messages are the sampled ones (others are examples)."""
    assistants = [i for i, m in enumerate(t.messages) if m.role == "assistant"][-len(t.turns) :] if t.turns else []
    first = assistants[0] if assistants else len(t.messages)
    prompt = t.messages[:first] or [Message("user", t.problem.question)]
    sections = [_message(m) for m in prompt]
    for number, turn in enumerate(t.turns):
        sections.append((_turn_heading(number, turn), "assistant", turn.text, SAMPLED))
        sections += _calls(turn)
        observed: list[Message] = []
        if number < len(assistants):
            end = assistants[number + 1] if number + 1 < len(assistants) else len(t.messages)
            observed = t.messages[assistants[number] + 1 : end]
        results = list(turn.results)
        for i, message in enumerate(observed):
            result = results.pop(0) if message.role == "tool" and results else None
            heading, role, text, style = _message(message, result)
            anew = " (the context begins anew)" if i == 0 and turn.end in t.restarts else ""
            sections.append((heading + anew, role, text, style))
        sections += [_result(result) for result in results]
    return sections


def _from_ids(t: Trajectory, tokenizer: Any) -> list[_Section]:
    """Sections from token ids: the prompt, then each turn and what was put after it."""
    sections: list[_Section] = [("prompt", "user", tokenizer.decode(t.ids[: t.prompt_length]), DIM)]
    for number, turn in enumerate(t.turns):
        text = tokenizer.decode(t.ids[turn.start : turn.end])
        sections.append((_turn_heading(number, turn), "assistant", text, SAMPLED))
        sections += _calls(turn)
        end = t.turns[number + 1].start if number + 1 < len(t.turns) else len(t.ids)
        if end > turn.end:
            notes = ", ".join(filter(None, map(_outcome, turn.results)))
            heading = f"observation ({notes})" if notes else "observation"
            heading += " (the context begins anew)" if turn.end in t.restarts else ""
            sections.append((heading, "tool", tokenizer.decode(t.ids[turn.end : end]), DIM))
    return sections


def _turn_heading(number: int, turn: Turn) -> str:
    return f"assistant, turn {number + 1} (sampled {turn.end - turn.start} tokens, finish: {turn.finish.value})"


def _calls(turn: Turn) -> list[_Section]:
    return [("", "assistant", _call(call), "bold red" if call.error else CALL) for call in turn.calls]


def _call(call: ToolCall) -> str:
    if call.error:
        return f"=> call not understood: {call.error}"
    return f"=> {call.name}({', '.join(f'{k}={v!r}' for k, v in call.arguments.items())})"


def _message(message: Message, result: ToolResult | None = None) -> _Section:
    heading = f"{message.role} {message.name}" if message.name else message.role
    note = _outcome(result) if result is not None else ""
    return (f"{heading} ({note})" if note else heading, message.role, _shown(message.content, message.images), DIM)


def _result(result: ToolResult) -> _Section:
    note = _outcome(result)
    return (f"tool ({note})" if note else "tool", "tool", _shown(result.text, result.images), DIM)


def _shown(text: str, images: tuple[Image, ...]) -> str:
    """A text, and its pictures by size and the beginning of their hash."""
    return "\n".join(filter(None, (text, *(f"[{i}, {i.sha256[:12]}]" for i in images))))


def _images(seen: list[Image], stored: Images | None) -> list[str]:
    """A line for each picture: what it is, and the file that holds it."""
    if stored is None:
        return []
    places = [(image, stored.path(image)) for image in seen]
    return [f"{i} {i.sha256[:12]}: {p if p.exists() else f'{p} (missing)'}" for i, p in places]


def _outcome(result: ToolResult) -> str:
    """How a call went, where it is worth a word."""
    words = [] if result.ok else [f"failed: {result.kind}"]
    if result.seconds >= 0.1:
        words.append(f"{result.seconds:.1f} s")
    return ", ".join(words)
