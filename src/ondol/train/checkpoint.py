"""What a run needs to go on: weights, optimiser and position, on disk; and what to forget when it goes back to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ondol.errors import OndolError
from ondol.models.load import LoadedModel
from ondol.models.save import weights
from ondol.records import Trajectory
from ondol.store import Run, latest_checkpoint, save_checkpoint
from ondol.train.learner import Learner


@dataclass(frozen=True)
class Position:
    """The weights are those after `step` steps of `stage`; `version` counts all updates so far; `memory` is the method's."""

    stage: str
    step: int
    version: int
    memory: dict[str, Any] = field(default_factory=dict)


def save(
    run: Run, position: Position, loaded: LoadedModel, learner: Learner, keep: int, ahead: Sequence[Trajectory] = ()
) -> None:
    """Write a checkpoint; the newest `keep` stay. `ahead`: rollouts of later steps, which older weights have sampled.

    Raises OndolError (disk full, say) with the older ones untouched.
    """

    state = learner.state()

    def write(folder: Path) -> None:
        save_tensors(weights(loaded.model), folder / "model.safetensors")
        for part, tensors in state.items():
            save_tensors(tensors, folder / f"{part}.safetensors")
        if ahead:
            (folder / "ahead.jsonl").write_text("".join(json.dumps(t.to_dict()) + "\n" for t in ahead))
        (folder / "state.json").write_text(json.dumps(asdict(position)))

    save_checkpoint(run.checkpoints, f"{position.stage}-{position.step:06d}", write, keep=keep)


def latest(run: Run, warn: Callable[[str], None]) -> tuple[Path, Position] | tuple[None, None]:
    """The newest whole checkpoint; `warn` hears of damaged ones."""
    path = latest_checkpoint(run.checkpoints, lambda p, why: warn(f"checkpoint {p.name} is damaged ({why}): skipped"))
    return (path, Position(**json.loads((path / "state.json").read_text()))) if path is not None else (None, None)


def ahead_of(path: Path) -> list[Trajectory]:
    """Rollouts of later steps that the checkpoint holds."""
    file = path / "ahead.jsonl"
    return [Trajectory.from_dict(json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


def load_learner(path: Path, learner: Learner) -> None:
    """Optimiser, and critic, as `save` left them. Raises OndolError where the checkpoint has no critic for a learner with
    one."""
    from safetensors.torch import load_file

    if learner.critic is not None and not (path / "critic.safetensors").exists():
        raise OndolError(f"checkpoint {path.name} holds no critic", "resume with the method that the run began with")
    for part in ("optimizer", *(("critic", "critic-optimizer") if learner.critic is not None else ())):
        learner.load_state(part, load_file(path / f"{part}.safetensors"))


def forget(run: Run, stages: Sequence[tuple[str, int, bool]], done: tuple[int, int]) -> None:
    """Drop what will be done again. Stages that change nothing and follow the checkpoint directly stay.

    Args:
        stages: (name, steps, whether it trains) in order.
        done: (index of the stage, steps of it) that the weights reflect; index -1 before any training.
    """
    index, step = done
    db, first = run.db, 0
    if index >= 0:
        for phase in (stages[index][0], "rl/greedy", "rl/sampled"):
            db.forget_after(phase, step)
        first = index + 1
    again = False  # what follows a stage that changes the weights is done again
    for name, steps, trains in stages[first:]:
        again = again or trains
        kept = 0 if again else db.meta(f"done:{name}", 0)
        db.set_meta(f"done:{name}", kept)
        for phase in (name, f"{name}/no_tool", f"{name}/greedy", f"{name}/sampled"):
            db.forget_after(phase, kept or -1)
        again = again or kept < steps


def save_tensors(tensors: dict[str, Any], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, str(path))
