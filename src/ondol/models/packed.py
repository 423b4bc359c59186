"""Weights laid out for oneDNN's kernels, for sampling on a CPU: products of few rows run about twice as fast (docs/speed.md).

A plain product of a few rows with a weight first rearranges the whole weight for the vector unit, at every call. Here it is done once for
each version of the weights, at the price of a second copy while sampling. Training (outside inference mode) uses the plain weights.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_ROWS = 64  # a hint to oneDNN: the layout serves any number of rows


class _Packed:
    """A packed weight; a copied model packs its own."""

    def __init__(self, weight: Tensor | None) -> None:
        self.weight = weight

    def __deepcopy__(self, memo: Any) -> _Packed:
        return _Packed(None)


def is_packed(layer: Any) -> bool:
    """Whether a linear layer uses packed weights now."""
    packed = layer.__dict__.get("ondol_packed")
    return packed is not None and packed.weight is not None and torch.is_inference_mode_enabled()


def packed_linear(layer: Any, input: Tensor, bias: Tensor | None = None) -> Tensor:
    """`input` times the packed weight of a layer (`is_packed`)."""
    return torch.ops.mkldnn._linear_pointwise(input, layer.ondol_packed.weight, bias, "none", [], "")


def _forward(self: Any, input: Tensor) -> Tensor:
    return packed_linear(self, input, self.bias) if is_packed(self) else linear(input, self.weight, self.bias)


def _query(self: Any, input: Tensor) -> Tensor:
    """Queries; keys and values, which come of the same product, are kept until they are asked for."""
    attention = self.ondol_attention
    if not is_packed(attention):
        return linear(input, self.weight)
    layers = (self, attention.k_proj, attention.v_proj)
    q, k, v = packed_linear(attention, input).split([layer.out_features for layer in layers], dim=-1)
    for layer, value in zip(layers[1:], (k, v)):
        layer.__dict__["ondol_kept"] = (input, value)
    return q


def _key_or_value(self: Any, input: Tensor) -> Tensor:
    of, value = self.__dict__.pop("ondol_kept", (None, None))
    return value if of is input and value is not None else linear(input, self.weight)


class PackedWeights:
    """The packed linear layers of a model; `refresh` before sampling, `free` after.

    Query, key and value projections become one, which the attention holds; so do the gate and up projections of fused MLPs
    (`ondol.models.fused`).
    """

    def __init__(self, model: nn.Module) -> None:
        mlps: list[Any] = [m for m in model.modules() if is_fused_mlp(m)]
        mlps = [m for m in mlps if _packable(m.gate_proj.weight) and _packable(m.up_proj.weight)]
        attentions: list[Any] = [m for m in model.modules() if _is_joinable(m)]
        paired = {id(layer) for m in mlps for layer in (m.gate_proj, m.up_proj)}
        paired |= {id(layer) for m in attentions for layer in (m.q_proj, m.k_proj, m.v_proj)}
        self.layers = [
            m for m in model.modules() if type(m) is nn.Linear and _packable(m.weight) and id(m) not in paired
        ]
        self._sources: list[tuple[Any, list[Any]]] = [(m, [m]) for m in self.layers]
        self._sources += [(m, [m.gate_proj, m.up_proj]) for m in mlps]
        self._sources += [(m, [m.q_proj, m.k_proj, m.v_proj]) for m in attentions]
        for m in attentions:
            m.q_proj.__dict__["ondol_attention"] = m
            for layer, run in ((m.q_proj, _query), (m.k_proj, _key_or_value), (m.v_proj, _key_or_value)):
                layer.forward = types.MethodType(run, layer)
        self._stamp: int | None = None

    def refresh(self) -> None:
        """Pack what was never packed or has changed since. Cheap when nothing has."""
        stamp = sum(layer.weight._version for _, layers in self._sources for layer in layers)
        if stamp == self._stamp and all("ondol_packed" in holder.__dict__ for holder, _ in self._sources):
            return
        for holder, layers in self._sources:
            weight = (
                torch.cat([layer.weight.detach() for layer in layers]) if len(layers) > 1 else layers[0].weight.detach()
            )
            holder.__dict__["ondol_packed"] = _Packed(torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS))
            if type(holder) is nn.Linear and "forward" not in holder.__dict__:
                holder.forward = types.MethodType(_forward, holder)
        self._stamp = stamp

    def free(self) -> None:
        for holder, _ in self._sources:
            holder.__dict__.pop("ondol_packed", None)
        self._stamp = None


def is_fused_mlp(module: nn.Module) -> bool:
    return module.__dict__.get("ondol_fused_mlp", False)


def _is_joinable(module: Any) -> bool:
    """An attention whose three projections are plain, without biases."""
    layers = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    return all(type(layer) is nn.Linear and layer.bias is None and _packable(layer.weight) for layer in layers)


def _packable(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16) or weight.numel() < 1 << 14:
        return False
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
