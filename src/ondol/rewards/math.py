"""Mathematical equality, by math-verify in a process that can be killed."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
from time import monotonic
from typing import Any

from pydantic import Field

from ondol.errors import OndolError
from ondol.records import Problem
from ondol.rewards.base import Verifier, marked_answer
from ondol.rewards.numeric import _NUMBER, last_number

_START_S = 120.0  # sympy's import on a busy machine


class Math(Verifier):
    """1 when the response's answer equals the gold one as mathematics: `\\frac{1}{2}`, `0.5` and `1/2` are the same.

    The answer is what the last `<answer>` or `\\boxed{}` holds, else what math-verify finds. Equal text and plain
    numbers are decided here; the rest goes to a worker process, which is killed when it takes longer than `timeout_s`
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
        if _NUMBER.fullmatch(_bare(given)) and _NUMBER.fullmatch(gold):
            a, b = last_number(_bare(given)), last_number(gold)
            return float(a is not None and a == b)
        if importlib.util.find_spec("math_verify") is None:
            raise OndolError("the verifier 'math' needs the package math-verify", "pip install 'ondol[tasks]'")
        # Unmarked text is searched for an answer; a marked one is an expression as it stands.
        text = given if marked is None else f"\\boxed{{{given}}}"
        return float(_worker.ask({"gold": gold, "response": text}, self.timeout_s) is True)

    def near_misses(self, problem: Problem) -> list[str]:
        gold = marked_answer(problem.answer)
        return ["", f"\\boxed{{({_bare(problem.answer if gold is None else gold)}) + 1}}"]


def _bare(text: str) -> str:
    return text.strip().strip("$").strip()


class _Worker:
    """One child process, started at the first question; asked by one thread at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._pid = 0

    def ask(self, question: dict[str, str], timeout_s: float) -> Any:
        """The worker's verdict, or None when it failed or took too long."""
        with self._lock:
            process = self._running()
            try:
                assert process.stdin is not None
                process.stdin.write(json.dumps(question) + "\n")
                process.stdin.flush()
                line = self._answers.get(timeout=timeout_s)
            except (queue.Empty, OSError):
                line = None
            if line is None:
                self.stop()
                return None
            return json.loads(line)["equal"]

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None and self._pid == os.getpid():
            with contextlib.suppress(OSError):
                process.kill()
                process.wait(timeout=10)

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._pid == os.getpid() and self._process.poll() is None:
            return self._process
        process = subprocess.Popen(
            [sys.executable, "-m", "ondol.rewards._math_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # its own: a killed worker's words are not ours
        threading.Thread(target=_listen, args=(process, answers), daemon=True).start()
        self._process, self._answers, self._pid = process, answers, os.getpid()
        deadline = monotonic() + _START_S
        try:
            ready = answers.get(timeout=deadline - monotonic())
        except queue.Empty:
            ready = None
        if ready is None:
            self.stop()
            raise OndolError("math-verify's worker process does not start", "run: python -m ondol.rewards._math_worker")
        return process


def _listen(process: subprocess.Popen[str], answers: queue.SimpleQueue[str | None]) -> None:
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            answers.put(line)
    answers.put(None)


_worker = _Worker()
atexit.register(_worker.stop)
