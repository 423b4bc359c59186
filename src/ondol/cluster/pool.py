"""Several engines as one: a scheduler decides where a trajectory goes, and it stays there until it is released."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from ondol.cluster.scheduler import Policy, Scheduler
from ondol.engines.base import Completion, Engine, EngineStats, Request
from ondol.errors import OndolError
from ondol.records import Finish


class EnginePool:
    """An engine (`ondol.engines.base.Engine`) over several with the same weights. What is sampled does not depend on where.

    Args:
        engines: each with a model of its own, since they step at the same time.
        kv_tokens: KV tokens that each has room for.
        policy, reserve, expected: of `Scheduler`.
        threads: step the engines side by side; off, one after the other.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        kv_tokens: int,
        policy: Policy = "kv",
        *,
        reserve: int = 0,
        expected: int = 0,
        most: int = 64,
        threads: bool = True,
    ) -> None:
        self.engines = list(engines)
        self.version = self.engines[0].version if self.engines else 0
        self.scheduler = Scheduler(
            [kv_tokens] * len(self.engines), policy, reserve=reserve, expected=expected, most=most
        )
        self._waiting: dict[str, Request] = {}  # of trajectories that have no engine yet
        self._open: dict[str, Request] = {}
        self._threads = (
            ThreadPoolExecutor(len(self.engines), "ondol-pool") if threads and len(self.engines) > 1 else None
        )

    @property
    def stats(self) -> EngineStats:
        """The engines' counters added up; `extra` has the scheduler's."""
        out = EngineStats()
        for engine in self.engines:
            s = engine.stats
            out.sampled_tokens += s.sampled_tokens
            out.prefilled_tokens += s.prefilled_tokens
            out.reused_tokens += s.reused_tokens
            out.steps += s.steps
            out.seconds += s.seconds
        out.extra = {"scheduler/evictions": float(self.scheduler.evictions)}
        return out

    @property
    def busy(self) -> bool:
        return bool(self._open)

    def submit(self, request: Request) -> None:
        session = request.session
        if session in self._open:
            raise OndolError(f"session '{session}' has a turn under way", "wait for it, or release the session")
        place = self.scheduler.at.get(session)
        if place is not None:  # sticky: its KV is there
            self.engines[place].submit(request)
            self.scheduler.grow(session, len(request.ids))
        else:
            longest = getattr(self.engines[0], "context_length", None)
            if longest is not None and len(request.ids) >= longest:
                raise OndolError(f"a prompt of {len(request.ids)} tokens does not fit the model's context of {longest}")
            self.scheduler.submit(session, len(request.ids))
            self._waiting[session] = request
        self._open[session] = request

    def step(self) -> list[Completion]:
        refused: list[Completion] = []
        for session, place in self.scheduler.dispatch():
            try:
                self.engines[place].submit(self._waiting.pop(session))
            except OndolError as e:  # said when it is its turn: who waits in a queue is not looked at by an engine
                refused.append(Completion(session, [], [], [], "", Finish.ERROR, self.version, str(e)))
        busy = [e for e in self.engines if e.busy]
        if self._threads is not None and len(busy) > 1:
            found = list(self._threads.map(lambda e: e.step(), busy))
        else:
            found = [e.step() for e in busy]
        done = [*refused, *(c for completions in found for c in completions)]
        for completion in done:
            request = self._open.pop(completion.session)
            if completion.session in self.scheduler.at:
                self.scheduler.grow(completion.session, len(request.ids) + len(completion.ids))
        return done

    def release(self, session: str) -> None:
        self._waiting.pop(session, None)
        self._open.pop(session, None)
        place = self.scheduler.at.get(session)
        self.scheduler.finish(session)
        if place is not None:
            self.engines[place].release(session)

    def sync(self, version: int) -> None:
        if self._open:
            raise OndolError("weights changed while turns were being sampled", "finish or release them first")
        for engine in self.engines:
            engine.sync(version)
        self.version = version
