"""A language model from scratch, of 0.1 to 1 M parameters, that reads and writes characters.

For tests, first steps and experiments in seconds: one token per printable ASCII character (and newline), ChatML special
tokens, and a ChatML template without a default system prompt, so that prompts stay short.
"""

from __future__ import annotations

import string
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ondol.errors import OndolError, nearest

#: All 95 printable ASCII characters and newline.
CHARACTERS = "\n" + "".join(chr(i) for i in range(32, 127))
UNKNOWN, PAD, START, END = "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SIZES = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "context": 256, "seed": 0}


def character_tokenizer(characters: str = CHARACTERS, context: int = 256) -> PreTrainedTokenizerFast:
    """One token per character of `characters`; any other becomes <unk>. Ids 0 to 3 are the special tokens.

    Nothing is added, dropped or normalised: decoding the ids of a text of known characters gives that text.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    special = [UNKNOWN, PAD, START, END]
    vocab = {token: i for i, token in enumerate([*special, *dict.fromkeys(characters)])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token=UNKNOWN))  # type: ignore[call-arg]
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = CHATML
    return made


def make_tiny(
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    context: int = 256,
    seed: int = 0,
    characters: str = CHARACTERS,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random float32 Llama on the CPU and its character tokenizer.

    Args:
        hidden: width; the MLP is four times as wide, a head is hidden / heads wide.
        context: longest sequence, in tokens (characters).
        seed: of the initial weights. The global random state is neither used nor moved.
        characters: those that get a token of their own.

    Raises OndolError for sizes that do not fit together.
    """
    sizes = {"hidden": hidden, "layers": layers, "heads": heads, "kv_heads": kv_heads, "context": context}
    for name, size in sizes.items():
        if size < 1:
            raise OndolError(f"tiny model: {name} = {size} is not positive", f"the default is {_SIZES[name]}")
    if hidden % (2 * heads):
        raise OndolError(
            f"tiny model: hidden = {hidden} does not split over {heads} heads of an even width",
            f"use a multiple of {2 * heads} for hidden",
        )
    if heads % kv_heads:
        raise OndolError(
            f"tiny model: heads = {heads} is not a multiple of kv_heads = {kv_heads}", "use kv_heads = heads"
        )
    tokenizer = character_tokenizer(characters, context)
    ids: dict[str, Any] = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        dtype="float32",
        **ids,
    )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model.eval(), tokenizer


def parse_tiny(path: str) -> dict[str, int]:
    """The sizes in "tiny:hidden=128,layers=4", defaults filled in. Raises OndolError for other keys or values."""
    sizes = dict(_SIZES)
    for item in path.removeprefix("tiny").removeprefix(":").split(","):
        if not item.strip():
            continue
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in sizes:
            raise OndolError(f"'{path}': a tiny model has no size '{key}'", nearest(key, sizes))
        if not value or set(value) - set(string.digits):
            raise OndolError(f"'{path}': {key} needs a whole number, not '{value}'", f"such as {key}={sizes[key]}")
        sizes[key] = int(value)
    return sizes


def tiny_from(path: str) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The model and tokenizer that "tiny" or "tiny:key=value,..." names."""
    sizes: dict[str, Any] = dict(parse_tiny(path))
    return make_tiny(**sizes)
