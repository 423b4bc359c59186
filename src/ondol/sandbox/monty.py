"""Stateful sessions of sandboxed Python on pydantic-monty.

Monty is a Python interpreter of its own: it has no files, sockets, processes or foreign modules to give away. It runs
in worker subprocesses (about 1 MiB of private memory each), so that even a crash of it harms one session only.

One pool serves the whole process. A session takes a worker at its first call and keeps it while fewer than
`MAX_WORKERS` are taken; beyond that the session idle longest is parked (its state dumped, ~0.1 MiB, and restored at its
next call). So any number of trajectories may have a session open, none waits for another to end, and no process is
spent on one that never calls. Workers end with this process: they read from a pipe that closes.

What a session computes does not depend on the machine's clock or entropy: the clock stands still at `CLOCK`, `sleep`
returns at once, `random` starts from the session's seed. Time limits are the one exception: they count wall time, so
only a few calls run at once and the others wait their turn.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import re
import shlex
import shutil
import signal
import tempfile
from collections import OrderedDict
from datetime import datetime
from pathlib import Path
from time import perf_counter
from typing import Any

from ondol.errors import OndolError
from ondol.records import ToolResult
from ondol.sandbox.turns import TURN_S, turn

MAX_WORKERS = 128  # worker processes that sessions may hold between their calls
CLOCK = datetime(2025, 1, 1, 12, 0, 0)
CRASHED = "SandboxError: the interpreter crashed"
RESTARTED = "(the interpreter was restarted: earlier variables are gone)"
CUT = "\n...(truncated)...\n"

_OUTPUT_BYTES = 1 << 20  # printed per call; a flood must not fill our memory
_GRACE_S = 2.0  # beyond the sandbox's own limit, and its pool's (1 s more), before we give a call up ourselves
_WORKER_S = 15.0  # for a worker to start, to restore a session or to hand it back
_DUMP_S = 5.0  # for an idle worker to give its session's state: another session waits for it

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class MontySession:
    """One trajectory's interpreter. State lives from call to call; `close` forgets it (a later call starts afresh).

    Args:
        seed: where the sandbox's `random` starts; the trajectory's id, so that a rerun draws the same.
        timeout_s: wall time of one call.
        memory_bytes: heap of the interpreter.
        output_chars: longer output is cut in the middle.
    """

    def __init__(self, seed: str, timeout_s: float, memory_bytes: int, output_chars: int) -> None:
        self.seed, self.timeout_s, self.memory_bytes, self.output_chars = seed, timeout_s, memory_bytes, output_chars
        self._live: Any = None  # the pool's session, while we hold a worker
        self._parked: bytes | None = None  # our state, while we hold none
        self._lost = False  # the worker died between two calls, and the next one has to say so
        self._lock = asyncio.Lock()  # one call at a time, and no parking in the middle of one

    async def run(self, code: str) -> ToolResult:
        """Run a snippet: what it printed, then, as in a notebook, the repr of a last expression that is not None.

        Failures are results: "error" (the last line of the traceback), "timeout", "memory", "crashed". The last three
        end the interpreter; the text says so and the next call finds a fresh one. Raises OndolError when this machine
        cannot run the sandbox at all.
        """
        from pydantic_monty import CollectString

        started = perf_counter()
        sink = CollectString(max_bytes=_OUTPUT_BYTES)
        try:
            async with asyncio.timeout(TURN_S + self.timeout_s), turn(), self._lock:
                kind, last = await self._call(code, sink)
        except TimeoutError:
            kind, last = "timeout", "TimeoutError: no sandbox was free"
        if kind not in ("ok", "error"):
            last = f"{last}\n{RESTARTED}"
        printed = sink.output
        if printed and last and not printed.endswith("\n"):
            printed += "\n"
        return ToolResult(clean(printed + last, self.output_chars), kind == "ok", kind, perf_counter() - started)

    async def close(self) -> None:
        """Forget the state and hand the worker back. May be called twice."""
        async with self._lock:
            self._lost = False
            await self._give_back()

    async def _call(self, code: str, sink: Any) -> tuple[str, str]:
        """(kind, last lines of the text). Afterwards we hold a worker whose state is sound, or none."""
        from pydantic_monty import MontyCrashedError, MontyError, MontyRuntimeError, MontySyntaxError

        lost, self._lost = self._lost, False
        if lost:
            return "crashed", CRASHED
        try:
            await self._take_worker()
        except (OSError, RuntimeError, MontyError) as e:  # OSError: TimeoutError is one
            self._drop()
            return "crashed", f"SandboxError: {str(e) or 'no worker came in time'}"
        kind = "crashed"  # also what the `finally` sees when we are cancelled
        too_long = f"TimeoutError: ran longer than {self.timeout_s:g} s"
        try:
            async with asyncio.timeout(self.timeout_s + _GRACE_S):
                last = await self._evaluate(code, sink)
            kind = "ok"
        except (MontySyntaxError, MontyRuntimeError) as e:
            kind, last = "error", e.display("type-msg")
            if last.startswith("TimeoutError: feed time limit exceeded"):
                kind, last = "timeout", too_long
            elif last.startswith(("MemoryError: memory limit exceeded", "MemoryError: the worker exceeded")):
                flood = f"> {_OUTPUT_BYTES} bytes" in last
                limit = "printed more than 1 MiB" if flood else f"more than {self.memory_bytes / 2**20:g} MiB in use"
                kind, last = "memory", f"MemoryError: {limit}"
        except MontyCrashedError as e:
            kind, last = ("timeout", too_long) if e.timed_out else ("crashed", CRASHED)
        except TimeoutError:
            kind, last = "timeout", too_long
        except (MontyError, RuntimeError, ValueError, TypeError, RecursionError) as e:
            last = f"SandboxError: {e}"  # the worker was gone, or the value cannot cross to us
        finally:
            if kind in ("ok", "error"):
                _workers.idle[id(self)] = self
            else:
                self._drop()
        return kind, last

    async def _evaluate(self, code: str, sink: Any) -> str:
        """Run `code` and give the text of its last expression, "" when there is none or it is None.

        The repr is made inside: a value that crossed would lose its own `__repr__`, and a set its order. We do not
        parse untrusted code ourselves (deep nesting can overflow our stack); Monty's parser says whether a guess holds.
        """
        from pydantic_monty import MontySyntaxError

        head, tail = _split(code)
        if tail and "\n" not in tail.rstrip("\n"):  # our brackets would forgive a wrong indent in further lines
            try:
                shown = f"{head}pass;_ = {{0: [({tail}\n)]}}[0][0]\n'' if _ is None else f'{{_!r}}'"
                return str(await self._live.feed_run(shown, print_callback=sink))
            except MontySyntaxError:  # not an expression; nothing has run yet
                pass
        value = await self._live.feed_run(code, print_callback=sink)
        return "" if value is None else repr(value)

    async def _take_worker(self) -> None:
        if _workers.pid not in (None, os.getpid()):  # the native runtime does not survive a fork: it would hang
            raise OndolError(
                "the sandbox was in use when this process was forked, and cannot be used in the child",
                "start worker processes with the 'spawn' method",
            )
        _workers.idle.pop(id(self), None)
        if self._live is not None:
            return
        async with asyncio.timeout(_WORKER_S):
            await _workers.make_room()
            limits = {"max_feed_duration_secs": self.timeout_s, "max_memory": self.memory_bytes}
            policy = {"sleep": "zero", "datetime": CLOCK, "random_start": {"seed": self.seed}}
            live = (await _workers.pool()).checkout(limits=limits, os_policy=policy)
            await live.__aenter__()
            self._live, _workers.taken = live, _workers.taken + 1
            parked, self._parked = self._parked, None
            if parked is not None:
                await live.load_session(parked)

    async def _park(self) -> None:
        """Keep the state here and hand the worker back. A worker found dead is this session's loss, not the caller's."""
        from pydantic_monty import MontyError

        async with self._lock:
            if self._live is None:
                return
            live, state = self._live, None
            try:
                async with asyncio.timeout(_DUMP_S):
                    state = await live.dump()
                await self._give_back()
            except (OSError, RuntimeError, MontyError):  # OSError: TimeoutError is one
                pass
            finally:  # also when we are cancelled: half a dump is no state
                if state is None:
                    _kill(live)
                self._drop()
                self._parked, self._lost = state, state is None

    async def _give_back(self) -> None:
        from pydantic_monty import MontyError

        live = self._live
        self._drop()
        if live is not None:
            try:
                async with asyncio.timeout(_WORKER_S):
                    await live.__aexit__(None, None, None)
            except (OSError, RuntimeError, MontyError):
                pass  # the worker is gone, and its state with it: nothing left to hand back

    def _drop(self) -> None:
        """Forget the state. A worker that nobody refers to any more is ended by the pool."""
        if self._live is not None:
            _workers.taken -= 1
        self._live = self._parked = None
        _workers.idle.pop(id(self), None)


def _kill(live: Any) -> None:
    """End a worker that does not answer. One that is frozen would be handed out again by its pool, and hold up whoever gets it."""
    with contextlib.suppress(OSError, RuntimeError, TypeError):
        os.kill(live.worker_pid, signal.SIGKILL)


class _Workers:
    """The process's pool, how many of its workers are taken, and the sessions that hold one without using it."""

    def __init__(self) -> None:
        self.pid: int | None = None
        self.taken = 0
        self.idle: OrderedDict[int, MontySession] = OrderedDict()  # longest idle first
        self._pool: Any = None

    async def pool(self) -> Any:
        if self._pool is None:
            from pydantic_monty import AsyncMonty, MontyError

            try:
                pool = AsyncMonty(
                    binary_path=_quiet_binary(),
                    min_processes=1,
                    max_processes=4 * MAX_WORKERS,  # never reached: `make_room` keeps below it
                    checkout_timeout=_WORKER_S,
                )
                self.pid = os.getpid()
                await pool.__aenter__()
            except (OSError, RuntimeError, MontyError) as e:
                raise OndolError(
                    f"the Python sandbox cannot start: {e}", "pip install --force-reinstall pydantic-monty"
                ) from e
            self._pool = self._pool or pool
        return self._pool

    async def make_room(self) -> None:
        while self.taken >= MAX_WORKERS and self.idle:
            _, session = self.idle.popitem(last=False)
            if not session._lock.locked():  # else it is about to run, and is entered again afterwards
                await session._park()


