"""Which walls this machine can put up: found out once, by really trying.

bubblewrap   a sandbox made by `bwrap`, with Landlock and seccomp on top
namespaces   user, PID, mount, network, IPC, UTS and cgroup namespaces, Landlock and seccomp, by our own launcher
rlimits      limits on memory, time, processes and files, a clean environment, a user of its own under root: no walls

The strongest that works is used. Each level stops what `results/isolation.json` says.
"""

from __future__ import annotations

import asyncio
import json
import platform
import threading
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ondol.errors import OndolError, nearest
from ondol.sandbox.boxes import LEVELS, Box, settings

_PROBE_S = 20.0

#: run inside: facts that tell whether the walls stand
_PROBE = """
import json, os, resource, socket
def refused(attempt):
    try:
        attempt()
        return False
    except OSError:
        return True
with open("probe", "w") as f:
    f.write("x")
words = {}
try:
    words = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
except OSError:
    pass
print(json.dumps({
    "limits": resource.getrlimit(resource.RLIMIT_FSIZE)[1] > 0 and resource.getrlimit(resource.RLIMIT_AS)[1] > 0,
    "first process is ours": os.getppid() == 1,
    "no other user's files": not os.path.exists("/etc/passwd"),
    "no network": refused(lambda: socket.socket(socket.AF_INET)),
    "nothing to write to": refused(lambda: open("/probe", "w")) and refused(lambda: open("/usr/probe", "w")),
    "filtered": words.get("Seccomp", "2").strip() == "2" and words.get("NoNewPrivs", "1").strip() == "1",
    "not root": os.getuid() != 0,
}))
"""


@dataclass(frozen=True)
class Reached:
    """The strongest level that works here (None: not even limits do), and why stronger ones do not."""

    level: str | None
    why: dict[str, str] = field(default_factory=dict)
    landlock: int = 0

    @property
    def walls(self) -> str:
        """What the level is made of, in a few words."""
        if self.level is None:
            return "none"
        if self.level == "rlimits":
            return "limits of resources only"
        land = f"Landlock {self.landlock}" if self.landlock else "no Landlock"
        by = "bwrap" if self.level == "bubblewrap" else "namespaces"
        return f"{by}, {land}, seccomp"


@lru_cache(maxsize=1)
def reached() -> Reached:
    """Try the levels from the strongest down. Takes some tenths of a second the first time."""
    why: dict[str, str] = {}
    for level in reversed(LEVELS):
        problem = try_level(level)
        if problem is None:
            return Reached(level, why, _landlock())
        why[level] = problem
    return Reached(None, why)


@lru_cache(maxsize=len(LEVELS))
def try_level(level: str) -> str | None:
    """What is wrong with a level on this machine; None when it works."""
    if platform.system() != "Linux":
        return "it needs Linux"
    if level == "bubblewrap" and settings()["bubblewrap"] is None:
        return "there is no bwrap (Debian and Ubuntu: apt install bubblewrap)"
    out: list[str | None] = ["the trial did not end"]

    def trial() -> None:  # in a thread of its own, since the caller may be in an event loop
        try:
            out[0] = asyncio.run(_probe(level))
        except OndolError as e:
            out[0] = e.what.partition(": ")[2] or e.what
        except Exception as e:
            out[0] = f"{type(e).__name__}: {e}"

    thread = threading.Thread(target=trial, daemon=True)
    thread.start()
    thread.join(6 * _PROBE_S)
    return out[0]


def check_level(wanted: str, where: str = "the recipe") -> None:
    """Raise OndolError unless this machine reaches at least `wanted`."""
    if wanted not in LEVELS:
        raise OndolError(f"{where}: there is no sandbox level '{wanted}'", nearest(wanted, LEVELS))
    found = reached()
    if found.level is None:
        why = found.why.get("rlimits", "unknown")
        raise OndolError(f"no sandbox opens on this machine: {why}", "sandboxes need Linux; see docs/sandbox.md")
    if LEVELS.index(found.level) < LEVELS.index(wanted):
        reasons = "; ".join(f"{level}: {text}" for level, text in found.why.items())
        raise OndolError(
            f"{where} requires sandboxes of level '{wanted}', and this machine reaches '{found.level}' ({reasons})",
            "make that level work (docs/sandbox.md), or require less",
        )


async def _probe(level: str) -> str | None:
    box = Box(level)
    try:
        answer = await box.ask("program", _PROBE_S, code=_PROBE)
    finally:
        await box.close()
    if answer.kind != "ok":
        return f"a program there ended with '{answer.kind}': {answer.stderr[-300:].strip()}"
    facts: dict[str, Any] = json.loads(answer.stdout)
    needed = ["limits"] if level == "rlimits" else list(facts)
    missing = [name for name in needed if facts.get(name) is not True]
    return f"not so: {', '.join(missing)}" if missing else None


def _landlock() -> int:
    from ondol.sandbox.inside.walls import landlock_version

    return landlock_version()
