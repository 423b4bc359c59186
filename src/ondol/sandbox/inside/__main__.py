"""The launcher: a process that makes sandboxes when asked, each from a fork of itself. Started as `python <this folder>`.

Without arguments it is the launcher, on the socket that is its standard input. A message there is
{"box": id, "level": ..., "home": ..., ...} with the sandbox's own socket, or {"kill": id}. When the socket closes all
sandboxes end. With "box" it is what bubblewrap runs inside: one sandbox, on its standard input.

Standard library only, one thread, nothing imported later than needed: what it loads all sandboxes share.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import box  # pyright: ignore[reportMissingImports]
import look  # pyright: ignore[reportMissingImports]
import walls  # pyright: ignore[reportMissingImports]

_BRIEF_S = 10.0


class Launcher:
    """Sandboxes by id, and their process here."""

    def __init__(self, control: socket.socket, settings: dict) -> None:
        self.control, self.settings = control, settings
        self.boxes: dict[int, int] = {}  # id -> its process
        self.homes: dict[int, str] = {}  # of sandboxes without a file system of their own

    def serve(self) -> None:
        while True:
            ready = select.select([self.control], [], [], 1.0)[0]
            self.reap()
            if not ready:
                continue
            data, descriptors, _, _ = socket.recv_fds(self.control, 1 << 20, 1)
            if not data:
                break
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)
            message = json.loads(data)
            if "kill" in message:
                self.kill(message["kill"])
            elif descriptors:
                try:
                    self.open(message, descriptors[0])
                except Exception as e:  # no memory to fork, say: this sandbox is lost, the others are not
                    tell(descriptors[0], e)
                os.close(descriptors[0])
        for number in list(self.boxes):
            self.kill(number)

    def kill(self, number: int) -> None:
        if number in self.boxes:
            self.end(self.boxes[number], deep=number in self.homes)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.boxes[number], 0)
            self.forget(number)
        self.reap()

    def end(self, pid: int, deep: bool) -> None:
        for each in (pid, *(look.descendants(pid) if deep else ())):
            if each > 1:  # lower numbers mean many processes, or the machine's first
                with contextlib.suppress(OSError):
                    os.kill(each, signal.SIGKILL)

    def forget(self, number: int) -> None:
        del self.boxes[number]
        home = self.homes.pop(number, None)
        if home is not None:
            for orphan in self.orphans():
                self.end(orphan, deep=True)
            shutil.rmtree(home, ignore_errors=True)

    def reap(self) -> None:
        """Bury the dead; end what lost its sandbox's first process and became ours."""
        with contextlib.suppress(ChildProcessError):
            while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                for number in [n for n, known in self.boxes.items() if known == pid]:
                    self.forget(number)
        for pid in self.orphans():
            self.end(pid, deep=True)

    def orphans(self) -> list[int]:
        """Children of ours that we did not start."""
        known = set(self.boxes.values())
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as f:
                return [pid for pid in map(int, f.read().split()) if pid not in known]
        except OSError:
            return []

    def open(self, message: dict, descriptor: int) -> None:
        for name in message["preload"] if message["share"] else ():
            self.load(name)
        if message["level"] == "namespaces":
            pid = self.in_namespaces(message, descriptor)
            if pid > 1:
                self.boxes[message["box"]] = pid
        else:
            if message["level"] == "rlimits":
                message["home"] = self.homes[message["box"]] = tempfile.mkdtemp(prefix="ondol-")
            pid = os.fork()
            if pid == 0:
                try:
                    if message["level"] == "bubblewrap":
                        self.exec_bubblewrap(message, descriptor)
                    walls.adopt_orphans()
                    walls.no_new_privileges()
                    self.serve_box(message, descriptor)
                except BaseException as e:
                    tell(descriptor, e)
                finally:
                    os._exit(1)
            self.boxes[message["box"]] = pid

    def load(self, name: str) -> None:
        if name not in sys.modules:
            sys.path += [p for p in self.settings["paths"] if p not in sys.path]
            box.load(name)

    def serve_box(self, message: dict, descriptor: int) -> None:
        self.control.close()
        dress_and_serve(socket.socket(fileno=descriptor), message, self.settings)

    def in_namespaces(self, message: dict, descriptor: int) -> int:
        """The host's id of the first process in new namespaces. It is ours: the one between ends at once."""
        read, write = os.pipe()
        between = os.fork()
        if between == 0:
            try:
                os.close(read)
                walls.enter_namespaces()
                pid = os.fork()
                if pid == 0:
                    os.close(write)
                    try:
                        self.control.close()
                        message["home"] = walls.HOME
                        socket.sethostname("sandbox")
                        walls.new_root(self.settings["visible"], message["disk_bytes"])
                        walls.drop_capabilities()
                        walls.no_new_privileges()
                        walls.landlock(walls.HOME)
                        walls.seccomp()
                        self.serve_box(message, descriptor)
                    except BaseException as e:
                        tell(descriptor, e)
                    finally:
                        os._exit(1)
                os.write(write, str(pid).encode())
            except BaseException as e:
                tell(descriptor, e)
            finally:
                os._exit(0)
        os.close(write)
        text = b""
        end = time.monotonic() + _BRIEF_S
        while select.select([read], [], [], max(0.0, end - time.monotonic()))[0]:
            piece = os.read(read, 64)
            if not piece:
                break
            text += piece
        os.close(read)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(between, 0)
        return int(text or b"0")

    def exec_bubblewrap(self, message: dict, descriptor: int) -> None:
        s = self.settings
        arguments = [s["bubblewrap"], "--unshare-all", "--die-with-parent", "--new-session", "--as-pid-1"]
        arguments += ["--uid", str(walls.USER), "--gid", str(walls.USER), "--hostname", "sandbox", "--cap-drop", "ALL"]
        for path in s["visible"]:
            if os.path.islink(path):
                arguments += ["--symlink", os.readlink(path), path]
            else:
                arguments += ["--ro-bind", path, path]
        for device in walls.DEVICES:
            arguments += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
        arguments += ["--size", str(message["disk_bytes"]), "--tmpfs", walls.HOME, "--proc", "/proc"]
        arguments += ["--symlink", f"{walls.HOME}/.tmp", "/dev/shm"]
        if not any(path.startswith("/tmp/") for path in s["visible"]):
            arguments += ["--symlink", f"{walls.HOME}/.tmp", "/tmp"]
        arguments += ["--symlink", "/proc/self/fd", "/dev/fd", "--remount-ro", "/", "--clearenv"]
        for name, value in box.ENVIRONMENT.items():
            arguments += ["--setenv", name, value]
        here = os.path.dirname(os.path.abspath(__file__))
        arguments += ["--chdir", walls.HOME, s["program"], "-s", "-S", here, "box"]
        os.dup2(descriptor, 0)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        os.execv(arguments[0], arguments)


