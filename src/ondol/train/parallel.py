"""One learner made of several processes: each computes some of an update's micro-batches, and their gradients are summed.

The first process leads: it samples, records and evaluates as ever, and tells the others what to learn from. Every process holds the whole model and optimiser (data
parallelism) and makes the same update, so a checkpoint is one process's, and a run may be resumed with any number of them. They are started here (`train.learners`), or by
torchrun, on one machine or many:

    torchrun --nproc-per-node 8 -m ondol train recipe.toml

Processes agree before they add up: when one of them gives up (Ctrl-C, a loss that is not finite), all drop the update. One that dies ends the run with an error, and the
last checkpoint is good. Sums go over gloo on CPUs and NCCL on GPUs.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ondol.errors import OndolError
from ondol.methods.base import ActorCritic, Method
from ondol.models.load import LoadedModel
from ondol.models.save import put_weights, weights
from ondol.recipe import Recipe, load_recipe, to_table
from ondol.records import Batch, Group, Trajectory
from ondol.train.critic import CriticLearner
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
    """This process's place among those that learn together. Close it."""

    def __init__(self, rank: int, size: int, answer_s: float = _ANSWER_S) -> None:
        self.rank, self.size = rank, size
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        with _told("the processes of the learner cannot reach each other"):
            dist.init_process_group(backend, rank=rank, world_size=size, timeout=timedelta(seconds=_START_S))
            self._calls: Any = dist.new_group(timeout=timedelta(seconds=_IDLE_S), backend=backend)
            self._work: Any = dist.new_group(timeout=timedelta(seconds=answer_s), backend=backend)

    def close(self) -> None:
        with contextlib.suppress(Exception):  # others may be gone
            dist.destroy_process_group()

    # -- updates ------------------------------------------------------------------------------------------------

    def share(self, batches: Sequence[Batch]) -> list[Batch]:
        """This process's micro-batches, in order: the longest first to whoever has least."""
        load = [0] * self.size
        mine = []
        for i in sorted(range(len(batches)), key=lambda i: (-len(batches[i].ids), i)):
            owner = load.index(min(load))
            load[owner] += len(batches[i].ids)
            if owner == self.rank:
                mine.append(i)
        return [batches[i] for i in sorted(mine)]

    def combine(self, optimizers: Sequence[Optimizer], totals: Totals) -> Totals:
        """Sum the gradients, in place, and all totals. A parameter without a gradient anywhere stays without."""
        self.agree()
        parameters = [p for o in optimizers for p in o.masters]
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
        """All go on, or nobody does: raises in every process when one of them gives a failure."""
        flag = torch.tensor(failure is not None, dtype=torch.int32)
        with _told("a process of the learner was lost"):
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._work)
            if not int(flag):
                return
            what = failure.what if isinstance(failure, OndolError) else f"{type(failure).__name__}: {failure}"
            said = self._gather(None if failure is None else (isinstance(failure, NotFinite), what))
        reasons = [(i, s) for i, s in enumerate(said) if s is not None]
        number, (not_finite, why) = reasons[0]
        raise GaveUp(why if not_finite else f"process {number} of the learner gave up: {why}", not_finite)

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
        why = str(e).splitlines()[0].partition(". This is typically")[0]
        why = re.sub(r"^\[[^]]*\.cc:\d+\] ", "", why)  # where in gloo's source it was noticed
        raise Lost(f"{what}: {why}", "go on from the last checkpoint with: ondol resume last") from e


def build(
    recipe: Recipe, loaded: LoadedModel, stage: str, critic: CriticLearner | None, kind: type[Learner], **more: Any
) -> Learner:
    """The learner of a training stage; `critic` is one that an earlier stage had."""
    r, settings = recipe, recipe.optimizer
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

    def _together(self, what: str, *args: Any) -> dict[str, float]:
        team, before = self.crew.team, torch.get_num_threads()
        torch.set_num_threads(self.crew.threads)
        try:
            self.crew.begin(self)
            team.tell({"do": what, "args": args, "version": self.version, "memory": self.memory})
            try:
                found = getattr(super(), what)(*args)
            except (Lost, GaveUp):
                raise
            except BaseException as e:
                with contextlib.suppress(OndolError):
                    team.agree(e)
                raise
            team.agree()
            return found
        except GaveUp as e:
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
        made = build(self.recipe, self.loaded, stage, critic, Leader, team=self.team, **more)
        assert isinstance(made, Leader)
        made.crew, made.stage = self, stage
        return made

    def begin(self, learner: Leader) -> None:
        """Give the others the learner's state, once for each learner."""
        if self._begun is learner:
            return
        self._begun = learner
        states = _states(learner)
        self.team.tell({"do": "begin", "recipe": to_table(self.recipe), "stage": learner.stage, "states": list(states)})
        for state in states.values():
            self.team.tensors(state, learner.device)

    def close(self) -> None:
        if all(p.poll() is None for p in self._started):
            with contextlib.suppress(OndolError):
                self.team.tell({"do": "end"})
        self.team.close()
        self._kill()

    def said(self) -> str:
        """The last words of those that have ended."""
        until = time.monotonic() + 1.0  # a connection may be known to be gone before its process is
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


def _states(learner: Learner) -> dict[str, dict[str, Tensor]]:
    """All that two learners of one recipe and stage may differ in, as tensors by name."""
    out = {"weights": weights(learner.model), "optimizer": learner.optimizer.state()}
    if learner.critic is not None:
        out["critic"] = {k: v.detach() for k, v in learner.critic.critic.trainable().items()}
        out["critic optimizer"] = learner.critic.optimizer.state()
    if learner.reference is not None:
        out["reference"] = weights(learner.reference)
    return out


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
                if loaded is None:
                    loaded = load(recipe)
                learner = build(recipe, loaded, command["stage"], None, Learner, team=team)
                for name in command["states"]:
                    state = team.tensors(None, learner.device)
                    if name == "weights":
                        put_weights(learner.model, state, "the leader")
                    elif name == "optimizer":
                        learner.optimizer.load_state(state)
                    elif name == "reference":
                        reference = copy.deepcopy(loaded.model).requires_grad_(False).eval()
                        put_weights(reference, state, "the leader")
                        learner.reference = reference
                    elif learner.critic is not None:
                        if name == "critic":
                            learner.critic.critic.load(state)
                        else:
                            learner.critic.optimizer.load_state(state)
                continue
            assert learner is not None
            learner.version, learner.memory = command["version"], command["memory"]
            try:
                getattr(learner, command["do"])(*command["args"])
                team.agree()
            except GaveUp:  # the leader says what it was
                continue
            except Lost:
                raise
            except Exception as e:
                with contextlib.suppress(GaveUp):
                    team.agree(e)
    finally:
        team.close()


if __name__ == "__main__":
    follow()
