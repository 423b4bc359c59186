"""Attempts to get out of a sandbox, run against each level: what a level stops is measured here, not promised.

    python -m ondol.sandbox.escapes                      what this machine's levels stop, as a table
    python -m ondol.sandbox.escapes -o FILE              the same, added to a JSON file, under root or under a user
    python -m ondol.sandbox.escapes --as-user -o FILE    as root: become an ordinary user first

Each attempt is harmless if it succeeds: what it may read, kill or write are decoys made for it, and its floods are bounded.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ondol.sandbox.boxes import LEVELS, Answer, Box, Limits
from ondol.sandbox.levels import try_level

TIERS = ("monty", *LEVELS)
CONTROL = "none"  # plain Python without a sandbox: shows that the attempts are real ones
LIMITS = Limits(memory_mib=128, disk_mib=8, processes=32, output_bytes=1 << 16)
CALL_S = 1.5


@dataclass
class Scene:
    """The decoys: a folder that anyone may read and write, processes, listeners; all removed at the end."""

    outside: Path
    token: str
    decoy: subprocess.Popen[bytes]
    victim: subprocess.Popen[bytes]
    listener: socket.socket
    datagrams: socket.socket
    local: socket.socket
    abstract: socket.socket
    shared_memory: int

    def header(self) -> str:
        """What each attempt knows of the world it wants to reach."""
        known = {
            "OUTSIDE": str(self.outside),
            "SECRET": f"secret-{self.token}",
            "PROJECT": str(Path(__file__).resolve().parents[1] / "errors.py"),
            "DECOY": self.decoy.pid,
            "VICTIM": self.victim.pid,
            "TCP": self.listener.getsockname()[1],
            "UDP": self.datagrams.getsockname()[1],
            "TOKEN": self.token,
            "SHM": self.shared_memory,
        }
        return "".join(f"{name} = {value!r}\n" for name, value in known.items())


@dataclass(frozen=True)
class Attempt:
    """Attributes:
    what: what it tries, for the table.
    code: a program; it prints ESCAPED when it got what it wanted.
    escaped: (scene, answer) -> whether it did, where that can be seen better from outside.
    files: a command of the files tool that follows, whose output is looked at instead.
    again: whether a next call must work for the attempt to count as stopped.
    """

    what: str
    code: str
    escaped: Callable[[Scene, Answer], bool] = lambda scene, answer: "ESCAPED" in answer.stdout
    files: str = ""
    again: bool = False


def _reads(path: str, wanted: str = "SECRET") -> str:
    return f"if {wanted} in open({path}).read(): print('ESCAPED')"


def _received(name: str) -> Callable[[Scene, Answer], bool]:
    def check(scene: Scene, answer: Answer) -> bool:
        sock: socket.socket = getattr(scene, name)
        try:
            if sock.type == socket.SOCK_DGRAM:
                return bool(sock.recv(100))
            sock.accept()[0].close()
            return True
        except OSError:
            return False

    return check


def _survivors(scene: Scene, answer: Answer) -> bool:
    found = False
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                if scene.token.encode() in Path("/proc", name, "cmdline").read_bytes().replace(b"\0", b" "):
                    found = found or b"sleep" in Path("/proc", name, "cmdline").read_bytes()
                    if found:
                        os.kill(int(name), 9)
                        break
    return found


_C = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"

ATTEMPTS: dict[str, Attempt] = {
    # reading
    "read-passwd": Attempt("read the machine's /etc/passwd", _reads("'/etc/passwd'", "'root:'")),
    "read-project": Attempt("read this project's source", _reads("PROJECT", "'OndolError'")),
    "read-file": Attempt("read a file outside", _reads("OUTSIDE + '/secret.txt'")),
    "symlink": Attempt(
        "read a file outside through a symbolic link",
        "import os\nos.symlink(OUTSIDE + '/secret.txt', 'link')\n" + _reads("'link'"),
    ),
    "files-symlink": Attempt(
        "make the files tool follow a symbolic link out",
        "import os\nos.symlink(OUTSIDE, 'folder')",
        files="read folder/secret.txt",
        escaped=lambda scene, answer: scene.token in answer.stdout,
    ),
    "files-dots": Attempt(
        "make the files tool follow .. out",
        "pass",
        files="read ../../../../../../../../../../{outside}/secret.txt",
        escaped=lambda scene, answer: scene.token in answer.stdout,
    ),
    "hardlink": Attempt(
        "hard link a file outside", "import os\nos.link(OUTSIDE + '/victim.txt', 'hard')\nprint('ESCAPED')"
    ),
    "environment": Attempt(
        "find a secret of the host's environment",
        "import os\ntexts = [repr(dict(os.environ))]\n"
        "for p in ('self', '1', os.getppid()):\n"
        "    try: texts.append(open(f'/proc/{p}/environ').read())\n"
        "    except OSError: pass\n"
        "if any(SECRET in t for t in texts): print('ESCAPED')",
    ),
    # writing
    "write-file": Attempt(
        "make a file outside",
        "open(OUTSIDE + '/new.txt', 'w').write('x')",
        escaped=lambda scene, answer: (scene.outside / "new.txt").exists(),
    ),
    "change-file": Attempt(
        "change a file outside",
        "open(OUTSIDE + '/victim.txt', 'a').write('changed')",
        escaped=lambda scene, answer: "changed" in (scene.outside / "victim.txt").read_text(),
    ),
    "delete-file": Attempt(
        "delete a file outside",
        "import os\nos.unlink(OUTSIDE + '/spare.txt')",
        escaped=lambda scene, answer: not (scene.outside / "spare.txt").exists(),
    ),
    # network
    "tcp": Attempt(
        "connect to a port of this machine",
        "import socket\nsocket.create_connection(('127.0.0.1', TCP), 1)",
        escaped=_received("listener"),
    ),
    "udp": Attempt(
        "send a datagram to this machine",
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', UDP))",
        escaped=_received("datagrams"),
    ),
    "unix-socket": Attempt(
        "connect to a socket in a folder outside",
        "import socket\nsocket.socket(socket.AF_UNIX).connect(OUTSIDE + '/local')",
        escaped=_received("local"),
    ),
    "abstract-socket": Attempt(
        "connect to a socket without a file",
        "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0ondol-' + TOKEN)",
        escaped=_received("abstract"),
    ),
    "netlink": Attempt(
        "ask the kernel about the network",
        "import socket\nsocket.socket(16, socket.SOCK_RAW, 0).bind((0, 0))\nprint('ESCAPED')",
    ),
    # other processes
    "kill": Attempt(
        "kill a process outside",
        "import os, time\nos.kill(VICTIM, 9)\ntime.sleep(0.1)",
        escaped=lambda scene, answer: scene.victim.poll() is not None,
    ),
    "kill-supervisor": Attempt(
        "kill the process that watches it",
        "import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(0.3)",
        escaped=lambda scene, answer: answer.emptied,
    ),
    "ptrace": Attempt(
        "trace a process outside",
        _C + "if libc.ptrace(16, DECOY, 0, 0) == 0:\n    print('ESCAPED')\n    os.waitpid(DECOY, 0x40000000)\n"
        "    libc.ptrace(17, DECOY, 0, 0)",
    ),
    "ptrace-supervisor": Attempt(
        "trace the process that watches it",
        _C + "p = os.getppid()\nif libc.ptrace(16, p, 0, 0) == 0:\n    print('ESCAPED', flush=True)\n"
        "    os.waitpid(p, 0x40000000)\n    libc.ptrace(17, p, 0, 0)",
    ),
    "proc-memory": Attempt(
        "read a process's memory outside",
        "for line in open(f'/proc/{DECOY}/maps'):\n"
        "    if ' r' in line:\n"
        "        with open(f'/proc/{DECOY}/mem', 'rb') as f:\n"
        "            f.seek(int(line.split('-')[0], 16))\n"
        "            if f.read(8): print('ESCAPED')\n"
        "        break",
    ),
    "proc-environ": Attempt("read a process's environment outside", _reads("f'/proc/{DECOY}/environ'")),
    "proc-root": Attempt(
        "reach files through /proc/N/root and /proc/N/cwd",
        "import os\nfor n in (1, os.getppid(), DECOY):\n"
        "    for path in (f'/proc/{n}/root{OUTSIDE}/secret.txt', f'/proc/{n}/cwd/secret.txt'):\n"
        "        try:\n            if SECRET in open(path).read(): print('ESCAPED')\n        except OSError: pass",
    ),
    "proc-descriptors": Attempt(
        "reach files through /proc/N/fd",
        "import os\nfor n in (1, os.getppid(), DECOY):\n"
        "    try: names = os.listdir(f'/proc/{n}/fd')\n    except OSError: continue\n"
        "    for name in names:\n"
        "        try:\n            if os.path.isfile(p := f'/proc/{n}/fd/{name}') and SECRET in open(p).read(): print('ESCAPED')\n"
        "        except OSError: pass",
    ),
    "proc-sys": Attempt(
        "open a setting of the kernel for writing",
        "open('/proc/sys/vm/overcommit_memory', 'r+')\nprint('ESCAPED')",
    ),
    "descriptors": Attempt(
        "find an open socket or file of its supervisor",
        "import os, stat\nfor n in range(3, 256):\n"
        "    try: mode = os.fstat(n).st_mode\n    except OSError: continue\n"
        "    if not stat.S_ISFIFO(mode) and not stat.S_ISCHR(mode): print('ESCAPED', n)",
    ),
    "shared-memory": Attempt(
        "attach a System V memory segment of the host's",
        _C + "libc.shmat.restype = ctypes.c_void_p\np = libc.shmat(SHM, None, 0o10000)\n"
        "if p not in (None, ctypes.c_void_p(-1).value) and ctypes.string_at(p, len(SECRET)) == SECRET.encode(): print('ESCAPED')",
    ),
    # floods
    "fork-bomb": Attempt(
        "run 100 processes at once, where 32 are allowed",
        "import os, time\nmade = []\nfor _ in range(100):\n    try: pid = os.fork()\n    except OSError: break\n"
        "    if pid == 0:\n        time.sleep(1)\n        os._exit(0)\n    made.append(pid)\n"
        "time.sleep(0.2)\nif len(made) > 60: print('ESCAPED')\nfor pid in made: os.kill(pid, 9)",
    ),
    "thread-bomb": Attempt(
        "run 100 threads at once, where 32 tasks are allowed",
        "import threading, time\nmade = []\nfor _ in range(100):\n"
        "    t = threading.Thread(target=time.sleep, args=(0.5,), daemon=True)\n"
        "    try: t.start()\n    except RuntimeError: break\n    made.append(t)\n"
        "if len(made) > 60: print('ESCAPED')",
    ),
    "memory": Attempt(
        "use 512 MiB in one process, where 128 are allowed",
        "b = bytearray(512 << 20)\nb[::4096] = b'x' * (len(b) // 4096)\nprint('ESCAPED')",
    ),
    "memory-of-many": Attempt(
        "use 800 MiB in eight processes",
        "import os, time\nmade = []\nfor _ in range(8):\n    if (pid := os.fork()) == 0:\n"
        "        b = bytearray(100 << 20)\n        b[::4096] = b'x' * (len(b) // 4096)\n        time.sleep(0.5)\n        os._exit(7)\n"
        "    made.append(pid)\n"
        "if all(os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) == 7 for p in made): print('ESCAPED')",
    ),
    "large-file": Attempt(
        "write a file of 32 MiB, where 8 are allowed",
        "with open('large', 'wb') as f:\n    for _ in range(32): f.write(bytes(1 << 20))\nprint('ESCAPED')",
    ),
    "many-files": Attempt(
        "write six files of 6 MiB, where 8 are allowed in all",
        "import time\nfor n in range(6):\n    with open(f'f{n}', 'wb') as f: f.write(bytes(6 << 20))\n"
        "time.sleep(0.5)\nprint('ESCAPED')",
    ),
    "huge-output": Attempt(
        "print 64 MiB",
        "import os\nfor _ in range(64):\n    data = b'x' * (1 << 20)\n    while data: data = data[os.write(1, data):]",
        escaped=lambda scene, answer: len(answer.stdout) > 1 << 20,
        again=True,
    ),
    "raise-limits": Attempt(
        "raise its own limits",
        "import resource as r\nr.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY, r.RLIM_INFINITY))\nprint('ESCAPED')",
    ),
    # living on
    "ignore-signals": Attempt(
        "ignore all signals and loop for ever",
        "import signal\nfor s in signal.valid_signals():\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
        "while True: pass",
        escaped=lambda scene, answer: answer.kind == "ok" or answer.seconds > CALL_S + 1,
        again=True,
    ),
    "daemon": Attempt(
        "leave a process behind, in a session of its own",
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        os.execv('/bin/sh', ['sh', '-c', f'sleep 20; : {TOKEN}'])\n    os._exit(0)\ntime.sleep(0.2)",
        escaped=_survivors,
    ),
    # the interpreter and the kernel
    "segfault": Attempt("crash the interpreter", "import ctypes\nctypes.string_at(0)", again=True),
    "scribble": Attempt(
        "write over the interpreter's own objects",
        "import ctypes\nctypes.memset(id(None), 255, 64)\nctypes.memset(id(int), 255, 256)",
        again=True,
    ),
    "user-namespace": Attempt("make a user namespace", _C + "if libc.unshare(0x10000000) == 0: print('ESCAPED')"),
    "mount": Attempt(
        "mount a file system",
        _C
        + "if libc.unshare(0x10020000) == 0 and libc.mount(b'none', os.getcwd().encode(), b'tmpfs', 0, None) == 0: print('ESCAPED')",
    ),
    "chroot": Attempt("change its root", "import os\nos.chroot('.')\nprint('ESCAPED')"),
    "io-uring": Attempt(
        "use io_uring, a wide part of the kernel",
        _C + "if libc.syscall(425, 4, ctypes.create_string_buffer(256)) >= 0: print('ESCAPED')",
    ),
    "setuid": Attempt(
        "gain rights from programs with the setuid bit", _C + "if libc.prctl(39, 0, 0, 0, 0) != 1: print('ESCAPED')"
    ),
    "root": Attempt("become root", "import os\nos.setuid(0)\nprint('ESCAPED')"),
}


@contextlib.contextmanager
def scene() -> Iterator[Scene]:
    """Decoys for one tier's attempts."""
    token = secrets.token_hex(8)
    outside = Path(tempfile.mkdtemp(prefix="outside-"))
    outside.chmod(0o777)
    secret = f"secret-{token}"
    for name, mode in (("secret.txt", 0o644), ("victim.txt", 0o666), ("spare.txt", 0o666)):
        (outside / name).write_text(secret)
        (outside / name).chmod(mode)
    environment = {**os.environ, "SECRET": secret}
    with open(outside / "secret.txt") as held, contextlib.ExitStack() as stack:
        decoys = []
        for _ in range(2):
            process = subprocess.Popen(["sleep", "120"], env=environment, cwd=outside, stdin=held)
            stack.callback(process.wait)
            stack.callback(process.kill)
            decoys.append(process)
        socks = [
            socket.socket(family, kind)
            for family, kind in (
                (socket.AF_INET, socket.SOCK_STREAM),
                (socket.AF_INET, socket.SOCK_DGRAM),
                (socket.AF_UNIX, socket.SOCK_STREAM),
                (socket.AF_UNIX, socket.SOCK_STREAM),
            )
        ]
        addresses = (("127.0.0.1", 0), ("127.0.0.1", 0), str(outside / "local"), f"\0ondol-{token}")
        for sock, address in zip(socks, addresses):
            stack.callback(sock.close)
            sock.bind(address)
            sock.settimeout(0.05)
            if sock.type == socket.SOCK_STREAM:
                sock.listen()
        (outside / "local").chmod(0o777)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.shmat.restype = ctypes.c_void_p
        memory = libc.shmget(0, 4096, 0o1666)
        stack.callback(libc.shmctl, memory, 0, None)
        ctypes.memmove(libc.shmat(memory, None, 0), secret.encode(), len(secret))
        os.environ["ONDOL_ESCAPE"] = secret
        stack.callback(os.environ.pop, "ONDOL_ESCAPE", None)
        stack.callback(shutil.rmtree, outside, ignore_errors=True)
        yield Scene(outside, token, decoys[0], decoys[1], *socks, shared_memory=memory)


