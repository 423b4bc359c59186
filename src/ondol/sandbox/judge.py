"""A code judge: programs in, verdicts out; a queue, and workers that each run one program at a time in a sandbox.

Semantics of the code-judge service of rStar2-Agent (arXiv 2508.20722; the service's own code for what the paper leaves
open). `run` and `run_batch` are what its HTTP API offers (`ondol.sandbox.judge_http`), here in process:

    async with CodeJudge() as judge:
        result = await judge.run(Submission("print(int(input()) + 1)", input="41", expected_output="42"))
        results = await judge.run_batch([...])

`CodeJudgeClient` stands between many callers and a judge, here or behind HTTP: it gathers calls into batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from ondol.errors import OndolError
from ondol.sandbox.boxes import PACKAGES, Answer, Box, Limits
from ondol.sandbox.levels import check_level, reached

EXECUTION_S = 10.0  # of one program (the paper's RL runs use 4)
QUEUE_LIFE_S = 4.0  # that a call may wait for a worker
LONG_QUEUE_LIFE_S = 3600.0  # the same in a long batch
MEMORY_MIB = 256
CLIP_CHARS = 1000  # of stdout and stderr in a result
_OUTPUT_BYTES = 1 << 20  # compared with the expected output
_MOST_CHARS = 1 << 20  # of a solution


class Reason(StrEnum):
    """Why a result is as it is. A program that fails by itself (an exception, a wrong output, no memory) has NONE."""

    NONE = ""
    INTERNAL_ERROR = "internal_error"  # the judge failed, not the program
    WORKER_TIMEOUT = "worker_timeout"  # the program ran too long
    QUEUE_TIMEOUT = "queue_timeout"  # no worker was free in time: ask again
    INVALID_INPUT = "invalid_input"  # no submission that this judge understands


@dataclass(frozen=True)
class Submission:
    """A Python program, what it reads, and what it should print (None: anything)."""

    solution: str
    input: str | None = None
    expected_output: str | None = None
    type: str = "python"
    sub_id: str = field(default_factory=lambda: str(uuid.uuid4()))

    @classmethod
    def parse(cls, data: Any) -> Submission:
        """From JSON. Raises ValueError that says what is wrong."""
        if isinstance(data, Submission):
            data = dataclasses.asdict(data)
        if not isinstance(data, dict):
            raise ValueError(f"a submission is an object, not {type(data).__name__}")
        if data.get("type") != "python":
            raise ValueError(f"type {str(data.get('type'))[:40]!r} cannot be judged here; known: python")
        for name in ("solution", "input", "expected_output", "sub_id"):
            value = data.get(name)
            if not isinstance(value, str) and not (value is None and name != "solution"):
                raise ValueError(f"{name} must be a text")
        if len(data["solution"]) > _MOST_CHARS or len(data.get("input") or "") > 16 * _MOST_CHARS:
            raise ValueError("the submission is too long")
        own = data.get("sub_id") or str(uuid.uuid4())
        return cls(data["solution"], data.get("input"), data.get("expected_output"), sub_id=own)


@dataclass(frozen=True)
class Result:
    """A verdict. `run_success`: the program ended with exit code 0; `success`: and printed what was expected, but for white
    space at the ends. `cost`: seconds it ran."""

    sub_id: str
    success: bool
    run_success: bool
    cost: float
    stdout: str | None = None
    stderr: str | None = None
    reason: Reason = Reason.NONE

    @property
    def is_fault(self) -> bool:
        """It says nothing of the solution: a reward must not be made of it."""
        return self.reason in (Reason.INTERNAL_ERROR, Reason.QUEUE_TIMEOUT)

    @classmethod
    def parse(cls, data: dict[str, Any]) -> Result:
        known = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name in data}
        return cls(**{**known, "reason": Reason(data.get("reason", ""))})


class Judge(Protocol):
    """Whoever judges a batch: results in the order of the submissions, one each."""

    async def run_batch(self, submissions: Sequence[Submission], long: bool = False) -> list[Result]: ...


@dataclass
class _Job:
    submission: Submission
    result: asyncio.Future[Result]
    stamp: float
    life_s: float


class CodeJudge:
    """The judge in this process. Use as a context (`async with`), in one event loop.

    Args:
        workers: programs that run at once; default: one for each core.
        level: of the sandbox; default: the strongest that works here.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        level: str | None = None,
        execution_s: float = EXECUTION_S,
        queue_life_s: float = QUEUE_LIFE_S,
        long_queue_life_s: float = LONG_QUEUE_LIFE_S,
        memory_mib: int = MEMORY_MIB,
    ) -> None:
        self.workers = workers or os.cpu_count() or 1
        self.level, self.execution_s = level, execution_s
        self.queue_life_s, self.long_queue_life_s = queue_life_s, long_queue_life_s
        self.limits = Limits(memory_mib, disk_mib=32, processes=32, output_bytes=_OUTPUT_BYTES)
        self._queue: asyncio.Queue[_Job] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> CodeJudge:
        """Raises OndolError when no sandbox opens on this machine."""
        if self.level is None:
            await asyncio.to_thread(check_level, "rlimits")
            self.level = reached().level
        self._tasks = [asyncio.create_task(self._work()) for _ in range(self.workers)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        while not self._queue.empty():
            job = self._queue.get_nowait()
            if not job.result.done():
                job.result.set_result(_plain(job.submission.sub_id, Reason.INTERNAL_ERROR, "the judge was closed"))

    def status(self) -> dict[str, int]:
        """Length of the queue, and workers."""
        return {"queue": self._queue.qsize(), "num_workers": sum(not t.done() for t in self._tasks)}

    async def run(self, submission: Any) -> Result:
        """Judge one submission (a `Submission`, or its JSON). What goes wrong is a result."""
        return (await self.run_batch([submission]))[0]

    async def run_batch(self, submissions: Sequence[Any], long: bool = False) -> list[Result]:
        """Judge several; results in their order. In a `long` batch each may wait an hour for its turn."""
        life = self.long_queue_life_s if long else self.queue_life_s
        return list(await asyncio.gather(*(self._enqueue(s, life) for s in submissions)))

    def _enqueue(self, data: Any, life_s: float) -> asyncio.Future[Result]:
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Result] = loop.create_future()
        try:
            submission = Submission.parse(data)
        except ValueError as e:
            name = data.get("sub_id") if isinstance(data, dict) else getattr(data, "sub_id", None)
            result.set_result(_plain(str(name or uuid.uuid4()), Reason.INVALID_INPUT, str(e)))
            return result
        if not self._tasks:
            result.set_result(_plain(submission.sub_id, Reason.INTERNAL_ERROR, "the judge is not open: use async with"))
            return result
        job = _Job(submission, result, time.monotonic(), life_s)
        timer = loop.call_later(life_s, _expire, job)
        result.add_done_callback(lambda _: timer.cancel())
        self._queue.put_nowait(job)
        return result

    async def _work(self) -> None:
        assert self.level is not None
        box = Box(self.level, "judge", self.limits, PACKAGES, share=False)
        try:
            while True:
                job = await self._queue.get()
                if job.result.done():  # it waited too long, or its caller is gone
                    continue
                job.life_s = float("inf")
                try:
                    verdict = await self._judge(box, job.submission)
                except asyncio.CancelledError:
                    verdict = _plain(job.submission.sub_id, Reason.INTERNAL_ERROR, "the judge was closed")
                    raise
                except Exception as e:
                    verdict = _plain(job.submission.sub_id, Reason.INTERNAL_ERROR, f"{type(e).__name__}: {e}")
                finally:
                    if not job.result.done():
                        job.result.set_result(verdict)
        finally:
            await box.close()

    async def _judge(self, box: Box, s: Submission) -> Result:
        answer = await box.ask("program", self.execution_s, code=s.solution, stdin=s.input, clear=True)
        if answer.kind == "crashed" and answer.emptied:  # the sandbox itself failed: once more, in a new one
            answer = await box.ask("program", self.execution_s, code=s.solution, stdin=s.input, clear=True)
        ran = answer.kind == "ok"
        right = s.expected_output is None or answer.stdout.strip() == s.expected_output.strip()
        reason = Reason.NONE
        if answer.kind == "timeout":
            reason = Reason.WORKER_TIMEOUT
        elif answer.kind == "crashed" and answer.emptied:
            reason = Reason.INTERNAL_ERROR
        clipped = (answer.stdout[:CLIP_CHARS], (answer.stderr + _ending(answer))[-CLIP_CHARS:])
        return Result(s.sub_id, ran and right, ran, answer.seconds, *clipped, reason=reason)


