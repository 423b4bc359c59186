"""The loop: evaluate, warm start, evaluate, reinforce, evaluate; with checkpoints between, and exact resume.

A run is a list of stages, a stage a number of steps. A step depends only on the weights, the optimiser's state, its own
number and what earlier stages recorded; it is written to the run's database in one transaction, and checkpoints hold
(stage, step). Resuming forgets whatever came after the last checkpoint and does it again, with the same result.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

from ondol.cluster.scoring import RewardWorkers
from ondol.errors import OndolError
from ondol.methods.base import ActorCritic
from ondol.models.load import LoadedModel
from ondol.models.save import load_weights, save_model, weights
from ondol.recipe import Recipe
from ondol.records import Group, Trajectory
from ondol.rollout.driver import rollout
from ondol.rollout.statistics import staleness, statistics
from ondol.store import Run
from ondol.train import checkpoint
from ondol.train.checkpoint import Position
from ondol.train.dump import groups_of, read_trajectories
from ondol.train.evaluations import Evaluations
from ondol.train.executor import Ahead, Executor, executor
from ondol.train.filters import Filtered, filtered, is_hopeless
from ondol.train.flex import use_flex
from ondol.train.interrupt import Interrupt, Interrupted
from ondol.train.learner import Learner
from ondol.train.parallel import Crew, build, world
from ondol.train.plans import Asked, hit_share, make_engine, peak_mib, plan_of, reward_workers
from ondol.train.prompts import order
from ondol.train.report import Reporter
from ondol.train.updates import NotFinite
from ondol.train.warm_start import accepted, check_prompts, check_tokens, traces, updates


@dataclass
class Stage:
    """A number of steps of one kind. `trains` tells whether they change the weights; `work` is a guess for the ETA."""

    name: str
    steps: int
    step: Callable[[int], None]
    trains: bool = False
    work: float = 1.0


class Trainer:
    """Runs a recipe in a run folder.

    Args:
        recipe, run, loaded: what, where, on which model.
        reporter: hears of progress.
        rollout_only: sample and record, but update nothing.
        dump: trajectories by step to train on instead of sampling.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Run,
        loaded: LoadedModel,
        *,
        reporter: Reporter | None = None,
        rollout_only: bool = False,
        dump: str | None = None,
    ) -> None:
        self.recipe, self.run, self.loaded = recipe, run, loaded
        self.reporter = reporter or Reporter()
        self.interrupt = Interrupt()
        self.rollout_only = rollout_only
        self.dump = read_trajectories(dump) if dump else None
        self.engine = make_engine(recipe, loaded)
        self.processes: Executor | None = None
        self.rewards: RewardWorkers | None = None
        self.ahead = Ahead()
        self.crew: Crew | None = None
        self.learner: Learner | None = None
        self.version = 0
        self.evaluations = Evaluations(recipe, run, loaded, self.engine, self.reporter, self.interrupt.check)
        self.stages = self._stages()
        self.at = ("", 0)  # (stage, step) under way
        self.done = (-1, 0)  # (index of the stage, steps of it) that the weights now reflect
        self.saved: tuple[int, int] | None = None
        self._kept: list[Trajectory] | None = None  # what the warm start imitates

    def train(self) -> str:
        """Do what is left to do. Returns the run's state: "finished" or "stopped" (interrupted; resumable)."""
        self.run.state = "running"
        try:
            with self.interrupt:
                check_prompts(self.recipe, self.loaded)
                if self.recipe.train.flex_attention and not self.rollout_only:
                    use_flex(self.loaded.model)  # refused now rather than when the first learner is made
                if tools := self.recipe.env.facts():
                    self.run.add_facts({"tools": tools})
                if self.dump is not None:
                    check_tokens(self.loaded, self.dump, "the dump")
                if max(self.recipe.train.learners, world()) > 1:
                    self.crew = Crew(self.recipe, self.loaded, self.recipe.train.learners)
                elif self.recipe.train.fsdp:
                    self.reporter.warn("train.fsdp is for several learners (train.learners): this one holds everything")
                self._restore()
                if self.recipe.evaluate.problems and not self.evaluations.problems:
                    self.reporter.warn("the task has no test problems: nothing is evaluated")
                self.reporter.plan([(s.name, s.work) for s in self.stages])
                self.rewards = reward_workers(self.recipe, self.reporter.warn)
                self.processes = executor(self.recipe, self.loaded, self.run.path / "workers", self.reporter.warn)
                for index, stage in enumerate(self.stages):
                    if index >= self.done[0]:
                        self._run_stage(index, stage)
                if not self.rollout_only:
                    self.reporter.note("writing the model")
                    save_model(self.loaded, self.run.path / "model")
        except Interrupted:
            try:
                self._save()
            except BaseException:
                self.run.state = "failed"
                raise
            self.run.state = "stopped"
            return "stopped"
        except NotFinite as e:
            self.run.state = "failed"
            stage, step = self.at
            raise e.placed(
                f"step {step} of '{stage}' in {self.run.name}", self.run.path / f"bad-batch-{stage}-{step:06d}"
            ) from e
        except KeyboardInterrupt:  # the second signal: at once, without saving
            self.run.state = "stopped"
            raise
        except BaseException:
            self.run.state = "failed"
            raise
        finally:
            for part in (self.processes, self.crew, self.rewards):
                if part is not None:
                    part.close()
            self.processes = self.crew = self.rewards = None
        self.run.state = "finished"
        return "finished"

    # -- stages -------------------------------------------------------------------------------------------------

    def _stages(self) -> list[Stage]:
        r, out = self.recipe, []
        checks = bool(self.evaluations.problems) and not self.dump
        group = r.train.prompts_per_step * r.train.samples_per_prompt
        per_check = len(self.evaluations.problems) * (1 + r.evaluate.samples) / 8
        if checks:
            out.append(Stage("before", 1, lambda i: self._evaluate("before"), work=per_check))
        if r.warm_start is not None and not self.dump and not self.rollout_only:
            w = r.warm_start
            if w.samples:
                out.append(Stage("warm_start", 1, self._collect, work=w.problems * w.samples_per_problem / 8))
            traces = w.problems * (w.samples_per_problem if w.from_task else w.keep_per_problem)
            out.append(Stage("sft", 0, self._imitate, trains=True, work=w.epochs * traces / 2))
            if checks and r.train.steps:
                out.append(Stage("warm", 1, lambda i: self._evaluate("warm"), work=per_check))
        if pretraining := self._value_steps():
            out.append(Stage("value", pretraining, self._pretrain_values, trains=True, work=pretraining * group / 4))
        if r.train.steps:
            rl = Stage(
                "rl", r.train.steps, self._reinforce, trains=not self.rollout_only, work=r.train.steps * group / 3
            )
            out.append(rl)
            if checks and not self.rollout_only:
                out.append(Stage("after", 1, lambda i: self._evaluate("after"), work=per_check))
        return out

    def _value_steps(self) -> int:
        r = self.recipe
        if not isinstance(r.method, ActorCritic) or not r.train.steps or self.dump or self.rollout_only:
            return 0
        return r.method.value_pretraining_steps

    def _run_stage(self, index: int, stage: Stage) -> None:
        if stage.name == "sft":
            stage.steps = updates(self.recipe, self._traces())
        if stage.trains:
            done = self.done[1] if self.done[0] == index else 0
        else:  # recorded before an interruption, from these very weights
            done = self.run.db.meta(f"done:{stage.name}", 0)
        if done < stage.steps:
            if stage.trains and done == 0:
                self._begin(stage, fresh=True)
            self.reporter.stage(stage.name, stage.steps)
        if stage.name == "rl" and done:
            self._evaluate_between(done)  # an interruption may have come in the middle of it
        for number in range(done + 1, stage.steps + 1):
            self.interrupt.check()
            self.at = (stage.name, number)
            self.engine.sync(self.version)  # with an empty cache, so that a resumed step begins as an uninterrupted one
            stage.step(number)
            if stage.trains:
                self.done = (index, number)
            else:
                self.run.db.set_meta(f"done:{stage.name}", number)
            if stage.name == "rl":
                self._evaluate_between(number)
            if stage.trains and (number == stage.steps or number % self.recipe.train.checkpoint_every_steps == 0):
                self._save()

    def _begin(self, stage: Stage, fresh: bool) -> None:
        """A training stage starts (`fresh`) or goes on: an optimiser, and the reference it may need."""
        r = self.recipe
        critic = self.learner.critic if self.learner is not None else None
        if self.crew is not None:
            self.learner = self.crew.learner(stage.name, critic, stop=self._stop_learning)
        else:
            self.learner = build(r, self.loaded, stage.name, critic, Learner, stop=self._stop_learning)
        self._tell_version()
        if stage.name == "rl" and r.method.needs_reference:
            path = self.run.path / "reference.safetensors"
            if fresh:
                part = path.with_name(f"{path.name}.part")
                checkpoint.save_tensors(weights(self.loaded.model), part)
                part.replace(path)
            reference = copy.deepcopy(self.loaded.model)
            load_weights(reference, path)
            self.learner.reference = reference.requires_grad_(False).eval()

    # -- steps --------------------------------------------------------------------------------------------------

    def _evaluate(self, phase: str) -> None:
        """An evaluation as a stage of its own."""
        self.reporter.advance(1.0, self.evaluations.evaluate(phase, 0, self.reporter.advance))

    def _collect(self, step: int) -> None:
        """Sample with examples in the prompt; record everything, keep what the verifier accepts."""
        w = self.recipe.warm_start
        assert w is not None
        started = time.perf_counter()
        groups = self._rollout(
            Asked("warm_start", 0, 0, w.problems, w.samples_per_problem, temperature=w.temperature, examples=True)
        )
        self.reporter.failures("warm start", [t for g in groups for t in g.trajectories])
        kept = accepted((t for g in groups for t in g.trajectories), w.keep_per_problem)
        tried = w.problems * w.samples_per_problem
        metrics = {
            **{k: v for k, v in statistics(groups).items() if not k.startswith("reward/")},
            "warm_start/accepted_share": sum(t.score >= 1.0 for g in groups for t in g.trajectories) / tried,
            "warm_start/traces": float(len(kept)),
            "rollout/seconds": time.perf_counter() - started,
        }
        with self.run.db.step():
            self.run.db.add_metrics("warm_start", step, metrics)
            self.run.db.add_trajectories("warm_start", step, [t for g in groups for t in g.trajectories])
        if not kept:
            raise OndolError(
                f"the warm start sampled {tried} answers and the verifier accepted none",
                "give more or better worked examples (warm_start.examples), more samples, or an easier task",
            )
        self.reporter.note(f"warm start keeps {len(kept)} of {tried} own traces")
        self.reporter.trajectory("accepted trace", kept[0])
        self.reporter.advance(1.0, metrics)

    def _traces(self) -> list[Trajectory]:
        """What the warm start imitates, on the plain prompt."""
        if self._kept is None:
            sampled = self.run.db.trajectories(phase="warm_start")
            self._kept = traces(self.recipe, self.loaded, sampled, self.reporter.note)
        return self._kept

    def _imitate(self, step: int) -> None:
        """One SFT update on own accepted traces, in an order that the seed alone decides."""
        w = self.recipe.warm_start
        assert w is not None and self.learner is not None
        traces = self._traces()
        per_epoch = -(-len(traces) // w.traces_per_update)
        epoch, at = divmod(step - 1, per_epoch)
        shuffled = order(self.recipe, len(traces), "sft", epoch)
        # in order again, so that traces of one problem lie side by side and share its prompt
        chosen = sorted(shuffled[at * w.traces_per_update : (at + 1) * w.traces_per_update])
        metrics = self.learner.imitate([traces[i] for i in chosen])
        self._updated()
        if step == 1:
            metrics["warm_start/traces"] = float(len(traces))
        with self.run.db.step():
            self.run.db.add_metrics("sft", step, metrics)
        self.reporter.advance(1.0, metrics)

    def _reinforce(self, step: int) -> None:
        """One batch of rollouts and its updates."""
        r = self.recipe
        started = time.perf_counter()
        before = copy.copy(self.engine.stats)
        if self.dump is not None:
            groups = groups_of([t for t in self.dump if t.key[0] == step])
            if not groups:
                raise OndolError(f"the dump holds no trajectories of step {step}", f"set train.steps={step - 1}")
        else:
            groups = self._batch(step)
        waited = time.perf_counter() - started
        found = Filtered([], groups) if self.rollout_only else self._filtered(groups, step)
        groups = found.sampled
        sampled_in = time.perf_counter() - started
        self.reporter.failures(f"step {step}", [t for g in groups for t in g.trajectories])
        metrics = r.method.reports(groups) | self._statistics(groups)
        metrics["rollout/seconds"] = sampled_in
        metrics["rollout/tokens_per_s"] = metrics["rollout/sampled_tokens"] / sampled_in
        metrics |= staleness(groups, self.version)
        metrics["engine/prefix_hit_share"] = hit_share(before, self.engine.stats)
        if not self.rollout_only:
            assert self.learner is not None
            self.engine.sync(self.version)  # its memory is the learner's now
            metrics |= self.learner.reinforce(groups, r.method, found.kept)
            metrics["groups/resampled"] = float(found.resampled)
            if self.learner.memory:
                self.run.db.set_meta("method/memory", True)
            if found.kept:
                self._updated()
            if metrics["updates/skipped"]:
                left_out = int(metrics["updates/skipped"])
                self.reporter.warn(f"step {step}: no response counted in {left_out} of its updates; they were left out")
                self.run.db.event("skipped_updates", step=step, updates=left_out)
            gap = metrics.get("mismatch/max_abs", 0.0)
            limit = r.train.mismatch_warning if str(self.loaded.dtype) in ("torch.float32", "torch.float64") else 0.5
            if gap > limit:
                self.reporter.warn(
                    f"step {step}: learner and sampler differ by {gap:.2g} in a log-prob (warning above {limit:g})"
                )
                self.run.db.event("mismatch", step=step, max_abs=gap)
        metrics["step/seconds"] = time.perf_counter() - started
        metrics["learner/waited_seconds"] = waited
        self.ahead.drop(step)
        metrics["memory/peak_mib"] = peak_mib()
        with self.run.db.step():
            self.run.db.add_metrics("rl", step, metrics)
            self.run.db.add_trajectories("rl", step, [t for g in groups for t in g.trajectories])
        if not found.kept and not self.rollout_only:
            self._nothing_left(step, found)
        self.reporter.trajectory(f"step {step}", groups[0].trajectories[0])
        self.reporter.advance(1.0, metrics)

    def _filtered(self, groups: list[Group], step: int) -> Filtered:
        """What the method's filters leave, and more prompts where it asks for them."""
        method, wanted = self.recipe.method, self.recipe.train.prompts_per_step

        def more(again: int) -> list[Group]:
            batch = (step - 1) * method.max_resamples + again
            return self._prompts(batch, "resample", step, first=again * wanted)

        return filtered(method, groups, wanted, more if self.dump is None else None)

    def _nothing_left(self, step: int, found: Filtered) -> None:
        """An empty step is said; it is an error where it cannot be hoped to pass."""
        said = found.nothing_left()
        self.run.db.event("empty_step", step=step, groups=len(found.sampled))
        kept = [m.value for m in self.run.db.metrics("groups/kept", "rl")]
        if is_hopeless(self.recipe.method, kept, self.recipe.train.steps, self.dump is None, found.all_right):
            raise OndolError(f"step {step}: {said.what}", said.remedy)
        why = "every answer is right: there is nothing left to learn here" if found.all_right else said.what
        self.reporter.warn(f"step {step}: {why}; nothing was updated")

    def _pretrain_values(self, step: int) -> None:
        """One batch of rollouts of the unchanged policy, for the critic alone."""
        r = self.recipe
        assert self.learner is not None
        started = time.perf_counter()
        groups = self._prompts(step, "value")
        metrics = self._statistics(groups)
        self.engine.sync(self.version)  # its memory is the learner's now
        metrics |= self.learner.pretrain_values(groups, r.method)
        self._tell_version()
        metrics["step/seconds"] = time.perf_counter() - started
        with self.run.db.step():
            self.run.db.add_metrics("value", step, metrics)
            self.run.db.add_trajectories("value", step, [t for g in groups for t in g.trajectories])
        self.reporter.advance(1.0, metrics)

    def _statistics(self, groups: list[Group]) -> dict[str, float]:
        return statistics(groups, getattr(self.recipe.task, "answer_class", None))

    def _evaluate_between(self, step: int) -> None:
        """The evaluation due after this step, unless it is recorded already."""
        if not self.rollout_only and not self.dump and self.evaluations.is_due(step):
            self.engine.sync(self.version)
            self.evaluations.evaluate("rl", step)

    # -- shared -------------------------------------------------------------------------------------------------

    def _batch(self, step: int) -> list[Group]:
        """The step's rollouts. With staleness those of the next steps begin before it learns."""
        lag, last = self.recipe.train.staleness, self.recipe.train.steps
        if not lag:
            return self._prompts(step, "rl")
        assert self.processes is not None
        for later in range(step, min(step + lag, last) + 1):
            self.ahead.begin(self.processes, self._asked(later, "rl", later, 0), self.version)
        return self._ahead(step)

    def _ahead(self, step: int, stop: Callable[[], None] | None = None) -> list[Group]:
        part = 0.5 / (self.recipe.train.prompts_per_step * self.recipe.train.samples_per_prompt)
        return self.ahead.finish(step, lambda: self.reporter.advance(part, {}), stop or self.interrupt.check)

    def _prompts(self, batch: int, phase: str, step: int | None = None, first: int = 0) -> list[Group]:
        """Rollouts of the phase's batch of prompts number `batch` >= 1, recorded under `step`."""
        return self._rollout(self._asked(batch, phase, batch if step is None else step, first))

    def _asked(self, batch: int, phase: str, step: int, first: int) -> Asked:
        r = self.recipe.train
        return Asked(phase, step, (batch - 1) * r.prompts_per_step, r.prompts_per_step, r.samples_per_prompt, first)

    def _rollout(self, asked: Asked) -> list[Group]:
        part = 0.0 if asked.phase == "resample" else 0.5 / (asked.count * asked.samples)
        if self.processes is not None:
            return self.processes.rollout(
                asked, self.version, progress=lambda: self.reporter.advance(part, {}), stop=self.interrupt.check
            )
        plan = plan_of(self.recipe, asked)
        plan.progress, plan.stop = lambda t: self.reporter.advance(part, {}), self.interrupt.check
        return rollout(self.engine, self.loaded.renderer, plan)

    def _updated(self) -> None:
        """The weights have changed: everyone is told the new version."""
        self.version += 1
        self._tell_version()
        if self.recipe.train.in_flight and self.processes is not None:
            self.processes.announce(self.version)
        self.engine.sync(self.version)

    def _tell_version(self) -> None:
        """The learner compares its log-probs with those of samples of its own version; a dump's are never its own."""
        assert self.learner is not None
        self.learner.version = -2 if self.dump is not None else self.version
        self._updates = self.learner.updates

    def _stop_learning(self) -> None:
        """Between micro-batches: a step whose first update is made is finished, half of one could not be resumed."""
        assert self.learner is not None
        if self.learner.updates == self._updates:
            self.interrupt.check()

    # -- checkpoints --------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Save (weights, optimiser, position); nothing to do when that is already on disk."""
        if self.learner is None or self.done[0] < 0 or self.saved == self.done:
            return
        index, step = self.done
        position = Position(self.stages[index].name, step, self.version, self.learner.memory)
        ahead = [
            t
            for later in self.ahead.steps
            if later > step
            for g in self._ahead(later, lambda: None)
            for t in g.trajectories
        ]
        checkpoint.save(self.run, position, self.loaded, self.learner, self.recipe.train.keep_checkpoints, ahead)
        self.saved = self.done

    def _restore(self) -> None:
        """Go back to the last good checkpoint, if there is one, and forget what was recorded after it."""
        path, position = checkpoint.latest(self.run, self.reporter.warn)
        if path is not None and position is not None:
            index = [s.name for s in self.stages].index(position.stage)
            load_weights(self.loaded.model, path / "model.safetensors")
            self.version, self.done = position.version, (index, position.step)
            self._begin(self.stages[index], fresh=False)
            assert self.learner is not None
            checkpoint.load_learner(path, self.learner)
            self.ahead.restore(checkpoint.ahead_of(path))
            self.learner.memory = position.memory
            if position.stage == "rl" and not position.memory and self.run.db.meta("method/memory", False):
                self.reporter.warn(
                    f"checkpoint {path.name} lacks the memory that the method had gathered: it begins anew, and the run "
                    "will not be as if it had never stopped"
                )
            self._tell_version()
            self.engine.sync(self.version)
            self.saved = self.done
            self.reporter.note(f"resuming {self.run.name} after step {position.step} of '{position.stage}'")
        checkpoint.forget(self.run, [(s.name, s.steps, s.trains) for s in self.stages], self.done)
