"""`ondol train` and `ondol resume`."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from ondol.cli._common import load, print_json, runs_root
from ondol.errors import OndolError
from ondol.evaluate import ladder
from ondol.recipe import Recipe, load_recipe, read_table, to_table
from ondol.records import Trajectory
from ondol.store import Run
from ondol.train.report import Reporter
from ondol.view.console import Progress, before_after_table
from ondol.view.trajectory import render_trajectory

if TYPE_CHECKING:
    from ondol.models.load import LoadedModel

_TITLES = {
    "before": "evaluating before training",
    "warm_start": "warm start: own traces",
    "sft": "warm start: imitating them",
    "warm": "evaluating after the warm start",
    "value": "training the critic alone",
    "rl": "reinforcement learning",
    "after": "evaluating after training",
}
_QUIET = ("eval/error_greedy", "eval/error_sampled")
_SHOWN = (
    "score/mean", "reward/mean", "rollout/tokens_per_s", "learner/tokens_per_s", "policy/entropy", "gradient/norm",
    "loss/sft", "warm_start/accepted_share", "eval/score_no_tool", "eval/score_greedy", "eval/score_sampled",
)  # fmt: skip

# what a run may change when it goes on: where it is computed, not what
PLACES = (
    "rollout.processes",
    "rollout.cluster",
    "rollout.reward_workers",
    "rollout.lease_s",
    "train.learners",
    "train.fsdp",
    "model.device",
)


class ConsoleReporter(Reporter):
    """Shows a run to a person."""

    def __init__(self, console: Console, every: int = 3) -> None:
        self.console, self.every = console, every
        self.progress = Progress(console=console)
        self._name, self._steps, self._part = "", 0, 0.0

    def __enter__(self) -> ConsoleReporter:
        self.progress.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.__exit__(*error)

    def plan(self, stages: list[tuple[str, float]]) -> None:
        self.progress.weights = {_TITLES.get(name, name): work for name, work in stages if work > 0}

    def stage(self, name: str, total: int) -> None:
        self._name, self._steps, self._part = name, 0, 0.0
        self.progress.phase(_TITLES.get(name, name), total)

    def advance(self, part: float, values: dict[str, float]) -> None:
        if part < 1:
            step = min(part, 0.95 - self._part)  # the rest comes when the step is really complete
            self._part += max(step, 0.0)
            self.progress.advance(max(step, 0.0))
            return
        self._steps += 1
        shown = {k: v for k, v in values.items() if k in _SHOWN or k.startswith("stop/")}
        self.progress.advance(1 - self._part, **shown)
        self._part = 0.0

    def trajectory(self, title: str, trajectory: Trajectory) -> None:
        if self._name == "rl" and self._steps % self.every:
            return
        self.progress.show(Text(f"-- {title} --", style="bold"))
        self.progress.show(render_trajectory(trajectory))

    def note(self, text: str) -> None:
        self.progress.note(text)

    def warn(self, text: str) -> None:
        self.progress.note(f"warning: {text}")


def run(args: Namespace) -> int:
    if int(os.environ.get("RANK", "0")) > 0:  # torchrun: the first process leads, the others learn as it tells them
        from ondol.train.parallel import follow

        follow()
        return 0
    console = Console(stderr=args.json)
    return _resume(args, console) if args.command == "resume" else _start(args, console)


def _start(args: Namespace, console: Console) -> int:
    """A new run. Its folder is made last: a mistake in the recipe, the dump or the model leaves none behind."""
    if args.rollout_only and args.from_dump:
        raise OndolError("--rollout-only samples and --from-dump does not", "give one of them")
    recipe = load_recipe(*_on_cluster(args, read_table(args.recipe)))
    recipe.task.check(4)
    recipe.env.facts()  # what it requires of this machine
    dump = _dump(args)
    if dump is not None:
        from ondol.train.dump import read_trajectories

        read_trajectories(dump)
    loaded = load(recipe, recipe.model.path, lambda line: console.print(Text(line, style="dim")))
    from ondol.train.warm_start import check_prompts

    check_prompts(recipe, loaded)
    options = {"rollout_only": args.rollout_only, "dump": dump}
    with Run.create(runs_root(args), recipe.name, to_table(recipe)) as opened:
        opened.db.set_meta("options", options)
        return _train(args, opened, recipe, loaded, options, console)


def _on_cluster(args: Namespace, table: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A recipe's table and settings, with --set and --cluster."""
    settings = list(args.set)
    if args.cluster is None:
        return table, settings
    here = table.get("rollout", {})
    if args.cluster == "none":
        return {**table, "rollout": {k: v for k, v in here.items() if k != "cluster"}}, settings
    settings.append(f"rollout.cluster={args.cluster}")
    if not any(s.startswith("rollout.processes=") for s in settings):
        settings.append(f"rollout.processes={here.get('processes', 0) or 2}")
    return table, settings


