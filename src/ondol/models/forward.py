"""The one forward pass that engine and learner share, over any transformers decoder.

Tokens of many sequences are laid out flat, `[N]`, with their own positions; which token sees which is the
business of an `Attend` object: the engine's looks into its KV slots, the learner's at packed segments. Layers,
projections, norms and RoPE stay transformers' own modules, so every family that takes a pluggable attention works,
and sampling and learning cannot disagree about the network; where `lean` and `fused` say the same with fewer operations, tests
hold them to that.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ondol.errors import OndolError

_NAME = "ondol"


class Attend(Protocol):
    """Attention over a flat batch.

    q [heads, N, dim], k and v [kv_heads, N, dim] -> [N, heads, dim]. `window` is the number of positions a
    sliding-window layer sees (itself included), None for full attention.
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor: ...


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    ondol_attend: Attend | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if ondol_attend is None:
        raise OndolError(
            "this model's attention was switched by ondol", "call ondol.models.forward.hidden(), or load it anew"
        )
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise OndolError(
            "attention with soft-capping or sinks is not supported", "use a Llama, Qwen2/3 or Gemma 3 model"
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = ondol_attend(module.layer_idx, query[0], key[0], value[0], scale, sliding_window)
    return out.unsqueeze(0), None


AttentionInterface.register(_NAME, _attention)


def prepare(model: nn.Module) -> nn.Module:
    """Switch a transformers causal LM to our attention (in place; idempotent)."""
    base = causal_lm(model)
    if base.config._attn_implementation != _NAME:
        base.set_attn_implementation(_NAME)
    return model


def causal_lm(model: nn.Module) -> Any:
    """The transformers causal LM inside `model` (which may be wrapped for LoRA)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def hidden(model: nn.Module, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
    """Last hidden states [N, width] (after the final norm) of a flat batch: ids [N], positions [N].

    A model that was not switched yet is: with attention of its own it would take the flat batch for one sequence.
    """
    base = causal_lm(prepare(model))
    out = base.get_decoder()(
        input_ids=ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False, ondol_attend=attend
    )
    return out.last_hidden_state[0]


def head(model: nn.Module) -> Tensor:
    """Weight of the output layer, [vocabulary, width]."""
    return causal_lm(model).get_output_embeddings().weight


def logits(model: nn.Module, states: Tensor) -> Tensor:
    """Output logits [N, vocabulary] in the model's dtype, before temperature."""
    base = causal_lm(model)
    out = base.get_output_embeddings()(states)
    cap = softcap(model)
    return out if cap is None else torch.tanh(out / cap) * cap


def softcap(model: nn.Module) -> float | None:
    """The family's final logit soft-cap, if it has one."""
    return getattr(causal_lm(model).config, "final_logit_softcapping", None)
