"""The shared forward pass, given a model that nobody has prepared."""

from __future__ import annotations

import copy

import torch

from ondol.models import forward
from ondol.records import Segment
from ondol.train.logprobs import SegmentAttention


def test_a_fresh_model_keeps_sequences_apart(tiny_families):
    """Two sequences laid out flat are two sequences, though the model comes with an attention of its own."""
    fresh, ready = copy.deepcopy(tiny_families["llama"][0]), copy.deepcopy(tiny_families["llama"][0])
    fresh.set_attn_implementation("sdpa")
    forward.prepare(ready)
    ids, positions = torch.tensor([5, 6, 7, 8, 9]), torch.tensor([0, 1, 2, 0, 1])
    segments = [Segment(0, 3, None), Segment(3, 5, None)]
    with torch.no_grad():
        together = forward.hidden(fresh, ids, positions, SegmentAttention(segments, torch.device("cpu")))
        alone = [
            forward.hidden(
                ready,
                part,
                torch.arange(len(part)),
                SegmentAttention([Segment(0, len(part), None)], torch.device("cpu")),
            )
            for part in (ids[:3], ids[3:])
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
