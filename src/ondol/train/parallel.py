"""One learner made of several processes: each computes some of an update's micro-batches, and their gradients are summed.

The first process leads: it samples, records and evaluates as ever, and tells the others what to learn from. Every process holds the whole model and optimiser (data
parallelism) and makes the same update; or, with `train.fsdp`, its share of both (`ondol.train.shards`), and the first the whole model to sample from as well. A checkpoint
is whole in either case, so a run may be resumed with any number of processes. They are started here (`train.learners`), or by torchrun, on one machine or many:

    torchrun --nproc-per-node 8 -m ondol train recipe.toml

Processes agree before they add up (with `train.fsdp`: before every pass): when one of them gives up (Ctrl-C, a loss that is not finite), all drop the update. One that dies
ends the run with an error, and the last checkpoint is good. Sums go over gloo on CPUs and NCCL on GPUs.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ondol.errors import OndolError
from ondol.methods.base import ActorCritic, Method
from ondol.models.load import LoadedModel
from ondol.models.save import put_weights, weights
from ondol.recipe import Recipe, load_recipe, to_table
from ondol.records import Batch, Group, Segment, Trajectory
from ondol.train.critic import CriticLearner
from ondol.train.flex import use_flex
from ondol.train.learner import Learner
from ondol.train.optimizer import Optimizer
from ondol.train.plans import load
from ondol.train.updates import NotFinite, Totals

_ANSWER_S = 600.0  # for the others to come to the same point of an update
_IDLE_S = (
    7 * 86400.0
)  # a follower waits while its leader samples or evaluates; should that one die, the wait ends at once
_START_S = 300.0  # for all to be there
_LOG_CHARS = 2000
_LAST_WORDS_S = 10.0  # a connection is known to be gone before its process has written why and ended
TRAINS = ("reinforce", "imitate")  # what changes the policy


def rank() -> int:
    """Of this process among those that torchrun, or a leader, has started; 0 for one on its own."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes torchrun has started; 1 for one on its own."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Lost(OndolError):
    """A process of the team has died, or does not answer."""


class GaveUp(OndolError):
    """One of the processes gave this update up, and so do all."""

    def __init__(self, what: str, not_finite: bool) -> None:
        super().__init__(what)
        self.not_finite = not_finite


