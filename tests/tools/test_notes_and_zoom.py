"""Memory and zoom."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from ondol import parts
from ondol.records import ToolCall
from ondol.tasks.digits import GLYPHS, SIZE
from ondol.tools.base import call_tool
from ondol.tools.memory import Memory
from ondol.tools.zoom import Zoom


def ask(session, tool, *texts):
    async def go():
        return [await call_tool(session, tool, ToolCall(tool.name, {tool.main_argument: t})) for t in texts]

    return asyncio.run(go())


def test_notes() -> None:
    tool = Memory(notes=2, note_chars=10)
    said = [
        ("list", "(no notes)"),
        ("write a: 1", "ok"),
        ("write b 22", "ok"),
        ("read a", "1"),
        (" read b ", "22"),
        ("write a: new: x", "ok"),
        ("read a:", "new: x"),
        ("list ", "a, b"),
        ("write c: 3", "Error: the memory is full (2 notes): delete one first"),
    ]
    session = tool.session("t")
    assert [r.text for r in ask(session, tool, *(c for c, _ in said))] == [t for _, t in said]
    texts = [
        r.text
        for r in ask(
            session, tool, "delete a", "delete a", "write c: 3", "list", "write d: " + "x" * 11, "forget", "read"
        )
    ]
    assert texts[:4] == ["ok", "Error: there is no note 'a'", "ok", "b, c"]
    assert all(t.startswith("Error: ") for t in texts[4:])
    assert ask(tool.session("other"), tool, "list")[0].text == "(no notes)"


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), st.text(st.characters(codec="ascii", exclude_characters="\r"), max_size=12).map(str.strip), max_size=6))  # fmt: skip
def test_what_was_written_is_read(notes) -> None:
    tool = Memory()
    session = tool.session("t")
    assert all(r.text == "ok" for r in ask(session, tool, *(f"write {k}: {v}" for k, v in notes.items())))
    assert [r.text for r in ask(session, tool, *(f"read {k}" for k in notes))] == list(notes.values())


def nearest(crop: str) -> set[str]:
    """Digits whose glyph is somewhere in the crop, and nothing else."""
    rows = crop.split("\n")
    ink = {(y, x) for y, row in enumerate(rows) for x, c in enumerate(row) if c == "#"}
    out = set()
    for digit, glyph in GLYPHS.items():
        for top in range(SIZE - 6):
            for left in range(SIZE - 4):
                if ink == {(top + y, left + x) for y, row in enumerate(glyph) for x, c in enumerate(row) if c == "#"}:
                    out.add(digit)
    return out


def test_a_zoom_shows_the_digit_and_afar_does_not() -> None:
    task, tool, seen = parts.make("tasks", "digits"), Zoom(), set()
    for i in range(60):
        p = task.problem(i)
        session = tool.open("t", p)
        crop, empty, outside, word = ask(
            session, tool, p.data["cell"].upper(), "a1" if p.data["cell"] != "a1" else "b1", "d1", "left"
        )
        assert crop.ok and nearest(crop.text) == {p.answer}
        assert empty.ok and "#" not in empty.text and len(empty.text) == SIZE * SIZE + SIZE - 1
        assert not outside.ok and not word.ok and "a1 to c3" in word.text
        afar = p.question.split("\n")[1:-1]
        assert [(x, y) for y, row in enumerate(afar) for x, c in enumerate(row) if c == "#"] == [
            (ord(p.data["cell"][0]) - ord("a"), int(p.data["cell"][1]) - 1)
        ]
        seen.add((p.question.split("\n", 1)[1], p.answer))
    views = {v for v, _ in seen}
    assert len(seen) > 3 * len(views), "what is seen from afar does not tell the digit"
