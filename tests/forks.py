"""Run the command line many times without paying for its imports: a process that has them forks a child a time.

`Forks` starts such a server; `run` makes one child, which may be told to die. The server itself never computes (a
process that has used autograd must not fork).
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Where a child can be told to die: name -> (module, path of the function). The n-th call is the last thing it does.
PLACES = {
    "sampling": ("ondol.engines.torch", "TorchEngine.step"),
    "loss": ("ondol.train.updates", "log_probs_of"),
    "update": ("ondol.train.optimizer", "Optimizer.step"),
    "tensors": ("ondol.train.checkpoint", "save_tensors"),
    "seal": ("ondol.store.checkpoint", "_seal"),
    "sync": ("ondol.store.checkpoint", "_sync"),
    "rotate": ("ondol.store.checkpoint", "_rotate"),
    "remove": ("ondol.store.checkpoint", "_remove"),
    "trajectories": ("ondol.store.database", "Database.add_trajectories"),
    "metrics": ("ondol.store.database", "Database.add_metrics"),
    "meta": ("ondol.store.database", "Database.set_meta"),
    "evaluation": ("ondol.train.evaluations", "evaluate"),
    "forget": ("ondol.store.database", "Database.forget_after"),
    "restore": ("ondol.train.loop", "load_weights"),
    "model": ("ondol.train.loop", "save_model"),
}


@dataclass
class Ended:
    """How a child ended: exit status, or minus the signal's number; what it printed; calls of each place."""

    status: int
    text: str
    calls: dict[str, int]
    seconds: float


class Forks:
    """The server. Use it in a `with`."""

    def __enter__(self) -> Forks:
        here = Path(__file__).parent
        self._server = subprocess.Popen(
            [sys.executable, str(here / "forks.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(here), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        return self

    def __exit__(self, *error: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(30)

    def start(self, *argv: str, place: str = "", call: int = 0, after_s: float = 0, sign: int = signal.SIGKILL) -> None:
        """`ondol *argv` in a child. It gets `sign` just before the `call`-th call of `place`, and, if `after_s` is
        given, that long after its start; by default neither."""
        assert self._server.stdin is not None
        order = {"argv": argv, "place": place, "call": call, "after_s": after_s, "sign": int(sign)}
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()

    def end(self) -> Ended:
        """Wait for the child."""
        assert self._server.stdout is not None
        return Ended(**json.loads(self._server.stdout.readline()))

    def run(self, *argv: str, **how) -> Ended:
        self.start(*argv, **how)
        return self.end()


def _watch(place: str, number: int, sign: int, log: int) -> None:
    """Count calls of all places, one byte each in `log` (a pipe outlives a kill); die at the chosen one."""
    for index, (name, (module, path)) in enumerate(PLACES.items()):
        owner = importlib.import_module(module)
        *outer, attribute = path.split(".")
        for part in outer:
            owner = getattr(owner, part)

        setattr(owner, attribute, _counted(getattr(owner, attribute), index, log, number if name == place else 0, sign))


def _counted(real: Callable[..., Any], index: int, log: int, last: int, sign: int) -> Callable[..., Any]:
    calls = itertools.count(1)

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == last:
            os.kill(os.getpid(), sign)
        os.write(log, bytes([index]))
        return real(*args, **kwargs)

    return counted


def _child(order: dict, out: int, log: int) -> None:
    os.dup2(out, 1)
    os.dup2(out, 2)
    status = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _watch(order["place"], order["call"], order["sign"], log)
        from ondol.cli import main

        status = main(order["argv"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(status)


def _one(order: dict) -> Ended:
    with tempfile.TemporaryFile() as out:
        calls, log = os.pipe()
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _child(order, out.fileno(), log)
        os.close(log)
        os.set_blocking(calls, False)
        seen, status = b"", None
        while status is None:
            with suppress(BlockingIOError):
                seen += os.read(calls, 1 << 16)
            ended, raw = os.waitpid(pid, os.WNOHANG)
            if ended:
                status = os.waitstatus_to_exitcode(raw)
            elif order["after_s"] and time.monotonic() - started > order["after_s"]:
                os.kill(pid, order["sign"])
                order["after_s"] = 0
            else:
                time.sleep(0.002)
        with suppress(BlockingIOError):
            while more := os.read(calls, 1 << 16):
                seen += more
        os.close(calls)
        out.seek(0)
        text = out.read().decode(errors="replace")
    counts = {name: seen.count(bytes([i])) for i, name in enumerate(PLACES)}
    return Ended(status, text, counts, time.monotonic() - started)


def _serve() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot
    import torch

    torch.set_num_threads(1)
    for module in dict.fromkeys(module for module, _ in PLACES.values()):
        importlib.import_module(module)
    for module in ("ondol.cli.train", "ondol.models.tiny", "ondol.view.plots", "toy"):
        importlib.import_module(module)
    for line in sys.stdin:
        ended = _one(json.loads(line))
        print(json.dumps(vars(ended)), flush=True)


if __name__ == "__main__":
    _serve()
