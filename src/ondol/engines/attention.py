"""What the embedded engine attends to: keys and values in slots, and the attention of new tokens over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ondol.models import forward

_GROW = 64  # KV length grows in steps of this many tokens


class Slots:
    """Keys and values of all layers: each [slots, kv_heads, length, dim], grown when needed."""

    def __init__(self, config: Any) -> None:
        text = config.get_text_config()
        self.layers: int = text.num_hidden_layers
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        self.heads: int = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        self.dim: int = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    def reserve(self, slots: int, length: int, reach: int, model: torch.nn.Module) -> None:
        """Make room for so many slots of so many tokens, keeping what is there.

        When it has to grow it grows by half, but never past `reach`, the most tokens that the rows can come to: each growth copies
        everything.
        """
        weight = forward.head(model)
        have_slots, have_length = (self.k[0].shape[0], self.k[0].shape[2]) if self.k else (0, 0)
        if slots <= have_slots and length <= have_length:
            return
        slots = max(slots, have_slots)
        if length > have_length:
            length = max(length, min(length + length // 2, reach))
            length = -(-length // _GROW) * _GROW
        else:
            length = have_length
        for store in (self.k, self.v):
            for layer in range(self.layers):
                grown = weight.new_zeros(slots, self.heads, length, self.dim)
                if store[layer:]:
                    grown[:have_slots, :, :have_length] = store[layer]
                    store[layer] = grown
                else:
                    store.append(grown)

    def copy(self, source: int, target: int, length: int) -> None:
        for store in (self.k, self.v):
            for tensor in store:
                tensor[target, :, :length] = tensor[source, :, :length]

    def free(self) -> None:
        self.k, self.v = [], []


class CachedAttention:
    """Attention of new tokens over their slots: rows with one new token together, longer ones one by one."""

    def __init__(self, cache: Slots, rows: list[tuple[int, int, int]], device: torch.device) -> None:
        self.cache, self.device = cache, device
        start = 0
        single: list[tuple[int, int, int]] = []  # (flat index, slot, position)
        self.spans: list[tuple[slice, int, int]] = []  # (flat slice, slot, cached)
        for slot, cached, new in rows:
            if new == 1:
                single.append((start, slot, cached))
            else:
                self.spans.append((slice(start, start + new), slot, cached))
            start += new
        self.total = start
        columns = list(zip(*single)) if single else [(), (), ()]
        self.flat = torch.tensor(columns[0], dtype=torch.long, device=device)
        self.slots = torch.tensor(columns[1], dtype=torch.long, device=device)
        self.positions = torch.tensor(columns[2], dtype=torch.long, device=device)
        self.longest = max(columns[2], default=-1) + 1
        # A view of slots 0..width-1 costs attention for the unused ones among them, a gather costs a copy of the keys
        # and values of each layer: the view is cheaper as long as half of it is used.
        self.width = max(columns[1], default=-1) + 1
        self.dense = 2 * len(single) >= self.width
        self.rows = torch.zeros(self.width, dtype=torch.long, device=device) if self.dense else self.positions
        if self.dense:
            self.rows[self.slots] = self.positions  # an unused slot looks at its first position, and nobody at it
        self.masks: dict[Any, Tensor] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        keys, values = self.cache.k[layer], self.cache.v[layer]
        heads, _, dim = q.shape
        out = torch.empty(self.total, heads, dim, dtype=q.dtype, device=q.device) if self.spans else q
        for span, slot, cached in self.spans:
            end = cached + span.stop - span.start
            keys[slot, :, cached:end] = k[:, span]
            values[slot, :, cached:end] = v[:, span]
            attended = scaled_dot_product_attention(
                q[:, span].unsqueeze(0),
                keys[slot : slot + 1, :, :end],
                values[slot : slot + 1, :, :end],
                attn_mask=self._span_mask(cached, end, window),
                is_causal=cached == 0 and (window is None or end <= window),
                scale=scale,
                enable_gqa=keys.shape[1] != heads,
            )
            out[span] = attended[0].transpose(0, 1)
        n, kv_heads = len(self.flat), keys.shape[1]
        if n:
            if self.spans:
                q, k, v = q[:, self.flat], k[:, self.flat], v[:, self.flat]
            if n == 1:  # a plain copy costs less than an indexed one
                keys[self.width - 1, :, self.longest - 1], values[self.width - 1, :, self.longest - 1] = (
                    k[:, 0],
                    v[:, 0],
                )
            else:
                keys[self.slots, :, self.positions] = k.transpose(0, 1)
                values[self.slots, :, self.positions] = v.transpose(0, 1)
            # the query heads that share a key head go in as that many "positions": no copies of keys
            grouped = q.transpose(0, 1).reshape(n, kv_heads, heads // kv_heads, dim)
            full = self.dense and n == self.width
            if self.dense and not full:
                grouped = grouped.new_zeros(self.width, *grouped.shape[1:]).index_copy_(0, self.slots, grouped)
            rows = slice(0, self.width) if self.dense else self.slots
            attended = _attend_rows(
                grouped,
                keys[rows, :, : self.longest],
                values[rows, :, : self.longest],
                self._row_mask(window, (kv_heads, heads // kv_heads), q.dtype),
                scale,
            )
            if self.dense and not full:
                attended = attended[self.slots]
            attended = attended.reshape(n, heads, dim)
            if not self.spans:
                return attended
            out[self.flat] = attended
        return out

    def _row_mask(self, window: int | None, heads: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """[rows, kv_heads, group, length], made once a pass."""
        if ("row", window) not in self.masks:
            at = torch.arange(self.longest, device=self.device)
            hidden = at > self.rows.unsqueeze(-1)
            if window is not None:
                hidden |= at <= self.rows.unsqueeze(-1) - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill_(hidden, -torch.inf)
            self.masks["row", window] = mask[:, None, None, :].expand(-1, *heads, -1).contiguous()
        return self.masks["row", window]

    def _span_mask(self, cached: int, end: int, window: int | None) -> Tensor | None:
        if cached == 0 and (window is None or end <= window):
            return None
        key = (cached, end, window)
        if key not in self.masks:
            query = torch.arange(cached, end, device=self.device).unsqueeze(-1)
            at = torch.arange(end, device=self.device)
            mask = at <= query
            if window is not None:
                mask &= at > query - window
            self.masks[key] = mask
        return self.masks[key]


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of few queries to long keys: q [n, kv_heads, group, dim], k and v [n, kv_heads, length, dim] -> as q.

    On a CPU in full precision as two batched matrix products, a fifth quicker than the fused kernel when there are three queries to a key
    head (docs/speed.md); their scores would be rounded in bfloat16.
    """
    if q.device.type != "cpu" or q.dtype not in (torch.float32, torch.float64):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    n, kv_heads, group, dim = q.shape
    scores = torch.baddbmm(mask.flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(dim=-1), v.flatten(0, 1)).view(n, kv_heads, group, dim)
