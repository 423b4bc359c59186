"""Load a causal language model, its tokenizer and its chat renderer, or say plainly why not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ondol.errors import OndolError, nearest
from ondol.models import bundled
from ondol.models.fused import fuse
from ondol.models.lora import LoraSettings, apply_lora
from ondol.models.memory import keep_memory

DTYPES = {n: getattr(torch, n) for n in ("float32", "bfloat16", "float16", "float64")}

#: Context length when neither config nor tokenizer gives one (models without position limits).
FALLBACK_CONTEXT = 4096

_REMEDY = f"use '{bundled.NAME}', 'tiny', a folder with config.json and safetensors, or a hub id such as 'org/name'"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


@dataclass
class LoadedModel:
    """A model ready for engine and learner.

    Attributes:
        model: a transformers causal LM (adapters inside, if any), in eval mode, on its device.
        tokenizer: its transformers tokenizer.
        renderer: turns messages into token ids and back, for this model's chat format.
        name: short name for people.
        source: what `model` was loaded from: a folder, a hub id or "tiny:...".
        context_length: the most tokens of one sequence.
    """

    model: Any
    tokenizer: Any
    renderer: Any
    name: str
    source: str
    context_length: int

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the base weights."""
        return self.model.dtype


def load_model(
    path: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    chat: str | None = None,
    lora: LoraSettings | None = None,
    fused: bool = True,
    progress: Callable[[str], None] | None = None,
) -> LoadedModel:
    """Load a model for training or sampling.

    Args:
        path: a bundled name ("smollm2-135m-instruct"), "tiny" or "tiny:hidden=64,layers=2" (from scratch), a local
            folder in HF layout, or a hub id ("org/name").
        dtype: "float32", "bfloat16" or "float16"; "auto" is float32 on a CPU and bfloat16 elsewhere.
        device: "cpu", "cuda", "cuda:1", ...; "auto" is cuda where there is one, else cpu.
        chat: name of the chat format; by default the one that the tokenizer's template shows.
        lora: adapters to put in; the rest is then frozen.
        fused: compute norms and MLPs with less memory (`ondol.models.fused`); off is the plain path.
        progress: called with one line of text as each slow stage begins.

    Raises OndolError, naming file and remedy, for anything missing, damaged or not fitting together.
    """
    say = progress or (lambda line: None)
    keep_memory()
    place = _device(device)
    number_type = _dtype(dtype, place)
    model: Any
    if path == "tiny" or path.startswith("tiny:"):
        from ondol.models.tiny import tiny_from

        model, tokenizer = tiny_from(path)
        model = model.to(number_type)
        renderer = _renderer(tokenizer, chat, path)
        name, source = "tiny", path
    else:
        source, name = _resolve(path, say)
        say(f"loading {name}")
        config = _load_config(source)
        tokenizer = _load_tokenizer(source, config)
        renderer = _renderer(tokenizer, chat, source)  # before the weights: it is quick to fail
        model = _load_weights(source, config, number_type, say)
    _check_vocabulary(model, tokenizer, source)
    try:
        model.to(place)
    except (RuntimeError, AssertionError) as e:  # out of memory is a RuntimeError too
        raise OndolError(
            f"{name} cannot be moved to {place}: {e}", "free memory there, or use a smaller model or dtype"
        ) from e
    if lora is not None:
        apply_lora(model, lora)
    if fused:
        fuse(model)
    return LoadedModel(model.eval(), tokenizer, renderer, name, source, _context_length(model, tokenizer))


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as e:
        raise OndolError(f"there is no device '{device}'", "use auto, cpu, cuda or cuda:N") from e
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise OndolError(f"device '{device}': torch sees {torch.cuda.device_count()} cuda devices", "use auto or cpu")
    return place


