"""Decoding with fixed shapes, so that a GPU replays a step as one CUDA graph instead of launching each of its kernels.

A step covers the slots 0 to width - 1 and the first `length` positions of each, both rounded up, so that few graphs serve many steps. A slot in which nobody
decodes takes part with a token at its next free position: nobody sees that before it is written anew. Not run on a GPU so far; what is captured is tested
on a CPU: the same tokens, and no operation that depends on the data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ondol.models import forward

_ROWS = 8  # widths are multiples of this many slots
_TOKENS = 256  # lengths are multiples of this many positions
_WARM = 3  # runs before a capture, as torch asks for


class DecodeGraphs:
    """Steps in which every row has one new token.

    Args:
        cache: the engine's slots; when their tensors are new ones, graphs are captured anew.
    """

    def __init__(self, model: torch.nn.Module, cache: Any) -> None:
        self.model, self.cache = model, cache
        self.replayed = self.captured = 0
        self._steps: dict[tuple[int, int], tuple[Tensor, Callable[[], Tensor]]] = {}
        self._of: Tensor | None = None
        self._pool: Any = None

    def run(self, tokens: dict[int, tuple[int, int]], idle: dict[int, int]) -> Tensor | None:
        """Logits [rows, vocabulary], in the order of `tokens`; None when the slots have no room for the idle ones' part in it.

        Args:
            tokens: slot -> (token, its position) of the rows that decode.
            idle: slot -> tokens that it holds, of the sessions that do not.
        """
        keys = self.cache.k[0]
        slots, most = keys.shape[0], keys.shape[2]
        width = min(-(-(max(tokens) + 1) // _ROWS) * _ROWS, slots)
        length = min(-(-(max(p for _, p in tokens.values()) + 1) // _TOKENS) * _TOKENS, most)
        rows = [tokens.get(slot, (0, idle.get(slot, 0))) for slot in range(width)]
        if any(position >= most for _, position in rows):
            return None
        if self._of is not keys:
            self._steps.clear()
            self._of = keys
        if (width, length) not in self._steps:
            self._steps[width, length] = self._made(width, length, keys.device)
        given, step = self._steps[width, length]
        given.copy_(torch.tensor(rows, dtype=torch.long).T)
        self.replayed += 1
        return step()[torch.tensor(list(tokens), device=keys.device)]

    def _made(self, width: int, length: int, device: torch.device) -> tuple[Tensor, Callable[[], Tensor]]:
        """(ids and positions [2, width], what computes logits [width, vocabulary] of what they hold)."""
        given = torch.zeros(2, width, dtype=torch.long, device=device)
        plain = lambda: decode_step(self.model, self.cache, given[0], given[1], length)  # noqa: E731
        if device.type != "cuda":
            return given, plain
        # what warming up writes at position 0 must not be anybody's: it is put back
        first = [(t, t[:width, :, :1].clone()) for store in (self.cache.k, self.cache.v) for t in store]
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM):
                plain()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = plain()
        self._pool = self._pool or graph.pool()
        for tensor, kept in first:
            tensor[:width, :, :1] = kept
        self.captured += 1

        def replay() -> Tensor:
            graph.replay()
            return out

        return given, replay


def decode_step(model: torch.nn.Module, cache: Any, ids: Tensor, positions: Tensor, length: int) -> Tensor:
    """One new token in each of the first slots: ids [W], positions [W] -> logits [W, vocabulary]. No shape or branch depends on their values."""
    states = forward.hidden(model, ids, positions, _FixedAttention(cache, positions, length))
    return forward.logits(model, states)


class _FixedAttention:
    """Each row over the first `length` positions of its slot, of which it sees those up to its own."""

    def __init__(self, cache: Any, positions: Tensor, length: int) -> None:
        self.cache, self.positions, self.length = cache, positions, length
        self.rows = torch.arange(len(positions), device=positions.device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        keys, values = self.cache.k[layer], self.cache.v[layer]
        heads, width, dim = q.shape
        kv_heads = keys.shape[1]
        keys[self.rows, :, self.positions] = k.transpose(0, 1)
        values[self.rows, :, self.positions] = v.transpose(0, 1)
        at = torch.arange(self.length, device=q.device)
        seen = at <= self.positions[:, None]
        if window is not None:
            seen &= at > self.positions[:, None] - window
        # the query heads that share a key head go in as that many "positions": no copies of keys
        attended = scaled_dot_product_attention(
            q.transpose(0, 1).reshape(width, kv_heads, heads // kv_heads, dim),
            keys[:width, :, : self.length],
            values[:width, :, : self.length],
            attn_mask=seen[:, None, None, :],
            scale=scale,
        )
        return attended.reshape(width, heads, dim)
