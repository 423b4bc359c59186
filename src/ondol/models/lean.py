"""A Llama layer for decoding with packed weights: its operations one after the other, without the modules around them.

At a few rows a token's time is the reading of the weights, and calling modules costs half as much again. The operations and their order
are those of transformers' layer, so the numbers are the same.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from ondol.models.fused import rms_norm
from ondol.models.packed import is_fused_mlp, is_packed, packed_linear


def _forward(
    self: Any, hidden_states: Tensor, *, position_embeddings: Any = None, ondol_attend: Any = None, **others: Any
) -> Tensor:
    """hidden_states [1, N, width], cos and sin [1, N, dim] -> [1, N, width]."""
    attention, mlp = self.self_attn, self.mlp
    if ondol_attend is None or not (is_packed(attention) and is_packed(mlp) and is_packed(attention.o_proj)):
        more = {"position_embeddings": position_embeddings, "ondol_attend": ondol_attend}
        return type(self).forward(self, hidden_states, **more, **others)
    norm, dim, count = self.input_layernorm, attention.head_dim, hidden_states.shape[1]
    queries = attention.q_proj.out_features // dim
    keys = queries + attention.k_proj.out_features // dim
    states = hidden_states[0]
    x = rms_norm(states, norm.weight, norm.variance_epsilon)[0]
    heads = packed_linear(attention, x).view(count, -1, dim)
    cos, sin = (t[0].unsqueeze(1) for t in position_embeddings)
    plain = heads[:, :keys]
    half = torch.cat((-plain[..., dim // 2 :], plain[..., : dim // 2]), dim=-1)
    turned = (plain * cos + half * sin).transpose(0, 1)
    seen = ondol_attend(
        attention.layer_idx,
        turned[:queries],
        turned[queries:],
        heads[:, keys:].transpose(0, 1),
        attention.scaling,
        None,
    )
    states = states + packed_linear(attention.o_proj, seen.reshape(count, -1), attention.o_proj.bias)
    norm = self.post_attention_layernorm
    x = rms_norm(states, norm.weight, norm.variance_epsilon)[0]
    return (states + mlp.forward(x)).unsqueeze(0)


def make_lean(model: nn.Module) -> int:
    """Switch the layers that this is for, in place; how many. Elsewhere, and in training, they are as before."""
    layers: list[Any] = [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]
    layers = [layer for layer in layers if is_fused_mlp(layer.mlp)]
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)
    return len(layers)