def tell(descriptor: int, error: BaseException) -> None:
    """Say why there is no sandbox."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as sock:
        box.send(sock, {"failed": f"{type(error).__name__}: {error}"})


def dress_and_serve(sock: socket.socket, message: dict, settings: dict) -> None:
    """The sandbox's first process, behind its walls."""
    sock.setblocking(True)
    walls.not_dumpable()
    box.dress(message["home"], settings["paths"], settings["program"])
    served = box.Box(sock, message)
    box.send(sock, {"ready": True})
    served.serve()


def bubblewrapped() -> None:
    """Inside bubblewrap: our own walls on top, then serve."""
    sock = socket.socket(fileno=os.dup(0))
    try:
        first = box.receive(sock)
        if first is None:
            return
        message, settings = first["message"], first["settings"]
        message["home"] = walls.HOME
        walls.no_new_privileges()
        if walls.landlock_version():
            walls.landlock(walls.HOME)
        walls.seccomp()
        silent = os.open(os.devnull, os.O_RDONLY)
        os.dup2(silent, 0)
        dress_and_serve(sock, message, settings)
    except BaseException as e:
        tell(sock.fileno(), e)


def main() -> None:
    if sys.argv[1:] == ["box"]:
        bubblewrapped()
        return
    control = socket.socket(fileno=os.dup(0))
    control.settimeout(None)
    silent = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(silent, number)
    settings = json.loads(control.recv(1 << 20))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C at the terminal is the host's to handle
    os.setsid()
    walls.adopt_orphans()
    try:
        walls.become_ordinary(settings["needed"])
    except OSError:
        walls.drop_capabilities()  # root without its powers, where it cannot become anyone else
    Launcher(control, settings).serve()


main()