def _dtype(dtype: str, place: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.float32 if place.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise OndolError(f"there is no dtype '{dtype}'", nearest(dtype, ["auto", *DTYPES]))
    return DTYPES[dtype]


def _resolve(path: str, say: Callable[[str], None]) -> tuple[str, str]:
    """(folder or hub id, short name). A folder has been checked."""
    if path == bundled.NAME:
        folder = bundled.bundled_path(progress=say)
    else:
        folder = Path(path).expanduser()
        if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.startswith("."):
            return path, path.rpartition("/")[2]
        if not folder.exists():
            known = nearest(path, [bundled.NAME, "tiny"]) if "/" not in path else None
            raise OndolError(f"there is no model '{path}'", f"{known}; or {_REMEDY}" if known else _REMEDY)
    _check_folder(folder)
    name = bundled.NAME if path == bundled.NAME else folder.resolve().name
    return str(folder), name


# --- a folder, before anything loads ------------------------------------------------------------------------------


def _check_folder(folder: Path) -> None:
    """Refuse a folder whose files are missing, unreadable or cut short."""
    if not folder.is_dir():
        raise OndolError(f"{folder} is a file, not a folder in HF layout", _REMEDY)
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise OndolError(f"{folder} holds a LoRA adapter alone", "save it merged into its base model (merge_lora=True)")
    config = _read_json(folder / "config.json", "copy the model's folder again, whole")
    if not isinstance(config, dict) or "model_type" not in config:
        raise OndolError(
            f"{folder / 'config.json'} names no model_type", "use the config.json that belongs to the weights"
        )
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise OndolError(
            f"{folder} has no tokenizer ({', '.join(_TOKENIZERS[:3])})", "copy the tokenizer's files there too"
        )
    for file in _weight_files(folder):
        _check_safetensors(file)


def _read_json(path: Path, remedy: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise OndolError(f"{path.parent} has no {path.name}", remedy) from e
    except (OSError, ValueError) as e:
        raise OndolError(f"{path} cannot be read: {e}", remedy) from e


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder (none where it has only pickled weights, which transformers reads safely)."""
    remedy = "copy the model's folder again, whole"
    if (single := folder / "model.safetensors").is_file():
        return [single]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        table = _read_json(index, remedy)
        shards = table.get("weight_map") if isinstance(table, dict) else None
        if not isinstance(shards, dict) or not shards:
            raise OndolError(f"{index} has no weight_map", remedy)
        files = [folder / str(name) for name in sorted(set(shards.values()))]
        for file in files:
            if not file.is_file():
                raise OndolError(f"{file} is missing, which {index.name} names", remedy)
        return files
    if any(folder.glob("pytorch_model*.bin")):
        return []
    raise OndolError(f"{folder} has no weights (model.safetensors)", remedy)


def _check_safetensors(file: Path) -> None:
    """Opening reads the header and holds the file's length against it: this finds every truncation."""
    from safetensors import safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            opened.keys()
    except Exception as e:  # SafetensorError, OSError, and others for a nonsense header
        raise OndolError(f"{file} is damaged or cut short: {e}", "copy or save it again") from e


# --- loading -------------------------------------------------------------------------------------------------------


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off the terminal: what matters in them, we raise ourselves."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _failed(what: str, source: str, error: Exception) -> OndolError:
    reason = str(error).strip() or type(error).__name__
    reason = re.sub(r"\s*\n\s*", " ", reason)[:400]
    if Path(source).exists():
        return OndolError(f"{what} of {source} cannot be loaded: {reason}", "check that its files belong together")
    return OndolError(
        f"{what} of '{source}' cannot be loaded; there is no such folder here, and from the hub: {reason}",
        f"check the spelling and the network (a gated model needs `hf auth login`), or give a folder, downloaded where "
        f"there is a network by `hf download {source} --local-dir DIR`; '{bundled.NAME}' and 'tiny' need no hub",
    )


def _load_config(source: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as e:
        raise _failed("config.json", source, e) from e


_PROBE = "Hello, world! It's 12345 + x_1 = 7;\n\n\t  été, 한국어 🔥  "


def _load_tokenizer(source: str, config: Any) -> Any:
    """AutoTokenizer's choice, unless it disagrees with the folder's own tokenizer.json.

    For some model types (qwen2, say) AutoTokenizer takes the family's class whatever the folder says, and that class
    builds its own pre-tokeniser: a model with another family's tokenizer would silently get wrong ids.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, config=config, trust_remote_code=False)
    except Exception as e:
        raise _failed("the tokenizer", source, e) from e
    if type(tokenizer) is PreTrainedTokenizerFast:
        return tokenizer
    try:
        with quiet():
            literal = PreTrainedTokenizerFast.from_pretrained(source)
            same = literal.encode(_PROBE) == tokenizer.encode(_PROBE)  # quiet: it may be longer than a small context
    except Exception:  # no tokenizer.json: there is nothing to disagree with
        return tokenizer
    return tokenizer if same else literal


def _load_weights(source: str, config: Any, dtype: torch.dtype, say: Callable[[str], None]) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, config=config, dtype=dtype, trust_remote_code=False, output_loading_info=True
            )
    except Exception as e:
        raise _failed("the model", source, e) from e
    model, report = loaded
    remedy = "use the config.json that belongs to these weights"
    if missing := sorted(report["missing_keys"]):
        raise OndolError(
            f"the weights of {source} lack {len(missing)} tensors of its config, such as '{missing[0]}'", remedy
        )
    extra = sorted(report["unexpected_keys"])
    # further layers mean a config that is too small; other extras (a vision tower, say) are no part of a text model
    if layers := [key for key in extra if re.match(r"(model\.)?(layers|h|blocks)\.\d+\.", key)]:
        raise OndolError(f"the weights of {source} have layers that its config has not, such as '{layers[0]}'", remedy)
    if extra:
        say(f"{len(extra)} tensors of {source} are not used, such as '{extra[0]}'")
    return model


def _check_vocabulary(model: Any, tokenizer: Any, source: str) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if (ids := max(tokenizer.get_vocab().values(), default=0) + 1) > rows:
        raise OndolError(
            f"the tokenizer of {source} has {ids} ids, its model only {rows} embeddings",
            "use the tokenizer that belongs to the model",
        )


def _renderer(tokenizer: Any, chat: str | None, source: str) -> Any:
    from ondol.models.chat import renderer_for

    try:
        with quiet():  # the conversation that tells a template's family may be longer than the model's context
            return renderer_for(tokenizer, chat)
    except OndolError as e:
        raise OndolError(f"{source}: {e.what}", e.remedy) from e


def _context_length(model: Any, tokenizer: Any) -> int:
    config = model.config.get_text_config()
    for limit in (getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)):
        if isinstance(limit, int) and 0 < limit < 10**9:  # transformers says 10**30 for "not known"
            return limit
    return FALLBACK_CONTEXT
