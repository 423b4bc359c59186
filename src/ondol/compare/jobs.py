"""One run of a comparison: a warm start of one seed, or an arm of one seed. Cached by what it is, resumable.

A job's folder is named by a hash of its resolved recipe, so a finished job is found again whatever comparison asks for
it. The warm start knows nothing of the method: it is one job of its own, and all arms of its seed start from its model.
What an arm then does is what the whole run would have done, to the last bit: random streams are named by seed, phase,
step, problem and sample, every training stage begins with a fresh optimiser, and saved weights keep every bit. Only the
recorded version numbers of the weights differ, and "before" is what a whole run calls "warm".
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ondol
from ondol.errors import OndolError
from ondol.methods.base import Method
from ondol.recipe import Recipe, load_recipe, to_table
from ondol.store import Run
from ondol.train.report import Reporter

#: hears (share of the job that is done, newest metrics)
Tell = Callable[[float, dict[str, float]], None]


@dataclass(frozen=True)
class Job:
    """A run to be made, or made already. `labels` are the arms it stands for; a warm start has none.

    Attributes:
        table: the resolved recipe, whole (an arm's still says how its start was made).
        folder: holds its run, and no other.
        start: the job whose model this one starts from.
    """

    key: str
    seed: int
    table: dict[str, Any] = field(compare=False)
    folder: Path
    start: Job | None = None

    @property
    def run(self) -> Path | None:
        """Its newest run, finished or not."""
        runs = Run.list(self.folder) if self.folder.is_dir() else []
        runs = [r for r in runs if r.state != "damaged"]
        return runs[-1].path if runs else None

    @property
    def finished(self) -> Path | None:
        """Its finished run."""
        path = self.run
        if path is None or not (path / "model").is_dir():
            return None
        with Run.open(path) as run:
            return path if run.state == "finished" else None

    @property
    def work(self) -> float:
        """A guess of its cost, for the ETA: trajectories trained on, and sampled."""
        w, t, e = self.table.get("warm_start"), self.table["train"], self.table["evaluate"]
        sft = 0.0
        if w is not None and self.start is None:
            sft = w["epochs"] * w["problems"] * w["samples_per_problem"] / 3
        checks = e["problems"] * (1 + e["samples"]) * 2
        return 1 + sft + (t["steps"] * t["prompts_per_step"] * t["samples_per_prompt"] + checks if t["steps"] else 0)


def plan(recipe: Recipe, seed: int, folder: Path) -> list[Job]:
    """The jobs of one arm and seed: [its warm start,] itself."""
    whole = to_table(recipe)
    name = re.sub(r"[^\w.+-]+", "-", str(whole["method"]["name"]))
    key = digest(whole, recipe)
    start = None
    # Adapters are merged in a saved model: an arm could not go on with those of the warm start, so it makes its own.
    if recipe.warm_start is not None and recipe.model.lora is None and recipe.train.steps:
        warm = _warm_table(whole)
        k = digest(warm, recipe, method=False)
        start = Job(k, seed, warm, folder / "runs" / f"warm-start-seed{seed}-{k[:12]}")
    job = Job(key, seed, whole, folder / "runs" / f"{name}-seed{seed}-{key[:12]}", start)
    return [job] if start is None else [start, job]


def _warm_table(whole: dict[str, Any]) -> dict[str, Any]:
    """The part before RL, without what only RL looks at, so that arms that differ in that share it."""
    kept = ("tokens_per_microbatch", "share_prompts", "gradient_checkpointing", "checkpoint_every_steps")
    out = {k: v for k, v in whole.items() if k not in ("method", "evaluate")}
    out["optimizer"] = {k: v for k, v in whole["optimizer"].items() if k != "learning_rate"}
    out["train"] = {"steps": 0} | {k: v for k, v in whole["train"].items() if k in kept}
    out["evaluate"] = {"problems": 0}
    return to_table(load_recipe(out))


def digest(table: dict[str, Any], recipe: Recipe, method: bool = True) -> str:
    """What a run is: its resolved recipe but for its name, the package's version, and the source of parts from elsewhere."""
    parts = [recipe.task, recipe.env, *([recipe.method] if method else [])]
    sources = {}
    for part in parts:
        for cls in type(part).__mro__:
            module = sys.modules.get(cls.__module__)
            if cls.__module__.split(".")[0] not in ("ondol", "pydantic", "builtins", "typing", "abc") and module:
                try:
                    sources[cls.__module__] = inspect.getsource(module)
                except (OSError, TypeError):
                    sources[cls.__module__] = cls.__qualname__
    plain = {k: v for k, v in table.items() if k != "name"}
    text = json.dumps([plain, ondol.__version__, sources], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def execute(job: Job, tell: Tell = lambda part, values: None) -> Path:
    """Do what is left of a job; its finished run. Raises KeyboardInterrupt when stopped by a signal (and saved)."""
    from ondol.train.loop import Trainer
    from ondol.train.plans import load

    if done := job.finished:
        return done
    table = dict(job.table)
    if job.start is not None:
        model = job.start.finished
        if model is None:
            raise OndolError(f"the warm start of seed {job.seed} is not finished", f"see {job.start.folder}")
        table["model"] = table["model"] | {"path": str(model.absolute() / "model")}
        table.pop("warm_start")
    recipe = load_recipe(table)
    loaded = load(recipe)
    path = job.run
    opened = Run.open(path, write=True) if path else Run.create(job.folder, recipe.name, to_table(recipe))
    with opened:
        began = time.monotonic()
        try:
            state = Trainer(recipe, opened, loaded, reporter=Share(tell)).train()
        finally:
            opened.db.set_meta("seconds", opened.db.meta("seconds", 0.0) + time.monotonic() - began)
    if state == "stopped":
        raise KeyboardInterrupt(f"{opened.name} was stopped")
    return opened.path


class Share(Reporter):
    """Turns what a run reports into the share of it that is done."""

    def __init__(self, tell: Tell) -> None:
        self.tell = tell
        self.works: list[tuple[str, float]] = []
        self.name, self.total, self.done, self.within = "", 0, 0.0, 0.0

    def plan(self, stages: list[tuple[str, float]]) -> None:
        self.works = stages

    def stage(self, name: str, total: int) -> None:
        self.name, self.total, self.done, self.within = name, total, 0.0, 0.0

    def advance(self, part: float, values: dict[str, float]) -> None:
        if part < 1:  # part of a step, the rest of which comes when it is complete
            self.within = min(self.within + part, 0.95)
        else:
            self.done, self.within = self.done + 1, 0.0
        self.tell(self.share(), values)

    def share(self) -> float:
        names = [name for name, _ in self.works]
        all_work = sum(w for _, w in self.works)
        if self.name not in names or not all_work:
            return 0.0
        at = names.index(self.name)
        here = min((self.done + self.within) / max(self.total, 1), 1.0)
        return (sum(w for _, w in self.works[:at]) + self.works[at][1] * here) / all_work


def to_json(job: Job) -> dict[str, Any]:
    """What a worker process must know."""
    start = to_json(job.start) if job.start else None
    return {"key": job.key, "seed": job.seed, "table": job.table, "folder": str(job.folder), "start": start}


def from_json(data: dict[str, Any]) -> Job:
    start = from_json(data["start"]) if data["start"] else None
    return Job(data["key"], data["seed"], data["table"], Path(data["folder"]), start)


def worker() -> None:
    """A process that does one job: reads it from stdin, writes a JSON line a message to stdout. One thread."""
    import torch

    data = json.loads(sys.stdin.read())
    sys.path[:] = data["sys_path"]
    torch.set_num_threads(1)
    out, last = os.fdopen(os.dup(1), "w", buffering=1), [0.0]
    os.dup2(2, 1)  # whatever prints goes to the log, not between the messages

    def say(**message: Any) -> None:
        try:
            out.write(json.dumps(message) + "\n")
        except BrokenPipeError:  # nobody is left to work for: save and end
            os.kill(os.getpid(), signal.SIGINT)

    def tell(part: float, values: dict[str, float]) -> None:
        if time.monotonic() - last[0] > 0.5:
            last[0] = time.monotonic()
            say(part=part, values={k: v for k, v in values.items() if k == "score/mean"})

    try:
        execute(from_json(data["job"]), tell)
    except KeyboardInterrupt:
        say(state="stopped")
    except OndolError as e:
        say(error=e.what, remedy=e.remedy)
    except Exception as e:
        import traceback

        traceback.print_exc()
        say(error=f"{type(e).__name__}: {e}", remedy=f"the whole story is in {data['job']['folder']}/worker.log")
    else:
        say(state="finished")


def method_settings(table: dict[str, Any]) -> dict[str, Any]:
    """The method of a resolved recipe, without what is the same in all arms by construction."""
    return {k: v for k, v in table["method"].items() if k == "name" or k not in Method.model_fields}
