"""Questions whose answer is in a corpus and nowhere else: for an agent with the tool `search`."""

from __future__ import annotations

import ast
from functools import lru_cache
from random import Random
from typing import Any, Literal

from pydantic import Field

from ondol.records import Problem
from ondol.rewards.base import marked_answer
from ondol.rewards.numeric import Numeric
from ondol.tasks.base import Split, Task, question_id, shuffled, split_of
from ondol.tools.archive import archive
from ondol.tools.python_docs import defaults


class SearchQuestions(Task):
    """A finite list of questions on one of the corpora that are on every machine; set the tool's `corpus` to the same."""

    corpus: Literal["archive", "python"] = Field(
        default="archive", description="archive: invented years, which nobody knows; python: defaults of arguments"
    )
    hops: Literal[1, 2] = Field(
        default=1, description="archive: passages that an answer needs; with 2, a person's leads to a town's"
    )

    def problem(self, index: int, split: Split = "train") -> Problem:
        problems = _problems(self.corpus, self.hops)[split]
        return problems[shuffled(self.seed, index, len(problems))]

    def size(self, split: Split) -> int:
        return len(_problems(self.corpus, self.hops)[split])

    def score(self, problem: Problem, response: str) -> float:
        if self.corpus == "archive":
            return Numeric().score(problem, response)
        marked = marked_answer(response)
        lines = [line for line in (response if marked is None else marked).splitlines() if line.strip()]
        return float(bool(lines) and _value(lines[-1]) == _value(problem.answer))

    def near_misses(self, problem: Problem) -> list[str]:
        wrong = ["", "I do not know", problem.question]
        return wrong + [v for v in problem.data["others"] if _value(v) != _value(problem.answer)]


def _value(text: str) -> Any:
    """What a literal means, and the text itself where it is none; with its type, for 1 is not "1" and not True."""
    text = text.strip().strip("`").rstrip(".").strip()
    try:
        value = ast.literal_eval(text) if len(text) < 200 else text
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    return (type(value).__name__, value) if isinstance(value, (int, float, str)) else ("text", text)


@lru_cache(maxsize=4)
def _problems(corpus: str, hops: int) -> dict[Split, list[Problem]]:
    made = _archive_problems(hops) if corpus == "archive" else _python_problems()
    by_question = {p.question: p for p in made}
    out: dict[Split, list[Problem]] = {"train": [], "test": []}
    for p in by_question.values():
        out[split_of(p.question)].append(p)
    return out


def _archive_problems(hops: int) -> list[Problem]:
    made, known = [], archive()
    for person in known.people:
        who = f"the {person.trade} {person.name}"
        if hops == 1:
            question, year = f"In which year was {who} born?", person.born
            others = [known.founded[person.town], year + 1, year - 10]
        else:
            question, year = f"In which year was the town founded in which {who} lived?", known.founded[person.town]
            others = [person.born, year + 1, year - 10]
        made.append(_problem(question, str(year), [str(y) for y in others]))
    return made


def _python_problems() -> list[Problem]:
    found, random = defaults(), Random(0)
    values = sorted({d.value for d in found})
    return [
        _problem(
            f"In Python's standard library, what is the default of the argument '{d.argument}' of {d.function}?",
            d.value,
            ["None", "True", "0", d.argument, d.function, *random.sample(values, 3)],
        )
        for d in found
    ]


def _problem(question: str, answer: str, others: list[str]) -> Problem:
    return Problem(question_id(question), question, answer, {"others": others})
