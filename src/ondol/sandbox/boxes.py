"""Sandboxes for full CPython: a `Box` is the private machine of one trajectory, behind the walls of a level.

The walls are put up and watched by programs of our own in `inside/`, which see nothing of this process: a launcher, started
once, makes each sandbox from a fork of itself; the first process in a sandbox takes our requests over a socket, lets child
processes do them, and watches those (see `inside/box.py`). Here is the near side: opening, asking with a deadline, ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import itertools
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ondol.errors import OndolError
from ondol.sandbox.turns import TURN_S, turn

LEVELS = ("rlimits", "namespaces", "bubblewrap")  # from weak to strong
PACKAGES = ("numpy", "sympy")  # that sandboxed code may import, with what they need

_INSIDE = Path(__file__).with_name("inside")
_START_S = 60.0  # for a sandbox to open; the first one loads packages
_GRACE_S = 5.0  # beyond a call's own limit, before the whole sandbox is ended
_MAX_ANSWER = 64 << 20
_SYSTEM = (
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/alternatives",
)


@dataclass(frozen=True)
class Limits:
    """What one sandbox may use.

    Attributes:
        memory_mib: memory beyond the interpreter's own, of each process; all together get a quarter more.
        disk_mib: of its home folder, and of one file.
        processes: at once, threads included.
        output_bytes: kept of what one call prints (of stdout and stderr each, where they are apart).
    """

    memory_mib: int = 512
    disk_mib: int = 64
    processes: int = 64
    output_bytes: int = 1 << 20


@dataclass(frozen=True)
class Answer:
    """How a request went: kind "ok", "error", "timeout", "memory", "processes", "disk" or "crashed".

    `restarted`: what was held in memory is gone; `emptied`: the files too. `exit` is a program's exit code, negative for a
    signal.
    """

    kind: str
    stdout: str = ""
    stderr: str = ""
    exit: int = 0
    seconds: float = 0.0
    restarted: bool = False
    emptied: bool = False


class Box:
    """A sandbox, opened at its first request; ended and opened anew when it does not answer.

    Args:
        level: one of LEVELS.
        seed: where `random` starts inside.
        preload: packages that code may be about to import. The sandbox loads one when code names it, before that runs.
        share: below "bubblewrap", have them loaded once for all sandboxes. Where few sandboxes run many programs that need
            none of them it is better not to: each process is a fork, and a fork of more takes longer.
    """

    def __init__(
        self,
        level: str,
        seed: str = "",
        limits: Limits | None = None,
        preload: tuple[str, ...] = (),
        share: bool = True,
    ) -> None:
        self.level, self.seed, self.limits = level, seed, limits or Limits()
        self.preload, self.share = preload, share and level != "bubblewrap"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._number = 0
        self._lock = asyncio.Lock()

    async def ask(self, do: str, timeout_s: float, **details: Any) -> Answer:
        """Have one thing done: "cell" and "cell-alone" (code), "program" (code, stdin), "shell" and "files" (command), "clear".

        What goes wrong inside is an answer. Raises OndolError when this machine cannot open a sandbox of this level.
        """
        try:
            async with asyncio.timeout(TURN_S + timeout_s), turn(), self._lock:
                return await self._ask({"do": do, "timeout_s": timeout_s, **details})
        except TimeoutError:
            return Answer("timeout", stderr="TimeoutError: no sandbox was free")

    async def close(self) -> None:
        """End everything in the sandbox. May be called twice."""
        async with self._lock:
            self._end()

    @property
    def is_open(self) -> bool:
        return self._streams is not None

    async def _ask(self, request: dict[str, Any]) -> Answer:
        if self._streams is None:
            await self._open()
        assert self._streams is not None
        sound = False
        try:
            async with asyncio.timeout(request["timeout_s"] + _GRACE_S):
                await self._send(request)
                answer = await self._receive()
            sound = True
            return Answer(**answer)
        except TimeoutError:
            return Answer("timeout", exit=-9, seconds=request["timeout_s"] + _GRACE_S, restarted=True, emptied=True)
        except (OSError, EOFError, ValueError, TypeError):
            return Answer("crashed", exit=-9, restarted=True, emptied=True)
        finally:
            if not sound:  # also when we are cancelled in the middle
                self._end()

    async def _open(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        limits = self.limits
        message = {
            "level": self.level,
            "seed": self.seed,
            "preload": list(self.preload),
            "share": self.share,
            "memory_bytes": limits.memory_mib << 20,
            "disk_bytes": limits.disk_mib << 20,
            "processes": limits.processes,
            "output_bytes": limits.output_bytes,
        }
        with theirs:
            self._number = _launcher.open(message, theirs)
        reader, writer = await asyncio.open_connection(sock=ours, limit=1 << 20)
        self._streams = reader, writer
        try:
            async with asyncio.timeout(_START_S):
                if self.level == "bubblewrap":
                    await self._send({"message": message, "settings": settings()})
                first = await self._receive()
            why = first.get("failed")
        except TimeoutError:
            why = f"it took longer than {_START_S:g} s"
        except (OSError, EOFError, ValueError) as e:
            why = f"it ended at once ({type(e).__name__})"
        except BaseException:
            self._end()
            raise
        if why is not None:
            self._end()
            raise OndolError(f"no sandbox of level '{self.level}' opens on this machine: {why}", "see: ondol doctor")

    async def _send(self, message: dict[str, Any]) -> None:
        assert self._streams is not None
        data = json.dumps(message).encode()
        self._streams[1].write(struct.pack("!I", len(data)) + data)
        await self._streams[1].drain()

    async def _receive(self) -> dict[str, Any]:
        assert self._streams is not None
        (length,) = struct.unpack("!I", await self._streams[0].readexactly(4))
        if length > _MAX_ANSWER:
            raise ValueError("the answer is too long")
        return json.loads(await self._streams[0].readexactly(length))

    def _end(self) -> None:
        if self._streams is not None:
            with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: the event loop is closed
                self._streams[1].close()
            self._streams = None
            _launcher.kill(self._number)


class _Launcher:
    """This process's launcher, started at the first sandbox and again should it have ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._numbers = itertools.count(1)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._owner == os.getpid() else None

    def open(self, message: dict[str, Any], theirs: socket.socket) -> int:
        with self._lock:
            number = next(self._numbers)
            data = json.dumps(message | {"box": number}).encode()
            for attempt in range(2):
                try:
                    if self._control is None or self._owner != os.getpid():
                        self._start()
                    assert self._control is not None
                    socket.send_fds(self._control, [data], [theirs.fileno()])
                    return number
                except OSError as e:
                    self._stop()
                    if attempt:
                        raise OndolError(f"the sandbox launcher does not start: {e}", "see: ondol doctor") from e
            raise AssertionError

    def kill(self, number: int) -> None:
        with self._lock:
            if self._control is not None and self._owner == os.getpid():
                try:
                    self._control.send(json.dumps({"kill": number}).encode())
                except OSError:
                    self._stop()

    def _start(self) -> None:
        self._stop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(_START_S)
        command = [settings()["program"], "-s", "-S", str(_INSIDE)]
        environment = {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "OPENBLAS_NUM_THREADS": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"}
        if os.environ.get("TMPDIR"):
            environment["TMPDIR"] = os.environ["TMPDIR"]
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                cwd="/",
            )
        self._control, self._owner = ours, os.getpid()
        ours.send(json.dumps(settings()).encode())

    def _stop(self) -> None:
        """Let go of the launcher, which ends with its socket; of one that a parent process has, only our copy."""
        if self._control is not None:
            self._control.close()
        if self._process is not None and self._owner == os.getpid():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)
        self._control = self._process = None


