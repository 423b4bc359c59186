"""The child of `ondol.rewards.math`: JSON lines {"gold", "response"} in, {"equal": bool} out; first line: ready."""

from __future__ import annotations

import json
import logging
import sys

_MEMORY_BYTES = 4 << 30


def main() -> None:
    try:  # 10**10**10 must fail here, not take the machine's memory; not every system has limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    except (ImportError, ValueError, OSError):
        pass
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints must not look like an answer
    kinds = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        try:
            question = json.loads(line)
            # Timeouts are the parent's: it kills us. math-verify's own would need signals.
            gold = parse(f"${question['gold']}$", kinds, parsing_timeout=None)  # type: ignore[arg-type]
            given = parse(question["response"], kinds, parsing_timeout=None)  # type: ignore[arg-type]
            equal = bool(gold) and bool(given) and bool(verify(gold, given, timeout_seconds=None))
        except Exception:
            equal = False
        print(json.dumps({"equal": equal}), file=answers, flush=True)


if __name__ == "__main__":
    main()
