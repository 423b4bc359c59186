"""Any task of the package reasoning-gym, by its name there."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from random import Random
from typing import Any

from pydantic import Field, model_validator

from ondol.errors import OndolError, nearest
from ondol.records import Problem
from ondol.rewards.base import marked_answer
from ondol.rewards.numeric import last_match
from ondol.sandbox.child import Judge
from ondol.tasks.base import DrawnTask

_FAR = 2**31 - 2  # items drawn from, where a dataset makes any item on demand
_NEAR = 4096  # items drawn from, where it prepares a list of them beforehand
_NUMBER = re.compile(r"[-+]?[0-9]*\.?[0-9]+")

_MAKE_S = 60.0  # for an item to be made; puzzles search

#: Datasets whose scorer evaluates the response as Python (see `_gym_worker`).
EVALUATED = {
    "binary_matrix",
    "countdown",
    "intermediate_integration",
    "n_queens",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
    "spiral_matrix",
    "string_insertion",
}

_judge = Judge("ondol.tasks._gym_worker")


class ReasoningGym(DrawnTask):
    """Items and scores are reasoning-gym's own; the score is clamped to [0, 1].

    What is scored is the part of a response inside the last `<answer>...</answer>` or `\\boxed{}`. Without a mark it is
    the whole response where the gold answer has several lines, the last number where that is a number, and else the
    last line that is not empty.
    """

    dataset: str = Field(description="name of the dataset, e.g. 'chain_sum'")
    options: dict[str, Any] = Field(default={}, description="the dataset's own settings (its size and seed are ours)")

    timeout_s: float = Field(default=5.0, gt=0, le=600, description="time limit of one score")

    @model_validator(mode="after")
    def _known(self) -> ReasoningGym:
        for key in ("seed", "size"):
            if key in self.options:
                raise ValueError(f"options.{key}: it is set by the task")
        source(self.dataset, self._options)  # so that a wrong name or option is found before a run starts
        _items(self.dataset, self._options)
        return self

    def draw(self, random: Random) -> Problem:
        item = random.randrange(_items(self.dataset, self._options))
        question, answer = _question(self.dataset, self._options, item)
        return Problem("", question, answer, {"item": item})

    def score(self, problem: Problem, response: str) -> float:
        given = _extract(response, problem.answer)
        if not given:
            return 0.0
        question = {"dataset": self.dataset, "options": self._options, "item": problem.data["item"], "given": given}
        score = _judge.ask(question, self.timeout_s)
        # Scorers trust their input's form: what they choke on is not an answer.
        return min(max(score, 0.0), 1.0) if isinstance(score, float) and score == score else 0.0

    def gold(self, problem: Problem) -> str:
        if not problem.answer:
            raise OndolError(
                f"reasoning-gym's '{self.dataset}' gives no gold answers", "it can be trained on, but not checked"
            )
        return problem.answer

    def near_misses(self, problem: Problem) -> list[str]:
        return ["", "<answer></answer>", "<answer>?!</answer>", "I do not know"]

    @property
    def _options(self) -> str:
        return json.dumps(self.options, sort_keys=True)


# Kept here rather than in the task: a task must stay plain data that can be sent to another process.
@lru_cache(maxsize=64)
def source(dataset: str, options: str) -> Any:
    """The dataset `dataset`, with the settings `options` (JSON)."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as e:
        raise OndolError("this task needs the package reasoning-gym", "pip install 'ondol[tasks]'") from e
    if dataset not in DATASETS:
        raise OndolError(f"reasoning-gym has no dataset '{dataset}'", nearest(dataset, DATASETS))
    try:
        return reasoning_gym.create_dataset(dataset, seed=0, size=_NEAR, **json.loads(options))
    except (TypeError, AssertionError, ValueError) as e:
        raise ValueError(f"options of '{dataset}': {e}") from e


@lru_cache(maxsize=64)
def _items(dataset: str, options: str) -> int:
    try:
        source(dataset, options)[_FAR]
    except IndexError:
        return _NEAR
    except Exception as e:  # options that only fail when an item is made, in whatever way
        raise ValueError(f"options of '{dataset}': no item can be made ({type(e).__name__}: {e})") from e
    return _FAR


@lru_cache(maxsize=4096)
def _question(dataset: str, options: str, item: int) -> tuple[str, str]:
    # Not made here: some datasets' items depend on the order of sets, which only the child keeps the same.
    made = _judge.ask({"dataset": dataset, "options": options, "item": item, "given": None}, _MAKE_S)
    if made is None:
        raise OndolError(
            f"reasoning-gym's '{dataset}' did not make item {item}", "try other options, or another dataset"
        )
    return made["question"], made["answer"]


def _extract(response: str, gold: str) -> str:
    marked = marked_answer(response)
    if marked is not None:
        return marked
    if "\n" in gold:
        return response.strip("\n")
    if _NUMBER.fullmatch(gold):
        match = last_match(response)
        return "" if match is None else (match["sign"] or "").replace("−", "-") + match["top"].replace(",", "")
    lines = [line.strip() for line in response.splitlines() if line.strip()]
    return lines[-1] if lines else ""
