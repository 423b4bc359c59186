"""Mathematical equality, by math-verify in a process that can be killed."""

from __future__ import annotations

import importlib.util

from pydantic import Field

from ondol.errors import OndolError
from ondol.records import Problem
from ondol.rewards.base import Verifier, marked_answer
from ondol.rewards.numeric import is_number, last_number
from ondol.sandbox.child import Judge


class Math(Verifier):
    """1 when the response's answer equals the gold one as mathematics: `\\frac{1}{2}`, `0.5` and `1/2` are the same.

    The answer is what the last `<answer>` or `\\boxed{}` holds, else what math-verify finds. Equal text and plain
    numbers are decided here; the rest goes to a process of its own, which is killed when it takes longer than `timeout_s`
    (the response then scores 0).
    """

    timeout_s: float = Field(default=5.0, gt=0, le=600, description="time limit of one comparison")

    def score(self, problem: Problem, response: str) -> float:
        marked = marked_answer(response)
        given = response.strip() if marked is None else marked
        if not given:
            return 0.0
        gold = marked_answer(problem.answer)
        gold = _bare(problem.answer if gold is None else gold)
        if _bare(given) == gold:
            return 1.0
        if is_number(_bare(given)) and is_number(gold):
            a, b = last_number(_bare(given)), last_number(gold)
            return float(a is not None and a == b)
        if importlib.util.find_spec("math_verify") is None:
            raise OndolError("the verifier 'math' needs the package math-verify", "pip install 'ondol[tasks]'")
        # Unmarked text is searched for an answer; a marked one is an expression as it stands.
        text = given if marked is None else f"\\boxed{{{given}}}"
        return float(_judge.ask({"gold": gold, "response": text}, self.timeout_s) is True)

    def near_misses(self, problem: Problem) -> list[str]:
        gold = marked_answer(problem.answer)
        return ["", f"\\boxed{{({_bare(problem.answer if gold is None else gold)}) + 1}}"]


def _bare(text: str) -> str:
    return text.strip().strip("$").strip()


_judge = Judge("ondol.rewards._math_worker")
