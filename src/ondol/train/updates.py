"""An update: packed batches in, an updated model out. What the loss is, others know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ondol.errors import OndolError
from ondol.methods.base import ActorCritic
from ondol.models import forward
from ondol.records import Batch
from ondol.train.critic import CriticLearner
from ondol.train.logprobs import log_probs, log_probs_of, target_states
from ondol.train.optimizer import Optimizer
from ondol.train.packing import Sequence_, pack

#: (logp [T], batch, reference log-probs [T] or None), all of the T trained targets only -> loss [T], per-token reports
LossFn = Callable[[Tensor, Batch, Tensor | None], tuple[Tensor, dict[str, Tensor]]]


class NotFinite(OndolError):
    """A loss or a gradient was NaN or infinite: nothing was updated. `batch` is the micro-batch in question."""

    def __init__(self, what: str, batch: Batch | None) -> None:
        super().__init__(what, "lower the learning rate, or look at the dumped batch; the last checkpoint is good")
        self.batch = batch

    def placed(self, where: str, path: Path) -> OndolError:
        """The same, naming where it happened, with the batch put aside in `path`.safetensors for whoever wants to look."""
        what = f"{self.what} at {where}"
        if self.batch is None:
            return OndolError(what, self.remedy)
        path = path.with_name(f"{path.name}.safetensors")
        try:
            dump_batch(self.batch, path)
        except Exception as failure:  # the disk, say: what matters is told all the same
            return OndolError(f"{what} (its batch could not be written: {failure})", self.remedy)
        return OndolError(f"{what}; the batch is in {path}", self.remedy)


@dataclass
class Totals:
    """Sums over the trained targets of an update; `loss` is the weighted one."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)
    targets: int = 0
    tokens: int = 0
    loss: float = 0.0

    def add(self, name: str, values: Tensor) -> None:
        if name.endswith("_max"):
            peak = values.max() if values.numel() else torch.zeros((), device=values.device)
            self.maxima[name] = torch.maximum(self.maxima[name], peak) if name in self.maxima else peak
        else:
            self.sums[name] = self.sums.get(name, torch.zeros((), device=values.device)) + values.sum()

    def count(self, batch: Batch) -> None:
        if not len(batch.source):  # idle: it keeps other processes company
            return
        self.targets += int(batch.trained.sum())
        self.tokens += len(batch.ids)

    @classmethod
    def together(cls, parts: Iterable[Totals]) -> Totals:
        """Of an update whose micro-batches were shared out."""
        out = cls()
        for part in parts:
            for name, value in part.sums.items():
                out.sums[name] = out.sums[name] + value if name in out.sums else value
            for name, value in part.maxima.items():
                out.maxima[name] = torch.maximum(out.maxima[name], value) if name in out.maxima else value
            out.targets += part.targets
            out.tokens += part.tokens
            out.loss += part.loss
        return out

    def metrics(self) -> dict[str, float]:
        """Means over the trained targets, maxima, and the tokens that it took."""
        out = {name: float(v) / max(self.targets, 1) for name, v in self.sums.items()}
        out |= {name: float(v) for name, v in self.maxima.items()}
        return out | {"learner/tokens": float(self.tokens)}


class Team(Protocol):
    """Processes that make one update together; see `ondol.train.parallel`.

    `sharded` says whether they hold one model between them, and so make every pass together.
    """

    sharded: bool

    def share(self, batches: Sequence[Batch]) -> list[Batch]:
        """The micro-batches that are this process's."""
        ...

    def combine(self, optimizers: Sequence[Optimizer], totals: Totals) -> Totals:
        """Sum the gradients over all processes, in place; everybody's totals together."""
        ...

    def agree(self, failure: BaseException | None = None) -> None:
        """All go on, or nobody does: raises in every process when one of them gives a failure."""
        ...