_workers = _Workers()


def _split(code: str) -> tuple[str, str]:
    """Cut before the last line that may begin a top-level statement: ("a = 1\\n", "f(a,\\n  2)").

    A guess only. `pass;` in front of the tail makes every wrong guess a syntax error: inside brackets or after a line
    continuation it may not stand, and inside a string it leaves our brackets, three kinds of them, unbalanced.
    """
    if code.rstrip().endswith("\\"):  # would swallow what we append
        return code, ""
    lines = code.splitlines(keepends=True)
    for i in range(len(lines) - 1, -1, -1):
        first = lines[i][:1]
        if first.strip() and first not in "#)]}":
            return "".join(lines[:i]), "".join(lines[i:])
    return code, ""


def clean(text: str, limit: int) -> str:
    """Plain text of at most `limit` characters: no control characters but tab and newline, cut in the middle."""
    text = _CONTROL.sub("", text.encode("utf-8", "replace").decode()).rstrip("\n")
    if len(text) <= limit:
        return text
    keep = max(limit - len(CUT), 2)
    return text[: keep - keep // 2] + CUT + text[-(keep // 2) :]


def _quiet_binary() -> str | None:
    """The worker's program behind a line of shell that silences stderr: it writes there when it runs out of memory."""
    try:
        from pydantic_monty._binary import find_monty_binary

        folder = Path(tempfile.mkdtemp(prefix="ondol-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        script = folder / "monty"
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(find_monty_binary())} "$@" 2>/dev/null\n')
        script.chmod(0o700)
        return str(script) if os.name == "posix" and os.access(script, os.X_OK) else None
    except (ImportError, OSError):
        return None  # let the package look for it, and say what is wrong
