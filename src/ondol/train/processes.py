"""Rollouts of training by processes beside this one: the executor's other form, with the same trajectories.

Each worker has the model and an engine of its own. For every call it loads the weights of that version from a file, takes episodes from a ledger and plays them
(`ondol.cluster.workers`). A worker that dies is replaced, and its episodes go on from their last turn.

    python -m ondol.train.processes      # what a worker runs: commands come as JSON lines on its standard input
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ondol.cluster.ledger import Ledger
from ondol.cluster.workers import who_waits, work_on
from ondol.errors import OndolError
from ondol.models.load import LoadedModel, load_model
from ondol.models.save import load_weights, weights
from ondol.recipe import Recipe, load_recipe, to_table
from ondol.records import Group, Trajectory
from ondol.rollout.driver import Plan
from ondol.train.dump import groups_of
from ondol.train.plans import Asked, make_engine, plan_of

_LOOK_S = 0.02
_TELL_S = 60.0  # without progress, until it is said who waits for whom
_LEASE_S = 60.0  # a step of a large model on a busy machine may take a while
_LOG_CHARS = 2000


@dataclasses.dataclass
class Pending:
    """Rollouts that were asked for and may be under way."""

    asked: Asked
    version: int
    plan: Plan
    path: Path
    ledger: Ledger


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
        self._open: list[Pending] = []
        self._workers: dict[str, subprocess.Popen[bytes]] = {}
        for _ in range(count):
            self._start()

    def begin(self, asked: Asked, version: int) -> Pending:
        """Have the workers begin, with the weights as they are now, which are `version`. What was begun before comes first."""
        self._write_weights(version)
        self._calls += 1
        path = self.folder / f"episodes-{self._calls}.sqlite"
        pending = Pending(asked, version, plan_of(self.recipe, asked), path, Ledger(path, "parent", _LEASE_S))
        pending.ledger.add(pending.plan.keys)
        self._open.append(pending)
        for owner in self._workers:
            self._tell(owner, pending)
        return pending

    def finish(
        self, pending: Pending, *, progress: Callable[[], None] = lambda: None, stop: Callable[[], None] = lambda: None
    ) -> list[Group]:
        """Wait until they are done. `progress` is called once for each trajectory; raise in `stop` to give up waiting."""
        keys, ledger, told, moved = pending.plan.keys, pending.ledger, 0, time.monotonic()
        while (counts := ledger.counts())["done"] < len(keys):
            stop()
            for _ in range(counts["done"] - told):
                progress()
            if counts["done"] > told:
                told, moved = counts["done"], time.monotonic()
            if time.monotonic() - moved > _TELL_S:
                self.say(who_waits(counts, ledger, list(self._workers)))
                moved = time.monotonic()
            self._replace_lost()
            time.sleep(_LOOK_S)
        for _ in range(len(keys) - told):
            progress()
        done = ledger.results()
        self._forget(pending)
        return pending.plan.grouped([done[key] for key in keys])

    def rollout(
        self,
        asked: Asked,
        version: int,
        *,
        progress: Callable[[], None] = lambda: None,
        stop: Callable[[], None] = lambda: None,
    ) -> list[Group]:
        """As `ondol.rollout.driver.rollout` of `plan_of(recipe, asked)` with the weights of `version`."""
        return self.finish(self.begin(asked, version), progress=progress, stop=stop)

    def close(self) -> None:
        for process in self._workers.values():
            process.send_signal(signal.SIGKILL)  # it holds nothing that is not in a ledger
        for process in self._workers.values():
            process.wait(timeout=30)
        self._workers = {}
        for pending in self._open:
            pending.ledger.close()
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

    def _tell(self, owner: str, pending: Pending) -> None:
        command = {"asked": dataclasses.asdict(pending.asked), "version": pending.version, "ledger": str(pending.path)}
        command["weights"] = str(self._weights(pending.version))
        stream = self._workers[owner].stdin
        assert stream is not None
        with contextlib.suppress(OSError):  # it is gone; that is seen when its state is asked
            stream.write(json.dumps(command).encode() + b"\n")
            stream.flush()

    def _forget(self, pending: Pending) -> None:
        self._open.remove(pending)
        pending.ledger.close()
        for gone in self.folder.glob(f"{pending.path.name}*"):
            gone.unlink(missing_ok=True)

    def _replace_lost(self) -> None:
        for owner, process in list(self._workers.items()):
            if (code := process.poll()) is None:
                continue
            del self._workers[owner]
            self.lost += 1
            log = (self.folder / f"{owner}.log").read_text(errors="replace").strip()[-_LOG_CHARS:]
            why = " ".join([f"signal {-code}" if code < 0 else f"exit {code}", *log.splitlines()[-1:]])
            freed = sum(pending.ledger.release(owner) for pending in self._open)
            self.say(f"rollout worker {owner} ended ({why}); {freed} episodes go on elsewhere")
            if self.lost > self.replacements:
                raise OndolError(
                    f"{self.lost} rollout workers were lost; the last: {why}", "set rollout.processes to 0 to see more"
                )
            fresh = self._start()
            for pending in self._open:
                self._tell(fresh, pending)

    def _weights(self, version: int) -> Path:
        return self.folder / f"weights-{version}.safetensors"

    def _write_weights(self, version: int) -> None:
        from safetensors.torch import save_file

        if self._version == version:
            return
        part = self.folder / "weights.part"
        save_file(weights(self.loaded.model), part)
        part.rename(self._weights(version))
        self._version = version
        wanted = {self._weights(v) for v in (version, *(p.version for p in self._open))}
        for old in self.folder.glob("weights-*.safetensors"):
            if old not in wanted:
                old.unlink()


class Ahead:
    """Rollouts of steps to come: begun, or done, and kept until their step has learned from them."""

    def __init__(self) -> None:
        self._found: dict[int, Pending | list[Group]] = {}
        self._by: ProcessRollouts | None = None

    @property
    def steps(self) -> list[int]:
        return sorted(self._found)

    def begin(self, by: ProcessRollouts, asked: Asked, version: int) -> None:
        """Begin a step's rollouts, unless they are under way or here already."""
        if asked.step not in self._found:
            self._by = by
            self._found[asked.step] = by.begin(asked, version)

    def finish(self, step: int, progress: Callable[[], None], stop: Callable[[], None]) -> list[Group]:
        """A step's rollouts, waiting for them if need be; see `ProcessRollouts.finish`."""
        found = self._found[step]
        if isinstance(found, Pending):
            assert self._by is not None
            found = self._found[step] = self._by.finish(found, progress=progress, stop=stop)
        return found

    def drop(self, step: int) -> None:
        self._found.pop(step, None)

    def restore(self, trajectories: Sequence[Trajectory]) -> None:
        """Those that a checkpoint holds."""
        for step in sorted({t.key[0] for t in trajectories}):
            self._found[step] = groups_of(t for t in trajectories if t.key[0] == step)


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
