"""How many sandboxed calls run at once. Limits are in wall time, so with more than the cores can carry they would hit code
that is merely waiting."""

from __future__ import annotations

import asyncio
import os
import weakref

TURN_S = 120.0  # for a call to wait for its turn

_turns: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = weakref.WeakKeyDictionary()


def turn() -> asyncio.Semaphore:
    """At most two running calls per core."""
    loop = asyncio.get_running_loop()
    found = _turns.get(loop)
    if found is None:
        found = _turns[loop] = asyncio.Semaphore(2 * (os.cpu_count() or 1))
    return found