def _expire(job: _Job) -> None:
    """Give a call up that still waits in the queue."""
    if not job.result.done() and time.monotonic() - job.stamp >= job.life_s - 0.01:
        job.result.set_result(_plain(job.submission.sub_id, Reason.QUEUE_TIMEOUT, "", time.monotonic() - job.stamp))


def _plain(sub_id: str, reason: Reason, text: str, cost: float = 0.0) -> Result:
    return Result(sub_id, False, False, cost, "", text[:CLIP_CHARS], reason)


def _ending(answer: Answer) -> str:
    """How a program ended that could not say so itself."""
    texts = {
        "memory": "MemoryError: killed, it used too much memory\n",
        "processes": "OSError: killed, it started too many processes\n",
        "disk": "OSError: killed, it wrote too much\n",
        "crashed": f"killed by signal {-answer.exit}\n",
    }
    return texts.get(answer.kind, "")


class CodeJudgeClient:
    """Gathers the calls of many callers into batches. Use as a context, in one event loop.

    A sender takes the first call that waits and what else waits then, `batch_size` at most. Calls that no worker was free
    for are sent again, `attempts` times in all, after `backoff_s` * 2^k seconds; nothing else is. When a batch fails as a
    whole, each of its callers gets the exception.

    Args:
        judge: a `CodeJudge` or `ondol.sandbox.judge_http.HttpJudge`.
        concurrency: batches under way at once.
        timeout_s: for the answer to a batch.
    """

    def __init__(
        self,
        judge: Judge,
        *,
        batch_size: int = 32,
        concurrency: int = 8,
        timeout_s: float = 30.0,
        attempts: int = 4,
        backoff_s: float = 0.5,
    ) -> None:
        if min(batch_size, concurrency, attempts) < 1:
            raise OndolError("batch_size, concurrency and attempts of a CodeJudgeClient are at least 1", "raise them")
        self.judge_, self.batch_size, self.concurrency = judge, batch_size, concurrency
        self.timeout_s, self.attempts, self.backoff_s = timeout_s, attempts, backoff_s
        self.batches = 0  # sent so far
        self._queue: asyncio.Queue[tuple[Submission, asyncio.Future[Result]]] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> CodeJudgeClient:
        self._tasks = [asyncio.create_task(self._send()) for _ in range(self.concurrency)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        while not self._queue.empty():
            self._queue.get_nowait()[1].cancel()

    async def judge(self, submission: Submission) -> Result:
        """Judge one. Raises what its batch failed with; a queue that stays full is a result (`queue_timeout`)."""
        if not self._tasks:
            raise OndolError("the CodeJudgeClient is not open", "use: async with CodeJudgeClient(...) as client")
        result = await self._once(submission)
        for k in range(self.attempts - 1):
            if result.reason is not Reason.QUEUE_TIMEOUT:
                break
            await asyncio.sleep(self.backoff_s * 2**k)
            result = await self._once(submission)
        return result

    async def judge_all(self, submissions: Sequence[Submission]) -> list[Result]:
        """Judge several; results in their order."""
        return list(await asyncio.gather(*(self.judge(s) for s in submissions)))

    async def _once(self, submission: Submission) -> Result:
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((submission, future))
        return await future

    async def _send(self) -> None:
        while True:
            batch = [await self._queue.get()]
            while len(batch) < self.batch_size and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            self.batches += 1
            try:
                async with asyncio.timeout(self.timeout_s):
                    results = await self.judge_.run_batch([s for s, _ in batch])
                if len(results) != len(batch):
                    raise OndolError(
                        f"the judge gave {len(results)} results for {len(batch)} submissions", "look at it"
                    )
                for (_, future), result in zip(batch, results):
                    if not future.done():
                        future.set_result(result)
            except BaseException as e:
                for _, future in batch:
                    if not future.done():
                        with contextlib.suppress(asyncio.InvalidStateError):
                            future.cancel() if isinstance(e, asyncio.CancelledError) else future.set_exception(e)
                if not isinstance(e, Exception):
                    raise
