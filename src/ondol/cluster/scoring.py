"""Reward workers: processes that score responses for one that plays rollouts, so that a slow verifier or judge holds up nobody else.

A scorer is one worker; `RewardWorkers` has several, here as child processes, on a Ray cluster as actors (`ondol.train.on_ray`). Scores are a task's own,
so they are the same wherever they are given.
"""

from __future__ import annotations

import asyncio
import base64
import json
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from ondol.errors import OndolError
from ondol.records import Problem
from ondol.sandbox.child import Judge
from ondol.tasks.base import Task

_ATTEMPTS = 3  # an answer is not to blame for the death of the worker that it met


class Scorer(Protocol):
    """One worker. It is started at its first question, and anew after it was lost."""

    def ask(self, problem: Problem, response: str, timeout_s: float) -> dict[str, Any] | None:
        """{"score": in [0, 1]} or {"error": text}; None when the worker died, or was killed after `timeout_s`."""
        ...

    def stop(self) -> None: ...


class ChildScorer:
    """A child process of this one.

    Args:
        task: its table, as in a recipe.
    """

    def __init__(self, task: dict[str, Any]) -> None:
        self.judge = Judge("ondol.cluster.score_worker", json.dumps(task))

    def ask(self, problem: Problem, response: str, timeout_s: float) -> dict[str, Any] | None:
        # JSON alone would make lists of a problem's tuples
        asked = base64.b64encode(pickle.dumps((problem, response))).decode("ascii")
        return self.judge.ask({"asked": asked}, timeout_s)

    def stop(self) -> None:
        self.judge.stop()


class RewardWorkers:
    """Scores the responses to a task by `count` workers, from any event loop, until it is closed: `Task.judged` asks them.

    Args:
        make: a fresh scorer.
        timeout_s: of one scoring.
        say: told of workers that were lost.
    """

    def __init__(
        self,
        task: Task,
        make: Callable[[], Scorer],
        count: int,
        timeout_s: float,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.task, self.timeout_s, self.say = task, timeout_s, say
        self.scorers = [make() for _ in range(count)]
        self.lost = 0
        self._free = list(self.scorers)
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(
            count, "ondol-reward"
        )  # a scoring that waits for a worker waits for a thread
        task.judged_by(self)

    async def __call__(self, problem: Problem, response: str) -> float:
        """Raises OndolError when the task does, when it takes too long, and when one worker after the other is lost on it."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._score, problem, response)

    def _score(self, problem: Problem, response: str) -> float:
        with self._lock:
            scorer = self._free.pop()
        try:
            for _ in range(_ATTEMPTS):
                started = time.monotonic()
                answer = scorer.ask(problem, response, self.timeout_s)
                if answer is not None:
                    break
                self.lost += 1
                if time.monotonic() - started >= self.timeout_s:
                    raise OndolError(
                        f"scoring a response took longer than {self.timeout_s:g} s", "see rollout.reward_timeout_s"
                    )
                self.say("a reward worker died; its response is scored by another")
            else:
                raise OndolError(
                    f"{_ATTEMPTS} reward workers died of one response", "set rollout.reward_workers to 0 to see more"
                )
        finally:
            with self._lock:
                self._free.append(scorer)
        if "error" in answer:
            raise OndolError(answer["error"])
        return float(answer["score"])

    def __enter__(self) -> RewardWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.task.judged_by(None)
        for scorer in self.scorers:
            scorer.stop()
        self._threads.shutdown(wait=False, cancel_futures=True)


def score_with(task: Task) -> Callable[[Problem, str], dict[str, Any]]:
    """What a worker does with a question: the task's score, or what it raised."""

    def answer(problem: Problem, response: str) -> dict[str, Any]:
        try:
            return {"score": float(task.score(problem, response))}
        except OndolError as e:
            return {"error": str(e)}
        except Exception as e:  # a task's bug, as it would be said where the episode is played
            return {"error": f"{type(e).__name__}: {e}"}

    return answer
