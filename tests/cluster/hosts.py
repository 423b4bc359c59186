"""Machines of one's own: Linux namespaces with an address, files, processes and a name each, on one network.

A machine sees neither the others' processes nor what they write to /tmp, to /dev/shm and to their home; the rest of the file
system is there on each, as if the same things were installed on all. Needs root, and `ip` and `unshare` (Debian: iproute2,
util-linux).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NETWORK = "10.213.7"
_UNSHARE = ("unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--mount-proc", "--kill-child")


def why_not() -> str:
    """What is missing to have machines here; empty if nothing is."""
    if missing := [program for program in ("ip", "unshare", "nsenter") if shutil.which(program) is None]:
        return f"no {', '.join(missing)}"
    tried = subprocess.run(
        [
            *_UNSHARE,
            "sh",
            "-c",
            "mount -t tmpfs none /tmp && ip link add one type bridge && ip link add two type veth peer name three",
        ],
        capture_output=True,
        text=True,
    )
    return "" if tried.returncode == 0 else f"no namespaces: {tried.stderr.strip()[-200:]}"


class Host:
    """One machine: run things on it, cut it off, switch it off."""

    def __init__(self, number: int, folder: Path, names: dict[str, str], switch: Host | None) -> None:
        self.name = f"host{number}"
        self.tmp = folder / self.name  # its /tmp, as it is seen from here
        (self.tmp / "home").mkdir(parents=True)
        self.address = f"{NETWORK}.{number}"
        known = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in names.items())]
        setup = [
            "set -e",
            f"hostname {self.name}",
            f"mount --bind '{self.tmp}' /tmp && mount -t tmpfs none /dev/shm",
            *(f"echo {line} >> /tmp/hosts" for line in known),
            "mount --bind /tmp/hosts /etc/hosts",
            "ip link set lo up",
            "ip link add switch type bridge && ip link set switch up" if switch is None else "",
            "echo ready",
            "exec sleep infinity",
        ]
        self.holder = subprocess.Popen(
            [*_UNSHARE, "sh", "-c", "\n".join(setup)], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self.holder.stdout is not None and self.holder.stdout.readline() == "ready\n", "no such machine here"
        children = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children").read_text().split()
        self.pid = int(children[0])  # its first process, as it is seen from here
        self.switch = switch
        if switch is not None:
            port = f"port{number}"
            switch(
                "ip",
                "link",
                "add",
                port,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                str(self.pid),
                inside=("-n",),
            )
            switch("ip", "link", "set", port, "master", "switch", "up")
            self("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
            self("ip", "link", "set", "eth0", "up")

    def start(self, *command: str, inside: tuple[str, ...] = ("-n", "-m", "-p", "-u", "-i"), **settings: Any):
        """A process on this machine."""
        environment = {**os.environ, "HOME": "/tmp/home", "TMPDIR": "/tmp", **settings.pop("env", {})}
        settings.setdefault("cwd", "/")
        return subprocess.Popen(["nsenter", "-t", str(self.pid), *inside, "--", *command], env=environment, **settings)

    def __call__(self, *command: str, timeout_s: float = 60, **settings: Any) -> str:
        """Run a command here and wait for it; its output."""
        process = self.start(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **settings)
        try:
            said, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            said = process.communicate()[0]
            raise AssertionError(
                f"{self.name}: {' '.join(command)} takes more than {timeout_s} s\n{said[-3000:]}"
            ) from None
        assert process.returncode == 0, (
            f"{self.name}: {' '.join(command)} ended with {process.returncode}\n{said[-3000:]}"
        )
        return said

    def cut(self, off: bool = True) -> None:
        """Pull its network cable, or put it back."""
        assert self.switch is not None
        self.switch("ip", "link", "set", f"port{self.address.rpartition('.')[2]}", "down" if off else "up")

    def switch_off(self) -> None:
        self.holder.kill()
        self.holder.wait()
        for _ in range(100):
            if not Path(f"/proc/{self.pid}").exists():
                return
            time.sleep(0.05)
        raise AssertionError(f"{self.name} is still on")


@contextmanager
def hosts(count: int, folder: Path) -> Iterator[list[Host]]:
    """So many machines, which reach each other by name and address; their files are in the folder."""
    names = {f"host{n}": f"{NETWORK}.{n}" for n in range(1, count + 1)}
    made = [Host(0, folder, names, None)]
    try:
        for n in range(1, count + 1):
            made.append(Host(n, folder, names, made[0]))
        yield made[1:]
    finally:
        for host in reversed(made):
            host.switch_off()
