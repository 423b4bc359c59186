"""The first process in a sandbox: takes requests from outside, lets others do the work, and watches them.

In a PID namespace it is process 1, which no signal from inside reaches, and whose end ends all others. What it starts is
untrusted: time, memory and number of processes are watched, output is cut, and nothing outlives its call but the notebook's
interpreter.

Requests and answers are JSON behind four bytes of length, on a socket that the untrusted processes do not have.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

import look  # pyright: ignore[reportMissingImports]
import walls  # pyright: ignore[reportMissingImports]
import work  # pyright: ignore[reportMissingImports]

_TICK_S = 0.05  # between looks at memory and processes
_MAX_REQUEST = 64 << 20
_MAX_RESULT = 64
_NO_MEMORY = 97  # exit code
ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHASHSEED": "0",
}


def send(sock: socket.socket, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode()
    sock.sendall(struct.pack("!I", len(data)) + data)


def receive(sock: socket.socket) -> dict[str, Any] | None:
    """The next message; None when the other side is gone."""
    head = _exactly(sock, 4)
    if head is None:
        return None
    (length,) = struct.unpack("!I", head)
    if length > _MAX_REQUEST:
        return None
    data = _exactly(sock, length)
    return None if data is None else json.loads(data)


def _exactly(sock: socket.socket, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        try:
            more = sock.recv(min(count - len(data), 1 << 20))
        except OSError:
            return None
        if not more:
            return None
        data += more
    return bytes(data)


class Capture:
    """The head of what comes out of a pipe; the rest is read and dropped."""

    def __init__(self, most: int) -> None:
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.read_end, False)
        self.most, self.data, self.open = most, bytearray(), True

    def drain(self, rounds: int = 64) -> None:
        """Read what is there, but not for ever from one who writes for ever."""
        for _ in range(rounds):
            try:
                piece = os.read(self.read_end, 1 << 16)
            except BlockingIOError:
                return
            if not piece:
                self.open = False
                return
            self.data += piece[: max(0, self.most - len(self.data))]

    def take(self) -> str:
        self.drain()
        text = self.data.decode("utf-8", "replace")
        self.data = bytearray()
        return text

    def close(self) -> None:
        for end in (self.read_end, self.write_end):
            if end >= 0:
                with contextlib.suppress(OSError):
                    os.close(end)


class Notebook:
    """The process that holds a session's variables."""

    def __init__(self, pid: int, output: Capture, commands: int, results: int) -> None:
        self.pid, self.output, self.commands, self.results = pid, output, commands, results
        self.exit = os.pidfd_open(pid)

    def close(self) -> None:
        self.output.close()
        for end in (self.commands, self.results, self.exit):
            os.close(end)


