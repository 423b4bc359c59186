from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ondol.errors import OndolError
from ondol.models.tiny import CHARACTERS, character_tokenizer, make_tiny, parse_tiny, tiny_from

TOKENIZER = character_tokenizer()


@given(st.text(alphabet=CHARACTERS, max_size=60))
@settings(max_examples=100, deadline=None)
def test_one_token_per_character_and_back(text):
    if any(s in text for s in TOKENIZER.all_special_tokens):
        return
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert len(ids) == len(text)
    assert TOKENIZER.decode(ids) == text


def test_unknown_characters_and_special_tokens():
    ids = TOKENIZER("aé\t한b<|im_end|>\n")["input_ids"]
    known = TOKENIZER.convert_tokens_to_ids
    unknown = TOKENIZER.unk_token_id
    assert ids == [known("a"), unknown, unknown, unknown, known("b"), TOKENIZER.eos_token_id, known("\n")]
    assert len(TOKENIZER) == len(set(CHARACTERS)) + 4 == 100


def test_template_is_chatml_without_a_default_system_prompt():
    chat = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    text = TOKENIZER.apply_chat_template(chat, tokenize=False)
    assert text == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    prompt = TOKENIZER.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"


def test_the_seed_alone_decides_and_the_global_stream_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, _ = make_tiny(seed=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(77)
    b, _ = make_tiny(seed=3)
    c, _ = make_tiny(seed=4)
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values()):
        assert torch.equal(x, y), name
    assert not torch.equal(a.model.embed_tokens.weight, c.model.embed_tokens.weight)
    assert not a.training
    assert 0.1e6 < a.num_parameters() < 1e6


def test_sizes_from_the_name():
    assert (
        parse_tiny("tiny") == parse_tiny("tiny:") == dict(hidden=64, layers=2, heads=4, kv_heads=2, context=256, seed=0)
    )
    model, _ = tiny_from("tiny:hidden=32, layers=1,kv_heads=1")
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.num_key_value_heads) == (32, 1, 1)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("tiny:hiden=64", "did you mean 'hidden'"),
        ("tiny:hidden=big", "whole number"),
        ("tiny:hidden=-8", "whole number"),
        ("tiny:hidden", "whole number"),
        ("tiny:layers=0", "not positive"),
        ("tiny:hidden=30", "multiple of 8"),
        ("tiny:heads=4,kv_heads=3", "kv_heads"),
    ],
)
def test_wrong_sizes_are_refused(path, says):
    with pytest.raises(OndolError, match=says):
        tiny_from(path)
