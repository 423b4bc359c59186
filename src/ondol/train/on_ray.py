"""Rollouts of training by workers on a Ray cluster. Ray is an extra: pip install 'ondol[ray]'.

Weights travel through Ray's object store. The ledger is kept by an actor on this process's node, so that it is there as long as the run is; workers see it through that.
A worker that is killed, or whose node is, is replaced where there is room; one that freezes loses its episodes when its lease ends.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from ondol.cluster.ledger import Claimed, Key, Ledger
from ondol.cluster.scoring import score_with
from ondol.errors import OndolError
from ondol.models.load import LoadedModel
from ondol.models.save import put_weights, weights
from ondol.parts import make
from ondol.recipe import Recipe, load_recipe, to_table
from ondol.records import Group, Problem, Trajectory
from ondol.train.executor import Executor, Pending, Worker
from ondol.train.plans import Asked

_ANSWER_S = 60.0  # for the ledger's actor
_WEIGHTS_S = 600.0  # for weights to come from another node
_ROOM_S = 120.0  # for a reward worker to begin
_REACH_S = 10.0  # to reach a cluster's address
_TRIES = 3  # the first client of a ray:// address now and then finds that Ray could not fork a server for it
_STORE_MIB = 256  # least object store of a cluster begun here, beside room for three versions of the weights


class Keeper:
    """The actor that keeps the ledgers of all calls."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ondol-ledgers-")
        self._open: dict[tuple[int, str], Ledger] = {}
        self._states: dict[int, Any] = {}

    def do(self, number: int, owner: str, lease_s: float, what: str, *args: Any) -> Any:
        """Call a method of a ledger, as its owner would."""
        key = (number, owner)
        if key not in self._open:
            self._open[key] = Ledger(Path(self._folder.name) / f"episodes-{number}.sqlite", owner, lease_s)
        return getattr(self._open[key], what)(*args)

    def keep(self, version: int, state: list[Any], wanted: set[int]) -> None:
        """Weights of a version, as a reference in a list (which Ray hands on as it is); others that are not wanted are let go."""
        self._states = {v: s for v, s in self._states.items() if v in wanted} | {version: state}

    def state(self, version: int) -> list[Any]:
        return self._states[version]

    def newest(self) -> int:
        return max(self._states, default=0)

    def forget(self, number: int) -> None:
        """A call is over."""
        for key in [k for k in self._open if k[0] == number]:
            self._open.pop(key).close()
        for gone in Path(self._folder.name).glob(f"episodes-{number}.*"):
            gone.unlink(missing_ok=True)


class KeptLedger:
    """A ledger of the keeper's, as `owner` sees it; see `ondol.cluster.ledger.Ledger`."""

    def __init__(self, keeper: Any, number: int, owner: str, lease_s: float) -> None:
        self.keeper, self.number, self.owner, self.lease_s = keeper, number, owner, lease_s

    def _ask(self, what: str, *args: Any) -> Any:
        import ray
        from ray import exceptions

        try:
            return ray.get(self.keeper.do.remote(self.number, self.owner, self.lease_s, what, *args), timeout=_ANSWER_S)
        except (exceptions.RayActorError, exceptions.GetTimeoutError) as e:
            raise OndolError(
                f"the ledger of the rollouts does not answer: {_first_line(e)}",
                "go on from the last checkpoint with: ondol resume last",
            ) from e

    def add(self, keys: Iterable[Key]) -> None:
        self._ask("add", list(keys))

    def claim(self, most: int) -> list[Claimed]:
        return self._ask("claim", most)

    def renew(self) -> int:
        return self._ask("renew")

    def save(self, key: Key, t: Trajectory) -> bool:
        return self._ask("save", key, t)

    def finish(self, key: Key, t: Trajectory) -> bool:
        return self._ask("finish", key, t)

    def release(self, owner: str) -> int:
        return self._ask("release", owner)

    def counts(self) -> dict[str, int]:
        return self._ask("counts")

    def holders(self) -> dict[str, tuple[int, float]]:
        return self._ask("holders")

    def results(self) -> dict[Key, Trajectory]:
        return self._ask("results")

    def close(self) -> None:
        if self.owner == "parent":
            self.keeper.forget.remote(self.number)


