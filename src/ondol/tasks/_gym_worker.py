"""The child of `ondol.tasks.reasoning_gym`: makes items and scores what was given for them.

{"dataset", "options", "item", "given"} in; out comes {"question", "answer"} when `given` is null, else a score.

Several of reasoning-gym's scorers hand what the model wrote to `eval` (n_queens, spiral_matrix, ...) or to sympy's
`parse_expr`, which evals too (countdown, simple_integration, ...). So they run here, where a text that hangs can be
killed, and where a text that could reach beyond arithmetic and literals is not scored at all.
"""

from __future__ import annotations

import json
import random
import re
from functools import lru_cache
from typing import Any

from ondol.sandbox.child import serve
from ondol.tasks.reasoning_gym import EVALUATED, source

_REACHES_OUT = re.compile(
    r"__|\.\s*[^\W\d]|\b(?:import|eval|exec|open|compile|input|breakpoint|lambda|getattr|setattr|delattr|globals|locals|vars)\b"
)
_LONGEST = 4000

#: Where a dataset has several right answers it may leave `answer` empty and keep an example in its metadata.
_EXAMPLES = ("example_correct_answer", "example_answer", "possible_answer")


# Items are made again from their numbers: metadata need not survive a trip through JSON.
@lru_cache(maxsize=4096)
def _entry(dataset: str, options: str, item: int) -> dict[str, Any]:
    random.seed(f"{dataset}/{item}")  # list_functions draws from the module's own generator too
    return source(dataset, options)[item]


def _gold(entry: dict[str, Any]) -> str:
    """The gold answer as text, "" where the dataset gives none."""
    for answer in (entry["answer"], *(entry["metadata"].get(key) for key in _EXAMPLES)):
        if answer is not None:
            return answer if isinstance(answer, str) else json.dumps(answer)
    return ""


def prepare(question: dict[str, Any]) -> None:
    _entry(question["dataset"], question["options"], question["item"])


def answer(question: dict[str, Any]) -> Any:
    dataset, options, given = question["dataset"], question["options"], question["given"]
    entry = _entry(dataset, options, question["item"])
    if given is None:
        return {"question": entry["question"], "answer": _gold(entry)}
    if dataset in EVALUATED and (len(given) > _LONGEST or _REACHES_OUT.search(given)):
        return 0.0
    return float(source(dataset, options).score_answer(given, entry))


if __name__ == "__main__":
    serve(answer, prepare)
