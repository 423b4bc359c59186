"""What a corpus is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Passage:
    """A piece of text that a search can find."""

    title: str
    text: str