class Updater:
    """Updates a model, and its critic if it has one, on packed batches.

    Args:
        model: a causal LM whose attention was switched to ours.
        optimizer: over its trainable parameters.
        tokens_per_microbatch: memory follows this.
        share_prompts: compute each group's prompt once; off is the plain path.
        gradient_checkpointing: trade compute for memory.
        critic: for methods that need one.
        stop: called between micro-batches; raise in it to give up the update (nothing is changed then).
        team: those who share the micro-batches of each update; None: all are done here.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        tokens_per_microbatch: int = 1024,
        share_prompts: bool = True,
        gradient_checkpointing: bool = False,
        critic: CriticLearner | None = None,
        stop: Callable[[], None] = lambda: None,
        team: Team | None = None,
    ) -> None:
        self.team = team
        self.model, self.optimizer, self.stop = forward.prepare(model), optimizer, stop
        self.tokens_per_microbatch, self.share_prompts = tokens_per_microbatch, share_prompts
        self.reference: nn.Module | None = None
        self.critic = critic
        self.device = forward.head(model).device
        self.version = 0
        trunk = critic.critic.trunk if critic is not None else None
        for network in (model, trunk) if gradient_checkpointing else ():
            if network is None:
                continue
            forward.causal_lm(network).gradient_checkpointing_enable({"use_reentrant": False})
            network.train()  # transformers checkpoints in training mode only; these families have no dropout by default

    @property
    def updates(self) -> int:
        """Steps of its optimisers so far."""
        return self.optimizer.updates + (self.critic.optimizer.updates if self.critic is not None else 0)

    def pack(self, sequences: Sequence[Sequence_], *, whole_groups: bool = False) -> list[Batch]:
        return pack(sequences, self.tokens_per_microbatch, share_prompts=self.share_prompts, whole_groups=whole_groups)

    def gradient(self, batches: Sequence[Batch], loss_fn: LossFn, method: ActorCritic | None = None) -> Totals:
        """Accumulate the gradient of sum(weight * loss) over the micro-batches.

        With a `method` the critic's gradient is accumulated as well, into its own optimiser's parameters; where the trunk
        is shared, the policy's gradient has the value loss in it, times `value_coef`.
        """
        totals = Totals()
        for batch in batches:
            self.stop()
            batch = batch.to(self.device)
            states = target_states(self.model, batch)
            logp, entropy = log_probs_of(self.model, states, batch)
            reference = None
            if self.reference is not None:
                with torch.no_grad():
                    reference = log_probs(self.reference, batch)[0]
            trained = batch.trained
            # picked out, not multiplied by zero: the loss of a token outside may be NaN, and so may its gradient
            counted = batch.only(trained)
            losses, reports = logp[trained], {}
            if len(batch.source):  # an idle batch has no target, and methods need not know of such
                losses, reports = loss_fn(losses, counted, None if reference is None else reference[trained])
            loss = (losses * counted.weight.to(losses.dtype)).sum()
            self._settle(None if torch.isfinite(loss) else NotFinite("the loss is not finite", batch))
            if method is not None and self._critic.critic.shared:
                value = self._critic.critic.of_states(states[trained])
                (loss + method.value_coef * self._value_loss(value, batch, counted, method, totals)).backward()
            else:
                loss.backward()
                if method is not None:
                    value = self._critic.critic.values(self.model, batch)[trained]
                    self._value_loss(value, batch, counted, method, totals).backward()
            self.optimizer.collect()
            if method is not None:
                self._critic.optimizer.collect()
            totals.loss += loss.item()
            with torch.no_grad():
                totals.add("policy/entropy", entropy[trained])
                for name, values in reports.items():
                    totals.add(name, values)
                own = batch.sampled & (batch.version == self.version)
                gap = (logp - batch.logp.to(logp.dtype)).abs()[own]
                totals.add("mismatch/mean_abs", gap)
                totals.add("mismatch/abs_max", gap)
                totals.add("_own", own.to(gap.dtype))
            totals.count(batch)
        return totals

    def apply(self, batches: Sequence[Batch], loss_fn: LossFn, method: ActorCritic | None = None) -> dict[str, float]:
        """One optimiser update. Raises NotFinite, with nothing changed, when the loss or a gradient is not finite."""
        optimizers = [self.optimizer] if method is None else [self.optimizer, self._critic.optimizer]
        totals, norms, rates = self.update(optimizers, batches, lambda mine: self.gradient(mine, loss_fn, method))
        own = float(totals.sums.pop("_own", torch.zeros(())))
        mismatch = {"mismatch/max_abs": float(totals.maxima.pop("mismatch/abs_max", 0.0))}
        mismatch["mismatch/mean_abs"] = float(totals.sums.pop("mismatch/mean_abs", 0.0)) / max(own, 1)
        out = totals.metrics()
        out |= {"loss": totals.loss, "gradient/norm": norms[0], "learning_rate": rates[0]}
        if method is not None:
            out["value/gradient_norm"] = norms[1]
        # with nothing here that was sampled by the weights being trained there is nothing to compare
        return out | mismatch if own else out

    def update(
        self, optimizers: Sequence[Optimizer], batches: Sequence[Batch], gradient: Callable[[Sequence[Batch]], Totals]
    ) -> tuple[Totals, list[float], list[float]]:
        """Gradients, and a step of each optimiser, all or none: (what `gradient` gives, norms, learning rates)."""
        for optimizer in optimizers:
            optimizer.zero()
        try:
            found = gradient(batches if self.team is None else self.team.share(batches))
            if self.team is not None:
                found = self.team.combine(optimizers, found)
            norms = [optimizer.gradient_norm() for optimizer in optimizers]
            if not all(bool(torch.isfinite(norm)) for norm in norms):
                raise NotFinite("the gradient is not finite", batches[-1] if batches else None)
        except BaseException:
            for optimizer in optimizers:
                optimizer.zero()
            raise
        rates = [optimizer.learning_rate for optimizer in optimizers]
        if batches:
            for optimizer, norm in zip(optimizers, norms):
                optimizer.step(norm)
        return found, [float(norm) for norm in norms], rates

    def _settle(self, failure: NotFinite | None) -> None:
        """Raise it, if any; in all processes where they make every pass together, so that none waits for another's."""
        if self.team is not None and self.team.sharded:
            self.team.agree(failure)
        if failure is not None:
            raise failure

    # -- the critic ---------------------------------------------------------------------------------------------

    @property
    def _critic(self) -> CriticLearner:
        if self.critic is None:
            raise OndolError("this method needs a critic and the learner has none", "give it one: Learner(critic=...)")
        return self.critic

    def _value_loss(self, value: Tensor, batch: Batch, counted: Batch, method: ActorCritic, totals: Totals) -> Tensor:
        """The critic's loss, its tokens weighted as the policy's."""
        old, returns, weight = (v.to(value.dtype) for v in (counted.value, counted.returns, counted.weight))
        losses = method.value_loss(value, old, returns)
        loss = (losses * weight).sum()
        self._settle(None if torch.isfinite(loss) else NotFinite("the critic's loss is not finite", batch))
        totals.add("value/loss", losses.detach())
        return loss

    def value_gradient(self, method: ActorCritic, batches: Sequence[Batch]) -> Totals:
        """Accumulate the gradient of the value loss alone, for the critic's optimiser."""
        totals = Totals()
        for batch in batches:
            self.stop()
            batch = batch.to(self.device)
            value = self._critic.critic.values(self.model, batch)[batch.trained]
            self._value_loss(value, batch, batch.only(batch.trained), method, totals).backward()
            self._critic.optimizer.collect()
            totals.count(batch)
        return totals


def dump_batch(batch: Batch, path: Path) -> None:
    """Write a micro-batch for later inspection: tensors by name, segments as rows (start, end, parent index)."""
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {k: v.cpu().contiguous() for k, v in vars(batch).items() if isinstance(v, Tensor)}
    index = {id(s): i for i, s in enumerate(batch.segments)}
    rows = [(s.start, s.end, index[id(s.parent)] if s.parent is not None else -1) for s in batch.segments]
    tensors["segments"] = torch.tensor(rows, dtype=torch.long).reshape(-1, 3)
    save_file(tensors, str(path))
