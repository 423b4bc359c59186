"""Log-probabilities of a packed batch's targets, and their gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ondol.errors import OndolError
from ondol.models import forward
from ondol.records import Batch, Segment
from ondol.train.flex import FlexSegments, uses_flex

#: rows x vocabulary up to which the output layer's probabilities are kept for the backward pass; beyond it they are computed again
HEAD_BUDGET = 1 << 27
#: rows x vocabulary that it works on at a time: what is not kept never takes more
HEAD_CHUNK = 1 << 24


def target_states(model: nn.Module, batch: Batch) -> Tensor:
    """Hidden states [T, width] from which the targets of `batch` are predicted."""
    kind = FlexSegments if uses_flex(model) else SegmentAttention
    attend = kind(batch.segments, batch.ids.device)
    return forward.hidden(model, batch.ids, batch.positions, attend)[batch.source]


def log_probs(model: nn.Module, batch: Batch, *, head_budget: int = HEAD_BUDGET) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of the targets of `batch` at its temperature.

    Only positions that predict a target meet the output layer. Returns (logp [T], differentiable; entropy [T],
    not differentiable), float32 or wider.
    """
    return log_probs_of(model, target_states(model, batch), batch, head_budget=head_budget)


def log_probs_of(
    model: nn.Module, states: Tensor, batch: Batch, *, head_budget: int = HEAD_BUDGET
) -> tuple[Tensor, Tensor]:
    """The same from the targets' hidden states [T, width]."""
    if getattr(forward.causal_lm(model).get_output_embeddings(), "bias", None) is not None:
        raise OndolError("an output layer with a bias is not supported", "use a Llama, Qwen or Gemma model")
    return _Head.apply(  # type: ignore[return-value]
        states, forward.head(model), batch.target, batch.temperature, forward.softcap(model), head_budget
    )


class SegmentAttention:
    """Attention over packed segments: each sees its ancestors whole and itself causally.

    Segments of the same length and depth go through one attention call.
    """

    def __init__(self, segments: list[Segment], device: torch.device) -> None:
        self.device = device
        self.masks: dict[tuple[int, int, int | None], Tensor] = {}
        kinds: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for s in segments:
            chain, parent = [s], s.parent
            while parent is not None:
                chain.insert(0, parent)
                parent = parent.parent
            own = torch.arange(s.start, s.end)
            seen = torch.cat([torch.arange(c.start, c.end) for c in chain])
            kinds.setdefault((len(own), len(seen)), []).append((own, seen))
        #: (new tokens, seen tokens, where the new ones are [members, new], where the seen ones are [members, seen])
        self.kinds = [
            (
                new,
                seen,
                torch.stack([o for o, _ in members]).to(device),
                torch.stack([c for _, c in members]).to(device),
            )
            for (new, seen), members in kinds.items()
        ]
        order = torch.cat([own.reshape(-1) for _, _, own, _ in self.kinds])
        self.back = torch.empty_like(order)
        self.back[order] = torch.arange(len(order), device=device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        gqa, out = q.shape[0] != k.shape[0], []
        for new, total, own, seen in self.kinds:
            plain = new == total and (window is None or total <= window)
            attended = scaled_dot_product_attention(
                _pick(q, own),
                _pick(k, seen),
                _pick(v, seen),
                attn_mask=None if plain else self._mask(new, total, window, q.dtype),
                is_causal=plain,
                scale=scale,
                enable_gqa=gqa,
            )
            out.append(attended.transpose(1, 2).reshape(-1, q.shape[0], q.shape[2]))
        return torch.cat(out).index_select(0, self.back)

    def _mask(self, new: int, total: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """0 where seen, -inf where not, [new, total], for the last `new` of `total` positions."""
        key = (new, total, window)
        if key not in self.masks:
            query = torch.arange(total - new, total, device=self.device).unsqueeze(-1)
            at = torch.arange(total, device=self.device)
            hidden = at > query
            if window is not None:
                hidden |= at <= query - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=self.device)
            self.masks[key] = mask.masked_fill_(hidden, -torch.inf)
        return self.masks[key]


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """x [heads, N, dim] at index [members, n] -> [members, heads, n, dim]."""
    return x.index_select(1, index.reshape(-1)).view(x.shape[0], *index.shape, -1).transpose(0, 1)


class _Head(torch.autograd.Function):
    """logp = log softmax(states @ weight.T / temperature)[target], in chunks of rows.

    d logp / d logits = (onehot - p) / temperature: the backward pass needs only p, kept when it fits the budget and
    recomputed otherwise.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, target: Tensor, temperature: float, cap: float | None, budget: int
    ):
        rows, vocabulary = states.shape[0], weight.shape[0]
        chunk = max(1, min(rows, budget // vocabulary, HEAD_CHUNK // vocabulary))
        wide = torch.promote_types(states.dtype, torch.float32)
        kept = states.new_empty(rows, vocabulary, dtype=wide) if rows * vocabulary <= budget else None
        logp, entropy = [], []
        for at in range(0, rows, chunk):
            z = _scaled_logits(states[at : at + chunk], weight, temperature, cap)
            lse = z.logsumexp(dim=-1, keepdim=True)
            z -= lse
            logp.append(z.gather(-1, target[at : at + chunk].unsqueeze(-1)).squeeze(-1))
            p = torch.exp(z, out=None if kept is None else kept[at : at + chunk])
            entropy.append(-z.clamp_(min=-1e4).mul_(p).sum(dim=-1))
        ctx.save_for_backward(states, weight, target, kept)
        ctx.temperature, ctx.cap, ctx.chunk = temperature, cap, chunk
        empty = torch.zeros(0, dtype=wide, device=states.device)
        both = (torch.cat(logp), torch.cat(entropy)) if rows else (empty, empty.clone())
        ctx.mark_non_differentiable(both[1])
        return both

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        states, weight, target, kept = ctx.saved_tensors
        grad = grads[0]
        d_states = torch.zeros_like(states)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for at in range(0, states.shape[0], ctx.chunk):
            part = slice(at, at + ctx.chunk)
            rows = states[part]
            z = None
            if kept is None or ctx.cap is not None:
                z = _scaled_logits(rows, weight, ctx.temperature, ctx.cap)
            p = kept[part] if kept is not None else torch.softmax(z, dim=-1)  # type: ignore[arg-type]
            d = p * -grad[part].unsqueeze(-1)
            d.scatter_add_(-1, target[part].unsqueeze(-1), grad[part].unsqueeze(-1))
            d /= ctx.temperature
            if ctx.cap is not None and z is not None:
                d *= 1 - (z * ctx.temperature / ctx.cap) ** 2
            d = d.to(rows.dtype)
            d_states[part] = d @ weight
            if d_weight is not None:
                d_weight.addmm_(d.T, rows)
        return d_states, d_weight, None, None, None, None


def _scaled_logits(states: Tensor, weight: Tensor, temperature: float, cap: float | None) -> Tensor:
    z = states @ weight.T
    z = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
    if cap is not None:
        z = torch.tanh(z / cap) * cap
    return z / temperature if temperature != 1 else z
