"""The learner: packed batches in, an updated model out. It knows no method."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ondol.errors import OndolError
from ondol.methods.base import Method, TokenInputs
from ondol.models import forward
from ondol.records import Batch, Group, Trajectory
from ondol.train.logprobs import log_probs
from ondol.train.optimizer import Optimizer
from ondol.train.packing import Sequence_, pack

#: (logp [T], batch, reference log-probs [T] or None), all of the T trained targets only -> loss [T], per-token reports
LossFn = Callable[[Tensor, Batch, Tensor | None], tuple[Tensor, dict[str, Tensor]]]


class NotFinite(OndolError):
    """A loss or a gradient was NaN or infinite: nothing was updated. `batch` is the micro-batch in question."""

    def __init__(self, what: str, batch: Batch | None) -> None:
        super().__init__(what, "lower the learning rate, or look at the dumped batch; the last checkpoint is good")
        self.batch = batch


@dataclass
class Totals:
    """Sums over the trained targets of an update."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)
    targets: int = 0
    tokens: int = 0
    sequence_tokens: int = 0

    def add(self, name: str, values: Tensor) -> None:
        if name.endswith("_max"):
            peak = values.max() if values.numel() else torch.zeros((), device=values.device)
            self.maxima[name] = torch.maximum(self.maxima[name], peak) if name in self.maxima else peak
        else:
            self.sums[name] = self.sums.get(name, torch.zeros((), device=values.device)) + values.sum()


