"""Who plays the rollouts of training: this process, processes beside it, or a Ray cluster, with the same trajectories.

An executor's workers have the model and an engine of their own. For every call they load the weights of that version, take episodes from a ledger and play them
(`ondol.cluster.workers`). A worker that dies is replaced, and its episodes go on from their last turn.
"""

from __future__ import annotations

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ondol.cluster.ledger import Bookkeeping
from ondol.cluster.scoring import ChildScorer, Scorer
from ondol.cluster.workers import who_waits, work_on
from ondol.errors import OndolError
from ondol.models.load import LoadedModel
from ondol.recipe import Recipe
from ondol.records import Group, Trajectory
from ondol.rollout.driver import Plan
from ondol.train.dump import groups_of
from ondol.train.plans import Asked, load, make_engine, plan_of, reward_workers

_LOOK_S = 0.02
_TELL_S = 60.0  # without progress, until it is said who waits for whom
_NEWEST_S = 0.2  # between two looks for newer weights
_SIGNS_S = 0.5  # between two looks whether workers give signs


@dataclasses.dataclass
class Pending:
    """Rollouts that were asked for and may be under way. `number` is the call's."""

    number: int
    asked: Asked
    version: int
    plan: Plan
    ledger: Bookkeeping


class Executor(ABC):
    """Plays a recipe's rollouts with several workers. Close it.

    Args:
        loaded: the model that is trained here; its weights are given to the workers whenever their version is new.
        count: of workers;  replacements: how many of them may be lost.
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
        self.lost = self._made = self._calls = 0
        self._version: int | None = None
        self._looked = time.monotonic()
        self._open: list[Pending] = []
        for _ in range(count):
            self._start(self._name())

    # -- what an executor of some kind has of its own ---------------------------------------------------------------

    @property
    @abstractmethod
    def workers(self) -> Sequence[str]:
        """Names of those that are thought to be alive."""

    @abstractmethod
    def _start(self, owner: str) -> None:
        """Have a worker of this name."""

    @abstractmethod
    def _tell(self, owner: str, pending: Pending) -> None:
        """Give a worker these rollouts to do after those that it was given before. One that is gone hears nothing."""

    @abstractmethod
    def _gone(self) -> list[tuple[str, str]]:
        """(name, why) of those that have ended since it was last asked."""

    @abstractmethod
    def _signs(self) -> dict[str, float]:
        """Worker -> seconds since it last gave a sign; also of those that have nothing to do."""

    @abstractmethod
    def _drop(self, owner: str) -> None:
        """End a worker that gives no sign."""

    @abstractmethod
    def _ledger(self, number: int) -> Bookkeeping:
        """A new one."""

    @abstractmethod
    def _publish(self, version: int, wanted: set[int]) -> None:
        """Make the weights as they are now reachable for the workers as `version`; forget those that are not wanted."""

    @abstractmethod
    def close(self) -> None:
        """End the workers."""

    def announce(self, version: int) -> None:
        """New weights, for what is under way as well: workers of a recipe with `train.in_flight` take them up between two tokens."""
        if self._version != version:
            # the one before as well: a worker may just have decided to load it
            self._publish(version, {version, version - 1, *(p.version for p in self._open)})
            self._version = version

    # -- what is the same for all -----------------------------------------------------------------------------------

    def begin(self, asked: Asked, version: int) -> Pending:
        """Have the workers begin, with the weights as they are now, which are `version`. What was begun before comes first."""
        self.announce(version)
        self._calls += 1
        pending = Pending(self._calls, asked, version, plan_of(self.recipe, asked), self._ledger(self._calls))
        pending.ledger.add(pending.plan.keys)
        self._open.append(pending)
        for owner in self.workers:
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
                self.say(who_waits(counts, ledger, self.workers))
                moved = time.monotonic()
            self._replace_lost()
            time.sleep(_LOOK_S)
        for _ in range(len(keys) - told):
            progress()
        done = ledger.results()
        self._open.remove(pending)
        ledger.close()
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

    def _name(self) -> str:
        self._made += 1
        return f"w{self._made - 1}"

    def _replace_lost(self) -> None:
        lost = self._gone()
        if time.monotonic() - self._looked > _SIGNS_S:
            self._looked = time.monotonic()
            for owner, ago in self._signs().items():
                if ago > self.recipe.rollout.lease_s:
                    self._drop(owner)
                    lost.append((owner, f"no sign for {ago:.0f} s"))
        for owner, why in lost:
            self.lost += 1
            freed = [(pending, pending.ledger.release(owner)) for pending in self._open]
            self.say(f"rollout worker {owner} ended ({why}); {sum(n for _, n in freed)} episodes go on elsewhere")
            if self.lost > self.replacements:
                raise OndolError(
                    f"{self.lost} rollout workers were lost; the last: {why}", "set rollout.processes to 0 to see more"
                )
            for pending in (p for p, n in freed if n):
                for other in self.workers:
                    self._tell(other, pending)
            fresh = self._name()
            self._start(fresh)
            for pending in self._open:
                self._tell(fresh, pending)


def executor(recipe: Recipe, loaded: LoadedModel, folder: Path, say: Callable[[str], None]) -> Executor | None:
    """The one that the recipe names; None: this process plays its rollouts itself. `folder` is for what workers of this machine share."""
    r = recipe.rollout
    if not r.processes:
        return None
    if r.cluster is not None:
        from ondol.train.on_ray import RayRollouts

        return RayRollouts(recipe, loaded, r.processes, say=say)
    from ondol.train.processes import ProcessRollouts

    return ProcessRollouts(recipe, loaded, r.processes, folder=folder, say=say)


class Worker:
    """What a worker holds, wherever it runs: the model, an engine over it, and its reward workers, which `scorer` makes."""

    def __init__(self, recipe: Recipe, threads: int, scorer: Callable[[dict[str, Any]], Scorer] = ChildScorer) -> None:
        import torch

        torch.set_num_threads(threads)
        self.recipe = recipe
        self.rewards = reward_workers(recipe, print, scorer)
        self.loaded = load(recipe)
        self.engine: Any = make_engine(recipe, self.loaded)
        self.version: int | None = None

    def play(
        self,
        asked: Asked,
        version: int,
        put: Callable[[Any, int], None],
        ledger: Callable[[], Bookkeeping],
        newest: Callable[[], int],
    ) -> None:
        """Work on a call's episodes until none is left.

        Args:
            version: of the weights to begin with;  put: puts the weights of a version into a model.
            newest: the newest version there is; only asked, and then taken up, where the recipe says `train.in_flight`.
        """
        in_flight, looked = self.recipe.train.in_flight, time.monotonic()
        if in_flight:
            version = max(version, newest())
        if version != self.version:
            put(self.loaded.model, version)
            self.version = version
        self.engine.sync(version)  # with an empty cache, as the parent's engine begins a step
        plan = plan_of(self.recipe, asked)

        def look() -> None:
            nonlocal looked
            if time.monotonic() - looked < _NEWEST_S:
                return
            looked = time.monotonic()
            if (now := newest()) > (self.version or 0):
                put(self.loaded.model, now)
                self.version = now
                self.engine.renew(now)

        if in_flight:
            plan.stop = look
        at_once = max(1, min(self.recipe.rollout.max_batch, len(plan.problems) * plan.samples))
        # it goes on to the next call while others finish this one; what is freed later, it is told of again
        work_on(self.engine, self.loaded.renderer, plan, ledger, at_once, stay=False)


class Ahead:
    """Rollouts of steps to come: begun, or done, and kept until their step has learned from them."""

    def __init__(self) -> None:
        self._found: dict[int, Pending | list[Group]] = {}
        self._by: Executor | None = None

    @property
    def steps(self) -> list[int]:
        return sorted(self._found)

    def begin(self, by: Executor, asked: Asked, version: int) -> None:
        """Begin a step's rollouts, unless they are under way or here already."""
        if asked.step not in self._found:
            self._by = by
            self._found[asked.step] = by.begin(asked, version)

    def finish(self, step: int, progress: Callable[[], None], stop: Callable[[], None]) -> list[Group]:
        """A step's rollouts, waiting for them if need be; see `Executor.finish`."""
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