_launcher = _Launcher()


def launcher_pid() -> int | None:
    """The launcher's process, for those who count what is left of sandboxes; None before the first one."""
    return _launcher.pid


@lru_cache(maxsize=1)
def settings() -> dict[str, Any]:
    """What a launcher has to know of this installation: the interpreter, what sandboxes see, where packages are."""
    program = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    packages, paths = _package_paths()
    visible = [p for p in _SYSTEM if os.path.lexists(p)]
    visible += [os.path.realpath(sys.base_prefix), str(_INSIDE.resolve()), *packages]
    needed = [program, os.path.realpath(sys.base_prefix), str(_INSIDE.resolve()), *packages]
    return {
        "program": program,
        "visible": _distinct(visible),
        "needed": _distinct(needed),
        "paths": paths,
        "bubblewrap": shutil.which("bwrap"),
    }


def _package_paths() -> tuple[list[str], list[str]]:
    """Files and folders of PACKAGES and what they need, and the folders to search for them."""
    found: list[str] = []
    seen: set[str] = set()
    queue: list[str] = list(PACKAGES)
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        tops = {f.parts[0] for f in package.files or () if f.parts[0] not in ("..", "__pycache__")}
        found += [os.path.realpath(str(package.locate_file(top))) for top in sorted(tops)]
        for text in package.requires or ():
            if "extra ==" not in text:
                queue.append("".join(itertools.takewhile(lambda c: c.isalnum() or c in "._-", text)))
    return [p for p in found if os.path.exists(p)], _distinct([os.path.dirname(p) for p in found])


def _distinct(paths: list[str]) -> list[str]:
    return list(dict.fromkeys(paths))
