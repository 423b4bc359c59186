"""Attention over packed segments in one kernel, for GPUs: FlexAttention with a mask of segments.

The plain path (`ondol.train.logprobs.SegmentAttention`) makes a call for each shape of segment. On a CPU torch has FlexAttention's forward pass only, which is held to the
plain path in tests; its backward pass, and all of it on a GPU, were not run so far.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ondol.errors import OndolError
from ondol.models import forward
from ondol.records import Segment


def use_flex(model: nn.Module) -> None:
    """Have the learner compute this model's attention so. Raises OndolError where it could not learn."""
    if forward.head(model).device.type != "cuda":
        raise OndolError("train.flex_attention is for GPUs: on a CPU it has no backward pass", "leave it out")
    forward.causal_lm(model).ondol_flex = True


def uses_flex(model: nn.Module) -> bool:
    return getattr(forward.causal_lm(model), "ondol_flex", False)


class FlexSegments:
    """As `SegmentAttention`: each token sees its segment's ancestors whole, and its own segment up to itself."""

    def __init__(self, segments: list[Segment], device: torch.device) -> None:
        number = {id(s): i for i, s in enumerate(segments)}
        self.device, self.length = device, max(s.end for s in segments)
        of, position = torch.zeros(self.length, dtype=torch.long), torch.zeros(self.length, dtype=torch.long)
        above = torch.zeros(len(segments), len(segments), dtype=torch.bool)
        for s in segments:
            before, parent = 0, s.parent
            while parent is not None:
                above[number[id(s)], number[id(parent)]] = True
                before += parent.end - parent.start
                parent = parent.parent
            of[s.start : s.end] = number[id(s)]
            position[s.start : s.end] = torch.arange(before, before + s.end - s.start)
        #: the segment of each token [N], its place in its own line of segments [N], and whether segment i hangs under segment j [S, S]
        self.of, self.position, self.above = of.to(device), position.to(device), above.to(device)
        self.masks: dict[int | None, BlockMask] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        out = _attention(q.device.type)(
            q[None],
            k[None],
            v[None],
            block_mask=self._mask(window),
            scale=scale,
            enable_gqa=q.shape[0] != k.shape[0],
        )
        return out[0].transpose(0, 1)

    def _mask(self, window: int | None) -> BlockMask:
        if window not in self.masks:
            of, position, above = self.of, self.position, self.above

            def sees(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
                seen = above[of[i], of[j]] | ((of[i] == of[j]) & (j <= i))
                return seen if window is None else seen & (position[i] - position[j] < window)

            self.masks[window] = create_block_mask(sees, None, None, self.length, self.length, device=str(self.device))
        return self.masks[window]


@lru_cache(maxsize=2)
def _attention(device: str) -> Callable[..., Any]:
    """Compiled on a GPU, where it is one kernel; elsewhere as it is written."""
    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention
