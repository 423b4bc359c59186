"""`ondol evaluate`: how good is a model at its task, on held-out problems?"""

from __future__ import annotations

from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ondol.cli._common import find_model, load, print_json
from ondol.engines.base import Engine, Sampling
from ondol.envs.base import Env
from ondol.errors import OndolError
from ondol.evaluate import Evaluation, evaluate, held_out, many_samples, summarise, ways
from ondol.recipe import Recipe
from ondol.records import Group, StopReason, Trajectory
from ondol.view.console import Progress, number, table


def run(args: Namespace) -> int:
    for option in ("problems", "samples"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise OndolError(f"--{option} {value}: at least 1 is needed", f"for example --{option} 100")
    if args.by is not None:
        from ondol.cli import capability

        return capability.run(args)
    recipe, path, folder = find_model(args, trained=args.endpoint is None)
    wanted = args.problems or recipe.evaluate.problems
    problems = held_out(recipe.task, wanted)
    if not problems:
        what = "the recipe's evaluate.problems is 0" if not wanted else "the task has no held-out problems"
        raise OndolError(what, "say how many with --problems" if not wanted else "check the task's settings or file")
    console = Console(stderr=args.json, highlight=False)
    if len(problems) < wanted:
        console.print(Text(f"the task has {len(problems)} held-out problems, not {wanted}", "yellow"))
    samples = args.samples or recipe.evaluate.samples
    modes = list(ways(recipe.env, recipe.sampling, samples, recipe.evaluate.without_tools))
    results: dict[str, Evaluation] = {}
    with ExitStack() as stack:
        engine, renderer, name = open_model(args, recipe, path, folder, console, stack)
        if recipe.rollout.reward_workers:
            from ondol.train.plans import reward_workers

            if workers := reward_workers(recipe, lambda text: console.print(Text(text, "yellow"))):
                stack.enter_context(workers)
        console.print(Text(f"evaluating {name}", "bold"))
        complete = _measure(recipe, engine, renderer, problems, modes, results, console)
    failed = [t for r in results.values() for t in r.trajectories if t.stop_reason is StopReason.ERROR]
    if failed and len(failed) == sum(len(r.trajectories) for r in results.values()):
        remedy = "check the URL and the model's name" if args.endpoint else None
        raise OndolError(f"every episode failed; the first: {failed[0].info.get('error', 'unknown')}", remedy)
    if args.json:
        print_json(
            {"model": name, "complete": complete, "results": {w: _plain(r, recipe.task) for w, r in results.items()}}
        )
        return 0 if complete else 130
    if results:
        console.print()
        columns = ["way", "score", "standard error", "problems", "samples", "stop reasons"]
        console.print(table([_row(way, r) for way, r in results.items()], columns))
    if failed:
        error = failed[0].info.get("error", "unknown")
        console.print(Text(f"{len(failed)} episodes failed and count as 0; the first: {error}", "yellow"))
    if not complete:
        console.print(Text("stopped: the last line is of the episodes that had ended, which are the shorter ones"))
    return 0 if complete else 130


def open_model(
    args: Namespace, recipe: Recipe, path: str, folder: Path | None, console: Console, stack: ExitStack
) -> tuple[Any, Any, str]:
    """The engine, its renderer, and what people call the model."""
    if args.endpoint is not None:
        engine, renderer = _endpoint(args, recipe, stack)
        return engine, renderer, f"{engine.model} at {args.endpoint}"
    engine, renderer = _embedded(recipe, path, console)
    return engine, renderer, f"{folder.name}, trained" if folder else f"{path}, before any training"


def _endpoint(args: Namespace, recipe: Recipe, stack: ExitStack) -> tuple[Any, Any]:
    from ondol.engines.endpoint import EndpointEngine, TextRenderer

    engine = EndpointEngine(
        args.endpoint, args.endpoint_model, max_batch=recipe.rollout.max_batch, images=args.endpoint_images
    )
    stack.enter_context(engine)
    engine.check()
    return engine, TextRenderer()


def _embedded(recipe: Recipe, path: str, console: Console) -> tuple[Any, Any]:
    loaded = load(recipe, path, lambda line: console.print(Text(line, "dim")))
    from ondol.train.plans import make_engine

    return make_engine(recipe, loaded), loaded.renderer


def _measure(
    recipe: Recipe,
    engine: Engine,
    renderer: Any,
    problems: list[Any],
    modes: list[tuple[str, Env, Sampling, int]],
    results: dict[str, Evaluation],
    console: Console,
) -> bool:
    """Fill `results`, one way after the other. False when stopped by Ctrl-C: the last one is then partial."""
    from ondol.train.interrupt import Interrupt, Interrupted
    from ondol.train.prompts import PHASES

    weights = {name: float(len(problems) * count) for name, _, _, count in modes}
    with Interrupt() as interrupt, Progress(weights=weights, console=console) as progress:
        for name, env, sampling, count in modes:
            progress.phase(name, len(problems) * count)
            ended: list[Trajectory] = []

            def one_more(t: Trajectory, ended: list[Trajectory] = ended) -> None:
                ended.append(t)
                progress.advance(1, **{"score/mean": sum(t.score for t in ended) / len(ended)})

            try:
                results[name] = evaluate(
                    engine,
                    renderer,
                    recipe.task,
                    env,
                    problems,
                    sampling,
                    seed=(recipe.seed, PHASES["evaluate"]),
                    samples=count,
                    timeout_s=recipe.rollout.timeout_s,
                    max_response_tokens=recipe.rollout.max_response_tokens,
                    progress=one_more,
                    stop=interrupt.check,
                )
            except Interrupted:
                if ended:
                    results[name] = summarise(_groups(ended), count)
                return False
    return True


def _groups(trajectories: list[Trajectory]) -> list[Group]:
    by_problem: dict[int, list[Trajectory]] = {}
    for t in trajectories:
        by_problem.setdefault(t.key[1], []).append(t)
    return [Group(ts[0].problem, ts) for _, ts in sorted(by_problem.items())]


def _stops(result: Evaluation) -> dict[str, float]:
    """Shares of the stop reasons that occurred, largest first."""
    shares = {k.removeprefix("stop/"): v for k, v in result.statistics.items() if k.startswith("stop/") and v}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _row(way: str, r: Evaluation) -> list[Any]:
    stops = ", ".join(f"{reason} {number(share, 'share')}" for reason, share in _stops(r).items())
    return [way.replace("_", " "), number(r.score, "share"), number(r.error, "share"), r.problems, r.samples, stops]


def _plain(r: Evaluation, task: Any) -> dict[str, Any]:
    return {
        "score": r.score,
        "standard_error": r.error,
        "problems": r.problems,
        "samples": r.samples,
        **{name.removeprefix("eval/"): value for name, value in many_samples(r, task).items()},
        "stop": _stops(r),
        "calls_per_trajectory": r.statistics["tools/calls_per_trajectory"],
    }
