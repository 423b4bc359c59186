"""Packed weights sample what plain ones do, and follow the weights."""

from __future__ import annotations

import copy

import torch

from ondol.engines.base import Request, Sampling
from ondol.engines.torch import TorchEngine
from ondol.models.packed import PackedWeights


def sample(engine: TorchEngine, count: int = 5) -> dict[str, tuple[list[int], list[float]]]:
    out = {}
    for i in range(count):
        ids = list(range(3, 7 + 3 * i))
        engine.submit(Request(f"{i}", ids, Sampling(max_tokens=4 + 3 * i, temperature=1.0), (1, i)))
    while engine.busy:
        for done in engine.step():
            out[done.session] = (done.ids, done.logp)
            engine.release(done.session)
    return out


def make(model, tokenizer, pack: bool) -> TorchEngine:
    return TorchEngine(model, tokenizer, 128, max_batch=3, pack_weights=pack)


def layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [m for m in model.modules() if "ondol_packed" in m.__dict__]


def wide(model):
    """float32, and wide enough for packing."""
    import transformers as tf

    config = copy.deepcopy(model.config)
    config.hidden_size, config.intermediate_size, config.head_dim = 192, 256, 64
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(config).eval()


def test_the_same_samples(tiny_families) -> None:
    model, tokenizer = tiny_families["llama"]
    model = wide(model)
    plain = sample(make(copy.deepcopy(model), tokenizer, False))
    engine = make(model, tokenizer, True)
    fast = sample(engine)
    assert len(layers_of(model)) >= 6, "nothing was packed"
    assert {k: v[0] for k, v in fast.items()} == {k: v[0] for k, v in plain.items()}
    for key, (_, logp) in fast.items():
        torch.testing.assert_close(torch.tensor(logp), torch.tensor(plain[key][1]), rtol=1e-4, atol=1e-4)
    engine.sync(1)
    assert not layers_of(model), "sync gives the memory back"


def test_changed_weights_are_packed_anew(tiny_families) -> None:
    model, tokenizer = tiny_families["llama"]
    model = wide(model)
    engine = make(model, tokenizer, True)
    sample(engine)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    engine._rows.clear()  # a new session, and nobody told the engine of the change
    engine._cache.free()
    got = sample(engine)
    want = sample(make(copy.deepcopy(model), tokenizer, False))
    assert {k: v[0] for k, v in got.items()} == {k: v[0] for k, v in want.items()}


def test_training_never_sees_them(tiny_families) -> None:
    model = wide(tiny_families["llama"][0])
    packed = PackedWeights(model)
    packed.refresh()
    layer = packed.layers[0]
    x = torch.randn(3, layer.in_features)
    layer.ondol_packed.weight = torch.ops.mkldnn._reorder_linear_weight(torch.zeros_like(layer.weight), 64)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    with torch.inference_mode():
        assert not layer(x).any()


def test_float64_is_left_alone(tiny_families) -> None:
    assert not PackedWeights(wide(tiny_families["llama"][0]).double()).layers


def test_a_copied_model_packs_its_own(tiny_families) -> None:
    model = wide(tiny_families["llama"][0])
    PackedWeights(model).refresh()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    with torch.inference_mode():
        layer = next(m for m in twin.modules() if isinstance(m, torch.nn.Linear))
        assert not layer(torch.randn(2, layer.in_features)).any()


def test_projections_in_one_product_are_those_of_their_own_input(tiny_families) -> None:
    """Queries, keys and values of one input are one product; a family that asked for keys of another input would get those."""
    model = wide(tiny_families["llama"][0])
    packed = PackedWeights(model)
    packed.refresh()
    attention = model.model.layers[0].self_attn
    assert "ondol_packed" in attention.__dict__
    x, other = torch.randn(2, 1, 3, attention.q_proj.in_features).unbind()
    with torch.inference_mode():
        for asked in ((x, x, x), (x, other, x), (x, x, other), (other, other, other)):
            for layer, of in zip((attention.q_proj, attention.k_proj, attention.v_proj), asked):
                want = torch.nn.functional.linear(of, layer.weight)
                torch.testing.assert_close(layer(of), want, rtol=1e-4, atol=1e-5)
