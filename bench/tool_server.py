"""Load on the tool server, with faults: python bench/tool_server.py

Starts `ondol tools serve` and drives 1,000 trajectories at once, 3 calls each, over loopback. Half of them use the Python
tool, four tenths a plain tool in the server, a tenth a tool in processes of its own; every second one speaks VerlTool's
batch API, the others `/call`. 1 % of the calls raise, 1 % hang until their deadline, and in the middle of it a worker of
the Python sandbox and a process of the isolated tool are killed. Each trajectory adds up numbers in its tool's memory, so a
right answer shows that it came to the right place, in the right order, with the right state.

Writes bench/results/tool_server.json. It fails unless every answer is right, a killed process harmed no trajectory but its
own, and no state and no process is left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from ondol.records import ToolCall  # noqa: E402
from ondol.tools.isolated import RESTARTED  # noqa: E402
from ondol.tools.remote import ToolClient  # noqa: E402

CALLS = 3
HANG_S = 1.0  # deadline of the plain tools; the Python tool keeps its own 2 s


class Trajectory:
    """Three calls of one tool, what they must give, and what was seen."""

    def __init__(self, number: int, kinds: list[str], draw: random.Random) -> None:
        self.id, self.kinds = f"trajectory-{number}", kinds
        self.tool = "lonely" if number % 10 == 0 else "faulty" if number % 10 < 5 else "python"
        self.batch = number % 2 == 0
        self.values = [draw.randrange(1, 1000) for _ in range(CALLS)]
        self.sum: int | None = None  # what the tool has added up; None: it remembers nothing
        self.seconds: list[float] = []
        self.wrong: list[str] = []
        self.lost: list[str] = []  # calls whose process was killed
        self.begun, self.go_on = asyncio.Event(), asyncio.Event()
        self.go_on.set()

    def text(self, k: int) -> str:
        """What is asked of the tool."""
        kind, value = self.kinds[k], self.values[k]
        if self.tool != "python":
            return f"add {value}" if kind == "add" else kind
        if kind == "add":
            return f"total = {value}\ntotal" if self.sum is None else f"total = total + {value}\ntotal"
        return "1 / 0" if kind == "raise" else "while True: pass"

    async def run(self, client: ToolClient, progress: list[int]) -> None:
        for k in range(CALLS):
            text = self.text(k)
            started = time.perf_counter()
            if self.batch:
                ((said, _, valid),) = await client.observe([self.id], [f"<{self.tool}>{text}</{self.tool}>"])
                said = said if isinstance(said, str) else said.get("error", str(said))
                kind = "answered" if valid else "refused"
            else:
                argument = "code" if self.tool == "python" else "what"
                result = await client.call(self.id, ToolCall(self.tool, {argument: text}))
                said, kind = result.text, result.kind
            self.seconds.append(time.perf_counter() - started)
            self.check(k, said, kind)
            progress[0] += 1
            self.begun.set()
            await self.go_on.wait()
        if self.batch:
            await client.observe([self.id], [""], finish=[True])
        else:
            client.finish(self.id)

    def check(self, k: int, said: str, kind: str) -> None:
        expected = self.kinds[k]
        killed = ("the interpreter crashed", "its process ended", "SandboxError", "Connection", "Broken pipe")
        if any(word in said for word in killed) and "1 / 0" not in said:
            self.lost.append(f"{self.id} call {k}: {said[:80]}")
            self.sum = None
            return
        if expected == "add":
            self.sum = (self.sum or 0) + self.values[k]
            right = said.removeprefix("<result>").removesuffix("</result>").replace(RESTARTED, "").strip() == str(
                self.sum
            )
            if RESTARTED in said and self.sum != self.values[k]:
                right = False
        elif expected == "raise":
            right = ("ZeroDivisionError" if self.tool == "python" else "KeyError") in said
        else:
            right = "TimeoutError" in said
            if self.tool == "python":
                self.sum = None  # the interpreter was started again, and the text says so
                right = right and "restarted" in said
        if not right:
            self.wrong.append(f"{self.id} ({self.tool}) call {k} ({expected}, {kind}): {said[:200]}")


def plan(count: int, seed: int) -> list[Trajectory]:
    draw = random.Random(seed)
    calls = count * CALLS
    kinds = ["raise"] * (calls // 100) + ["hang"] * (calls // 100)
    kinds += ["add"] * (calls - len(kinds))
    draw.shuffle(kinds)
    return [Trajectory(i, kinds[i * CALLS : (i + 1) * CALLS], draw) for i in range(count)]


def descendants(pid: int) -> dict[int, str]:
    """Processes below this one: pid -> command line."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state != "Z":
                parents[int(entry.name)] = int(parent)
    found: dict[int, str] = {}
    level = {pid}
    while level:
        level = {p for p, parent in parents.items() if parent in level}
        for p in level:
            try:
                found[p] = (
                    (Path("/proc") / str(p) / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                )
            except OSError:
                continue
    return found


def kill_two(server: int) -> dict[str, int]:
    """Kill one worker of the Python sandbox and one process of the isolated tool."""
    below = descendants(server)
    monty = [p for p, line in below.items() if "monty" in line]
    # The process that forks, and what it has forked, have one command line; the first is the oldest.
    lonely = sorted(p for p, line in below.items() if "ondol.tools._zygote" in line)[1:]
    killed = {}
    for name, pids in (("sandbox", monty), ("isolated", lonely)):
        if pids:
            os.kill(pids[len(pids) // 2], signal.SIGKILL)
            killed[name] = pids[len(pids) // 2]
    return killed


async def drive(url: str, server: int, trajectories: list[Trajectory]) -> tuple[float, dict[str, int]]:
    client, progress, killed = ToolClient(url, timeout_s=240), [0], {}
    # One trajectory of the isolated tool rests after its first call, so that a process of that tool is there to be killed.
    resting = next(t for t in trajectories if t.tool == "lonely" and t.kinds[0] == "add")
    resting.go_on.clear()

    async def killer() -> None:
        await resting.begun.wait()
        while progress[0] < len(trajectories) * CALLS // 3:
            await asyncio.sleep(0.02)
        killed.update(await asyncio.to_thread(kill_two, server))
        resting.go_on.set()

    started = time.perf_counter()
    await asyncio.gather(killer(), *(t.run(client, progress) for t in trajectories))
    return time.perf_counter() - started, killed


async def health(url: str) -> dict[str, Any]:
    _, reply = await ToolClient(url)._request("GET", "/health", None, 20)
    return reply


def start() -> tuple[subprocess.Popen[str], str]:
    tools = [
        f'{{name = "faulty_tool:Faulty", timeout_s = {HANG_S}}}',
        f'{{name = "isolated", tool = {{name = "faulty_tool:Lonely", timeout_s = {HANG_S}}}}}',
    ]
    words = [w for t in tools for w in ("--tool", t)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests/tools'}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "ondol", "tools", "serve", "--json", "--in-process", "--tools", "python", *words],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())["url"]


def measure(count: int, seed: int) -> dict[str, Any]:
    trajectories = plan(count, seed)
    process, url = start()
    try:
        from ondol.tools import background

        seconds, killed = asyncio.run(drive(url, process.pid, trajectories))
        for _ in range(100):  # closing requests are sent and not waited for
            left = background.wait(health(url), 30)
            if left["trajectories"] == 0:
                break
            time.sleep(0.1)
        memory = int(
            next(x for x in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "VmHWM" in x).split()[1]
        )
        below = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        status = process.wait(30)
        time.sleep(0.5)
        alive = [line for p, line in below.items() if Path(f"/proc/{p}").exists() and _state(p) != "Z"]
    finally:
        process.kill()
        process.wait()
    latencies = sorted(s for t in trajectories for s, kind in zip(t.seconds, t.kinds) if kind == "add")
    return {
        "trajectories": count,
        "calls": count * CALLS,
        "raise": sum(t.kinds.count("raise") for t in trajectories),
        "hang": sum(t.kinds.count("hang") for t in trajectories),
        "killed": sorted(killed),
        "wrong": [w for t in trajectories for w in t.wrong],
        "lost_with_a_killed_process": [w for t in trajectories for w in t.lost],
        "trajectories_hit_by_a_kill": sum(bool(t.lost) for t in trajectories),
        "state_left": {k: left[k] for k in ("trajectories", "sessions", "concurrent_requests", "waiting")},
        "left_behind": left["left_behind"],
        "processes_left": alive,
        "exit_status": status,
        "seconds": round(seconds, 2),
        "calls_per_s": round(count * CALLS / seconds, 1),
        "latency_s": {
            "median": round(statistics.median(latencies), 4),
            "p95": round(latencies[int(0.95 * len(latencies))], 4),
            "max": round(latencies[-1], 4),
        },
        "server_peak_mib": round(memory / 1024),
    }


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def main() -> int:
    p = argparse.ArgumentParser()
    p.add_argument("--trajectories", type=int, default=1000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output", type=Path, default=ROOT / "bench/results/tool_server.json")
    args = p.parse_args()
    result = measure(args.trajectories, args.seed)
    held = (
        not result["wrong"]
        and not any(result["state_left"].values())
        and not result["processes_left"]
        and result["exit_status"] == 0
        and result["trajectories_hit_by_a_kill"] <= len(result["killed"])
        and len(result["killed"]) == 2
    )
    result = {
        "command": f"python bench/tool_server.py --trajectories {args.trajectories} --seed {args.seed}",
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}",
        "held": held,
        **result,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
