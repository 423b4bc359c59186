"""AdamW with float32 master weights where the model itself is in half precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ondol.recipe import OptimizerSettings
from ondol.train.shards import placed_like, squared_norm


class Optimizer:
    """AdamW over a model's trainable parameters.

    Half-precision parameters get a float32 master copy, and a float32 sum of their gradients: updates and terms too
    small for bfloat16 would otherwise be lost. Of parameters in shards (`ondol.train.shards`) it keeps this process's.
    """

    def __init__(self, model: nn.Module, settings: OptimizerSettings) -> None:
        self.settings = settings
        self.names, self.live = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
        self.masters = [
            p.detach().float().requires_grad_() if p.dtype in (torch.bfloat16, torch.float16) else p for p in self.live
        ]
        self.updates = 0
        shards = [p for p in self.masters if isinstance(p, DTensor)]
        others = [p for p in self.masters if not isinstance(p, DTensor)]
        self._adam = torch.optim.AdamW(
            [{"params": group} for group in (others, shards) if group],  # a fused step takes one kind or the other
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def zero(self) -> None:
        for p in (*self.live, *self.masters):
            p.grad = None

    def collect(self) -> None:
        """Add the gradients of half-precision parameters to their float32 sums; called after each backward pass."""
        for master, live in zip(self.masters, self.live):
            if master is not live and live.grad is not None:
                wide = live.grad.float()
                master.grad = wide if master.grad is None else master.grad.add_(wide)
                live.grad = None

    def gradient_norm(self) -> Tensor:
        """L2 norm of all gradients, float32 or wider, before clipping."""
        self.collect()
        grads = [p.grad for p in self.masters if p.grad is not None]
        if not grads:
            return torch.zeros(())
        shards = [g for g in grads if isinstance(g, DTensor)]
        if shards:
            others = [g for g in grads if not isinstance(g, DTensor)]
            return (squared_norm(others, _wide(grads[0])) + squared_norm(shards, _wide(grads[0]))).sqrt()
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=_wide(g)) for g in grads]))

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        s = self.settings
        return s.learning_rate * min(1.0, (self.updates + 1) / s.warmup_steps) if s.warmup_steps else s.learning_rate

    def step(self, norm: Tensor) -> None:
        """Clip by `norm` (from `gradient_norm`) and update."""
        self.collect()
        scale = min(1.0, self.settings.max_gradient_norm / (float(norm) + 1e-6))
        if scale < 1:
            for p in self.masters:
                if p.grad is not None:
                    p.grad.mul_(scale)
        for group in self._adam.param_groups:
            group["lr"] = self.learning_rate
        self._adam.step()
        self.updates += 1
        with torch.no_grad():
            for master, live in zip(self.masters, self.live):
                if master is not live:
                    live.copy_(master)
        self.zero()

    def state(self) -> dict[str, Tensor]:
        """Everything that the next update depends on, as tensors by name."""
        out = {"updates": torch.tensor(self.updates)}
        for name, master, live in zip(self.names, self.masters, self.live):
            if master is not live:
                out[f"master/{name}"] = master.detach()
            for key, value in self._adam.state.get(master, {}).items():
                out[f"{key}/{name}"] = value
        return out

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`, exactly."""
        self.updates = int(state["updates"])
        self._adam.state.clear()
        with torch.no_grad():
            for name, master, live in zip(self.names, self.masters, self.live):
                if master is not live:
                    master.copy_(placed_like(state[f"master/{name}"], master))
                keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}/{name}" in state]
                if keys:
                    own = {k: state[f"{k}/{name}"] for k in keys}
                    self._adam.state[master] = {
                        k: (v.to(master.device) if k == "step" else placed_like(v, master)).clone()
                        for k, v in own.items()
                    }


def _wide(t: Tensor) -> torch.dtype:
    return t.dtype if t.dtype in (torch.float32, torch.float64) else torch.float32
