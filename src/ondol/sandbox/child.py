"""A child process that can be killed: for judgements that may hang, eat memory or evaluate what a model wrote.

It runs `python -m <module>` and speaks JSON lines over pipes: a first line when it is ready, then two for each question,
when it has prepared for it and the answer. `serve` is the child's side. While it answers, its interpreter refuses to start
programs, open connections or change files. That is a second fence, not a sandbox: text that is evaluated must be looked at
first.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from ondol.errors import OndolError

_START_S = 120.0  # heavy imports on a busy machine
_PREPARE_S = 60.0
_MEMORY_BYTES = 4 << 30
_FORBIDDEN = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "signal.", "mmap.", "fcntl.", "tempfile.")
_READING = ("os.listdir", "os.scandir")  # imports need these
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_fenced = False


class Judge:
    """One child, started at the first question, asked by one thread at a time, started anew after it was killed.

    `arguments` follow the module on the child's command line.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self.module, self.arguments = module, arguments
        self.pid: int | None = None  # the child's, while it runs
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._owner = 0
        atexit.register(self.stop)

    def ask(self, question: dict[str, Any], timeout_s: float) -> Any:
        """The answer, or None when the child failed or took longer than `timeout_s`; it is killed then.

        Raises OndolError when the child cannot start.
        """
        with self._lock:
            process = self._running()
            try:
                assert process.stdin is not None
                process.stdin.write(json.dumps(question) + "\n")
                process.stdin.flush()
                # Preparing (a dataset, say, after a restart) does not count against the answer's time.
                if self._lines.get(timeout=_PREPARE_S) is not None:
                    line = self._lines.get(timeout=timeout_s)
                    if line is not None:
                        return json.loads(line)
            except (queue.Empty, OSError, ValueError):
                pass
            self.stop()
            return None

    def stop(self) -> None:
        """Kill the child, unless it is that of a process we were forked from."""
        process, self._process, self.pid = self._process, None, None
        if process is not None and self._owner == os.getpid():
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                process.kill()
                process.wait(timeout=10)

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, "-m", self.module, *self.arguments],
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONHASHSEED": "0"},  # sets keep one order, in every run
        )
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # its own: a killed child's words are not the next's
        threading.Thread(target=_listen, args=(process, lines), daemon=True).start()
        self._process, self._lines, self._owner, self.pid = process, lines, os.getpid(), process.pid
        try:
            ready = lines.get(timeout=_START_S)
        except queue.Empty:
            ready = None
        if ready is None:
            self.stop()
            raise OndolError("a scoring process does not start", f"run this to see why: python -m {self.module}")
        return process


def _listen(process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    assert process.stdout is not None
    with process.stdout as stdout:
        for line in stdout:
            lines.put(line)
    lines.put(None)


class Judges:
    """Several such children: a question goes to one that is free, or waits for one up to `turn_s`.

    They share nothing, so an answer must not depend on which of them gives it.
    """

    def __init__(self, module: str, *arguments: str, count: int | None = None, turn_s: float = 120.0) -> None:
        self.turn_s = turn_s
        self.all = [Judge(module, *arguments) for _ in range(count or min(4, os.cpu_count() or 1))]
        self._free: queue.LifoQueue[Judge] = queue.LifoQueue()  # the last one used first: its caches are warm
        for judge in reversed(self.all):
            self._free.put(judge)

    def ask(self, question: dict[str, Any], timeout_s: float) -> Any:
        """As `Judge.ask`. Raises TimeoutError when none of them is free in time."""
        try:
            judge = self._free.get(timeout=self.turn_s)
        except queue.Empty:
            raise TimeoutError(f"no process was free for {self.turn_s:g} s") from None
        try:
            return judge.ask(question, timeout_s)
        finally:
            self._free.put(judge)

    def stop(self) -> None:
        for judge in self.all:
            judge.stop()


def end_with_the_parent() -> None:
    """Have this process killed when the thread that started it ends, even while it is frozen. Elsewhere than on Linux it goes on."""
    if sys.platform == "linux":
        import ctypes

        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def serve(
    answer: Callable[[dict[str, Any]], Any],
    prepare: Callable[[dict[str, Any]], Any] | None = None,
    memory_bytes: int | None = _MEMORY_BYTES,
    fenced: bool = True,
) -> None:
    """The child's loop: one JSON line out for each one in; null where `answer` raises.

    `prepare` runs before `answer`, outside the fence: for imports and data, never for what a model wrote. Without a fence and a
    limit of memory it is a process that can be killed, and no more.
    """
    global _fenced
    if memory_bytes is not None:
        # 10**10**10 must fail here, not take the machine's memory; not every system has limits
        with contextlib.suppress(ImportError, ValueError, OSError):
            import resource

            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    out, sys.dont_write_bytecode = sys.stdout, True
    sys.stdout = sys.stderr  # what a library or an evaluated text prints must not look like an answer
    print("ready", file=out, flush=True)
    sys.addaudithook(_guard)
    for line in sys.stdin:
        question = json.loads(line)
        failed = False
        try:
            if prepare is not None:
                prepare(question)
        except Exception:
            failed = True
        print("prepared", file=out, flush=True)
        _fenced = fenced
        try:
            result = None if failed else answer(question)
        except (Exception, SystemExit):
            result = None
        _fenced = False
        print(json.dumps(result), file=out, flush=True)


def _guard(event: str, arguments: tuple[Any, ...]) -> None:
    if not _fenced:
        return
    if event.startswith(_FORBIDDEN) and event not in _READING:
        raise PermissionError(event)
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        raise PermissionError(event)
