"""Sandboxes for CPython, at each level that this machine reaches: what lives on, what does not, and what it costs a stranger."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ondol.sandbox import boxes, levels
from ondol.sandbox.boxes import LEVELS, Answer, Box, Limits

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sandboxes need Linux")


@pytest.fixture(params=LEVELS)
def level(request):
    why = levels.try_level(request.param)
    if why is not None:
        pytest.skip(f"{request.param}: {why}")
    return request.param


def ask(level: str, *requests: tuple[str, dict], **settings) -> list[Answer]:
    async def go():
        box = Box(level, **settings)
        try:
            return [await box.ask(do, **{"timeout_s": 5.0, **details}) for do, details in requests]
        finally:
            await box.close()
            await box.close()

    return asyncio.run(go())


def cell(code: str, **details) -> tuple[str, dict]:
    return "cell", {"code": code, **details}


def shell(command: str, **details) -> tuple[str, dict]:
    return "shell", {"command": command, **details}


def running(mark: str) -> list[int]:
    """Processes with the mark in their command line."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if mark.encode() in Path("/proc", name, "cmdline").read_bytes():
                    found.append(int(name))
            except OSError:
                continue
    return found


def gone(mark: str, within_s: float = 5.0) -> bool:
    end = time.monotonic() + within_s
    while running(mark):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_a_notebook(level):
    """Variables, the value of the last expression, and errors that begin at the code's own line."""
    answers = ask(
        level,
        cell("import sympy, numpy as np\nx = sympy.Symbol('x')\nprint('a')\nsympy.integrate(x**2)", timeout_s=20.0),
        cell("int(np.arange(3) @ np.arange(3))"),
        cell("x = None\nx"),
        cell("def f():\n    return 1 / 0\nf()"),
        cell("print(1"),
        cell("raise SystemExit(3)"),
        cell("print('\\ud800')\n7"),
    )
    assert [a.kind for a in answers] == ["ok", "ok", "ok", "error", "error", "error", "ok"]
    assert [a.stdout for a in answers[:3]] == ["a\nx**3/3\n", "5\n", ""]
    lines = answers[3].stdout.splitlines()
    assert (
        lines[0].startswith("Traceback")
        and "<cell 4>" in lines[1]
        and lines[-1] == "ZeroDivisionError: division by zero"
    )
    assert "SyntaxError" in answers[4].stdout and "Traceback" not in answers[4].stdout
    assert answers[5].stdout.endswith("SystemExit: 3\n") and answers[6].stdout == "\\ud800\n7\n"
    assert not any(a.restarted for a in answers)


def test_a_program(level):
    """Exit code, input, and the two streams apart; each program starts afresh, with the same random numbers."""
    code = "import sys, random\nprint(input()[::-1])\nprint(random.random(), file=sys.stderr)\nx = globals().get('x', 0) + 1\nsys.exit(x + 2)"
    first, second = ask(level, *[("program", {"code": code, "stdin": "abc\n"})] * 2, seed="7")
    assert (first.kind, first.exit, first.stdout) == ("error", 3, "cba\n")
    assert second.stderr == first.stderr != ""
    (other,) = ask(level, ("program", {"code": code, "stdin": "abc\n"}), seed="8")
    assert other.stderr != first.stderr
    answers = ask(level, *[("program", {"code": c}) for c in ("import os; os.abort()", "x = [0] * 10**10", "")])
    assert [(a.kind, a.exit) for a in answers] == [("crashed", -6), ("error", 1), ("ok", 0)]
    assert "MemoryError" in answers[1].stderr
    (large,) = ask(level, ("program", {"code": "import sys; print(len(sys.stdin.read()))", "stdin": "x" * 3_000_000}))
    assert large.stdout == "3000000\n"


def test_limits_are_kept_and_said(level):
    """After a broken limit the variables are gone, and the files are not."""
    requests = [
        ("files", {"command": "write keep.txt\nkept"}),
        cell("x = 1\nwhile True: pass", timeout_s=0.3),
        cell("x"),
        cell("import ctypes\nctypes.string_at(0)"),
        cell("open('keep.txt').read()"),
        shell("sleep 60", timeout_s=0.3),
        cell("b = bytearray(1 << 30)"),
        cell("print('x' * 300_000)"),
    ]
    _, loop, name, crash, kept, slept, memory, flood = ask(
        level, *requests, limits=Limits(memory_mib=128, output_bytes=10_000)
    )
    assert (loop.kind, loop.restarted, loop.emptied) == ("timeout", True, False) and 0.3 <= loop.seconds < 1.5
    assert "NameError" in name.stdout and (crash.kind, crash.restarted) == ("crashed", True)
    assert kept.stdout == "'kept'\n" and slept.kind == "timeout"
    assert memory.kind == "memory" and not memory.restarted
    assert flood.kind == "ok" and len(flood.stdout) == 10_000


