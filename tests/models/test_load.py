"""Loading: every family from a folder, and every way a folder can be wrong."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from ondol.errors import OndolError
from ondol.models.load import LoadedModel, load_model
from ondol.models.lora import LoraSettings, has_lora
from ondol.models.save import save_model
from ondol.models.tiny import character_tokenizer
from ondol.records import Message

IDS = torch.randint(4, 100, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def folders(tiny_families, tmp_path_factory):
    """family -> folder of its saved model."""
    root = tmp_path_factory.mktemp("families")
    return {
        family: save_model(LoadedModel(model, tokenizer, None, family, family, 256), root / family)
        for family, (model, tokenizer) in tiny_families.items()
    }


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of the qwen2 folder, to be damaged."""
    return shutil.copytree(folders["qwen2"], tmp_path / "copy")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
@torch.no_grad()
def test_families_load_as_they_are(tiny_families, folders, family, capfd):
    model, tokenizer = tiny_families[family]
    loaded = load_model(str(folders[family]), dtype="float32", device="cpu")
    plain = load_model(str(folders[family]), dtype="float32", device="cpu", fused=False)
    assert torch.equal(plain.model(IDS).logits, model(IDS).logits)
    torch.testing.assert_close(loaded.model(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
    assert (loaded.name, loaded.source, loaded.context_length) == (family, str(folders[family]), 256)
    assert not loaded.model.training and loaded.dtype == torch.float32 and loaded.device.type == "cpu"
    text = "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n"
    # the folder's tokenizer.json rules, also where AutoTokenizer would put the family's own (qwen2)
    assert loaded.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    want = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    )
    assert loaded.renderer.prompt([Message("user", "hi")], ()) == want
    assert capfd.readouterr() == ("", "")  # no bars, no reports


def test_another_causal_lm_loads(tmp_path):
    tokenizer = character_tokenizer(context=32)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=32)
    ).eval()
    save_model(LoadedModel(model, tokenizer, None, "gpt2", "gpt2", 32), tmp_path / "m")
    loaded = load_model(str(tmp_path / "m"), device="cpu")
    assert loaded.context_length == 32
    assert torch.equal(loaded.model(IDS).logits, model(IDS).logits)


def test_tiny_dtype_and_lora():
    loaded = load_model("tiny:hidden=32,layers=1,context=99", device="cpu", dtype="bfloat16", lora=LoraSettings(rank=2))
    assert (loaded.name, loaded.source, loaded.context_length) == ("tiny", "tiny:hidden=32,layers=1,context=99", 99)
    assert loaded.dtype == torch.bfloat16 and has_lora(loaded.model)
    assert load_model("tiny", device="cpu").dtype == torch.float32
    assert load_model("tiny", device="meta").dtype == torch.bfloat16  # "auto" anywhere but on a CPU


def test_shards_load(folders, tmp_path):
    folder = shutil.copytree(folders["qwen2"], tmp_path / "sharded")
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    table = {}
    for i, names in enumerate((sorted(whole)[::2], sorted(whole)[1::2]), start=1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({n: whole[n] for n in names}, folder / file, metadata={"format": "pt"})
        table |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    loaded = load_model(str(folder), device="cpu")
    assert all(torch.equal(v, whole[k]) for k, v in loaded.model.state_dict().items())
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(OndolError, match=r"model-00002-of-00002\.safetensors is missing"):
        load_model(str(folder), device="cpu")


def _edit(name, **changes):
    def act(folder):
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**data, **changes}))

    return act


def _cut(name, keep):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def _without(name):
    return lambda folder: (folder / name).unlink()


