"""Evaluations of a run on held-out problems: greedy and sampled, recorded under the phase that they belong to."""

from __future__ import annotations

from collections.abc import Callable

from ondol.engines.torch import TorchEngine
from ondol.evaluate import evaluate, held_out, many_samples, ways
from ondol.models.load import LoadedModel
from ondol.recipe import Recipe
from ondol.records import Trajectory
from ondol.store import Run
from ondol.train.prompts import PHASES
from ondol.train.report import Reporter


class Evaluations:
    """The same held-out problems each time. The engine has the weights that are evaluated.

    Args:
        stop: called between trajectories; what it raises ends the evaluation, of which nothing is recorded then.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Run,
        loaded: LoadedModel,
        engine: TorchEngine,
        reporter: Reporter,
        stop: Callable[[], None],
    ) -> None:
        self.recipe, self.run, self.loaded, self.engine = recipe, run, loaded, engine
        self.reporter, self.stop = reporter, stop
        self.problems = held_out(recipe.task, recipe.evaluate.problems)

    def is_due(self, step: int) -> bool:
        """Whether one follows this step of RL and is not recorded yet."""
        every = self.recipe.evaluate.every_steps
        if not every or step % every or step >= self.recipe.train.steps or not self.problems:
            return False
        return not any(m.step == step for m in self.run.db.metrics("eval/score_greedy", "rl"))

    def evaluate(
        self, phase: str, step: int, advance: Callable[[float, dict[str, float]], None] | None = None
    ) -> dict[str, float]:
        """Scores by mode. `advance` hears of each trajectory's share of the whole."""
        r, metrics = self.recipe, {}
        without_tools = r.evaluate.without_tools and phase == "before"
        modes = list(ways(r.env, r.sampling, r.evaluate.samples, without_tools))
        recorded: list[tuple[str, list[Trajectory]]] = []
        for mode, env, sampling, samples in modes:
            part = 1 / len(modes) / (len(self.problems) * samples)
            result = evaluate(
                self.engine,
                self.loaded.renderer,
                r.task,
                env,
                self.problems,
                sampling,
                seed=(r.seed, PHASES["evaluate"]),
                samples=samples,
                timeout_s=r.rollout.timeout_s,
                max_response_tokens=r.rollout.max_response_tokens,
                progress=lambda t, part=part: advance(part, {}) if advance else None,
                stop=self.stop,
            )
            metrics[f"eval/score_{mode}"] = result.score
            metrics[f"eval/error_{mode}"] = result.error
            if mode == "sampled":
                metrics |= many_samples(result, r.task)
            recorded.append((mode, result.trajectories))
            self.reporter.failures(f"evaluation '{phase}', {mode}", result.trajectories)
            if mode == "greedy":
                self.reporter.trajectory(f"{phase}, greedy", result.trajectories[0])
        with self.run.db.step():
            self.run.db.add_metrics(phase, step, metrics)
            for mode, trajectories in recorded:
                self.run.db.add_trajectories(f"{phase}/{mode}", step, trajectories)
        return metrics