class RayScorer:
    """A reward worker as an actor, wherever the cluster has room for it. Its owner's end is its own.

    Args:
        task: its table, as in a recipe.
    """

    def __init__(self, task: dict[str, Any]) -> None:
        self.task = task
        self._actor: Any = None

    def ask(self, problem: Problem, response: str, timeout_s: float) -> dict[str, Any] | None:
        import ray
        from ray import exceptions

        try:
            if self._actor is None:
                self._actor = ray.remote(_Scoring).options(num_cpus=1).remote(self.task)
                ray.get(self._actor.ready.remote(), timeout=_ROOM_S)
        except exceptions.GetTimeoutError as e:
            self.stop()
            raise OndolError(
                f"the cluster had no room for a reward worker for {_ROOM_S:g} s", "lower rollout.reward_workers"
            ) from e
        except exceptions.RayError as e:
            self.stop()
            raise OndolError(f"a reward worker does not start: {_first_line(e)}") from e
        try:
            return ray.get(self._actor.score.remote(problem, response), timeout=timeout_s)
        except exceptions.RayError:  # it was killed, or takes too long
            self.stop()
            return None

    def stop(self) -> None:
        import ray

        actor, self._actor = self._actor, None
        if actor is not None:
            ray.kill(actor)


class _Scoring:
    """The actor behind it."""

    def __init__(self, task: dict[str, Any]) -> None:
        self._score = score_with(make("tasks", task, "task"))

    def ready(self) -> None: ...

    def score(self, problem: Problem, response: str) -> dict[str, Any]:
        return self._score(problem, response)


class RayWorker:
    """The actor that plays rollouts."""

    def __init__(self, table: dict[str, Any], owner: str, threads: int) -> None:
        self.owner = owner
        self.worker = Worker(load_recipe(table), threads, RayScorer)

    def play(self, asked: Asked, version: int, keeper: Any, number: int) -> None:
        import ray
        from safetensors.torch import load

        def put(model: Any, version: int) -> None:
            [state] = ray.get(keeper.state.remote(version), timeout=_ANSWER_S)
            put_weights(model, load(ray.get(state, timeout=_WEIGHTS_S)), f"version {version}")

        def newest() -> int:
            return ray.get(keeper.newest.remote(), timeout=_ANSWER_S)

        self.worker.play(asked, version, put, self._ledger(keeper, number), newest)

    def _ledger(self, keeper: Any, number: int) -> Callable[[], KeptLedger]:
        return partial(KeptLedger, keeper, number, self.owner, self.worker.recipe.rollout.lease_s)

    def fetch(self, state: list[Any]) -> None:
        """Have weights come to this node, beside whatever is under way, so that nobody waits for them later."""
        import ray

        ray.wait(state, timeout=_WEIGHTS_S, fetch_local=True)

    def sign(self) -> None:
        """Whoever hears this is alive; it is heard while `play` is at work."""

    def pid(self) -> int:
        return os.getpid()


