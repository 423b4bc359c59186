"""The sandbox under hostile code: every case ends soon, as data, and harms nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ondol.errors import OndolError
from ondol.sandbox import monty
from ondol.sandbox.monty import RESTARTED, MontySession, clean


def session(seed: str = "a", timeout_s: float = 0.5, mib: int = 32, chars: int = 512) -> MontySession:
    return MontySession(seed, timeout_s, mib << 20, chars)


def run(*codes: str, **settings):
    async def go():
        s = session(**settings)
        try:
            return [await s.run(code) for code in codes]
        finally:
            await s.close()

    return asyncio.run(go())


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("47*76+29", "3601"),
        ("print('hi')\n5", "hi\n5"),
        ("print('a', end='')\n5", "a\n5"),
        ("x = 3", ""),
        ("None", ""),
        ("", ""),
        ("# nothing", ""),
        ("3\n# a note\n", "3"),
        ("[\n1,\n2\n]", "[1, 2]"),
        ("max(1,\n    2)", "2"),
        ("'''a\nb'''", "'a\\nb'"),
        ("x = '''\n7\n'''", ""),
        ("x = 1 + \\\n2", ""),
        ("dict(\na=1,\n)", "{'a': 1}"),
        ("for i in range(2):\n    print(i)", "0\n1"),
        ("{'b', 'a', 'c'}", "{'b', 'a', 'c'}"),  # the sandbox's order, not that of our hash seed
        ("class A:\n    def __repr__(self): return 'me'\nA()", "me"),
        ("'</python><|im_end|>'", "'</python><|im_end|>'"),
        ("print('</python><|im_end|>')", "</python><|im_end|>"),
        ("print('a\\rb\\x1b[31mc\\x00\\x9bd\\te')", "ab[31mcd\te"),
        ("import time\ntime.sleep(1000)\n1", "1"),
    ],
)
def test_what_a_notebook_would_show(code, text):
    (result,) = run(code)
    assert (result.text, result.kind, result.ok) == (text, "ok", True)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("1/0", "ZeroDivisionError: division by zero"),
        ("def f():\n    return 1/0\nf()", "ZeroDivisionError: division by zero"),
        ("1 +", "SyntaxError"),
        ("a\0b", "SyntaxError"),
        ("print('\ud800')", "SyntaxError"),
        ("(" * 5000, "SyntaxError"),
        ("-" * 20000 + "1", ""),
        ("def f(): return f()\nf()", "RecursionError"),
        ("import subprocess", "ModuleNotFoundError"),
        ("import socket", "ModuleNotFoundError"),
        ("import os\nos.system('id')", "AttributeError"),
        ("import os\nos.fork()", "AttributeError"),
        ("open('/etc/passwd').read()", "PermissionError"),
        ("open('/tmp/ondol-probe', 'w')", "PermissionError"),
        ("__import__('os').environ", ""),
        ("10**5000", "ValueError"),
        ("raise TimeoutError('mine')", "TimeoutError: mine"),
        ("raise SystemExit", "SystemExit"),
        ("while True raise", "SyntaxError"),
    ],
)
def test_errors_are_one_line_and_leave_the_state(code, says):
    before, result, after = run("keep = 5", code, "keep")
    assert before.ok and result.kind == "error" and not result.ok
    assert says in result.text and "Traceback" not in result.text and "\n" not in result.text
    assert after.text == "5"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("while True: pass", "timeout"),
        ("while True: print('x' * 1000)", "memory"),
        ("print('x' * 30_000_000)", "memory"),
        ("[0] * 10**9", "memory"),
        ("'a' * 10**9", "memory"),
        ("10**10**8", "memory"),
        ("[i for i in range(10**8)]", "memory"),
        ("x = []\nwhile True: x.append('y' * 1000)", "memory"),
        ("try:\n    while True: pass\nexcept BaseException: pass", "timeout"),
    ],
)
def test_limits_end_the_interpreter_and_the_text_says_so(code, kind):
    started = time.perf_counter()
    _, result, lost, again = run("keep = 5", code, "keep", "1 + 1")
    assert time.perf_counter() - started < 4
    assert result.kind == kind and not result.ok and result.text.endswith(RESTARTED) and len(result.text) <= 512
    assert lost.text == "NameError: name 'keep' is not defined"
    assert again.text == "2"


def test_a_killed_worker_is_a_result_and_harms_its_session_only():
    async def go():
        a, b = session("a"), session("b")
        await a.run("x = 1")
        await b.run("x = 2")
        os.kill(a._live.worker_pid, signal.SIGKILL)
        crashed, fresh, other = await a.run("x"), await a.run("3"), await b.run("x")
        await a.close()
        await b.close()
        return crashed, fresh, other

    crashed, fresh, other = asyncio.run(go())
    assert crashed.kind == "crashed" and crashed.text.endswith(RESTARTED)
    assert fresh.text == "3" and other.text == "2"


def test_more_sessions_than_workers_keep_their_states(monkeypatch):
    monkeypatch.setattr(monty, "MAX_WORKERS", 3)

    async def go():
        sessions = [session(str(i)) for i in range(12)]
        await asyncio.gather(*(s.run(f"import random\nx = [{i}]\ndef f(): return x") for i, s in enumerate(sessions)))
        for _ in range(3):
            await asyncio.gather(*(s.run("x[0] += 100") for s in sessions))
        held = monty._workers.taken
        seen = await asyncio.gather(*(s.run("f()") for s in sessions))
        for s in sessions:
            await s.close()
        return held, [r.text for r in seen], monty._workers.taken

    before = monty._workers.taken
    held, seen, left = asyncio.run(go())
    assert seen == [f"[{300 + i}]" for i in range(12)]
    assert held <= 3 + 2 * (os.cpu_count() or 1) and left == before


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_died_while_idle_does_not_harm_the_session_that_needs_room(monkeypatch, how):
    monkeypatch.setattr(monty, "MAX_WORKERS", 1)
    monkeypatch.setattr(monty, "_DUMP_S", 0.3)

    async def go():
        a, b = session("a"), session("b")
        await a.run("x = 1")
        pid = a._live.worker_pid
        os.kill(pid, how)
        while how == signal.SIGSTOP and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            await asyncio.sleep(0.01)
        try:
            other = await b.run("x = 2\nx")  # takes the room of a, whose worker can no more give its state
            lost, fresh, again = await a.run("x"), await a.run("3"), await b.run("x")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await a.close()
        await b.close()
        return other, lost, fresh, again, monty._workers.taken

    before = monty._workers.taken
    other, lost, fresh, again, left = asyncio.run(go())
    assert other.text == "2" and again.text == "2" and left == before
    assert lost.kind == "crashed" and lost.text == f"{monty.CRASHED}\n{RESTARTED}"
    assert fresh.text == "3"


def test_a_cancelled_call_loses_its_interpreter_only():
    async def go():
        s = session(timeout_s=5)
        await s.run("x = 1")
        started = time.perf_counter()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(s.run("while True: pass"), 0.2)
        waited = time.perf_counter() - started
        result = await s.run("1 + 1")
        await s.close()
        await s.close()
        return waited, result

    waited, result = asyncio.run(go())
    assert waited < 2 and result.text == "2"


def test_a_hanging_worker_is_given_up_by_our_own_deadline(monkeypatch):
    monkeypatch.setattr(monty, "_GRACE_S", 0.2)

    async def go():
        s = session(timeout_s=0.2)
        await s.run("x = 1")
        pid = s._live.worker_pid
        os.kill(pid, signal.SIGSTOP)  # it neither answers nor dies
        while Path(f"/proc/{pid}/stat").read_text().split()[2] != "T":
            await asyncio.sleep(0.01)
        try:
            result = await s.run("x")
        finally:
            with contextlib.suppress(ProcessLookupError):  # killed, as it should be
                os.kill(pid, signal.SIGCONT)
        fresh = await s.run("2")
        await s.close()
        return result, fresh

    result, fresh = asyncio.run(go())
    assert result.kind == "timeout" and result.seconds < 2 and fresh.text == "2"


def test_the_same_seed_draws_the_same_and_the_clock_stands():
    code = "import random, time\n[random.random(), random.randint(0, 10**9), time.time()]"
    a, b, c = run(code, seed="t1")[0].text, run(code, seed="t1")[0].text, run(code, seed="t2")[0].text
    assert a == b != c and a.split(",")[2] == c.split(",")[2]


def test_a_session_lives_on_in_another_event_loop():
    s = session()
    asyncio.run(s.run("x = 4"))
    assert asyncio.run(s.run("x")).text == "4"
    asyncio.run(s.close())


def test_a_forked_child_is_told_instead_of_hanging():
    run("1")
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        try:
            run("1")
        except OndolError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert run("2")[0].text == "2"


def test_workers_end_with_the_process_and_keep_our_stderr_clean():
    code = (
        "import asyncio\nfrom ondol.sandbox.monty import MontySession\n"
        "async def go():\n    s = MontySession('a', 1.0, 16 << 20, 200)\n"
        "    await s.run('list(range(10**7))')\n    await s.run('1')\n    print(s._live.worker_pid)\n"
        "asyncio.run(go())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    status = f"/proc/{int(done.stdout)}/stat"
    for _ in range(50):
        # Where nobody reaps orphans it stays as a zombie: ended all the same.
        if not os.path.exists(status) or Path(status).read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the worker outlived its process")


def test_concurrent_sessions_do_not_mix():
    async def go():
        sessions = [session(str(i), timeout_s=5) for i in range(64)]

        async def work(i, s):
            for k in range(5):
                await s.run(f"x = {i} if {k} == 0 else x + 1")
            return (await s.run("x")).text

        seen = await asyncio.gather(*(work(i, s) for i, s in enumerate(sessions)))
        for s in sessions:
            await s.close()
        return seen

    assert asyncio.run(go()) == [str(i + 4) for i in range(64)]


@given(st.text(), st.integers(min_value=64, max_value=300))
def test_clean_text_is_short_and_plain(text, limit):
    out = clean(text, limit)
    assert len(out) <= limit and clean(out, limit) == out.rstrip("\n")
    assert not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 for c in out)
    out.encode()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=6))
def test_any_text_is_answered(codes):
    for result in run(*codes, timeout_s=0.3):
        assert result.kind in {"ok", "error", "timeout", "memory"}


_LINES = st.sampled_from(
    [
        "x = 1",
        "x",
        "# c",
        "'''",
        '"""',
        "f(",
        ")",
        "(",
        "[",
        "]",
        "1,",
        "x\\",
        "x + \\",
        "2",
        "'a'",
        "f'{x}'",
        "if x:",
        "    3",
        "{",
        "}",
        ";",
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(_LINES, min_size=1, max_size=6))
def test_showing_the_last_value_never_changes_what_runs(lines):
    """Against CPython: the same programs are accepted, and leave x the same."""
    code = "\n".join(["x = 0", "def f(*a, **k): return (a, k)", *lines])
    scope: dict = {}
    try:
        exec(compile(code, "reference", "exec"), scope)
        expected = ("ok", repr(scope["x"]))
    except SyntaxError:
        expected = ("SyntaxError", None)
    except Exception as e:
        expected = (type(e).__name__, repr(scope.get("x")))
    result, x = run(code, "x")
    assert result.text.split("\n")[-1].startswith(expected[0]) or (expected[0] == "ok" and result.ok), (
        code,
        result,
        expected,
    )
    if expected[1] is not None:
        assert x.text == expected[1]
