"""Norms and MLPs that keep less for the backward pass and touch memory less often; the same numbers up to rounding.

A plain transformers layer keeps, for each token, about six intermediate values of the width of its MLP and eight of its own
width. Here a norm keeps its input and one number, and an MLP its input and two products; the rest is computed again.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from ondol.models.packed import is_packed, packed_linear


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm, and what it multiplied by before the weight."""
    wide = x.float()
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight), scale


class _RMSNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps), statistics in float32 as transformers has them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, scale = rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        x, weight, scale = ctx.saved_tensors
        unit = x.float() * scale
        d = grads[0].float()
        slopes = d * unit
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = slopes.reshape(-1, d.shape[-1]).sum(dim=0).to(weight.dtype)
        weight = weight.float()
        along = torch.mv(slopes.reshape(-1, d.shape[-1]), weight).div_(d.shape[-1]).view_as(scale)
        d = torch.mul(d, weight, out=slopes)
        return d.sub_(unit.mul_(along)).mul_(scale).to(x.dtype), d_weight, None


class _GatedMLP(torch.autograd.Function):
    """(silu(x gate.T) * (x up.T)) down.T"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        g, u = linear(x, gate), linear(x, up)
        ctx.save_for_backward(x, g, u, gate, up, down)
        return linear(silu(g).mul_(u), down)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        x, g, u, gate, up, down = ctx.saved_tensors
        flat = (-1, x.shape[-1])
        d, rows = grads[0].reshape(-1, grads[0].shape[-1]), x.reshape(flat)
        g, u = g.reshape(-1, g.shape[-1]), u.reshape(-1, u.shape[-1])
        open_ = silu(g)
        d_gate = d_up = d_down = d_x = None
        if ctx.needs_input_grad[3]:
            d_down = d.T @ (open_ * u)
        d_h = d @ down
        d_u = d_h * open_
        d_g = torch.ops.aten.silu_backward(d_h.mul_(u), g)
        if ctx.needs_input_grad[1]:
            d_gate = d_g.T @ rows
        if ctx.needs_input_grad[2]:
            d_up = d_u.T @ rows
        if ctx.needs_input_grad[0]:
            d_x = torch.addmm(d_g @ gate, d_u, up).view_as(x)
        return d_x, d_gate, d_up, d_down


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    if torch.is_inference_mode_enabled():  # no graph to keep anything for, and a third of the time at one row
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)[0]
    return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)  # type: ignore[return-value]


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    if is_packed(self):
        gate, up = packed_linear(self, x).chunk(2, dim=-1)
        return self.down_proj(silu(gate).mul_(up))
    return _GatedMLP.apply(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)  # type: ignore[return-value]


def _plain_linear(module: Any) -> bool:
    return type(module) is nn.Linear and module.bias is None


def fuse(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Switch what can be to the functions above, in place; part -> (switched, all of them).

    Norms of the Llama and Qwen kind (Gemma's weigh by 1 + weight and stay), and SiLU-gated MLPs of plain linear layers (those with
    adapters or biases stay). float64 stays as it is: transformers' norms are float32 inside, which ours would not repeat.
    """
    found: dict[str, tuple[int, int]] = {}
    wide = any(p.dtype == torch.float64 for p in model.parameters())
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            part, run, fits = (
                "norms",
                _norm_forward,
                hasattr(module, "variance_epsilon") and not kind.startswith("Gemma"),
            )
        elif kind.endswith("MLP") and hasattr(module, "gate_proj"):
            layers = (getattr(module, n, None) for n in ("gate_proj", "up_proj", "down_proj"))
            silu_gated = type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
            part, run, fits = "mlps", _mlp_forward, silu_gated and all(map(_plain_linear, layers))
        else:
            continue
        switched, count = found.get(part, (0, 0))
        fits = fits and not wide
        if fits:
            module.forward = types.MethodType(run, module)
            module.__dict__["ondol_fused_mlp"] = part == "mlps"
        found[part] = (switched + fits, count + 1)
    return found
