"""Decoding with fixed shapes: the same tokens as without, whoever else is in the slots, and nothing in it that a graph could not hold."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from float64 import exact
from forcing import drain
from ondol.engines.base import Request, Sampling
from ondol.engines.graphs import decode_step
from ondol.engines.torch import TorchEngine

CONTEXT = 256


def requests(turn: int, said: dict[str, list[int]]) -> list[Request]:
    """16 sessions of mixed lengths, of which every third rests each turn."""
    rng = random.Random(turn)
    out = []
    for i in range(16):
        more = [rng.randrange(4, 99) for _ in range(rng.choice([1, 3, 40]))]
        if (i + turn) % 3:
            said[f"{i}"] = [*said.get(f"{i}", []), *more]
            kind = Sampling(max_tokens=5 + i) if i % 2 else Sampling(temperature=0.7, top_k=9, max_tokens=4 + i)
            out.append(Request(f"{i}", said[f"{i}"], kind, (turn, i), end_ids=frozenset({3})))
    return out


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("max_batch, prefill_tokens", [(64, 2048), (12, 7), (1, 2048)])
def test_the_same_samples(family, max_batch, prefill_tokens):
    model, tokenizer = exact(family)
    settings = {"max_batch": max_batch, "prefill_tokens": prefill_tokens}
    plain, fixed = (TorchEngine(model, tokenizer, CONTEXT, **settings, cuda_graphs=on) for on in (False, True))
    said: list[dict[str, list[int]]] = [{}, {}]
    for turn in range(4):
        if turn == 3:  # as between two steps of training
            for engine in (plain, fixed):
                engine.sync(1)
            said = [{}, {}]
        want, got = (drain(e, requests(turn, s)) for e, s in zip((plain, fixed), said))
        assert want.keys() == got.keys()
        for session, a in want.items():
            b = got[session]
            assert (a.ids, a.finish, a.text) == (b.ids, b.finish, b.text)
            torch.testing.assert_close(a.logp, b.logp, atol=1e-10, rtol=0)
            for texts in said:
                texts[session] = [*texts[session], *a.ids]
    assert fixed._graphs is not None and fixed._graphs.replayed > fixed.stats.steps / 4
    assert len(fixed._graphs._steps) <= 6  # few shapes for many steps


def test_full_slots_go_the_plain_way():
    model, tokenizer = exact("llama")
    ids = list(range(4, 68))
    want, got = (
        drain(
            TorchEngine(model, tokenizer, CONTEXT, cuda_graphs=on),
            [Request(str(n), ids[:n], Sampling(temperature=0, max_tokens=300), (n,)) for n in (1, 64)],
        )
        for on in (False, True)
    )
    assert {k: (c.ids, c.finish) for k, c in want.items()} == {k: (c.ids, c.finish) for k, c in got.items()}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_nothing_in_a_step_depends_on_the_data(family):
    """With fake tensors any operation that had to look at a value raises; a CUDA graph could not hold it either."""
    model, tokenizer = exact(family)
    engine = TorchEngine(model, tokenizer, CONTEXT, pack_weights=False)
    drain(engine, [Request("0", [5, 6, 7], Sampling(max_tokens=4), (0,))])
    engine._cache.reserve(4, 64, 64, model)

    def step(ids, positions):
        return decode_step(model, engine._cache, ids, positions, 64)

    with torch.inference_mode(False), torch.no_grad():
        cache = engine._cache
        for store in (cache.k, cache.v):
            store[:] = [t.clone() for t in store]
        given = torch.tensor([[5, 6, 7, 8], [3, 2, 1, 0]])
        want = step(*given)
        for store in (cache.k, cache.v):
            store[:] = [t.clone() for t in store]
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            traced = make_fx(step)(*(mode.from_tensor(t) for t in given))
        assert len(list(traced.graph.nodes)) > 50 and want.shape == (4, model.config.get_text_config().vocab_size)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_captured_steps_give_the_same_samples(family):
    model, tokenizer = exact(family)
    model = copy.deepcopy(model).cuda()
    plain, fixed = (TorchEngine(model, tokenizer, CONTEXT, cuda_graphs=on) for on in (False, True))
    said: list[dict[str, list[int]]] = [{}, {}]
    for turn in range(3):
        want, got = (drain(e, requests(turn, s)) for e, s in zip((plain, fixed), said))
        assert {k: c.ids for k, c in want.items()} == {k: c.ids for k, c in got.items()}
        for session, a in want.items():
            torch.testing.assert_close(a.logp, got[session].logp, atol=1e-10, rtol=0)
            for texts in said:
                texts[session] = [*texts[session], *a.ids]
    assert fixed._graphs is not None and 0 < fixed._graphs.captured < fixed._graphs.replayed
