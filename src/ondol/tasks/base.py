"""What a task is: an endless or finite source of problems, split into train and test, with its own verifier."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from random import Random
from typing import Literal

from pydantic import Field, PrivateAttr

from ondol.errors import OndolError
from ondol.parts import Part
from ondol.records import Image, Problem

Split = Literal["train", "test"]

_DRAWS = 1000  # before we call a split empty


class Task(Part):
    """A source of problems.

    The same settings, seed, index and split always give the same problem, whatever was asked before. Which split a
    question belongs to depends on its text alone (1 in 8 is for testing), so that no test question is ever trained on,
    under any seed. A problem's `id` is a hash of its question: a question that returns is recognised.
    """

    seed: int = Field(default=0, description="which problems are drawn, and in which order")

    _judge: Callable[[Problem, str], Awaitable[float]] | None = PrivateAttr(default=None)

    def problem(self, index: int, split: Split = "train") -> Problem:
        """Problem number `index` >= 0 of a split; endless, a finite task begins anew in another order."""
        raise NotImplementedError

    def size(self, split: Split) -> int | None:
        """How many different problems a split has; None when they are drawn without end."""
        return None

    def images(self, problem: Problem) -> tuple[Image, ...]:
        """Pictures that are shown with the question."""
        return ()

    def score(self, problem: Problem, response: str) -> float:
        """How right `response` is, in [0, 1]."""
        raise NotImplementedError

    async def judged(self, problem: Problem, response: str) -> float:
        """`score`, by whoever is there for it: the reward workers of a run that has some, else here and now."""
        if self._judge is None:
            return self.score(problem, response)
        return await self._judge(problem, response)

    def judged_by(self, judge: Callable[[Problem, str], Awaitable[float]] | None) -> None:
        """Have `judged` ask somebody else, who must give the same scores."""
        self._judge = judge

    def gold(self, problem: Problem) -> str:
        """A response that must score 1."""
        return problem.answer

    @property
    def has_gold(self) -> bool:
        """Whether right responses are known, so that `check` tries the verifier on them."""
        return True

    def near_misses(self, problem: Problem) -> list[str]:
        """Responses that must score below 1; at least one."""
        raise NotImplementedError

    def feedback(self, problem: Problem, response: str, score: float) -> str:
        """What somebody who may try again is told of a response that scored below 1: never the answer itself."""
        return f"score {score:.2f}"

    def demonstration(self, problem: Problem, random: Random, right: bool) -> str | Sequence[str]:
        """A response to imitate, right or wrong, drawn from `random` alone. Tasks with many answers should draw one.

        A list of texts are the turns of an episode: calls of tools are carried out, and the last turn answers.
        """
        return self.gold(problem) if right else random.choice([m for m in self.near_misses(problem) if m])

    def check(self, count: int = 20) -> None:
        """Score the gold answers and near misses of `count` problems per split. Raises OndolError on the first slip."""
        splits: tuple[Split, ...] = ("train", "test")
        for split in splits:
            size = self.size(split)
            for index in range(count if size is None else min(count, size)):
                problem = self.problem(index, split)
                name = f"{split} problem {index} ({problem.question!r:.200})"
                if problem != self.problem(index, split):
                    raise OndolError(
                        f"{name} is another one when asked for again", "draw only from the task's seed and the index"
                    )
                gold = self.gold(problem)
                score = self.score(problem, gold)
                if score != 1.0:
                    raise OndolError(
                        f"{name}: its gold answer {gold!r:.200} scores {score}, not 1", "fix the answer or the verifier"
                    )
                misses = self.near_misses(problem)
                if not misses:
                    raise OndolError(f"{name} has no near miss", "give `near_misses` at least one wrong response")
                for miss in misses:
                    if not self.score(problem, miss) < 1.0:
                        raise OndolError(
                            f"{name}: the wrong response {miss!r:.200} scores 1", "make the verifier stricter"
                        )


def question_id(question: str) -> str:
    """16 hex digits that stand for a question."""
    return hashlib.blake2b(question.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def split_of(question: str) -> Split:
    """The split a question belongs to: 1 in 8 is for testing."""
    return "test" if zlib.crc32(question.encode("utf-8", "surrogatepass")) % 8 == 0 else "train"


class DrawnTask(Task):
    """A task whose problems are drawn at random, without end and with repetition."""

    def draw(self, random: Random) -> Problem | None:
        """One problem from `random` alone, or None when this draw makes none. Its id is set by the caller."""
        raise NotImplementedError

    def problem(self, index: int, split: Split = "train") -> Problem:
        for attempt in range(_DRAWS):
            problem = self.draw(Random(f"{self.seed}/{split}/{index}/{attempt}"))
            if problem is not None and split_of(problem.question) == split:
                return Problem(question_id(problem.question), problem.question, problem.answer, problem.data)
        raise OndolError(f"none of {_DRAWS} questions drawn belongs to the {split} split", "widen the task's settings")


@lru_cache(maxsize=16)
def _order(seed: int, epoch: int, size: int) -> list[int]:
    order = list(range(size))
    Random(f"{seed}/{epoch}").shuffle(order)
    return order


def shuffled(seed: int, index: int, size: int) -> int:
    """Position of draw `index` in a list of `size`: every pass visits each position once, in its own order."""
    return _order(seed, index // size, size)[index % size]