class Box:
    """Serves one sandbox. `settings`: home, memory_bytes, disk_bytes, processes, output_bytes, seed."""

    def __init__(self, sock: socket.socket, settings: dict[str, Any]) -> None:
        self.sock, self.home, self.settings = sock, settings["home"], settings
        self.first = os.getpid() == 1
        self.notebook: Notebook | None = None
        self.own_bytes = look.own_bytes(os.getpid())
        self.codes: dict[int, int | None] = {}  # children whose end matters: their status, once they have ended

    def serve(self) -> None:
        """Until the other side is gone. Then all that we started is ended."""
        try:
            while (request := receive(self.sock)) is not None:
                started = time.perf_counter()
                answer = self.answer(request)
                send(self.sock, answer | {"seconds": time.perf_counter() - started})
        except (OSError, ValueError):
            pass
        finally:
            self._end(keep=None)
            if not self.first:  # the launcher does this too, unless it was killed
                look.remove(self.home)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        do, limit_s = request["do"], float(request.get("timeout_s", 10.0))
        self._load(request.get("code", ""))
        if do == "cell":
            return self._cell(request["code"], limit_s)
        if do == "cell-alone":
            answer = self._fresh(lambda: _exit_of_cell(request["code"]), limit_s, merged=True)
            return answer | ({"kind": "memory"} if answer["exit"] == _NO_MEMORY else {})
        if do == "program":
            answer = self._fresh(lambda: work.run_program(request["code"]), limit_s, stdin=request.get("stdin") or "")
            if request.get("clear"):
                look.empty_folder(self.home)
            return answer
        if do == "shell":
            return self._fresh(lambda: self._shell(request["command"]), limit_s, merged=True)
        if do == "files":
            return self._fresh(lambda: self._files(request["command"]), limit_s)
        if do == "clear":
            return self._clear()
        raise ValueError(do)

    def _load(self, code: str) -> None:
        """Import here, once, the packages that the code names: what is forked from us need not."""
        for name in self.settings["preload"]:
            if name not in sys.modules and name in code:
                load(name)
                self.own_bytes = look.own_bytes(os.getpid())

    # -- kinds of work -----------------------------------------------------------------------------------------------

    def _cell(self, code: str, limit_s: float) -> dict[str, Any]:
        if self.notebook is None:
            self.notebook = self._start_notebook()
        book = self.notebook
        with contextlib.suppress(ProcessLookupError):
            os.kill(book.pid, signal.SIGCONT)
        line = json.dumps(code).encode() + b"\n"
        kind, exit_code = self._watch(book.exit, [book.output], limit_s, book.results, feed=(book.commands, line))
        if kind == "exit":
            kind = "crashed"
        gone = kind not in ("ok", "error", "memory") or (kind == "memory" and exit_code < 0)
        if not gone:  # nothing goes on between calls, whatever the code has said or started
            with contextlib.suppress(ProcessLookupError):
                os.kill(book.pid, signal.SIGSTOP)
        self._end(keep=None if gone else book.pid)
        text = book.output.take()
        if gone:
            self._reap(book.pid)
            book.close()
            self.notebook = None
        return {"kind": kind, "stdout": text, "stderr": "", "exit": exit_code, "restarted": gone}

    def _start_notebook(self) -> Notebook:
        output = Capture(self.settings["output_bytes"])
        commands, results = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                self._become([os.devnull, output.write_end, output.write_end], keep=(commands[0], results[1]))
                _notebook_loop(commands[0], results[1], self.settings["seed"])
            finally:
                os._exit(1)
        self.codes[pid] = None
        os.close(commands[0])
        os.close(results[1])
        os.close(output.write_end)
        output.write_end = -1
        os.set_blocking(commands[1], False)
        return Notebook(pid, output, commands[1], results[0])

    def _fresh(
        self, target: Callable[[], int], limit_s: float, stdin: str | None = None, merged: bool = False
    ) -> dict[str, Any]:
        """`target` in a process of its own; everything that it started ends with it."""
        out = Capture(self.settings["output_bytes"])
        err = out if merged else Capture(self.settings["output_bytes"])
        feed: tuple[int, bytes] | None = None
        source: Any = os.devnull
        if stdin is not None:
            source, write = os.pipe()
            os.set_blocking(write, False)
            feed = (write, stdin.encode("utf-8", "replace"))
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                # Processor time is limited too, for those whose processes use several cores at once.
                self._become([source, out.write_end, err.write_end], cpu_s=int(limit_s) * 2 + 2)
                work.seed_random(self.settings["seed"])
                code = target()
                work.flush()
            except BaseException as e:
                work.failed(e)
                work.flush()
            finally:
                os._exit(code)
        self.codes[pid] = None
        for capture in {out, err}:
            os.close(capture.write_end)
            capture.write_end = -1
        if feed is not None:
            os.close(source)
        watched = os.pidfd_open(pid)
        kind, _ = self._watch(watched, [out, err] if err is not out else [out], limit_s, feed=feed, close_feed=True)
        os.close(watched)
        self._end(keep=self.notebook.pid if self.notebook else None)
        code = self._reap(pid)
        if kind == "exit":
            kind = "ok" if code == 0 else "error" if code > 0 else "crashed"
            if code == -signal.SIGXCPU:
                kind = "timeout"
        answer = {"kind": kind, "stdout": out.take(), "stderr": "" if err is out else err.take(), "exit": code}
        for capture in {out, err}:
            capture.close()
        return answer | {"restarted": False}

    def _shell(self, command: str) -> int:
        program = work.shell_program()
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.execve(program, [program, "-c", command], dict(os.environ))

    def _files(self, command: str) -> int:
        try:
            print(work.file_command(command, self.home), end="")
            return 0
        except work.FileError as e:
            print(e, file=sys.stderr, end="")
        except OSError as e:
            name = os.path.relpath(str(e.filename), self.home) if e.filename else "the file"
            print(f"{name}: {e.strerror}", file=sys.stderr, end="")
        except UnicodeDecodeError:
            print("the file is not text", file=sys.stderr, end="")
        return 1

    def _clear(self) -> dict[str, Any]:
        self._end(keep=None)
        if self.notebook is not None:
            self._reap(self.notebook.pid)
            self.notebook.close()
            self.notebook = None
        look.empty_folder(self.home)
        return {"kind": "ok", "stdout": "", "stderr": "", "exit": 0, "restarted": False}

    # -- watching ----------------------------------------------------------------------------------------------------

    def _become(self, streams: list[Any], cpu_s: int | None = None, keep: tuple[int, ...] = ()) -> None:
        """In the child: an own session, our descriptors gone, limits on, in the home folder."""
        os.setsid()
        for number, stream in enumerate(streams):
            descriptor = os.open(stream, os.O_RDONLY) if isinstance(stream, str) else stream
            os.dup2(descriptor, number)
        low = 3
        for number in sorted(keep):
            os.closerange(low, number)
            low = number + 1
        os.closerange(low, 4096)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(self.home)
        s = self.settings
        processes = s["processes"] if self.first else s["processes"] + look.tasks_of_user()
        counted = not self.first or walls.counts_by_namespace()
        walls.limit(s["memory_bytes"], s["disk_bytes"], processes if counted else 1 << 20, cpu_s)
        work.reopen()

    def _watch(
        self,
        exit_: int,
        outputs: list[Capture],
        limit_s: float,
        results: int | None = None,
        feed: tuple[int, bytes] | None = None,
        close_feed: bool = False,
    ) -> tuple[str, int]:
        """Until the process ends ("exit"), says how its cell went, or breaks a limit ("timeout", "memory", "processes")."""
        poller = select.poll()
        poller.register(exit_, select.POLLIN)
        poller.register(self.sock, select.POLLHUP | select.POLLRDHUP)
        for capture in outputs:
            poller.register(capture.read_end, select.POLLIN)
        if results is not None:
            poller.register(results, select.POLLIN)
        left = memoryview(feed[1]) if feed else memoryview(b"")
        if feed:
            poller.register(feed[0], select.POLLOUT)
        told = bytearray()
        started = time.monotonic()
        next_look = started + _TICK_S
        try:
            while True:
                now = time.monotonic()
                if now - started >= limit_s:
                    return "timeout", -1
                events = dict(poller.poll(max(0.0, min(started + limit_s, next_look) - now) * 1000))
                for capture in outputs:
                    if capture.read_end in events:
                        capture.drain()
                        if not capture.open:
                            poller.unregister(capture.read_end)
                if feed and feed[0] in events:
                    try:
                        left = left[os.write(feed[0], left[: 1 << 16]) :]
                    except BlockingIOError:
                        pass
                    except OSError:
                        left = left[:0]
                    if not left:
                        poller.unregister(feed[0])
                        if close_feed:
                            os.close(feed[0])
                        feed = None
                if results is not None and results in events:
                    piece = os.read(results, 1 << 16)
                    told += piece
                    if told.endswith(b"\n") or not piece or len(told) > _MAX_RESULT:
                        kind = bytes(told).strip().decode("ascii", "replace")
                        return (kind, 0) if kind in ("ok", "error", "memory") else ("crashed", -1)
                if exit_ in events:
                    return "exit", 0
                if self.sock.fileno() in events:
                    raise OSError("the other side is gone")
                if time.monotonic() >= next_look:
                    broken = self._look()
                    if broken:
                        return broken, -1
                    next_look = time.monotonic() + _TICK_S
        finally:
            if feed and close_feed:
                os.close(feed[0])

    def _look(self) -> str | None:
        """The limit that all processes together break, if one is broken."""
        found = self._others()
        if len(found) > self.settings["processes"]:
            return "processes"
        grown = sum(max(0, look.own_bytes(pid) - self.own_bytes) for pid in found)
        if grown > 1.25 * self.settings["memory_bytes"]:
            return "memory"
        # Behind namespaces the home folder is a file system of limited size.
        return "disk" if not self.first and look.folder_bytes(self.home) > self.settings["disk_bytes"] else None

    def _others(self) -> list[int]:
        """All processes in the sandbox but this one."""
        mine = os.getpid()
        if self.first:
            return [pid for pid in look.listed() or look.guessed() if pid != mine]
        return look.descendants(mine)

    def _end(self, keep: int | None) -> None:
        """Kill everything here but ourselves and `keep`, and wait until it is gone."""
        if self.first and keep is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # as process 1 of a namespace: all the others in it
        for _ in range(1000):
            others = [pid for pid in self._others() if pid != keep and not look.is_zombie(pid)]
            if not others:
                break
            for pid in others:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.001)
            self._bury()
        self._bury()

    def _bury(self) -> None:
        """Wait for those that have ended, adopted ones too."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid in self.codes:
                    self.codes[pid] = status

    def _reap(self, pid: int) -> int:
        """The exit code of a child that was killed or has ended; negative: the signal."""
        status = self.codes.pop(pid, None)
        if status is None:
            status = os.waitpid(pid, 0)[1]
        return os.waitstatus_to_exitcode(status)


def _exit_of_cell(code: str) -> int:
    return {"ok": 0, "memory": _NO_MEMORY}.get(work.run_cell(code, {"__name__": "__main__"}, "<cell>"), 1)


def _notebook_loop(commands: int, results: int, seed: str) -> None:
    work.seed_random(seed)
    variables: dict[str, Any] = {"__name__": "__main__"}
    with open(commands, "rb") as lines:
        for number, line in enumerate(lines, 1):
            kind = work.run_cell(json.loads(line), variables, f"<cell {number}>")
            work.flush()
            os.write(results, kind.encode() + b"\n")


def load(name: str) -> None:
    """Import a package for the processes that will be forked from this one."""
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
        if name == "numpy":
            importlib.import_module("numpy.random")  # which it would import at first use
        gc.collect()
        gc.freeze()  # collections in a fork must not touch, and so copy, what is shared


def dress(home: str, paths: list[str], program: str) -> None:
    """The environment and search path of all that runs here; nothing of the host's."""
    os.makedirs(os.path.join(home, ".tmp"), exist_ok=True)
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    folders = ["/usr/local/bin", "/usr/bin", "/bin", os.path.dirname(program)]
    os.environ.update(
        HOME=home, TMPDIR=f"{home}/.tmp", PATH=":".join(dict.fromkeys(folders)), PYTHONPATH=":".join(paths)
    )
    import builtins
    import tempfile

    builtins.exit = builtins.quit = sys.exit  # `site`, which we start without, gives these
    tempfile.tempdir = f"{home}/.tmp"
    for path in paths:
        if path not in sys.path:
            sys.path.append(path)
