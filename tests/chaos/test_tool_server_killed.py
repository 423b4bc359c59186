"""The tool server is killed in the middle of rollouts and comes back: calls meanwhile are failed results, and nothing else is harmed."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from ondol.engines.base import Sampling
from ondol.envs.tool import ToolEnv
from ondol.models.load import load_model
from ondol.papers.slow_tools import SteadyEngine, said
from ondol.papers.tool_sums import ToolSums
from ondol.parts import make
from ondol.records import StopReason
from ondol.rollout.driver import Plan, rollout

pytestmark = pytest.mark.timeout(180)
CALLS, COUNT = 6, 12


def serve(port: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ondol", "tools", "serve", "--json", "--tools", "python", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and json.loads(process.stdout.readline())["url"]
    return process


def test_a_killed_tool_server_harms_the_calls_of_its_absence_only():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    servers = [serve(port)]
    renderer, task = load_model("tiny:context=4096").renderer, ToolSums()
    remote = make("tools", {"name": "remote", "url": f"http://127.0.0.1:{port}", "timeout_s": 10})
    env = ToolEnv(tools=(remote,), max_turns=CALLS + 1, system="")
    engine = SteadyEngine(renderer, lambda seed: said(CALLS, seed), 0.02)
    plan = Plan(task, env, [task.problem(i) for i in range(COUNT)], 1, Sampling(max_tokens=4096), (3, 0))
    plan.overlap_tools, turns = True, []

    def back_again() -> None:
        time.sleep(1.5)
        servers.append(serve(port))

    again = threading.Thread(target=back_again)

    def saved(t) -> None:
        turns.append(t.key)
        if len(turns) == 2 * COUNT:
            servers[0].send_signal(signal.SIGKILL)
            again.start()

    plan.saved = saved
    try:
        groups = rollout(engine, renderer, plan)
    finally:
        again.join()
        for server in servers:
            server.kill()
            server.wait()
    done = [t for g in groups for t in g.trajectories]
    assert [t.key for t in done] == [(0, i, 0) for i in range(COUNT)]
    assert {t.stop_reason for t in done} == {StopReason.ANSWERED} and all(len(t.turns) == CALLS + 1 for t in done)
    lost, late = 0, 0
    for t in done:
        right = []
        for turn in t.turns[:-1]:
            (call,), (result,) = turn.calls, turn.results
            a, b = map(int, call.arguments["code"].split(" * "))
            assert result.ok == (result.text == str(a * b)), result
            assert result.ok or (result.kind == "crashed" and "Tool server error" in result.text), result
            right.append(result.ok)
        lost += right.count(False)
        late += right[-1]
    assert lost > 0 and late > 0, "it was away, and came back in time for some"