def _resume(args: Namespace, console: Console) -> int:
    for text in args.set:
        if (key := text.partition("=")[0].strip()) not in PLACES:
            raise OndolError(
                f"a run that goes on keeps its recipe: --set {key} would make another of it",
                f"what may change is where it runs: {', '.join(PLACES)}; for anything else begin a new run",
            )
    with Run.open(Run.find(runs_root(args), args.run), write=True) as opened:
        if opened.state == "finished":
            raise OndolError(f"{opened.name} is finished", f"see it with: ondol show {opened.name}")
        recipe, options = load_recipe(*_on_cluster(args, opened.recipe)), opened.db.meta("options", {})
        if args.set or args.cluster:
            opened.db.event("moved", cluster=args.cluster, settings=args.set)
        loaded = load(recipe, recipe.model.path, lambda line: console.print(Text(line, style="dim")))
        return _train(args, opened, recipe, loaded, options, console)


def _dump(args: Namespace) -> str | None:
    """What --from-dump names, a file or a run, as an absolute path."""
    if args.from_dump is None:
        return None
    path = Path(args.from_dump)
    if path.suffix in (".jsonl", ".json") and not path.exists():
        raise OndolError(
            f"--from-dump: there is no file {path}", "export one with: ondol export RUN trajectories -o FILE"
        )
    return str((path if path.exists() else Run.find(runs_root(args), args.from_dump)).absolute())


def _train(
    args: Namespace, opened: Run, recipe: Recipe, loaded: LoadedModel, options: dict[str, Any], console: Console
) -> int:
    from ondol.train.loop import Trainer

    console.print(Text(f"run folder: {opened.path}"))
    try:
        with ConsoleReporter(console) as reporter:
            trainer = Trainer(
                recipe,
                opened,
                loaded,
                reporter=reporter,
                rollout_only=options.get("rollout_only", False),
                dump=options.get("dump"),
            )
            state = trainer.train()
    except KeyboardInterrupt:
        console.print(Text(f"stopped at once. Go on from the last checkpoint with: {_command()} resume {opened.name}"))
        return 130
    except BaseException:
        if opened.db.meta("state") == "created":
            opened.state = "failed"
        raise
    if state == "stopped":
        console.print(Text(f"stopped and saved. Go on with: {_command()} resume {opened.name}"))
        return 130
    summary = finish(opened, console)
    if args.json:
        print_json(summary)
    return 0


def finish(run: Run, console: Console) -> dict[str, Any]:
    """What a person sees at the end; the same as data."""
    from ondol.view.plots import plot_run

    rows = ladder(run)
    plot = plot_run(run, run.path / "curves.png")
    pair = before_and_after(run)
    if rows:
        console.print()
        console.print(before_after_table(rows))
        n = len(run.db.trajectory_rows(phase="before/greedy")) or len(run.db.trajectory_rows(phase="after/greedy"))
        console.print(Text(f"scores on {n} held-out problems; one greedy and the sampled answers to each", style="dim"))
    for title, trajectory in pair:
        console.print()
        console.print(Text(f"the same question, {title}:", style="bold"))
        console.print(render_trajectory(trajectory))
    console.print()
    console.print(Text(f"run folder  {run.path}"))
    console.print(Text(f"curves      {plot}"))
    console.print(Text(f"model       {run.path / 'model'}"))
    name = run.name
    console.print(Text("try next"))
    for line in (f'chat {name} --ask "What is 58 * 83 + 77?"', f"show {name} --trajectories 3", "runs"):
        console.print(Text(f"  {_command()} {line}"))
    return {
        "run": str(run.path),
        "state": run.state,
        "ladder": rows,
        "curves": str(plot),
        "metrics": run.db.last_metrics(),
    }


def before_and_after(run: Run) -> list[tuple[str, Trajectory]]:
    """The first held-out problem that training turned from wrong to right (else the first), as answered then and now."""
    before = {t.problem.id: t for t in run.db.trajectories(phase="before/greedy")}
    after = list(run.db.trajectories(phase="after/greedy"))
    for t in [t for t in after if t.score > before.get(t.problem.id, t).score] or after[:1]:
        if t.problem.id in before:
            return [("before", before[t.problem.id]), ("after", t)]
    return []


def _command() -> str:
    """How the user called us, so that what is printed can be pasted."""
    first = sys.argv[0]
    return (
        os.path.relpath(first)
        if first.endswith("/ondol") and os.path.dirname(first) not in os.environ.get("PATH", "").split(":")
        else "ondol"
    )
