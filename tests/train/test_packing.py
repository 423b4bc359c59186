"""Packing: every token of every trajectory once, seeing just what it saw when it was sampled."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ondol.records import Batch, Problem, Trajectory
from ondol.train.packing import Sequence_, pack


def trajectory(prompt: list[int], masks: list[tuple[int, bool, bool]], number: int = 0) -> Trajectory:
    """`masks`: (id, sampled, trained) of each token after the prompt."""
    ids = prompt + [m[0] for m in masks]
    n = len(prompt)
    sampled, trained = [False] * n + [m[1] for m in masks], [False] * n + [m[2] for m in masks]
    return Trajectory(
        (0, 0, number),
        Problem("p", "q", "a"),
        ids,
        n,
        sampled,
        trained,
        [-0.5 - i if s else 0.0 for i, s in enumerate(sampled)],
        [number if s else -1 for s in sampled],
        temperature=0.7,
    )


tokens = st.integers(0, 5)  # few, so that prompts agree and one is often a beginning of another
masks = st.lists(st.tuples(tokens, st.booleans(), st.booleans()), max_size=12)
sequences = st.lists(st.tuples(st.lists(tokens, max_size=4), masks), max_size=10)


def context(batch: Batch, at: int) -> list[tuple[int, int]]:
    """(id, position) of every token that flat index `at` sees, itself last."""
    (own,) = [s for s in batch.segments if s.start <= at < s.end]
    seen, parent = list(range(own.start, at + 1)), own.parent
    while parent is not None:
        seen = [*range(parent.start, parent.end), *seen]
        parent = parent.parent
    return [(int(batch.ids[i]), int(batch.positions[i])) for i in seen]


@settings(max_examples=200, deadline=None)
@given(made=sequences, budget=st.integers(1, 80), share=st.booleans())
def test_targets_see_what_they_saw(made, budget, share):
    ts = [trajectory(p, m, i) for i, (p, m) in enumerate(made)]
    batches = pack([Sequence_(t, i, i + 0.25, 1 / (i + 1)) for i, t in enumerate(ts)], budget, share_prompts=share)
    rows = []
    for batch in batches:
        covered = sorted((s.start, s.end) for s in batch.segments)
        assert [a for a, _ in covered] == [0, *(b for _, b in covered)][: len(covered)]  # side by side, no gap
        assert sum(b - a for a, b in covered) == len(batch.ids) == len(batch.positions)
        assert batch.temperature == 0.7
        for k in range(len(batch.target)):
            rows.append((batch, k))
    expected = [(i, at) for i, t in enumerate(ts) for at in range(1, len(t.ids)) if t.sampled[at] or t.trained[at]]
    assert len(rows) == len(expected)
    for (batch, k), (i, at) in zip(rows, expected):
        t = ts[i]
        assert context(batch, int(batch.source[k])) == list(zip(t.ids[:at], range(at)))
        found = tuple(
            getattr(batch, name)[k].item()
            for name in ("target", "sequence", "sampled", "trained", "logp", "version", "advantage", "weight")
        )
        weight = 1 / (i + 1) if t.trained[at] else 0.0
        assert found == (t.ids[at], i, t.sampled[at], t.trained[at], t.logp[at], t.version[at], i + 0.25, weight)


@settings(max_examples=200, deadline=None)
@given(made=sequences, budget=st.integers(1, 80), share=st.booleans())
def test_budget(made, budget, share):
    ts = [trajectory(p, m, i) for i, (p, m) in enumerate(made)]
    batches = pack([Sequence_(t, i, 0.0, 1.0) for i, t in enumerate(ts)], budget, share_prompts=share)
    assert sum(b.sequence_tokens for b in batches) == sum(len(t.ids) for t in ts)
    for batch in batches:
        assert len(batch.ids) <= max(budget, max((len(t.ids) for t in ts), default=0))
        assert len(batch.ids) <= budget or batch.sequence_tokens == len(batch.ids)  # an outsize one is alone
        assert share or len(batch.ids) == batch.sequence_tokens
    if ts:
        assert len(pack([Sequence_(t, i, 0.0, 1.0) for i, t in enumerate(ts)], 10**6)) == 1


def test_a_prompt_is_shared_once():
    ts = [trajectory([1, 2, 3], [(4, True, True)] * 5, i) for i in range(8)]
    (batch,) = pack([Sequence_(t, i, 0.0, 1.0) for i, t in enumerate(ts)], 1000)
    assert (len(batch.ids), batch.sequence_tokens) == (3 + 8 * 5, 8 * 8)
    assert sum(s.parent is None for s in batch.segments) == 1


def test_masks_of_the_prompt():
    t = trajectory([1, 2, 3], [(4, True, True)])
    t.trained[1] = True
    with pytest.raises(ValueError, match="prompt_length"):
        pack([Sequence_(t, 0, 0.0, 1.0)], 100)
    t.prompt_length = 0
    (batch,) = pack([Sequence_(t, 0, 0.0, 1.0)], 100)
    assert batch.target.tolist() == [2, 4] and batch.source.tolist() == [0, 2]
    assert torch.equal(batch.weight, torch.ones(2, dtype=torch.float64))


def test_a_common_beginning_is_shared_once():
    masks = [(50, True, True), (51, True, True)]
    two = [Sequence_(trajectory([7, 8, 9, n], masks), n, 1.0, 1.0) for n in (10, 11)]
    shared, apart = pack(two, 100), pack(two, 100, share_prompts=False)
    assert shared[0].ids.tolist() == [7, 8, 9, 10, 50, 51, 11, 50, 51]
    assert shared[0].positions.tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert len(apart[0].ids) == shared[0].sequence_tokens == 12