class Processes:
    """This process's place among those that learn together. Close it.

    `sharded` is set where they hold one model between them.
    """

    sharded = False

    def __init__(self, rank: int, size: int, answer_s: float = _ANSWER_S) -> None:
        self.rank, self.size = rank, size
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        with _told("the processes of the learner cannot reach each other"):
            dist.init_process_group(backend, rank=rank, world_size=size, timeout=timedelta(seconds=_START_S))
            # the leader hands its command over within a deadline; how long the others wait for one is no sign of anything
            patience = answer_s if rank == 0 else _IDLE_S
            self._calls: Any = dist.new_group(timeout=timedelta(seconds=patience), backend=backend)
            self._work: Any = dist.new_group(timeout=timedelta(seconds=answer_s), backend=backend)
            # shards come and go over connections of their own: an agreement cannot be taken for one
            self._shards: Any = dist.new_group(timeout=timedelta(seconds=answer_s), backend=backend)

    def close(self) -> None:
        with contextlib.suppress(Exception):  # others may be gone
            dist.destroy_process_group()

    # -- updates ------------------------------------------------------------------------------------------------

    def share(self, batches: Sequence[Batch]) -> list[Batch]:
        """This process's micro-batches, in order: the longest first to whoever has least.

        Of a sharded model all have as many, some an idle one, and make passes of about one length at a time.
        """
        if self.sharded and batches:
            longest = sorted(batches, key=lambda b: -len(b.ids))
            mine = longest[self.rank :: self.size]
            return mine + [_idle(longest[0])] * (-(-len(longest) // self.size) - len(mine))
        load = [0] * self.size
        mine = []
        for i in sorted(range(len(batches)), key=lambda i: (-len(batches[i].ids), i)):
            owner = load.index(min(load))
            load[owner] += len(batches[i].ids)
            if owner == self.rank:
                mine.append(i)
        return [batches[i] for i in sorted(mine)]

    def mesh(self, device: torch.device) -> DeviceMesh:
        """All processes in a row, for shards on such devices."""
        return DeviceMesh.from_group(self._shards, device.type)

    def together(self, act: Callable[[], None]) -> Callable[[], None]:
        """`act` such that what it raises in one process is raised in all, which call it together."""

        def both() -> None:
            failure = None
            try:
                act()
            except BaseException as e:
                failure = e
            self.agree(failure)

        return both

    def combine(self, optimizers: Sequence[Optimizer], totals: Totals) -> Totals:
        """Sum the gradients, in place, and all totals. A parameter without a gradient anywhere stays without.

        Those of shards are summed already.
        """
        self.agree()
        parameters = [p for o in optimizers for p in o.masters if not isinstance(p, DTensor)]
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
        with _told("a process of the learner was lost in the middle of an update"):
            dist.all_reduce(has, dist.ReduceOp.MAX, group=self._work)
            sums = []
            for p, wanted in zip(parameters, has.tolist()):
                if not wanted:
                    continue
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                sums.append(dist.all_reduce(p.grad, group=self._work, async_op=True))
            for s in sums:
                if s is not None:
                    s.wait()
            here = copy.copy(totals)
            here.sums = {k: v.cpu() for k, v in totals.sums.items()}
            here.maxima = {k: v.cpu() for k, v in totals.maxima.items()}
            return Totals.together(self._gather(here))

    def agree(self, failure: BaseException | None = None) -> None:
        """All go on, or nobody does: raises in every process when one of them gives a failure, its own being the cause."""
        flag = torch.tensor(failure is not None, dtype=torch.int32)
        with _told("a process of the learner was lost"):
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._work)
            if not int(flag):
                return
            what = failure.what if isinstance(failure, OndolError) else f"{type(failure).__name__}: {failure}"
            said = self._gather(None if failure is None else (isinstance(failure, NotFinite), what))
        reasons = [(i, s) for i, s in enumerate(said) if s is not None]
        number, (not_finite, why) = reasons[0]
        raise GaveUp(why if not_finite else f"process {number} of the learner gave up: {why}", not_finite) from failure

    def _gather(self, here: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, here, group=self._work)
        return found

    # -- commands -----------------------------------------------------------------------------------------------

    def tell(self, command: Any = None) -> Any:
        """The leader's object, in every process."""
        box = [command]
        with _told("the leader of the learner's processes, or one of them, was lost"):
            dist.broadcast_object_list(box, src=0, group=self._calls)
        return box[0]

    def tensors(self, of: dict[str, Tensor] | None, device: torch.device) -> dict[str, Tensor]:
        """The leader's tensors, in every process."""
        shapes = self.tell(None if of is None else {k: (tuple(v.shape), v.dtype) for k, v in of.items()})
        out = {}
        with _told("the leader of the learner's processes, or one of them, was lost"):
            for name, (shape, dtype) in shapes.items():
                value = torch.empty(shape, dtype=dtype, device=device)
                if of is not None:
                    value.copy_(of[name])
                dist.broadcast(value, src=0, group=self._calls)
                out[name] = value
        return out


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as e:  # what torch.distributed raises when somebody is gone or late
        raise _lost(what, e) from e


def _lost(what: str, e: Exception) -> Lost:
    why = str(e).splitlines()[0].partition(". This is typically")[0]
    why = re.sub(r"^\[[^]]*\.cc:\d+\] ", "", why)  # where in gloo's source it was noticed
    return Lost(f"{what}: {why}", "go on from the last checkpoint with: ondol resume last")


def build(
    recipe: Recipe, loaded: LoadedModel, stage: str, critic: CriticLearner | None, kind: type[Learner], **more: Any
) -> Learner:
    """The learner of a training stage; `critic` is one that an earlier stage had."""
    r, settings = recipe, recipe.optimizer
    if r.train.flex_attention:
        use_flex(loaded.model)
    if stage == "sft" and r.warm_start is not None:
        settings = settings.model_copy(update={"learning_rate": r.warm_start.learning_rate})
    if isinstance(r.method, ActorCritic) and stage in ("value", "rl") and critic is None:
        critic = CriticLearner(loaded.model, r.method.critic, r.optimizer, r.method.critic_learning_rate)
    return kind(
        loaded.model,
        Optimizer(loaded.model, settings),
        tokens_per_microbatch=r.train.tokens_per_microbatch,
        share_prompts=r.train.share_prompts,
        gradient_checkpointing=r.train.gradient_checkpointing,
        critic=critic,
        importance_cap=r.train.importance_cap if r.train.off_policy == "decoupled" else None,
        **more,
    )


class Leader(Learner):
    """A learner whose work others share. `crew` makes it so."""

    crew: Crew
    stage: str

    def reinforce(self, groups: list[Group], method: Method, kept: list[Group] | None = None) -> dict[str, float]:
        return self._together("reinforce", groups, method, kept)

    def imitate(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        return self._together("imitate", trajectories)

    def pretrain_values(self, groups: list[Group], method: ActorCritic) -> dict[str, float]:
        return self._together("pretrain_values", groups, method)

    def state(self, *, keep: bool = True) -> dict[str, dict[str, Tensor]]:
        return self._together("state") if self.crew.team.sharded else super().state(keep=keep)

    def _together(self, what: str, *args: Any) -> Any:
        team, before = self.crew.team, torch.get_num_threads()
        torch.set_num_threads(self.crew.threads)
        try:
            self.crew.begin(self)
            team.tell({"do": what, "args": args, "version": self.version, "memory": self.memory})
            try:
                found = getattr(super(), what)(*args)
                if team.sharded and what in TRAINS:
                    self.publish(self.crew.loaded.model)
            except (Lost, GaveUp):
                raise
            except BaseException as e:
                if team.sharded and not isinstance(e, OndolError):  # the others may be in the middle of a pass
                    self.crew.broken = True
                    if isinstance(e, RuntimeError) and not isinstance(e, torch.OutOfMemoryError):
                        raise _lost("a process of the learner was lost in the middle of a pass", e) from e
                    raise
                with contextlib.suppress(OndolError):
                    team.agree(e)
                raise
            team.agree()
            return found
        except GaveUp as e:
            if e.__cause__ is not None:
                raise e.__cause__ from None
            raise NotFinite(e.what, None) if e.not_finite else e from None
        except Lost as e:
            said = self.crew.said()
            raise Lost(f"{e.what} ({said})" if said else e.what, e.remedy) from e
        finally:
            torch.set_num_threads(before)


class Crew:
    """The leader's hold on the other processes. Close it.

    Args:
        loaded: the model that is trained here.
        count: processes in all, this one included. Under torchrun they are there already and this is ignored.
    """

    def __init__(self, recipe: Recipe, loaded: LoadedModel, count: int) -> None:
        self.recipe, self.loaded = recipe, loaded
        self.broken = False  # the others do not listen any more
        self._begun: Learner | None = None
        self._started: list[subprocess.Popen[bytes]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="ondol-learners-")
        size = world()
        if size == 1:
            size = count
            os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(_free_port())
            self.threads = max(1, torch.get_num_threads() // size)
            self._started = [self._start(i, size) for i in range(1, size)]
        else:
            self.threads = torch.get_num_threads()
        try:
            self.team = Processes(0, size)
            self.team.sharded = recipe.train.fsdp
        except BaseException:
            self._kill()
            raise

    def _start(self, number: int, size: int) -> subprocess.Popen[bytes]:
        environment = os.environ | {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(size)}
        environment["OMP_NUM_THREADS"] = str(self.threads)
        with self._log(number).open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "ondol.train.parallel"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is the leader's to hear
            )

    def _log(self, number: int) -> Path:
        return Path(self._folder.name) / f"{number}.log"

    def learner(self, stage: str, critic: CriticLearner | None, **more: Any) -> Leader:
        """The learner of a training stage, whose work all share."""
        loaded = self.loaded
        if self.team.sharded:  # sampling goes on with the whole one
            loaded = dataclasses.replace(loaded, model=copy.deepcopy(loaded.model))
        made = build(self.recipe, loaded, stage, critic, Leader, team=self.team, **more)
        assert isinstance(made, Leader)
        made.crew, made.stage = self, stage
        return made

    def begin(self, learner: Leader) -> None:
        """Give the others the learner's state, once for each learner."""
        if self._begun is learner:
            return
        # a critic of the stage before: all have it, each perhaps its share
        kept = self._begun is not None and self._begun.critic is learner.critic
        self._begun = learner
        states = {"weights": weights(learner.model)} | learner.parts(critic=not kept)
        if learner.reference is not None:
            states["reference"] = weights(learner.reference)
        table = to_table(self.recipe)
        self.team.tell({"do": "begin", "recipe": table, "stage": learner.stage, "states": list(states), "kept": kept})
        for state in states.values():
            self.team.tensors({k: v.detach() for k, v in state.items()}, learner.device)
        _begun(learner, self.team)

    def close(self) -> None:
        if not self.broken and all(p.poll() is None for p in self._started):
            with contextlib.suppress(OndolError):
                self.team.tell({"do": "end"})
        self.team.close()
        self._kill()

    def said(self) -> str:
        """The last words of those that have ended."""
        until = time.monotonic() + _LAST_WORDS_S
        while all(p.poll() is None for p in self._started) and self._started and time.monotonic() < until:
            time.sleep(0.01)
        gone = [(i + 1, p.poll()) for i, p in enumerate(self._started) if p.poll() not in (None, 0)]
        lines = []
        for number, code in gone:
            log = self._log(number).read_text(errors="replace").strip()[-_LOG_CHARS:].splitlines()[-1:]
            why = f"signal {-code}" if code is not None and code < 0 else f"exit {code}"
            lines.append(" ".join([f"process {number} ended ({why})", *log]))
        return "; ".join(lines)

    def _kill(self) -> None:
        for process in self._started:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()  # it holds nothing that the leader has not
                process.wait(timeout=30)
        self._folder.cleanup()


def _begun(learner: Learner, team: Processes) -> None:
    """Leader and followers have the same state now."""
    if team.sharded:
        learner.shard(team.mesh(learner.device))
        learner.stop = team.together(learner.stop)


def _idle(batch: Batch) -> Batch:
    """A micro-batch of one token and no target, for a process that would have none while others make a pass."""
    none = batch.only(torch.zeros_like(batch.trained))
    start = {"ids": batch.ids[:1], "positions": batch.positions[:1], "segments": [Segment(0, 1, None)]}
    return dataclasses.replace(none, **start, sequence_tokens=0)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def follow() -> None:
    """What every process but the first does: learn as it is told, until the leader ends."""
    team = Processes(rank(), world())
    learner: Learner | None = None
    loaded: LoadedModel | None = None
    try:
        while (command := team.tell())["do"] != "end":
            if command["do"] == "begin":
                recipe = load_recipe(command["recipe"])
                team.sharded = recipe.train.fsdp
                critic = learner.critic if learner is not None and command["kept"] else None
                learner = None
                if loaded is None:
                    loaded = load(recipe)
                learner = build(recipe, loaded, command["stage"], critic, Learner, team=team)
                for name in command["states"]:
                    state = team.tensors(None, learner.device)
                    if name == "weights":
                        put_weights(learner.model, state, "the leader")
                    elif name == "reference":
                        reference = copy.deepcopy(loaded.model).requires_grad_(False).eval()
                        put_weights(reference, state, "the leader")
                        learner.reference = reference
                    else:
                        learner.load_state(name, state)
                _begun(learner, team)
                if team.sharded:
                    loaded = None  # it holds a share now
                continue
            assert learner is not None
            learner.version, learner.memory = command["version"], command["memory"]
            try:
                if command["do"] == "state":
                    learner.state(keep=False)
                else:
                    getattr(learner, command["do"])(*command["args"])
                if team.sharded and command["do"] in TRAINS:
                    learner.publish(None)
                team.agree()
            except GaveUp:  # the leader says what it was
                continue
            except Lost:
                raise
            except Exception as e:
                if team.sharded and not isinstance(e, OndolError):
                    raise  # others may be in the middle of a pass, and hear of it as this process ends
                with contextlib.suppress(GaveUp):
                    team.agree(e)
    finally:
        team.close()


if __name__ == "__main__":
    follow()
