"""An engine in a thread of its own, that many may ask at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ondol.engines.base import Completion, Engine, Request
from ondol.errors import OndolError

_IDLE_S = 0.5  # how often a worker without work looks whether to end


class Streams(Engine, Protocol):
    """An engine that tells of a turn before it is complete."""

    def partial(self, session: str) -> tuple[list[int], list[float]]: ...


#: called with all new tokens and log-probabilities so far, on the asker's event loop
Listener = Callable[[Sequence[int], Sequence[float]], None]


@dataclass
class _Asked:
    request: Request
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Completion]
    listener: Listener | None
    heard: int = 0


class Busy(Exception):
    """More turns wait than are taken on."""


class Worker:
    """Steps an engine as long as there is something to do. Use it from event loops; close it.

    Args:
        most: turns waiting or under way at once; more are refused (`Busy`).
        keep: how many sessions keep their KV between requests, for whoever begins like one of them; the oldest go first.
    """

    def __init__(self, engine: Streams, *, most: int = 256, keep: int = 8) -> None:
        self.engine, self.most, self.keep = engine, most, keep
        self._open: dict[str, _Asked] = {}
        self._new: list[_Asked] = []
        self._gone: list[str] = []
        self._kept: dict[str, None] = {}
        self._changed = threading.Condition()
        self._closed = False
        self.failure: str | None = None
        self.served = 0
        self._thread = threading.Thread(target=self._run, name="ondol-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._open)

    async def sample(self, request: Request, listener: Listener | None = None) -> Completion:
        """Sample one turn. Raises OndolError when it can never fit, Busy when too much waits."""
        loop = asyncio.get_running_loop()
        asked = _Asked(request, loop, loop.create_future(), listener)
        with self._changed:
            if self._closed or self.failure is not None:
                raise OndolError(
                    f"the engine has stopped{': ' + self.failure if self.failure else ''}", "start it anew"
                )
            if len(self._open) >= self.most:
                raise Busy(f"{self.most} turns are under way or wait")
            self._open[request.session] = asked
            self._new.append(asked)
            self._changed.notify()
        try:
            return await asked.future
        finally:  # answered, or given up: a turn that nobody waits for is not sampled
            with self._changed:
                if self._open.get(request.session) is asked:
                    del self._open[request.session]
                    self._gone.append(request.session)
                    self._changed.notify()

    def release(self, session: str) -> None:
        """Forget what a session left in the engine."""
        with self._changed:
            self._gone.append(session)
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=60)

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as e:  # a broken engine must not leave askers waiting
            self.failure = f"{type(e).__name__}: {e}"
        with self._changed:
            left, self._open = list(self._open.values()), {}
        for asked in left:
            self._fail(asked, OndolError(f"the engine has stopped: {self.failure or 'the server is closing'}"))

    def _turn(self) -> bool:
        with self._changed:
            while not (self._new or self._gone or self._closed or self.engine.busy):
                self._changed.wait(_IDLE_S)
            if self._closed:
                return False
            new, self._new = self._new, []
            gone, self._gone = self._gone, []
        for session in gone:
            self._kept.pop(session, None)
            self.engine.release(session)
        for asked in new:
            if asked.request.session not in self._open:
                continue  # given up already
            try:
                self.engine.submit(asked.request)
            except OndolError as e:
                self._fail(asked, e)
        for done in self.engine.step():
            with self._changed:
                asked = self._open.pop(done.session, None)
            if asked is None:
                continue
            self._tell(asked, done.ids, done.logp)
            self.served += 1
            self._kept.pop(done.session, None)
            self._kept[done.session] = None
            asked.loop.call_soon_threadsafe(_resolve, asked.future, done)
        while len(self._kept) > self.keep:
            oldest = next(iter(self._kept))
            del self._kept[oldest]
            if oldest not in self._open:
                self.engine.release(oldest)
        for asked in [a for a in list(self._open.values()) if a.listener is not None]:
            self._tell(asked, *self.engine.partial(asked.request.session))
        return True

    def _tell(self, asked: _Asked, ids: list[int], logp: list[float]) -> None:
        if asked.listener is not None and len(ids) > asked.heard:
            asked.heard = len(ids)
            asked.loop.call_soon_threadsafe(asked.listener, list(ids), list(logp))

    def _fail(self, asked: _Asked, error: OndolError) -> None:
        with self._changed:
            if self._open.get(asked.request.session) is asked:
                del self._open[asked.request.session]
        asked.loop.call_soon_threadsafe(_refuse, asked.future, error)


def _resolve(future: asyncio.Future[Completion], done: Completion) -> None:
    if not future.done():
        future.set_result(done)


def _refuse(future: asyncio.Future[Completion], error: OndolError) -> None:
    if not future.done():
        future.set_exception(error)
