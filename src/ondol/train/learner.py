"""The learner: batches of rollouts or of traces in, an updated model out. It knows no method."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ondol.errors import OndolError
from ondol.methods.base import ActorCritic, Method, TokenInputs
from ondol.records import Batch, Group, Trajectory
from ondol.train.credit import credit
from ondol.train.logprobs import log_probs
from ondol.train.off_policy import correct, is_stale
from ondol.train.optimizer import Optimizer
from ondol.train.packing import Sequence_
from ondol.train.shards import is_sharded, shard, whole
from ondol.train.updates import Updater

_FAR = 20.0  # log-ratios are held within this for a metric: e^20 is far enough


class Learner(Updater):
    """Learns from rollouts with a method, or by imitation. `memory` is the method's own, see `Scored.memory`.

    With an `importance_cap` samples of older weights are corrected for as `ondol.train.off_policy` says; without, by the method's own ratio.
    """

    def __init__(self, *args: Any, importance_cap: float | None = None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.memory: dict[str, Any] = {}
        self.importance_cap = importance_cap

    # -- state --------------------------------------------------------------------------------------------------

    def parts(self, *, critic: bool = True) -> dict[str, dict[str, Tensor]]:
        """What the next update depends on besides the weights, by part and name, as this process has it."""
        out = {"optimizer": self.optimizer.state()}
        if critic and self.critic is not None:
            out |= {"critic": self.critic.critic.trainable(), "critic-optimizer": self.critic.optimizer.state()}
        return out

    def state(self, *, keep: bool = True) -> dict[str, dict[str, Tensor]]:
        """The same, whole, for a checkpoint. Of a sharded model all processes ask together; those that do not `keep` it get nothing."""
        out: dict[str, dict[str, Tensor]] = {}
        for part, tensors in self.parts().items():
            out[part] = {}
            for name, t in tensors.items():
                found = whole(t)  # asked for in any case: others wait for this process's share
                if keep:
                    out[part][name] = found
        return out

    def load_state(self, part: str, tensors: dict[str, Tensor]) -> None:
        """Inverse of `state` for one of its parts, exactly."""
        if part == "optimizer":
            self.optimizer.load_state(tensors)
        elif part == "critic":
            self._critic.critic.load(tensors)
        else:
            self._critic.optimizer.load_state(tensors)

    def shard(self, mesh: DeviceMesh) -> None:
        """Keep this process's share of the model, of a reference and of a critic's trunk, each with its optimiser's state.

        They are changed in place. A critic of an earlier stage that is in shards already stays as it is.
        """
        before = self.optimizer.state()
        shard(self.model, mesh)
        self.optimizer = Optimizer(self.model, self.optimizer.settings)
        self.optimizer.load_state(before)
        if self.reference is not None:
            shard(self.reference, mesh)
        critic = self.critic
        if critic is not None and critic.critic.trunk is not None and not is_sharded(critic.critic.trunk):
            before = critic.optimizer.state()
            shard(critic.critic.trunk, mesh)
            critic.optimizer = Optimizer(critic.critic, critic.optimizer.settings)
            critic.optimizer.load_state(before)

    @torch.no_grad()
    def publish(self, model: nn.Module | None) -> None:
        """Put the weights of a sharded model into a whole one; all processes ask together, and one has somewhere to put them."""
        into = dict(model.named_parameters()) if model is not None else {}
        for name, parameter in zip(self.optimizer.names, self.optimizer.live):
            value = whole(parameter)
            if model is not None:
                into[name].copy_(value)

    # -- reinforcement learning ---------------------------------------------------------------------------------

    def reinforce(self, groups: list[Group], method: Method, kept: list[Group] | None = None) -> dict[str, float]:
        """One batch of rollouts: filter, advantages, pack, update. Returns means over the updates, and counts.

        `kept` is what the method's `keep` left of the groups, where the caller has asked already. Nothing kept, or
        nothing counted in an update, is no update: "groups/kept" and "updates/skipped" tell.
        """
        started = time.perf_counter()
        memory = copy.deepcopy(self.memory)
        critic = method if isinstance(method, ActorCritic) else None
        found = credit(method.keep(groups) if kept is None else kept, method, memory, critic and self.values)
        found.trajectories = self._with_old_logp(found.trajectories)
        corrected = None
        if self.importance_cap is not None:
            stale = [is_stale(t, self.version) for t in found.trajectories]
            corrected = correct(
                found.trajectories, self._logp_now(found.trajectories, stale), self.version, self.importance_cap
            )
            found.trajectories, found.factors = corrected.trajectories, corrected.factors
        updates, skipped = [], 0
        for _ in range(method.epochs):
            for members in found.updates(method.minibatches):
                if not any(found.counted[i] and any(found.trajectories[i].trained) for i in members):
                    skipped += 1
                    continue
                batches = self.pack(found.sequences(members, method), whole_groups=type(method).whole_groups)
                constant = self._constant(batches, method)
                updates.append(self.apply(batches, partial(_method_loss, method, constant), critic))
        # only now: a step that is given up in its first update is done again, from the same memory
        self.memory = _plain(memory, method)
        seconds = time.perf_counter() - started
        metrics = _summary(updates)
        tokens = sum(u["learner/tokens"] for u in updates)
        metrics |= found.metrics(sum(len(g.trajectories) for g in groups))
        metrics |= corrected.reports if corrected is not None else {}
        if critic is not None:
            metrics["value/explained_variance"] = found.explained_variance(found.monte_carlo(critic))
        metrics |= {
            "updates/skipped": float(skipped),
            "learner/tokens": tokens,
            "learner/seconds": seconds,
            "learner/tokens_per_s": tokens / seconds,
        }
        return metrics

    def _with_old_logp(self, trajectories: list[Trajectory]) -> list[Trajectory]:
        """The same, with log-probs also of tokens that are trained and were not sampled: the present weights', as those of
        sampled tokens are those of the weights that sampled them. Observations, that is, where they are not masked."""
        odd = [any(a and not b for a, b in zip(t.trained, t.sampled)) for t in trajectories]
        out = []
        for t, now in zip(trajectories, self._logp_now(trajectories, odd)):
            if now is not None:
                now = [old if s else new for s, old, new in zip(t.sampled, t.logp, now)]
            out.append(t if now is None else dataclasses.replace(t, logp=now))
        return out

    def _logp_now(self, trajectories: Sequence[Trajectory], wanted: Sequence[bool]) -> list[list[float] | None]:
        """Log-probs under the present weights of the wanted trajectories' sampled and trained tokens, 0 for the others; one per entry of `ids`."""
        out: list[list[float] | None] = [None] * len(trajectories)
        chosen = [Sequence_(t, i, 0.0, 0.0) for i, t in enumerate(trajectories) if wanted[i]]
        with torch.no_grad():
            for batch in self.pack(chosen):
                self.stop()
                logp = log_probs(self.model, batch.to(self.device))[0].double().cpu()
                for i in batch.sequence.unique().tolist():
                    t, mine = trajectories[i], iter(logp[batch.sequence == i].tolist())
                    first = max(t.prompt_length, 1)
                    has = [k >= first and (s or a) for k, (s, a) in enumerate(zip(t.sampled, t.trained))]
                    out[i] = [next(mine) if h else 0.0 for h in has]
        return out

    def _constant(self, batches: Sequence[Batch], method: Method) -> Tensor | None:
        """What the method makes of all tokens of an update together, without gradient."""
        if not type(method).needs_constant or not batches:
            return None
        parts = []
        with torch.no_grad():
            for batch in batches:
                self.stop()
                batch = batch.to(self.device)
                needed = type(method).constant_of_logp
                logp = (log_probs(self.model, batch)[0] if needed else batch.logp)[batch.trained]
                reference = None
                if needed and self.reference is not None:
                    reference = log_probs(self.reference, batch)[0][batch.trained]
                parts.append(_inputs(logp, batch.only(batch.trained), reference))
            columns: dict[str, Any] = {
                f.name: None if getattr(parts[0], f.name) is None else torch.cat([getattr(p, f.name) for p in parts])
                for f in dataclasses.fields(TokenInputs)
            }
            return method.constant(TokenInputs(**columns))

    # -- supervised fine-tuning ---------------------------------------------------------------------------------

    def imitate(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """One SFT update: mean negative log-likelihood over the trained tokens of all trajectories."""
        started = time.perf_counter()
        count = sum(sum(t.trained) for t in trajectories)
        if count == 0:
            raise OndolError("none of the trajectories has a token to train on", "check their `trained` masks")
        batches = self.pack([Sequence_(t, i, 0.0, 1 / count) for i, t in enumerate(trajectories)])
        update = self.apply(batches, lambda logp, batch, reference: (-logp, {}))
        update["loss/sft"] = update.pop("loss")
        update["learner/seconds"] = time.perf_counter() - started
        update["learner/tokens_per_s"] = update["learner/tokens"] / update["learner/seconds"]
        return {k: v for k, v in update.items() if not k.startswith("mismatch/")}

    # -- the critic ---------------------------------------------------------------------------------------------

    def values(self, trajectories: Sequence[Trajectory]) -> list[Tensor]:
        """The critic's values of each trajectory's trained tokens, float64 on the CPU; no gradient."""
        found: list[list[Tensor]] = [[] for _ in trajectories]
        with torch.no_grad():
            for batch in self.pack([Sequence_(t, i, 0.0, 0.0) for i, t in enumerate(trajectories)]):
                self.stop()
                value = self._critic.critic.values(self.model, batch.to(self.device)).double().cpu()
                for i in batch.sequence.unique().tolist():
                    found[i].append(value[batch.trained & (batch.sequence == i)])
        return [torch.cat(f) if f else torch.zeros(0, dtype=torch.float64) for f in found]

    def pretrain_values(self, groups: list[Group], method: ActorCritic) -> dict[str, float]:
        """One batch of rollouts for the critic alone: its values before it learns from them, then the updates.

        The policy is as it was. "value/explained_variance" is of the values before: on rollouts never learned from.
        """
        started = time.perf_counter()
        found = credit(method.keep(groups), method, {}, self.values)
        goals = found.monte_carlo(method)
        found = dataclasses.replace(found, returns=goals)
        updates = []
        for _ in range(method.epochs):
            for members in found.updates(method.minibatches):
                batches = self.pack(found.sequences(members, method))
                if not batches:
                    continue
                work = partial(self.value_gradient, method)
                totals, norms, rates = self.update([self._critic.optimizer], batches, work)
                updates.append(totals.metrics() | {"value/gradient_norm": norms[0], "learning_rate": rates[0]})
        return {
            **{name: sum(u[name] for u in updates) / len(updates) for name in (updates[0] if updates else ())},
            "learner/tokens": sum(u["learner/tokens"] for u in updates),
            "value/explained_variance": found.explained_variance(goals),
            "learner/seconds": time.perf_counter() - started,
        }


def _method_loss(
    method: Method, constant: Tensor | None, logp: Tensor, batch: Batch, reference: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    x = _inputs(logp, batch, reference, constant)
    loss, reports = method.token_loss(x)
    # r - 1 - log r of tokens that the old policy sampled: how far an update has come from it, whatever the method
    moved = (x.logp - x.old_logp).detach().clamp(-_FAR, _FAR)
    always = {"policy/clip_share": torch.zeros_like(moved), "policy/kl_old_k3": moved.expm1() - moved}
    return loss, always | reports


def _inputs(logp: Tensor, batch: Batch, reference: Tensor | None, constant: Tensor | None = None) -> TokenInputs:
    cast = {"dtype": logp.dtype, "device": logp.device}
    old, advantage, reward = (v.to(**cast) for v in (batch.logp, batch.advantage, batch.reward))
    return TokenInputs(logp, old, reference, advantage, batch.sequence, batch.group, reward, constant)


def _summary(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics of a step out of those of its updates: means, and maxima of what is a maximum.

    Two are of the first update alone, whose weights are those that sampled: the mismatch, and the gradient's norm.
    """
    # updates without any advantage have nothing to tell, unless there is no other
    updates = [u for u in updates if u["learner/tokens"]] or updates
    out: dict[str, float] = {}
    for name in dict.fromkeys(name for u in updates for name in u):
        values = [u[name] for u in updates if name in u]
        if name.endswith("_max"):
            out[name] = max(values)
        elif name.startswith("mismatch/") or name == "gradient/norm":
            if name in updates[0]:
                out[name] = updates[0][name]
        else:
            out[name] = sum(values) / len(values)
    if updates:
        out["loss/policy"] = out.pop("loss")
        out["gradient/norm_max"] = max(u["gradient/norm"] for u in updates)
    return out


def _plain(memory: dict[str, Any], method: Method) -> dict[str, Any]:
    """The memory as a checkpoint would give it back, so that a resumed run sees no other."""
    try:
        return json.loads(json.dumps(memory))
    except (TypeError, ValueError) as e:
        raise OndolError(
            f"{type(method).__name__} keeps what is not plain JSON data in its memory: {e}",
            "keep numbers, strings, lists and dicts of them there",
        ) from e
