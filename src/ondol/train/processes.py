"""Rollouts of training by processes beside this one, which share a folder with it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ondol.cluster.ledger import Ledger
from ondol.errors import OndolError
from ondol.models.load import LoadedModel
from ondol.models.save import load_weights, weights
from ondol.recipe import Recipe, load_recipe, to_table
from ondol.train.executor import Executor, Pending, Worker
from ondol.train.plans import Asked

_LOG_CHARS = 2000
_BEGIN_S = 60.0  # for a process to have begun
_SIGN_S = 0.5  # between two signs of life of a worker


class ProcessRollouts(Executor):
    """Workers are processes of this machine. Weights travel as files, the ledger is one; both lie in `folder`, which is made anew and goes again."""

    def __init__(self, recipe: Recipe, loaded: LoadedModel, count: int, *, folder: Path, **settings: Any) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        folder.mkdir(parents=True)
        self.folder = folder
        (self.folder / "recipe.json").write_text(json.dumps(to_table(recipe)))
        self._workers: dict[str, subprocess.Popen[bytes]] = {}
        super().__init__(recipe, loaded, count, **settings)

    @property
    def workers(self) -> Sequence[str]:
        return list(self._workers)

    def _start(self, owner: str) -> None:
        recipe = str(self.folder / "recipe.json")
        command = [sys.executable, "-m", "ondol.train.start_worker", recipe, owner, str(self.threads)]
        sign = self.folder / f"{owner}.sign"
        sign.touch()
        due = time.time() + _BEGIN_S  # its first own sign may be late: Python and torch come first
        os.utime(sign, (due, due))
        with (self.folder / f"{owner}.log").open("wb") as log:
            self._workers[owner] = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": str(self.threads)},
                start_new_session=True,
            )  # a session of its own: Ctrl-C is the parent's to hear

    def _tell(self, owner: str, pending: Pending) -> None:
        command = {"asked": dataclasses.asdict(pending.asked), "version": pending.version}
        command["ledger"] = str(self._path(pending.number))
        stream = self._workers[owner].stdin
        assert stream is not None
        with contextlib.suppress(OSError):  # it is gone; that is seen when its state is asked
            stream.write(json.dumps(command).encode() + b"\n")
            stream.flush()

    def _gone(self) -> list[tuple[str, str]]:
        out = []
        for owner, process in list(self._workers.items()):
            if (code := process.poll()) is None:
                continue
            del self._workers[owner]
            log = (self.folder / f"{owner}.log").read_text(errors="replace").strip()[-_LOG_CHARS:]
            out.append((owner, " ".join([f"signal {-code}" if code < 0 else f"exit {code}", *log.splitlines()[-1:]])))
        return out

    def _signs(self) -> dict[str, float]:
        now, out = time.time(), {}
        for owner in self._workers:
            with contextlib.suppress(OSError):
                out[owner] = now - (self.folder / f"{owner}.sign").stat().st_mtime
        return out

    def _drop(self, owner: str) -> None:
        process = self._workers.pop(owner)
        process.kill()
        process.wait(timeout=30)

    def _path(self, number: int) -> Path:
        return self.folder / f"episodes-{number}.sqlite"

    def _ledger(self, number: int) -> Ledger:
        for old in self.folder.glob("episodes-*"):  # of calls that are over
            if int(old.name.split("-")[1].split(".")[0]) not in {p.number for p in self._open}:
                old.unlink(missing_ok=True)
        return Ledger(self._path(number), "parent", self.recipe.rollout.lease_s)

    def _publish(self, version: int, wanted: set[int]) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        part = self.folder / "weights.part"
        try:
            save_file(weights(self.loaded.model), part)
            part.rename(weights_file(self.folder, version))
        except (OSError, SafetensorError) as e:
            raise OndolError(
                f"the weights for the rollout processes cannot be written in {self.folder}: {e}",
                "free some space, then resume the run",
            ) from e
        keep = {weights_file(self.folder, v) for v in wanted}
        for old in self.folder.glob("weights-*.safetensors"):
            if old not in keep:
                old.unlink()

    def close(self) -> None:
        for process in self._workers.values():
            process.send_signal(signal.SIGKILL)  # it holds nothing that is not in a ledger
        for process in self._workers.values():
            process.wait(timeout=30)
        self._workers = {}
        for pending in self._open:
            pending.ledger.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def weights_file(folder: Path, version: int) -> Path:
    return folder / f"weights-{version}.safetensors"


def _give_signs(path: Path) -> None:
    """A sign of life, as long as the folder is there."""
    with contextlib.suppress(OSError):
        while True:
            os.utime(path)
            time.sleep(_SIGN_S)


def main(recipe_path: str, owner: str, threads: int) -> None:
    """What a worker does: commands come as JSON lines on its standard input."""
    folder = Path(recipe_path).parent
    threading.Thread(target=_give_signs, args=(folder / f"{owner}.sign",), daemon=True).start()
    worker = Worker(load_recipe(json.loads(Path(recipe_path).read_text())), threads)

    def load(model: Any, version: int) -> None:
        load_weights(model, weights_file(folder, version))

    def newest() -> int:
        return max((int(f.stem.split("-")[1]) for f in folder.glob("weights-*.safetensors")), default=0)

    for line in sys.stdin:  # it ends when the parent does
        command = json.loads(line)
        ledger = partial(Ledger, Path(command["ledger"]), owner, worker.recipe.rollout.lease_s)
        worker.play(Asked(**command["asked"]), command["version"], load, ledger, newest)
