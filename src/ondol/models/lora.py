"""Low-rank adapters: train a small product B·A beside each linear layer, keep the layer itself frozen.

Hu et al. 2021, https://arxiv.org/abs/2106.09685. The layers are peft's, put into the model in place, so that it stays a
transformers model with the same forward, config and attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ondol.errors import OndolError
from ondol.parts import Part

if TYPE_CHECKING:
    from torch import Tensor, nn

ADAPTER = "default"


class LoraSettings(Part):
    """Settings of the adapters. The product is scaled by alpha / rank."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the layers, such as ["q_proj", "v_proj"]; "all-linear" is every linear layer but the output head."""
    seed: int = 0
    """Of the initial A; B begins at zero, so that the model begins unchanged."""


def apply_lora(model: nn.Module, settings: LoraSettings) -> nn.Module:
    """Put fresh adapters into `model`, in place, and freeze all else. Returns `model`.

    Adapters are float32 whatever the model's dtype, so that small updates are not rounded away. The global random
    state is neither used nor moved. Raises OndolError without peft, for targets that the model lacks, when the model
    has adapters already, and for a target whose weight is tied to another (merging it would undo the tie).
    """
    import torch

    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as e:
        raise OndolError(f"LoRA needs peft, which cannot be imported: {e}", "pip install 'ondol[lora]'") from e
    if has_lora(model):
        raise OndolError("the model has LoRA adapters already", "load it anew, or merge them first by saving it")
    _check_targets(model, settings)
    targets: Any = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft says int and divides it
        lora_dropout=settings.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):  # peft draws A on the CPU and moves it, so every device gets the same
        torch.manual_seed(settings.seed)
        inject_adapter_in_model(config, model, ADAPTER)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return model.eval()


def _check_targets(model: nn.Module, settings: LoraSettings) -> None:
    if settings.targets == "all-linear":
        return
    from torch import nn

    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    tied |= set((getattr(model, "all_tied_weights_keys", None) or {}).values())
    for target in settings.targets:
        found = [name for name in linear if name == target or name.endswith("." + target)]
        if not found:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise OndolError(f"lora: the model has no linear layer '{target}'", f"it has: {known}")
        if any(f"{name}.weight" in tied for name in found):
            raise OndolError(
                f"lora: the weight of '{target}' is tied to the embeddings, so it cannot have an adapter of its own",
                "leave it out of targets",
            )


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every layer with an adapter; `layer` is peft's LoraLayer."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name, module


def has_lora(model: nn.Module) -> bool:
    return next(lora_layers(model), None) is not None


def merged(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict as if the adapters were added into their layers: the names and dtypes of the plain model.

    The live model is not touched; weights without an adapter are shared with it, not copied. Without adapters this is
    just its state dict.
    """
    layers = dict(lora_layers(model))
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if ".lora_" in key:
            continue
        owner, _, leaf = key.rpartition(".base_layer.")
        if owner in layers:
            if leaf == "weight":
                # added in float32 and rounded once
                delta = layers[owner].get_delta_weight(ADAPTER).detach()
                value = (value.float() + delta.float()).to(value.dtype)
            key = f"{owner}.{leaf}"
        state[key] = value
    return state
