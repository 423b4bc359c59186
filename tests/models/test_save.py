"""Saving, LoRA and checkpoint weights, on every family."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ondol.errors import OndolError
from ondol.models.load import LoadedModel
from ondol.models.lora import LoraSettings, apply_lora, has_lora, merged
from ondol.models.save import load_weights, save_model, weights

FAMILIES = ["llama", "qwen2", "qwen3", "gemma3"]
IDS = torch.randint(4, 100, (2, 20), generator=torch.Generator().manual_seed(0))


def loaded(pair, **changes) -> LoadedModel:
    model, tokenizer = pair
    return LoadedModel(changes.get("model", model), tokenizer, None, "test", "somewhere", 256)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def with_lora(pair, **settings):
    """A copy of the model with adapters that do something (B is zero at the start)."""
    model = apply_lora(copy.deepcopy(pair[0]), LoraSettings(rank=4, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_model_is_the_same_model(tiny_families, family, tmp_path):
    model, tokenizer = tiny_families[family]
    folder = save_model(loaded(tiny_families[family]), tmp_path / "out")
    again, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(again) is type(model)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(logits(model), logits(again))
    tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert tied == (family in ("llama", "gemma3"))
    # AutoTokenizer gives every qwen2 model Qwen's own tokenizer, which this test's model does not have
    back = (PreTrainedTokenizerFast if family == "qwen2" else AutoTokenizer).from_pretrained(folder)
    text = "<|im_start|>user\nHello 12?<|im_end|>\n"
    assert back(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert back.chat_template == tokenizer.chat_template
    assert {p.name for p in tmp_path.iterdir()} == {"out"}  # nothing temporary is left


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_begins_unchanged_trains_alone_and_merges(tiny_families, family, tmp_path):
    base = tiny_families[family][0]
    fresh = apply_lora(copy.deepcopy(base), LoraSettings(rank=4))
    assert torch.equal(logits(base), logits(fresh))
    trainable = {n for n, p in fresh.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in fresh.named_parameters() if ".lora_" in n}
    assert len(trainable) == 2 * 7 * 2  # A and B of seven linear layers in two blocks; never the head

    model = with_lora(tiny_families[family])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    changed = logits(model)
    assert (changed - logits(base)).abs().max() > 0.01
    folder = save_model(loaded(tiny_families[family], model=model), tmp_path / "out")
    again, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not has_lora(again)
    torch.testing.assert_close(logits(again), changed, rtol=1e-4, atol=1e-4)
    # merging did not touch the live model
    assert has_lora(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(logits(model), changed)


def test_our_own_attention_does_not_travel_with_the_model(tiny_families, tmp_path):
    from ondol.models.forward import prepare

    pair = tiny_families["gemma3"]
    model = prepare(copy.deepcopy(pair[0]))
    folder = save_model(loaded(pair, model=model), tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.config._attn_implementation == "sdpa"
    assert torch.equal(logits(again), logits(pair[0]))


def test_merged_against_the_formula(tiny_families):
    model, base = with_lora(tiny_families["qwen2"], alpha=6.0), tiny_families["qwen2"][0]
    state, plain = merged(model), base.state_dict()
    assert state.keys() == plain.keys()
    layer = model.model.layers[1].self_attn.q_proj
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    name = "model.layers.1.self_attn.q_proj"
    torch.testing.assert_close(state[f"{name}.weight"], plain[f"{name}.weight"] + 6.0 / 4 * product)
    assert torch.equal(state[f"{name}.bias"], plain[f"{name}.bias"])
    assert torch.equal(state["model.norm.weight"], plain["model.norm.weight"])
    assert merged(base).keys() == plain.keys()


def test_adapters_alone_load_with_peft(tiny_families, tmp_path):
    from peft import PeftModel

    model = with_lora(tiny_families["llama"])
    folder = save_model(loaded(tiny_families["llama"], model=model), tmp_path / "adapter", merge_lora=False)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "somewhere"
    again = PeftModel.from_pretrained(copy.deepcopy(tiny_families["llama"][0]), str(folder))
    assert torch.equal(logits(again), logits(model))


def test_lora_seed_dtype_and_global_stream(tiny_families):
    base = tiny_families["llama"][0]
    before = torch.get_rng_state()
    a = apply_lora(copy.deepcopy(base), LoraSettings(rank=2, seed=1))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    b = apply_lora(copy.deepcopy(base), LoraSettings(rank=2, seed=1))
    c = apply_lora(copy.deepcopy(base), LoraSettings(rank=2, seed=2))
    assert all(torch.equal(x, weights(b)[k]) for k, x in weights(a).items())
    assert any(not torch.equal(x, weights(c)[k]) for k, x in weights(a).items())
    half = apply_lora(copy.deepcopy(base).bfloat16(), LoraSettings(rank=2))
    assert {v.dtype for v in weights(half).values()} == {torch.float32}
    assert {v.dtype for v in merged(half).values()} == {torch.bfloat16}
    assert half(IDS).logits.dtype == torch.bfloat16


def test_lora_mistakes(tiny_families, monkeypatch):
    base = copy.deepcopy(tiny_families["llama"][0])
    with pytest.raises(OndolError, match="no linear layer 'query'") as e:
        apply_lora(base, LoraSettings(targets=("query",)))
    assert "q_proj" in str(e.value.remedy)
    with pytest.raises(OndolError, match="tied"):
        apply_lora(base, LoraSettings(targets=("lm_head",)))
    apply_lora(base, LoraSettings(targets=("q_proj",)))
    assert len(weights(base)) == 4
    with pytest.raises(OndolError, match="already"):
        apply_lora(base, LoraSettings())
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(OndolError, match=r"ondol\[lora\]"):
        apply_lora(copy.deepcopy(tiny_families["llama"][0]), LoraSettings())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [False, True])
def test_checkpoint_round_trip_is_exact(tiny_families, family, lora, tmp_path):
    pair = tiny_families[family]
    model = with_lora(pair) if lora else copy.deepcopy(pair[0])
    state = weights(model)
    assert all((".lora_" in name) == lora for name in state)
    tied = pair[0].config.tie_word_embeddings
    if not lora:
        assert ("lm_head.weight" in state) == (not tied)
    save_file(state, tmp_path / "w.safetensors")
    other = with_lora(pair, seed=9) if lora else copy.deepcopy(pair[0])
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    addresses = [p.data_ptr() for p in other.parameters()]
    assert not torch.equal(logits(other), logits(model))
    load_weights(other, tmp_path / "w.safetensors")
    assert [p.data_ptr() for p in other.parameters()] == addresses  # in place: an optimiser keeps its parameters
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    assert torch.equal(logits(other), logits(model))


def test_wrong_checkpoints_change_nothing(tiny_families, tmp_path):
    model = copy.deepcopy(tiny_families["llama"][0])
    before = {k: v.clone() for k, v in weights(model).items()}
    good = {k: v + 1 for k, v in before.items()}
    file = tmp_path / "w.safetensors"
    norm = "model.norm.weight"

    def refused(tensors, says):
        save_file(tensors, file)
        with pytest.raises(OndolError, match=says):
            load_weights(model, file)

    refused({k: v for k, v in good.items() if k != norm}, f"only the model has '{norm}'")
    refused({**good, "a": torch.zeros(1)}, "only it has 'a'")
    refused({**good, norm: torch.zeros(63)}, r"is \[63\] torch.float32, the model's is \[64\]")
    refused({**good, norm: good[norm].half()}, "float16")
    save_file(good, file)
    file.write_bytes(file.read_bytes()[:-10])
    for path in (file, tmp_path / "absent.safetensors"):
        with pytest.raises(OndolError, match="cannot be read"):
            load_weights(model, path)
    assert all(torch.equal(v, before[k]) for k, v in weights(model).items())


def test_saving_twice_replaces_but_never_a_strangers_folder(tiny_families, tmp_path):
    pair = tiny_families["llama"]
    folder = save_model(loaded(pair), tmp_path / "out")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    changed = copy.deepcopy(pair[0])
    with torch.no_grad():
        changed.model.norm.weight.mul_(2)
    save_model(loaded(pair, model=changed), folder)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(changed))
    assert not (folder / "model-00001-of-00002.safetensors").exists()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(OndolError, match=r"thesis\.tex"):
        save_model(loaded(pair), folder)
    assert (folder / "thesis.tex").read_text() == "years of work"
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OndolError, match="cannot be saved"):
        save_model(loaded(pair), blocked / "out")