class Learner:
    """Updates a model on packed batches.

    Args:
        model: a causal LM whose attention was switched to ours.
        optimizer: over its trainable parameters.
        tokens_per_microbatch: memory follows this.
        share_prompts: compute each group's prompt once; off is the plain path.
        gradient_checkpointing: trade compute for memory.
        stop: called between micro-batches; raise in it to give up the update (nothing is changed then).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        tokens_per_microbatch: int = 1024,
        share_prompts: bool = True,
        gradient_checkpointing: bool = False,
        stop: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.optimizer, self.stop = forward.prepare(model), optimizer, stop
        self.tokens_per_microbatch, self.share_prompts = tokens_per_microbatch, share_prompts
        self.reference: nn.Module | None = None
        self.device = forward.head(model).device
        self.version = 0
        if gradient_checkpointing:
            causal = forward.causal_lm(model)
            causal.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()  # transformers checkpoints in training mode only; these families have no dropout by default

    def pack(self, sequences: Sequence[Sequence_]) -> list[Batch]:
        return pack(sequences, self.tokens_per_microbatch, share_prompts=self.share_prompts)

    def gradient(self, batches: Sequence[Batch], loss_fn: LossFn) -> tuple[Totals, float]:
        """Accumulate the gradient of sum(weight * loss) over all micro-batches; the totals and that sum."""
        totals, loss_sum = Totals(), 0.0
        for batch in batches:
            self.stop()
            batch = batch.to(self.device)
            logp, entropy = log_probs(self.model, batch)
            reference = None
            if self.reference is not None:
                with torch.no_grad():
                    reference = log_probs(self.reference, batch)[0]
            trained = batch.trained
            # picked out, not multiplied by zero: the loss of a token outside may be NaN, and so may its gradient
            counted = _only(batch, trained)
            losses, reports = loss_fn(logp[trained], counted, None if reference is None else reference[trained])
            loss = (losses * counted.weight.to(losses.dtype)).sum()
            if not torch.isfinite(loss):
                raise NotFinite("the loss is not finite", batch)
            loss.backward()
            self.optimizer.collect()
            loss_sum += loss.item()
            with torch.no_grad():
                totals.add("policy/entropy", entropy[trained])
                for name, values in reports.items():
                    totals.add(name, values)
                own = batch.sampled & (batch.version == self.version)
                gap = (logp - batch.logp.to(logp.dtype)).abs()[own]
                totals.add("mismatch/mean_abs", gap)
                totals.add("mismatch/abs_max", gap)
                totals.add("_own", own.to(gap.dtype))
            totals.targets += int(trained.sum())
            totals.tokens += len(batch.ids)
            totals.sequence_tokens += batch.sequence_tokens
        return totals, loss_sum

    def apply(self, batches: Sequence[Batch], loss_fn: LossFn) -> dict[str, float]:
        """One optimiser update. Raises NotFinite, with nothing changed, when the loss or a gradient is not finite."""
        self.optimizer.zero()
        try:
            totals, loss = self.gradient(batches, loss_fn)
            norm = self.optimizer.gradient_norm()
            if not torch.isfinite(norm):
                raise NotFinite("the gradient is not finite", batches[-1] if batches else None)
        except BaseException:
            self.optimizer.zero()
            raise
        rate = self.optimizer.learning_rate
        if batches:
            self.optimizer.step(norm)
        count, own = max(totals.targets, 1), float(totals.sums.pop("_own", torch.zeros(())))
        out = {name: float(v) / count for name, v in totals.sums.items() if name != "mismatch/mean_abs"}
        out |= {name: float(v) for name, v in totals.maxima.items()}
        out["mismatch/mean_abs"] = float(totals.sums.get("mismatch/mean_abs", torch.zeros(()))) / max(own, 1)
        out["mismatch/max_abs"] = out.pop("mismatch/abs_max", 0.0)
        out |= {
            "loss": loss,
            "gradient/norm": float(norm),
            "learning_rate": rate,
            "learner/tokens": float(totals.tokens),
        }
        if own == 0:  # nothing here was sampled by the weights being trained: there is nothing to compare
            del out["mismatch/max_abs"], out["mismatch/mean_abs"]
        return out

    # -- reinforcement learning ---------------------------------------------------------------------------------

    def reinforce(self, groups: list[Group], method: Method) -> dict[str, float]:
        """One batch of rollouts: filter, advantages, pack, update. Returns metrics of the first update, and counts."""
        started = time.perf_counter()
        kept = method.keep(groups)
        trajectories: list[Trajectory] = [t for g in kept for t in g.trajectories]
        if not trajectories:
            raise OndolError(
                f"the method's filters kept none of {len(groups)} groups", "loosen them, or give an easier task"
            )
        if any(t.turns and not t.ids for t in trajectories):
            raise OndolError(
                "these trajectories are text without token ids (an endpoint sampled them): nothing can be learned from them",
                "sample with the embedded engine to train; endpoints are for evaluation and judging",
            )
        group = torch.tensor([i for i, g in enumerate(kept) for _ in g.trajectories])
        rewards = torch.tensor([t.reward for t in trajectories], dtype=torch.float64)
        if not torch.isfinite(rewards).all():
            bad = [t.key for t in trajectories if not math.isfinite(t.reward)][:3]
            raise OndolError(f"rewards are not finite (first trajectories: {bad})", "look at the verifier")
        advantages = method.advantages(rewards, group)
        metrics: dict[str, float] = {}
        tokens = 0.0
        for epoch in range(method.epochs):
            for n, members in enumerate(_split(group.tolist(), method.minibatches)):
                lengths = torch.tensor([sum(trajectories[i].trained) for i in members], dtype=torch.float64)
                weights = method.token_weights(lengths)
                sequences = [
                    Sequence_(trajectories[i], i, float(advantages[i]), float(w))
                    for i, w in zip(members, weights)
                    if float(advantages[i]) != 0 or not method.skip_zero_advantage
                ]
                batches = self.pack(sequences)
                update = self.apply(batches, lambda *a: _method_loss(method, *a))
                tokens += update.pop("learner/tokens")
                update["loss/policy"] = update.pop("loss")
                if epoch == n == 0:
                    metrics = update  # the first update of a step has equal weights on both sides: its mismatch counts
                else:
                    for name in ("policy/clip_share", "policy/ratio_max", "gradient/norm"):
                        if name in update:
                            metrics[name] = max(metrics.get(name, 0.0), update[name])
        seconds = time.perf_counter() - started
        zero = sum(bool((advantages[group == i] == 0).all()) for i in range(len(kept)))
        metrics |= {
            "groups/kept": float(len(kept)),
            "groups/zero_advantage_share": zero / len(kept),
            "learner/tokens": tokens,
            "learner/seconds": seconds,
            "learner/tokens_per_s": tokens / seconds,
        }
        return metrics

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


def _only(batch: Batch, targets: Tensor) -> Batch:
    """The batch with some of its targets, mask [T]."""
    names = ("source", "target", "sequence", "sampled", "trained", "logp", "version", "advantage", "weight")
    return dataclasses.replace(batch, **{n: getattr(batch, n)[targets] for n in names})


def _method_loss(
    method: Method, logp: Tensor, batch: Batch, reference: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    cast = {"dtype": logp.dtype, "device": logp.device}
    return method.token_loss(
        TokenInputs(logp, batch.logp.to(**cast), reference, batch.advantage.to(**cast), batch.sequence)
    )


def _split(group: list[int], parts: int) -> list[list[int]]:
    """Indices of trajectories in `parts` runs of whole groups, in order."""
    groups = sorted(set(group))
    size = -(-len(groups) // parts)
    chosen = [set(groups[i : i + size]) for i in range(0, len(groups), size)]
    return [[i for i, g in enumerate(group) if g in c] for c in chosen]


def dump_batch(batch: Batch, path: Path) -> None:
    """Write a micro-batch for later inspection: tensors by name, segments as rows (start, end, parent index)."""
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {k: v.cpu().contiguous() for k, v in vars(batch).items() if isinstance(v, Tensor)}
    index = {id(s): i for i, s in enumerate(batch.segments)}
    rows = [(s.start, s.end, index[id(s.parent)] if s.parent is not None else -1) for s in batch.segments]
    tensors["segments"] = torch.tensor(rows, dtype=torch.long).reshape(-1, 3)
    save_file(tensors, str(path))
