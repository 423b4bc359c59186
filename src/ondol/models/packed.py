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


def _forward(self: Any, input: Tensor) -> Tensor:
    if not is_packed(self):
        return linear(input, self.weight, self.bias)
    return torch.ops.mkldnn._linear_pointwise(input, self.ondol_packed.weight, self.bias, "none", [], "")


class PackedWeights:
    """The packed linear layers of a model; `refresh` before sampling, `free` after."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = [m for m in model.modules() if type(m) is nn.Linear and _packable(m.weight)]
        self._stamp: int | None = None

    def refresh(self) -> None:
        """Pack what was never packed or has changed since. Cheap when nothing has."""
        stamp = sum(m.weight._version for m in self.layers)
        if stamp == self._stamp and all("ondol_packed" in m.__dict__ for m in self.layers):
            return
        for m in self.layers:
            m.__dict__["ondol_packed"] = _Packed(torch.ops.mkldnn._reorder_linear_weight(m.weight.detach(), _ROWS))
            if "forward" not in m.__dict__:
                m.forward = types.MethodType(_forward, m)
        self._stamp = stamp

    def free(self) -> None:
        for m in self.layers:
            m.__dict__.pop("ondol_packed", None)
        self._stamp = None


def _packable(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16) or weight.numel() < 1 << 14:
        return False
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
