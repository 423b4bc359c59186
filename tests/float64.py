"""Models that are float64 all through: transformers' norms compute in float32 whatever the model's dtype."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import nn

from conftest import make_family


class _Norm(nn.Module):
    def __init__(self, old: Any, offset: float) -> None:
        super().__init__()
        self.weight, self.offset = old.weight, offset
        self.eps: float = getattr(old, "variance_epsilon", None) or old.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (self.weight + self.offset)


def widen(model: nn.Module) -> nn.Module:
    """The model in float64, its RMS norms replaced (in place) by ones that keep the dtype."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, _Norm(child, 1.0 if "Gemma" in type(child).__name__ else 0.0))
    return model.double()


@functools.cache
def _exact(family: str) -> tuple[Any, Any]:
    model, tokenizer = make_family(family)
    return widen(model), tokenizer


def exact(family: str = "llama") -> tuple[Any, Any]:
    """A fresh float64 copy of `make_family(family)`, and its tokenizer."""
    model, tokenizer = _exact(family)
    return copy.deepcopy(model), tokenizer
