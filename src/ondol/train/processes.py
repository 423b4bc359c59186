"""Rollouts of training by processes beside this one: the executor's other form, with the same trajectories.

Each worker has the model and an engine of its own. For every call it loads the weights of that version from a file, takes episodes from a ledger and plays them
(`ondol.cluster.workers`). A worker that dies is replaced, and its episodes go on from their last turn.

    python -m ondol.train.processes      # what a worker runs: commands come as JSON lines on its standard input
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ondol.cluster.ledger import Ledger
from ondol.cluster.workers import who_waits, work_on
from ondol.errors import OndolError
from ondol.models.load import LoadedModel, load_model
from ondol.models.save import load_weights, weights
from ondol.recipe import Recipe, load_recipe, to_table
from ondol.records import Group
from ondol.train.plans import Asked, make_engine, plan_of

_LOOK_S = 0.02
_TELL_S = 60.0  # without progress, until it is said who waits for whom
_LEASE_S = 60.0  # a step of a large model on a busy machine may take a while
_LOG_CHARS = 2000


class ProcessRollouts:
    """Plays a recipe's rollouts with several processes. Close it.

    Args:
        loaded: the model that is trained here; its weights are written for the workers whenever their version is new.
        count: worker processes;  replacements: how many of them may be lost.
        threads: torch threads of each.
        say: told of lost workers and of who waits for whom.
    """

    def __init__(
        self,
        recipe: Recipe,
        loaded: LoadedModel,
        count: int,
        *,
        threads: int = 1,
        replacements: int = 8,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.recipe, self.loaded, self.threads, self.replacements, self.say = recipe, loaded, threads, replacements, say
        self._folder = tempfile.TemporaryDirectory(prefix="ondol-rollouts-")
        self.folder = Path(self._folder.name)
        (self.folder / "recipe.json").write_text(json.dumps(to_table(recipe)))
        self.lost = self._made = self._calls = 0
        self._version: int | None = None
        self._workers: dict[str, subprocess.Popen[bytes]] = {}
        for _ in range(count):
            self._start()

    def rollout(
        self,
        asked: Asked,
        version: int,
        *,
        progress: Callable[[], None] = lambda: None,
        stop: Callable[[], None] = lambda: None,
    ) -> list[Group]:
        """As `ondol.rollout.driver.rollout` of `plan_of(recipe, asked)` with the weights of `version`.

        `progress` is called once for each trajectory that is done; raise in `stop` to give up.
        """
        plan = plan_of(self.recipe, asked)
        self._write_weights(version)
        self._calls += 1
        path = self.folder / f"episodes-{self._calls}.sqlite"
        keys = [(plan.first + p, s) for p in range(len(plan.problems)) for s in range(plan.samples)]
        ledger = Ledger(path, "parent", _LEASE_S)
        try:
            ledger.add(keys)
            for owner in self._workers:
                self._tell(owner, asked, version, path)
            told, moved = 0, time.monotonic()
            while (counts := ledger.counts())["done"] < len(keys):
                stop()
                for _ in range(counts["done"] - told):
                    progress()
                if counts["done"] > told:
                    told, moved = counts["done"], time.monotonic()
                if time.monotonic() - moved > _TELL_S:
                    self.say(who_waits(counts, ledger, list(self._workers)))
                    moved = time.monotonic()
                self._replace_lost(ledger, asked, version, path)
                time.sleep(_LOOK_S)
            for _ in range(len(keys) - told):
                progress()
            done = ledger.results()
        finally:
            ledger.close()
        for gone in self.folder.glob(f"episodes-{self._calls}.sqlite*"):
            gone.unlink(missing_ok=True)
        size = plan.samples
        ordered = [done[key] for key in keys]
        return [Group(p, ordered[i * size : (i + 1) * size]) for i, p in enumerate(plan.problems)]

    def close(self) -> None:
        for process in self._workers.values():
            process.send_signal(signal.SIGKILL)  # it holds nothing that is not in a ledger
        for process in self._workers.values():
            process.wait(timeout=30)
        self._workers = {}
        self._folder.cleanup()

    def _start(self) -> str:
        owner = f"w{self._made}"
        self._made += 1
        m = self.recipe.model
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        command = [
            sys.executable,
            "-m",
            "ondol.train.processes",
            str(self.folder / "recipe.json"),
            owner,
            str(self.threads),
        ]
        with (self.folder / f"{owner}.log").open("wb") as log:
            self._workers[owner] = subprocess.Popen(
                [*command, m.path],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )  # a session of its own: Ctrl-C is the parent's to hear
        return owner

    def _tell(self, owner: str, asked: Asked, version: int, ledger: Path) -> None:
        command = {"asked": dataclasses.asdict(asked), "version": version, "ledger": str(ledger)}
        command["weights"] = str(self._weights(version))
        stream = self._workers[owner].stdin
        assert stream is not None
        try:
            stream.write(json.dumps(command).encode() + b"\n")
            stream.flush()
        except OSError:
            pass  # it is gone; that is seen when its state is asked

    def _replace_lost(self, ledger: Ledger, asked: Asked, version: int, path: Path) -> None:
        for owner, process in list(self._workers.items()):
            if (code := process.poll()) is None:
                continue
            del self._workers[owner]
            self.lost += 1
            log = (self.folder / f"{owner}.log").read_text(errors="replace").strip()[-_LOG_CHARS:]
            why = " ".join([f"signal {-code}" if code < 0 else f"exit {code}", *log.splitlines()[-1:]])
            freed = ledger.release(owner)
            self.say(f"rollout worker {owner} ended ({why}); {freed} episodes go on elsewhere")
            if self.lost > self.replacements:
                raise OndolError(
                    f"{self.lost} rollout workers were lost; the last: {why}", "set rollout.processes to 0 to see more"
                )
            self._tell(self._start(), asked, version, path)

    def _weights(self, version: int) -> Path:
        return self.folder / f"weights-{version}.safetensors"

    def _write_weights(self, version: int) -> None:
        from safetensors.torch import save_file

        if self._version == version:
            return
        part = self.folder / "weights.part"
        save_file(weights(self.loaded.model), part)
        part.rename(self._weights(version))
        if self._version is not None:
            self._weights(self._version).unlink(missing_ok=True)
        self._version = version


def main(recipe_path: str, owner: str, threads: int, model_path: str) -> None:
    import torch

    torch.set_num_threads(threads)
    recipe = load_recipe(json.loads(Path(recipe_path).read_text()))
    m = recipe.model
    loaded = load_model(model_path, dtype=m.dtype, device=m.device, chat=m.chat, lora=m.lora, fused=m.fused)
    engine: Any = make_engine(recipe, loaded)
    have: int | None = None
    for line in sys.stdin:  # it ends when the parent does
        command = json.loads(line)
        version, path = command["version"], Path(command["ledger"])
        if version != have:
            load_weights(loaded.model, Path(command["weights"]))
            have = version
        engine.sync(version)  # with an empty cache, as the parent's engine begins a step
        plan = plan_of(recipe, Asked(**command["asked"]))
        at_once = max(1, min(recipe.rollout.max_batch, len(plan.problems) * plan.samples))
        work_on(engine, loaded.renderer, plan, path, owner, at_once, _LEASE_S)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
