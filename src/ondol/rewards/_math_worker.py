"""The child of `ondol.rewards.math`: {"gold", "response"} in, whether they are equal out."""

from __future__ import annotations

import logging
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from ondol.sandbox.child import serve

_KINDS: Any = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())


def equal(question: dict[str, str]) -> bool:
    # Deadlines are the parent's, which kills us: math-verify's own need signals.
    gold = parse(f"${question['gold']}$", _KINDS, parsing_timeout=None)  # type: ignore[arg-type]
    given = parse(question["response"], _KINDS, parsing_timeout=None)  # type: ignore[arg-type]
    return bool(gold) and bool(given) and bool(verify(gold, given, timeout_seconds=None))


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    serve(equal)