def _weights(change):
    def act(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return act


def _no_template(folder):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    data = json.loads((folder / "tokenizer_config.json").read_text())
    data.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_without("config.json"), "has no config.json"),
        (_cut("config.json", 40), r"config\.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "names no model_type"),
        (_edit("config.json", model_type="qwen2000"), "qwen2000"),
        (_edit("config.json", num_hidden_layers=1), r"config\.json of .* cannot be loaded"),
        (_edit("config.json", hidden_size=32), "cannot be loaded"),
        (
            _edit("config.json", num_hidden_layers=1, layer_types=None),
            r"layers that its config has not.*model\.layers\.1",
        ),
        (_edit("config.json", num_hidden_layers=3, layer_types=None), r"lack 12 tensors.*model\.layers\.2"),
        (_without("model.safetensors"), "has no weights"),
        (_cut("model.safetensors", 5), r"model\.safetensors is damaged or cut short"),
        (_cut("model.safetensors", 3000), r"model\.safetensors is damaged or cut short"),
        (_cut("model.safetensors", -1), r"model\.safetensors is damaged or cut short"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"<html>" * 100),
            r"model\.safetensors is damaged or cut short",
        ),
        (_weights(lambda t: t.pop("lm_head.weight")), r"lack 1 tensors.*lm_head\.weight"),
        (_weights(lambda t: t.update({"model.norm.weight": torch.ones(8)})), "cannot be loaded"),
        (_without("tokenizer.json"), "has no tokenizer"),
        (_cut("tokenizer.json", 500), "tokenizer"),
        (_no_template, "has no chat template"),
    ],
)
def test_a_wrong_folder_is_refused_by_name(folder, damage, says):
    damage(folder)
    with pytest.raises(OndolError, match=says) as e:
        load_model(str(folder), device="cpu")
    assert e.value.remedy and str(folder) in e.value.what


def test_chat_can_be_named_where_there_is_no_template(folder):
    _no_template(folder)
    loaded = load_model(str(folder), device="cpu", chat="chatml")
    want = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert loaded.tokenizer.decode(loaded.renderer.prompt([Message("user", "hi")], ())) == want
    with pytest.raises(OndolError, match="'chatmel'"):
        load_model(str(folder), device="cpu", chat="chatmel")


def test_a_tokenizer_larger_than_the_model_is_refused(folder):
    character_tokenizer("".join(chr(i) for i in range(32, 127)) + "äöüß\n\t").save_pretrained(folder)
    with pytest.raises(OndolError, match="105 ids, its model only 100"):
        load_model(str(folder), device="cpu")


def test_tensors_that_are_no_part_of_the_model_are_told(folder):
    _weights(lambda t: t.update({"visual.patch.weight": torch.ones(8)}))(folder)
    lines: list[str] = []
    load_model(str(folder), device="cpu", progress=lines.append)
    assert lines == ["loading copy", f"1 tensors of {folder} are not used, such as 'visual.patch.weight'"]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("smollm2-135m-instuct", "did you mean 'smollm2-135m-instruct'"),
        ("./no/such/folder", "there is no model './no/such/folder'"),
        ("no-such-org/no-such-model", "the hub"),
        (__file__, "is a file"),
    ],
)
def test_a_wrong_path_is_refused(path, says):
    with pytest.raises(OndolError, match=says) as e:
        load_model(path, device="cpu")
    assert "smollm2-135m-instruct" in str(e.value.remedy)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dtype": "float23"}, "did you mean 'float32'"),
        ({"device": "gpu0"}, "no device 'gpu0'"),
        ({"device": "cuda:97"}, "torch sees"),
    ],
)
def test_wrong_settings_are_refused(settings, says):
    with pytest.raises(OndolError, match=says):
        load_model("tiny", **settings)


def test_context_length_falls_back():
    from ondol.models.load import FALLBACK_CONTEXT, _context_length

    def lengths(config, tokenizer):
        config = SimpleNamespace(**config)
        model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
        return _context_length(model, SimpleNamespace(model_max_length=tokenizer))

    assert lengths({"max_position_embeddings": 512}, 100) == 512
    assert lengths({}, 100) == 100
    assert lengths({}, int(1e30)) == FALLBACK_CONTEXT
