"""What a verifier is, and how an answer is found in a response."""

from __future__ import annotations

import re

from ondol.parts import Part
from ondol.records import Problem


class Verifier(Part):
    """Says how right a response is. Pure: the same problem and response always score the same."""

    def score(self, problem: Problem, response: str) -> float:
        """How right `response` is, in [0, 1]. Raises OndolError only for a gold answer it cannot read."""
        raise NotImplementedError

    def gold(self, problem: Problem) -> str:
        """A response that must score 1."""
        return problem.answer

    def near_misses(self, problem: Problem) -> list[str]:
        """Responses that must score below 1."""
        return ["", "no answer"]


_BOXED = re.compile(r"\\boxed\s*\{")


def marked_answer(response: str) -> str | None:
    """Content of the last `<answer>...</answer>` or `\\boxed{...}`, whichever begins later; None without one."""
    start, content = -1, None
    close = response.rfind("</answer>")
    opened = response.rfind("<answer>", 0, close) if close >= 0 else -1
    if opened >= 0:
        start, content = opened, response[opened + len("<answer>") : close]
    # A few of the last only: many that are never closed would each be read to the end.
    for match in list(_BOXED.finditer(response))[:-5:-1]:
        if match.start() < start:
            break
        boxed = _balanced(response, match.end())
        if boxed is not None:
            content = boxed
            break
    return None if content is None else content.strip()


def _balanced(text: str, start: int) -> str | None:
    """`text[start:]` up to the brace that closes the one before `start`; None when it is never closed."""
    depth, escaped = 1, False
    for i in range(start, len(text)):
        c = text[i]
        if escaped:  # \{ and \} are characters of the answer
            escaped = False
        elif c == "\\":
            escaped = True
        elif c in "{}":
            depth += 1 if c == "{" else -1
            if depth == 0:
                return text[start:i]
    return None