class RayRollouts(Executor):
    """Workers are actors of a Ray cluster: the recipe's `rollout.cluster`."""

    def __init__(self, recipe: Recipe, loaded: LoadedModel, count: int, **settings: Any) -> None:
        ray = _ray()
        self._ours = not ray.is_initialized()  # a cluster that somebody else is connected to stays
        if self._ours:
            _connect(ray, recipe.rollout.cluster or "local", count * (1 + recipe.rollout.reward_workers), loaded)
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        self.ray = ray
        self._keeper = ray.remote(Keeper).options(num_cpus=0, scheduling_strategy=here).remote()
        self._actors: dict[str, Any] = {}
        self._jobs: dict[str, list[Any]] = {}
        self._begun: set[str] = set()
        self._asked: dict[str, tuple[Any, float]] = {}
        super().__init__(recipe, loaded, count, **settings)

    @property
    def workers(self) -> Sequence[str]:
        return list(self._actors)

    def _start(self, owner: str) -> None:
        on_gpu = self.recipe.model.device.startswith("cuda")
        self.ray.method(concurrency_group="signs")(RayWorker.sign)
        self.ray.method(concurrency_group="fetching")(RayWorker.fetch)
        kind = self.ray.remote(concurrency_groups={"signs": 1, "fetching": 1})(RayWorker).options(
            num_cpus=self.threads, num_gpus=1 if on_gpu else 0, name=None
        )
        self._actors[owner] = kind.remote(to_table(self.recipe), owner, self.threads)
        self._jobs[owner] = [self._actors[owner].pid.remote()]

    def _tell(self, owner: str, pending: Pending) -> None:
        job = self._actors[owner].play.remote(pending.asked, pending.version, self._keeper, pending.number)
        self._jobs[owner].append(job)

    def _gone(self) -> list[tuple[str, str]]:
        out = []
        for owner, jobs in list(self._jobs.items()):
            ready, self._jobs[owner] = self.ray.wait(jobs, num_returns=len(jobs), timeout=0) if jobs else ([], [])
            for job in ready:
                self._begun.add(owner)
                try:
                    self.ray.get(job, timeout=_ANSWER_S)
                except self.ray.exceptions.RayError as e:
                    self._drop(owner)
                    out.append((owner, _first_line(e)))
                    break
        return out

    def _signs(self) -> dict[str, float]:
        """A worker that has begun answers, beside its work, within the lease."""
        now, out = time.monotonic(), {}
        for owner, actor in self._actors.items():
            asked = self._asked.get(owner)
            if asked is None:
                if owner in self._begun:
                    self._asked[owner] = (actor.sign.remote(), now)
            elif self.ray.wait([asked[0]], timeout=0)[0]:
                del self._asked[owner]  # what came, an answer or an error, `_gone` finds out
            else:
                out[owner] = now - asked[1]
        return out

    def _drop(self, owner: str) -> None:
        del self._jobs[owner]
        self._asked.pop(owner, None)
        self.ray.kill(self._actors.pop(owner))

    def _ledger(self, number: int) -> KeptLedger:
        return KeptLedger(self._keeper, number, "parent", self.recipe.rollout.lease_s)

    def _publish(self, version: int, wanted: set[int]) -> None:
        from safetensors.torch import save

        state = {k: v.cpu() for k, v in weights(self.loaded.model).items()}
        kept = [self.ray.put(save(state))]
        self.ray.get(self._keeper.keep.remote(version, kept, wanted), timeout=_ANSWER_S)
        for actor in self._actors.values():  # while they sample with the weights before
            actor.fetch.remote(kept)

    def announce(self, version: int) -> None:
        with self._reached():
            super().announce(version)

    def begin(self, asked: Asked, version: int) -> Pending:
        with self._reached():
            return super().begin(asked, version)

    def finish(self, pending: Pending, **watched: Callable[[], None]) -> list[Group]:
        with self._reached():
            return super().finish(pending, **watched)

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Say so when the cluster is no longer there. Ray itself would begin one here."""
        lost = OndolError(
            f"the Ray cluster '{self.recipe.rollout.cluster}' is gone",
            "go on from the last checkpoint with: ondol resume last, and --cluster ADDRESS for another one or --cluster none",
        )
        if not self.ray.is_initialized():
            raise lost
        try:
            yield
        except Exception as e:  # of a client that lost its connection Ray raises a plain one
            if self.ray.is_initialized() and not isinstance(e, ConnectionError):
                raise
            raise lost from e

    def close(self) -> None:
        with suppress(ConnectionError):
            if self.ray.is_initialized():
                for actor in (*self._actors.values(), self._keeper):
                    self.ray.kill(actor)
        self._actors, self._jobs = {}, {}
        if self._ours:
            self.ray.shutdown()


def _ray() -> Any:
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as e:
        raise OndolError("rollout.cluster needs Ray, which is not installed", "pip install 'ondol[ray]'") from e
    return ray


def _connect(ray: Any, address: str, actors: int, loaded: LoadedModel) -> None:
    """Connect to a cluster, or begin one here with room for so many actors."""
    # workers find what this process finds: plug-ins by reference are looked for in the same places
    paths = os.pathsep.join(dict.fromkeys(p for p in (*sys.path, os.environ.get("PYTHONPATH", "")) if p))
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        size = sum(v.numel() * v.element_size() for v in weights(loaded.model).values())
        settings |= {
            "address": "local",
            "num_cpus": max(actors, os.cpu_count() or 1),
            "include_dashboard": False,
            "object_store_memory": 3 * size + _STORE_MIB * 2**20,
            "runtime_env": {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}},
        }
    else:
        settings["address"] = address
    try:
        if ":" in (place := address.removeprefix("ray://")):  # Ray itself would try for minutes
            host, _, port = place.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
        for left in reversed(range(_TRIES)):
            try:
                ray.init(**settings)
                break
            except ConnectionAbortedError:
                if not left:
                    raise
    except Exception as e:  # whatever Ray raises: nothing there, another version, no room
        remedy = "give 'local' to begin one here, or start one with: ray start --head"
        raise OndolError(f"no connection to the Ray cluster '{address}': {_first_line(e)}", remedy) from e


def _first_line(e: BaseException) -> str:
    """What a person reads; what comes from a traceback of Ray's own has its reason at the end."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
    return f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
