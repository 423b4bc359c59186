"""Fixtures shared by all tests: one thread, no network, tiny random models of every family we name."""

from __future__ import annotations

import copy
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: one thread gives the same sums everywhere
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the hub, and none may wait for it

from typing import Any

import pytest
import torch

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_family(family: str, seed: int = 0) -> tuple[Any, Any]:
    """A random float32 model in eval mode (hidden 64, 2 layers) and a character tokenizer with a ChatML template.

    Weights are larger than at a fresh start, and norms and biases are random too, so that a part left out or
    mixed up shows in the logits. llama and gemma3 tie their embeddings, qwen2 and qwen3 do not; gemma3 has one
    sliding-window layer (8 tokens) and one full one.
    """
    import transformers as tf

    from ondol.models.tiny import character_tokenizer

    tokenizer = character_tokenizer(context=256)
    common: dict[str, Any] = dict(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "llama":
            model = tf.LlamaForCausalLM(tf.LlamaConfig(**common, tie_word_embeddings=True))
        elif family == "qwen2":
            model = tf.Qwen2ForCausalLM(tf.Qwen2Config(**common, tie_word_embeddings=False))
        elif family == "qwen3":
            model = tf.Qwen3ForCausalLM(tf.Qwen3Config(**common, head_dim=24, tie_word_embeddings=False))
        elif family == "gemma3":
            config = tf.Gemma3TextConfig(
                **common,
                head_dim=24,
                query_pre_attn_scalar=24,
                sliding_window=8,
                layer_types=["sliding_attention", "full_attention"],
                tie_word_embeddings=True,
            )
            model = tf.Gemma3ForCausalLM(config)
        else:
            raise ValueError(family)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.float().eval(), tokenizer


class Families(dict[str, tuple[Any, Any]]):
    """family -> (model, tokenizer), see `make_family`; each look-up gives a copy, so that no test changes another's."""

    def __getitem__(self, family: str) -> tuple[Any, Any]:
        model, tokenizer = super().__getitem__(family)
        return copy.deepcopy(model), tokenizer


@pytest.fixture(scope="session")
def tiny_families() -> Families:
    return Families({family: make_family(family) for family in FAMILIES})


@pytest.fixture(scope="session")
def smollm() -> Any:
    """The bundled model, loaded once in float32 on the CPU. Only for tests marked `bundled`; never change it."""
    from ondol.models.load import load_model

    return load_model("smollm2-135m-instruct", dtype="float32", device="cpu")
