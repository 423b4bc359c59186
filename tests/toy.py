"""A plug-in task for tests of the loop: finite, instant, with rewards that look random and tools to call."""

from __future__ import annotations

import os
import signal
import zlib
from random import Random

from pydantic import Field

from ondol.methods.grpo import GRPO
from ondol.records import Problem
from ondol.tasks.base import Task

CALL = "<calculator>{}+2</calculator>"


class Toy(Task):
    """A response is right when its checksum is even, so that even a random model gets half of them right."""

    train: int = Field(default=6, ge=0, description="problems to train on")
    test: int = Field(default=3, ge=0, description="problems to test on")
    question: str = Field(default="{}", description="the question; {} is the problem's number")
    calls: bool = Field(default=True, description="demonstrations are calls of the calculator")

    def size(self, split):
        return self.train if split == "train" else self.test

    def problem(self, index, split="train"):
        number = index % self.size(split)
        text = self.question.replace("{}", f"{number}" if split == "train" else f"t{number}")
        return Problem(text, text, "", {"number": number})

    def score(self, problem, response):
        return float(zlib.crc32(response.encode()) % 2 == 0)

    def gold(self, problem):
        return next(text for text in map(str, range(99)) if self.score(problem, text))

    def near_misses(self, problem):
        return [next(text for text in map(str, range(99)) if not self.score(problem, text))]

    def demonstration(self, problem, random: Random, right):
        if not self.calls:
            return super().demonstration(problem, random, right)
        return CALL.format(problem.data["number"])


class NoTask:
    """Not a task at all."""


class OneNaN(GRPO):
    """The loss of one trajectory's tokens is not a number."""

    bad: int = Field(default=0, description="which trajectory of the step")

    def token_loss(self, x):
        loss, reports = super().token_loss(x)
        return loss.where(x.sequence != self.bad, float("nan")), reports


class OneEnds(GRPO):
    """Of the processes that learn together the second one ends in the middle of its pass."""

    how: str = Field(default="kill", description="kill or raise")

    def token_loss(self, x):
        if os.environ.get("RANK") == "1":
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("out of luck")
        return super().token_loss(x)