async def attempt(tier: str, name: str, where: Scene, box: Any) -> bool:
    """Run one attempt. Returns whether it was stopped."""
    a = ATTEMPTS[name]
    answer = await _run(tier, box, where.header() + a.code)
    if a.files and tier in LEVELS:
        answer = await box.ask("files", CALL_S, command=a.files.format(outside=where.outside))
    out = a.escaped(where, answer)
    if a.again:
        after = await _run(tier, box, "print(6 * 7)")
        out = out or after.stdout.strip() != "42"
    if tier in LEVELS:
        await box.ask("clear", CALL_S)
    return not out


async def _run(tier: str, box: Any, code: str) -> Answer:
    if tier == CONTROL:
        return await asyncio.to_thread(_plain, code)
    if tier == "monty":
        result = await box.run(code)
        return Answer(result.kind, result.text, seconds=result.seconds)
    return await box.ask("program", CALL_S, code=code)


def _plain(code: str) -> Answer:
    """The code in a Python of its own, below a shell that stands for the supervisor."""
    with tempfile.TemporaryDirectory(prefix="plain-") as folder:
        started = time.perf_counter()
        command = ["/bin/sh", "-c", '"$0" -c "$1"; exit $?', sys.executable, code]
        process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            out = process.communicate(timeout=CALL_S + 1.5)[0]
            kind = "ok" if process.returncode == 0 else "error"
        except subprocess.TimeoutExpired:
            out, kind = b"", "timeout"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
        return Answer(
            kind,
            out.decode("utf-8", "replace"),
            seconds=time.perf_counter() - started,
            emptied=process.returncode == -9,
        )


