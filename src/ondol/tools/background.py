"""One event loop in a thread of its own, for connections that outlive the loops that use them.

A rollout makes a loop and ends it; a connection to a tool server, or a server that we started, stays. It lives here, and
callers on any loop (or on none) wait for it. The thread ends with the process; what was registered by `at_exit` is
closed before.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
_EXIT_S = 10.0  # for everything at exit together

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_pid: int | None = None
_closers: list[Callable[[], Awaitable[None]]] = []


def submit(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Start it there. The future may be waited for, cancelled or forgotten."""
    return asyncio.run_coroutine_threadsafe(work, _running())


async def away(work: Coroutine[Any, Any, T]) -> T:
    """Await it there, from any loop. Cancelling us cancels it."""
    return await asyncio.wrap_future(submit(work))


def wait(work: Coroutine[Any, Any, T], timeout_s: float) -> T:
    """Run it there and block. Raises TimeoutError, after cancelling it, when it takes longer."""
    future = submit(work)
    try:
        return future.result(timeout_s)
    except TimeoutError:
        future.cancel()
        raise


def at_exit(close: Callable[[], Awaitable[None]]) -> None:
    """Call it there before the process ends."""
    with _lock:
        _closers.append(close)


def _running() -> asyncio.AbstractEventLoop:
    global _loop, _pid
    with _lock:
        if _loop is None or _pid != os.getpid():  # a forked child has the loop but not its thread
            if _pid is None:
                atexit.register(_close)
            else:
                _closers.clear()  # they belong to the parent
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="ondol-tools", daemon=True).start()
            _loop, _pid = loop, os.getpid()
        return _loop


def _close() -> None:
    if _loop is None or _pid != os.getpid():
        return

    async def close_all() -> None:
        await asyncio.wait_for(asyncio.gather(*(c() for c in _closers), return_exceptions=True), _EXIT_S)

    with contextlib.suppress(Exception):  # the process is ending; nobody is left to tell
        asyncio.run_coroutine_threadsafe(close_all(), _loop).result(_EXIT_S + 1)
