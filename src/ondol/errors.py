"""The one exception that users meet: it says what is wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OndolError(Exception):
    """A mistake or a failure that a person can act on. `str()` is the whole message, remedy included.

    Args:
        what: what is wrong, in one sentence, naming the place (key path, file and line, URL).
        remedy: what to do next; shown on its own line.
    """

    def __init__(self, what: str, remedy: str | None = None) -> None:
        super().__init__(what if remedy is None else f"{what}\n  -> {remedy}")
        self.what, self.remedy = what, remedy


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy for an unknown name: the nearest known one, and all that are known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}known: {', '.join(known)}"
