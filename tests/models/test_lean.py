"""Layers without their modules sample, to the last bit, what they sample with them."""

from __future__ import annotations

import copy

import pytest
import torch
from test_packed import make, sample, wide

from ondol.models.fused import fuse
from ondol.models.lean import make_lean
from ondol.models.packed import PackedWeights
from ondol.records import Problem, Trajectory
from ondol.train.logprobs import log_probs
from ondol.train.packing import Sequence_, pack


def plain_layers(model):
    """As they were before an engine switched them."""
    for layer in model.model.layers:
        layer.__dict__.pop("forward", None)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_same_to_the_last_bit(tiny_families, interleaved) -> None:
    model, tokenizer = tiny_families["llama"]
    model = wide(model)
    fuse(model)
    engine = make(copy.deepcopy(model), tokenizer, True)
    plain_layers(engine.model)
    want = sample(engine)
    engine = make(model, tokenizer, True)
    if interleaved:  # a second engine over the same model, as an evaluation has
        sample(make(model, tokenizer, True))
    ran = []
    layer = model.model.layers[0]
    inner = layer.self_attn.forward
    layer.self_attn.forward = lambda *a, **k: ran.append(1) or inner(*a, **k)
    assert sample(engine) == want
    assert not ran, "the lean path was not taken"


def test_switched_and_counted(tiny_families) -> None:
    model = wide(tiny_families["llama"][0])
    assert make_lean(model) == 0, "its MLPs are not fused"
    fuse(model)
    assert make_lean(model) == len(model.model.layers)
    other = copy.deepcopy(tiny_families["qwen3"][0])
    fuse(other)
    assert make_lean(other) == 0


def test_the_learner_sees_no_difference(tiny_families) -> None:
    model = wide(tiny_families["llama"][0])
    fuse(model)
    answers = [[4, 9, 11], [5, 6], [7, 8, 4, 12]]
    [batch] = pack(
        [
            Sequence_(
                Trajectory(
                    (0, 0, i),
                    Problem("p", "q", "a"),
                    [3, 5, 7, *ids],
                    3,
                    *[[False] * 3 + [True] * len(ids)] * 2,
                    [0.0] * 3 + [-1.0] * len(ids),
                    [-1] * 3 + [0] * len(ids),
                ),
                i,
                1.0,
                1.0,
            )
            for i, ids in enumerate(answers)
        ],
        400,
        share_prompts=True,
    )
    lean = copy.deepcopy(model)
    make_lean(lean)
    PackedWeights(lean).refresh()
    found = []
    for m in (model, lean):
        logp = log_probs(m, batch)[0]
        logp.sum().backward()
        found.append((logp.detach(), [p.grad for p in m.parameters()]))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1]))
