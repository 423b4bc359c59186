"""Problems from files with one JSON object a line."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from ondol import parts
from ondol.errors import OndolError
from ondol.records import Problem
from ondol.rewards.base import Verifier
from ondol.tasks.base import Split, Task, question_id, shuffled, split_of

_SHOWN = 5  # bad lines listed at once


class Jsonl(Task):
    """Your own questions and answers. Every pass visits each problem once, in another order."""

    path: Path = Field(description="the file; without `test_path`, 1 in 8 of its questions is for testing")
    test_path: Path | None = Field(default=None, description="the test file")
    question_field: str = Field(default="question", description="key of the question")
    answer_field: str = Field(default="answer", description="key of the gold answer: text or a number")
    verifier: dict[str, Any] | str = Field(default="numeric", description="name or table of the verifier")

    @model_validator(mode="after")
    def _loads(self) -> Jsonl:
        _ = self._verifier, self._splits  # mistakes are found before a run starts
        return self

    def problem(self, index: int, split: Split = "train") -> Problem:
        problems = self._splits[split]
        if not problems:
            raise OndolError(
                f"{self.path}: none of its questions belongs to the {split} split", "give more lines, or a test_path"
            )
        return problems[shuffled(self.seed, index, len(problems))]

    def size(self, split: Split) -> int:
        return len(self._splits[split])

    def score(self, problem: Problem, response: str) -> float:
        return self._verifier.score(problem, response)

    def gold(self, problem: Problem) -> str:
        return self._verifier.gold(problem)

    def near_misses(self, problem: Problem) -> list[str]:
        return self._verifier.near_misses(problem)

    @cached_property
    def _verifier(self) -> Verifier:
        return parts.make("verifiers", self.verifier, "verifier")

    @cached_property
    def _splits(self) -> dict[Split, list[Problem]]:
        problems = self._read(self.path)
        if self.test_path is None:
            return {
                "train": [p for p in problems if split_of(p.question) == "train"],
                "test": [p for p in problems if split_of(p.question) == "test"],
            }
        test = self._read(self.test_path)
        shared = {p.id for p in test} & {p.id for p in problems}
        if shared:
            example = next(p.question for p in test if p.id in shared)
            raise OndolError(
                f"{self.test_path}: {len(shared)} questions are also in {self.path}, such as {example!r:.80}"
            )
        return {"train": problems, "test": test}

    def _read(self, path: Path) -> list[Problem]:
        """All problems of a file, or OndolError with its first bad lines."""
        try:
            data = path.read_bytes()
        except OSError as e:
            raise OndolError(f"{path}: {e.strerror}", "check the path; it is relative to where you started") from e
        problems: dict[str, tuple[int, Problem]] = {}
        wrong: list[str] = []
        for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
            if not line.strip():
                continue
            try:
                problem = self._problem(line)
                first = problems.setdefault(problem.id, (number, problem))[0]
                if first != number:
                    raise ValueError(f"the question of line {first} again")
            except ValueError as e:
                wrong.append(f"{path}:{number}: {e}")
        if wrong:
            more = [f"... and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
            remedy = f'each line must be like {{"{self.question_field}": "...", "{self.answer_field}": "..."}}'
            raise OndolError("\n".join(wrong[:_SHOWN] + more), remedy)
        if not problems:
            raise OndolError(f"{path}: the file holds no problem", "give one JSON object a line")
        return [problem for _, problem in problems.values()]

    def _problem(self, line: bytes) -> Problem:
        """One line's problem. Raises ValueError with what is wrong with it."""
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as e:
            raise ValueError(f"not UTF-8 (byte {e.start + 1} of the line)") from None
        except RecursionError:
            raise ValueError("nested too deeply") from None
        except json.JSONDecodeError as e:
            raise ValueError(f"not JSON: {e.msg} (column {e.colno})") from None
        if not isinstance(row, dict):
            raise ValueError(f"a JSON object is needed, not {type(row).__name__}")
        for field in (self.question_field, self.answer_field):
            if field not in row:
                raise ValueError(f"no field '{field}' (the line has: {', '.join(map(str, row))[:80]})")
        question, answer = row[self.question_field], row[self.answer_field]
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"field '{self.question_field}' must be text that is not empty")
        if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
            raise ValueError(f"field '{self.answer_field}' must be a number or text that is not empty")
        try:
            question.encode()
        except UnicodeEncodeError:
            raise ValueError(f"field '{self.question_field}' holds half a surrogate pair") from None
        use_tool = row.get("use_tool", True)
        if not isinstance(use_tool, bool):
            raise ValueError("field 'use_tool' must be true or false")
        problem = Problem(question_id(question), question, str(answer), {} if use_tool else {"use_tool": False})
        try:
            accepted = self._verifier.score(problem, self._verifier.gold(problem)) == 1.0
        except OndolError as e:
            raise ValueError(f"field '{self.answer_field}': {e.what}") from None
        if not accepted:
            raise ValueError(f"field '{self.answer_field}': the verifier does not accept {problem.answer!r:.60}")
        return problem
