"""Tasks whose problems bring a program that asks the policy itself, over OpenAI's chat API; the environment `program` plays them."""

from __future__ import annotations

from dataclasses import dataclass

from ondol.records import Problem
from ondol.tasks.base import Task


@dataclass(frozen=True)
class Played:
    """How a program's run ended: what it answered, its score in [0, 1], and the reward it gave itself."""

    response: str
    score: float
    reward: float


class ProgramTask(Task):
    """A task that drives the model through an endpoint, and scores what came of it."""

    def play(self, problem: Problem, base_url: str, api_key: str) -> Played:
        """One episode, in a thread of its own; the requests it sends to `base_url` are the policy's turns. Raises OndolError."""
        raise NotImplementedError