async def battery(tier: str) -> dict[str, bool]:
    """attempt -> stopped, for one tier."""
    box: Any = None
    if tier == "monty":
        from ondol.sandbox.monty import MontySession

        box = MontySession("escapes", CALL_S, LIMITS.memory_mib << 20, LIMITS.output_bytes)
    elif tier in LEVELS:
        box = Box(tier, "escapes", LIMITS)
    try:
        with scene() as where:
            return {name: await attempt(tier, name, where, box) for name in ATTEMPTS}
    finally:
        if box is not None:
            await box.close()


def measure() -> tuple[dict[str, dict[str, bool]], dict[str, str]]:
    """(tier -> attempt -> stopped, tier -> why it was left out) on this machine, as this user."""
    found, missing = {}, {}
    for tier in (CONTROL, *TIERS):
        why = try_level(tier) if tier in LEVELS else None
        if why is None:
            found[tier] = asyncio.run(battery(tier))
        else:
            missing[tier] = why
    return found, missing


def _as_user() -> tuple[dict[str, dict[str, bool]], dict[str, str]]:
    """`measure` in a fork that has become an ordinary user; what it may read must stay in reach."""
    from ondol.sandbox.boxes import settings
    from ondol.sandbox.inside.walls import become_ordinary

    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            become_ordinary([*settings()["needed"], *(os.path.realpath(p) for p in sys.path if os.path.exists(p))])
            os.write(write, json.dumps(measure()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, encoding="utf-8") as f:
        found, missing = json.load(f)
    os.waitpid(pid, 0)
    return found, missing


def markdown(table: dict[str, Any]) -> str:
    """The committed table as docs/sandbox.md shows it: what holds under root and under an ordinary user alike."""
    lines = ["| attempt | " + " | ".join(TIERS) + " |", "|---|" + "---|" * len(TIERS)]
    for name, what in table["attempts"].items():
        stopped = [all(table["stopped"][who][tier][name] for who in ("root", "user")) for tier in TIERS]
        lines.append(f"| {what} | " + " | ".join("stopped" if s else "**not stopped**" for s in stopped) + " |")
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description="What each level of the sandbox stops on this machine.")
    p.add_argument("-o", "--output", type=Path, help="JSON file to add this to, as measured under root or under a user")
    p.add_argument("--as-user", action="store_true", help="as root: become an ordinary user first")
    args = p.parse_args()
    if args.output:
        args.output = args.output.absolute()
    who = "user" if args.as_user or os.getuid() != 0 else "root"
    found, missing = _as_user() if args.as_user else measure()
    print(f"under {who}; + is stopped, - is not\n" + "  ".join(found))
    for name, a in ATTEMPTS.items():
        print(
            "  ".join(("+" if found[tier][name] else "-").center(len(tier)) for tier in found) + f"  {name}: {a.what}"
        )
    for tier, why in missing.items():
        print(f"{tier} is left out: {why}")
    if args.output:
        known = json.loads(args.output.read_text()) if args.output.exists() else {}
        known.setdefault("command", "python -m ondol.sandbox.escapes [--as-user] -o results/isolation.json")
        known["machine"] = {"kernel": platform.release(), "system": f"{platform.system()} {platform.machine()}"}
        known["attempts"] = {name: a.what for name, a in ATTEMPTS.items()}
        known.setdefault("stopped", {})[who] = found
        args.output.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