def test_nothing_goes_on_between_calls(level):
    """Background processes end with their call; threads of the notebook stand still until the next."""
    mark = f"300.{os.getpid()}{time.monotonic_ns() % 10**9}"
    code = "import threading, time\nn = 0\ndef count():\n    global n\n    while True: n += 1\nthreading.Thread(target=count, daemon=True).start()"

    async def go():
        box = Box(level)
        try:
            await box.ask("shell", 5.0, command=f"setsid sleep {mark} & sleep {mark} & echo started")
            left = running(mark)
            await box.ask("cell", 5.0, code=code)
            await asyncio.sleep(0.05)
            first = int((await box.ask("cell", 5.0, code="a = n\na")).stdout)
            await asyncio.sleep(0.4)
            second = int((await box.ask("cell", 5.0, code="b = n\nb - a")).stdout)
            await box.ask("shell", 0.3, command=f"trap '' TERM INT HUP; (sleep {mark}; sleep {mark}) & sleep {mark}")
            return left, first, second, running(mark)
        finally:
            await box.close()

    left, first, second, after = asyncio.run(go())
    assert left == [] == after and first > 0
    assert second < 20 * first + 2_000_000  # 0.4 s would be some ten millions


def test_two_sandboxes_do_not_meet(level):
    async def go():
        one, two = Box(level), Box(level)
        try:
            await one.ask("files", 5.0, command="write a.txt\nsecret")
            await one.ask("cell", 5.0, code="x = 1")
            listed = await two.ask("files", 5.0, command="list")
            name = await two.ask("cell", 5.0, code="x")
            other = await two.ask("cell", 5.0, code="import os\nos.path.realpath('.')")
            return listed.stdout, name.kind, other.stdout
        finally:
            await one.close()
            await two.close()

    listed, name, place = asyncio.run(go())
    assert listed == "(empty)" and name == "error"
    home = Path(place.strip().strip("'"))
    assert not home.exists() or level == "rlimits"
    if level == "rlimits":  # its folder is on the machine's disk, and goes with it
        end = time.monotonic() + 5
        while home.exists() and time.monotonic() < end:
            time.sleep(0.02)
        assert not home.exists()


def test_files_commands(level):
    commands = {
        "write d/a.txt\none\ntwo\n": "wrote 8 characters to d/a.txt",
        "edit d/a.txt\ntwo\n=======\nthree": "edited d/a.txt",
        "read d/a.txt": "one\nthree\n",
        "list": "d/",
        "list d": "a.txt  10 bytes",
        "delete d/a.txt": "deleted d/a.txt",
        "delete d": "deleted d",
        "list .": "(empty)",
    }
    bad = {
        "read nothing.txt": "nothing.txt: No such file or directory",
        "read ../../etc/passwd": "../../etc/passwd is not in this folder",
        "write /etc/x\ny": "/etc/x is not in this folder",
        "read .": ". is not a file",
        "delete .": "the folder itself stays",
        "fetch a": "there is no file command 'fetch'; known: delete, edit, list, read, write",
        "write b.txt\nx\nx\n": "",
        "edit b.txt\nx\n=======\ny": "the old text is in b.txt 2 times; it must be there once",
        "edit b.txt\nx": "an edit is: the old text, a line of seven '=', the new text",
    }
    answers = ask(level, *[("files", {"command": c}) for c in (*commands, *bad)])
    assert [a.stdout for a in answers[: len(commands)]] == list(commands.values())
    assert [a.stderr for a in answers[len(commands) :]] == list(bad.values())


def test_a_lost_launcher_is_replaced(level):
    async def go():
        box = Box(level)
        try:
            before = await box.ask("cell", 5.0, code="1")
            lost = boxes.launcher_pid()
            os.kill(lost, signal.SIGKILL)
            await asyncio.sleep(0.2)
            kinds = [(await box.ask("cell", 5.0, code="2")).kind for _ in range(2)]
            other = Box(level)
            after = await other.ask("cell", 5.0, code="3")
            await other.close()
            return before.stdout, kinds[-1], after.stdout, lost != boxes.launcher_pid()
        finally:
            await box.close()

    assert asyncio.run(go()) == ("1\n", "ok", "3\n", True)


def test_sandboxes_end_with_the_process_that_has_them(level):
    """Killed in the middle of a call, it leaves nothing running."""
    mark = f"300.{os.getpid()}{time.monotonic_ns() % 10**9}"
    code = (
        "import asyncio, sys\nfrom ondol.sandbox.boxes import Box\n"
        "asyncio.run(Box(sys.argv[1]).ask('shell', 60.0, command=f'sleep {sys.argv[2]} & sleep {sys.argv[2]}'))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, level, mark])
    try:
        end = time.monotonic() + 30
        while len([p for p in running(mark) if p != process.pid]) < 2:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert gone(mark)


def test_a_cancelled_call_ends_its_sandbox(level):
    mark = f"300.{os.getpid()}{time.monotonic_ns() % 10**9}"

    async def go():
        box = Box(level)
        try:
            await box.ask("cell", 5.0, code="1")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await box.ask("shell", 60.0, command=f"sleep {mark}")
            assert not box.is_open
            return (await box.ask("cell", 5.0, code="2")).stdout
        finally:
            await box.close()

    assert asyncio.run(go()) == "2\n" and gone(mark)


def test_root_is_nobody_inside(level):
    (answer,) = ask(level, shell("id -u; cat /proc/self/status | grep -E 'CapEff|NoNewPrivs' || true"))
    lines = answer.stdout.split()
    assert int(lines[0]) != 0
    assert "0000000000000000" in lines and lines[-1] == "1"
