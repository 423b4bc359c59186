"""Weights out and in: an HF folder for the world, a dict of tensors for checkpoints."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ondol.errors import OndolError
from ondol.models.lora import has_lora, merged

if TYPE_CHECKING:
    from ondol.models.load import LoadedModel

#: What an earlier save may have left in a folder, besides what this one writes.
_OURS = re.compile(
    r"(model|adapter_model)(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|"
    r"(config|adapter_config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json|"
    r"chat_template\.jinja|vocab\.json|merges\.txt|tokenizer\.model|README\.md"
)


def save_model(loaded: LoadedModel, folder: Path, merge_lora: bool = True) -> Path:
    """Write model and tokenizer in HF layout: `AutoModelForCausalLM.from_pretrained(folder)` gives the same logits.

    Args:
        loaded: the live model; it is not changed.
        folder: made anew; an earlier saved model there is replaced only once the new one is whole.
        merge_lora: add LoRA adapters into the weights. False writes the adapters alone, in peft's layout
            (`PeftModel.from_pretrained(base, folder)`); it means nothing for a model without adapters.

    Raises OndolError when the folder holds anything but a saved model, or cannot be written.
    """
    folder = Path(folder)
    try:
        if folder.is_dir():
            strangers = sorted(p.name for p in folder.iterdir() if p.is_dir() or not _OURS.fullmatch(p.name))
            if strangers:
                raise OndolError(
                    f"{folder} holds '{strangers[0]}', which is not of a saved model", "name another folder"
                )
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            model: Any = loaded.model
            if has_lora(model) and not merge_lora:
                _write_adapter(model, made, loaded.source)
            else:
                from ondol.models.load import quiet

                with quiet():
                    model.save_pretrained(made, state_dict=merged(model))
            loaded.tokenizer.save_pretrained(made)
            _sync(made)
            if folder.is_dir():
                folder.rename(Path(temporary) / "old")
            made.rename(folder)
    except OSError as e:
        raise OndolError(
            f"the model cannot be saved in {folder}: {e}", "check the free space and the rights there"
        ) from e
    return folder


def _write_adapter(model: Any, folder: Path, base: str) -> None:
    from safetensors.torch import save_file

    from ondol.models.lora import ADAPTER

    config = model.peft_config[ADAPTER]
    config.base_model_name_or_path = base
    config.save_pretrained(folder)
    tensors = {f"base_model.model.{k.replace(f'.{ADAPTER}.', '.')}": v.contiguous() for k, v in weights(model).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _sync(folder: Path) -> None:
    """Let every file reach the disk before the folder takes its name."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.iterdir():
        path.chmod(mode)  # safetensors writes 0600: let others read what they may read here
        with path.open("rb") as f:
            os.fsync(f.fileno())


def weights(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint must hold: the adapters if the model has LoRA, else its whole state, each tied weight once.

    The tensors share memory with the model: write or clone them before the next step. Ready for
    `safetensors.torch.save_file`.
    """
    adapters, seen = has_lora(model), set()
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in seen or (adapters and ".lora_" not in name):
            continue
        seen.add(id(value))
        state[name] = value.detach().contiguous()
    return state


def load_weights(model: nn.Module, path: Path) -> None:
    """Put the tensors of a safetensors file into the model, see `put_weights`. Raises OndolError also when it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as e:
        raise OndolError(f"the weights {path} cannot be read: {e}", "use an earlier checkpoint") from e
    put_weights(model, stored, str(path))


@torch.no_grad()
def put_weights(model: nn.Module, stored: dict[str, Tensor], source: str) -> None:
    """Inverse of `weights`: put these tensors into the model, exactly, in place. `source` says whose they are.

    Raises OndolError, before anything is changed, when their names, shapes or dtypes are not those of `weights(model)`.
    """
    live = weights(model)
    remedy = "load the model with the settings (path, dtype, LoRA) that this checkpoint was made with"
    if stored.keys() != live.keys():
        odd = sorted(stored.keys() ^ live.keys())
        where = "it" if odd[0] in stored else "the model"
        raise OndolError(
            f"{source} does not fit the model: {len(odd)} names differ; only {where} has '{odd[0]}'", remedy
        )
    for name, value in stored.items():
        if value.shape != live[name].shape or value.dtype != live[name].dtype:
            has, wants = (f"{list(t.shape)} {t.dtype}" for t in (value, live[name]))
            raise OndolError(f"{source} does not fit the model: '{name}' is {has}, the model's is {wants}", remedy)
    # not through `live`, whose tensors may be contiguous copies
    for name, target in model.state_dict().items():
        if name in stored:
            target.copy_(stored[name])
