"""Renderers against the families' real templates, on tokenizers built here; parsing of calls; safety of contents."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ondol.errors import OndolError
from ondol.models.chat import FAMILIES, renderer_for, template_message
from ondol.models.chat.base import Codec
from ondol.records import Message, ToolCall

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is 12 + 35?\n\n  Let me think.\n",
    '{"name": "add", "arguments": {"a": 1}}\n<tool_call>\nuser\nassistant\nsystem\nmodel\n',
    "Überraschung, 온돌 방 바닥, 日本語, emoji 🙂🔥.\r\n\tdef f(x):\n        return x\n\n\n",
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n# Tools\n\n<tools></tools> |im_end| <|",
] * 3
# Pre-tokenizers of Qwen and Llama 3 (their tokenizer.json files).
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_SPLIT = QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)

LLAMA_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
QWEN_PLAIN = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# template -> (special tokens, added tokens that are not special, split, bos, eos, the family it must be taken for)
KINDS = {
    "smollm2": (CHATML_TOKENS, [], None, "<|im_start|>", "<|im_end|>", "chatml"),
    "qwen2_5": (CHATML_TOKENS, QWEN_PLAIN[:2], QWEN_SPLIT, None, "<|im_end|>", "chatml"),
    "qwen3": (CHATML_TOKENS, QWEN_PLAIN, QWEN_SPLIT, None, "<|im_end|>", "qwen3"),
    "qwen3_instruct_2507": (CHATML_TOKENS, QWEN_PLAIN, QWEN_SPLIT, None, "<|im_end|>", "chatml"),
    "llama3": (LLAMA_TOKENS, [], LLAMA_SPLIT, LLAMA_TOKENS[0], "<|eot_id|>", "llama3"),
    "llama3_1": ([*LLAMA_TOKENS, "<|eom_id|>"], [], LLAMA_SPLIT, LLAMA_TOKENS[0], "<|eot_id|>", "llama3.1"),
    "llama3_2": ([*LLAMA_TOKENS, "<|eom_id|>"], [], LLAMA_SPLIT, LLAMA_TOKENS[0], "<|eot_id|>", "llama3.1"),
    "gemma3": (["<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], ["\n\n"], None, "<bos>", "<eos>", "gemma3"),
}
#: Templates with a place for tools.
WITH_TOOLS = ["qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3_1", "llama3_2"]
DATE = "01 Feb 2025"


def template(kind: str) -> str:
    if kind == "smollm2":
        return SMOLLM2
    folder = os.environ.get("ONDOL_TEST_TEMPLATES")
    if folder is None:
        spec = importlib.util.find_spec("trl")
        places = list(spec.submodule_search_locations or []) if spec else []
        folder = str(Path(places[0]) / "chat_templates") if places else None
    path = Path(folder) / f"{kind}.jinja" if folder else None
    if path is None or not path.exists():
        pytest.skip(
            "the families' chat templates come with `trl`; install it or set ONDOL_TEST_TEMPLATES to its folder"
        )
    return path.read_text()


@functools.cache
def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    special, plain, split, bos, eos, _ = KINDS[kind]
    backend = Tokenizer(models.BPE())
    if split is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        backend.normalizer = normalizers.NFC()
        pieces = [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in plain])
    names = {"bos_token": bos} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, **names)


@functools.cache
def setup(kind: str):
    tokenizer = make_tokenizer(kind)
    tokenizer.chat_template = template(kind)
    return tokenizer, renderer_for(tokenizer, date=DATE if kind == "llama3_2" else None)


def reference(tokenizer, messages, tools=(), generation=True):
    return tokenizer.apply_chat_template(
        [template_message(m) for m in messages],
        tools=list(tools) or None,
        add_generation_prompt=generation,
        return_dict=False,
        **({"date_string": DATE} if "strftime_now" in tokenizer.chat_template else {}),
    )


# ---- conversations --------------------------------------------------------------------------------------------------
snippets = [
    "",
    " ",
    "\n",
    "\n\n",
    "  hm ",
    "Hello",
    "12",
    " + 35",
    "온돌",
    "é",
    "e\u0301",
    "🙂",
    '"',
    "{",
    "</",
    "\t",
    "\u00a0",
]
letters = st.characters(exclude_categories=["Cs"], exclude_characters="<")
texts = st.lists(st.sampled_from(snippets) | st.text(letters, max_size=4), max_size=6).map("".join)
thoughts = st.tuples(st.sampled_from(["", "\n", " "]), texts, texts).map(
    lambda t: f"{t[0]}<think>\n{t[1]}\n</think>\n\n{t[2]}"
)
answers = texts | thoughts
names = st.text("abcdef_", min_size=1, max_size=6)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | texts | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
calls = st.builds(ToolCall, names, st.dictionaries(names, json_values, max_size=3))
tools = st.lists(
    st.builds(
        lambda name, text: {
            "type": "function",
            "function": {
                "name": name,
                "description": text,
                "parameters": {"type": "object", "properties": {"a": {"type": "number", "description": text}}},
            },
        },
        names,
        texts,
    ),
    min_size=1,
    max_size=2,
)


@st.composite
def conversations(draw, with_calls=False, most_calls=2):
    """User and assistant in turns, perhaps a system message, perhaps calls with their results."""
    out = [Message("system", draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        out.append(Message("user", draw(texts)))
        if with_calls and draw(st.booleans()):
            made = draw(st.lists(calls, min_size=1, max_size=most_calls))
            out.append(Message("assistant", draw(answers), tuple(made)))
            out += [Message("tool", draw(texts), name=c.name) for c in made]
        out.append(Message("assistant", draw(answers)))
    if draw(st.booleans()):
        out.append(Message("user", draw(texts)))
        if with_calls and draw(st.booleans()):
            content = draw(st.sampled_from(["", "\n", "<think>\nhm\n</think>\n\n"]) | answers)
            out.append(Message("assistant", content, tuple(draw(st.lists(calls, min_size=1, max_size=most_calls)))))
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_conversations_equal_the_template(kind):
    tokenizer, renderer = setup(kind)
    assert renderer.family == KINDS[kind][5]

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(conversations())
    def check(messages):
        assert renderer.prompt(messages) == reference(tokenizer, messages)
        assert renderer.conversation(messages) == reference(tokenizer, messages, generation=False)

    check()


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "gemma3"])
def test_tool_conversations_equal_the_template(kind):
    """With tools and calls; where the template leaves them out (SmolLM2, Llama 3.0), so does the renderer."""
    tokenizer, renderer = setup(kind)
    assert renderer.renders_tools == (kind in WITH_TOOLS)

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(conversations(with_calls=True, most_calls=1 if kind.startswith("llama3_") else 2), tools)
    def check(messages, tools):
        assert renderer.prompt(messages, tools) == reference(tokenizer, messages, tools)
        assert renderer.conversation(messages, tools) == reference(tokenizer, messages, tools, generation=False)
        assert renderer.prompt(messages) == reference(tokenizer, messages)

    check()


def test_gemma_leaves_tools_out_as_its_template_does():
    tokenizer, renderer = setup("gemma3")
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    messages = [Message("system", "a"), Message("user", "b")]
    assert renderer.prompt(messages, [tool]) == reference(tokenizer, messages, [tool])
    assert '"name": "f"' in renderer.tools_text([tool])
    with pytest.raises(OndolError, match="begins with a user message"):
        renderer.prompt([Message("system", "a")])
    with pytest.raises(OndolError, match="at the start only"):
        renderer.prompt([Message("user", "a"), Message("system", "b")])


@pytest.mark.parametrize("kind", KINDS)
def test_an_observation_continues_the_ids(kind):
    """prompt + T + end + observation is the prompt of the longer conversation, for every T the format keeps."""
    tokenizer, renderer = setup(kind)
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    if kind == "qwen3":  # its template keeps the thoughts of turns that tools answer, and asks for one
        solid = texts.map(lambda t: t.strip("\n")).filter(bool)
        turns = st.tuples(solid, texts).map(lambda t: f"<think>\n{t[0]}\n</think>\n\n" + t[1].lstrip("\n"))
        roles = ["tool"]
    else:
        trimmed = kind.startswith(("llama", "gemma"))
        turns = texts.map(str.strip if trimmed else str.lstrip)
        roles = ["tool", "user"]
    news = st.lists(st.builds(Message, st.sampled_from(roles), texts), min_size=1, max_size=3)

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(conversations().filter(lambda ms: ms[-1].role == "user"), turns, news)
    def check(messages, text, new):
        before = renderer.prompt(messages) + encode(text)
        after = [renderer.end_id, *renderer.observation(new, ended=True)]
        assert before + after == renderer.prompt([*messages, Message("assistant", text), *new])
        assert after == renderer.observation(new, ended=False)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_contents_cannot_close_a_turn(kind):
    """Control tokens in an observation are those of the format, whatever the contents say; the text is kept."""
    tokenizer, renderer = setup(kind)
    special = KINDS[kind][0]
    control = set(tokenizer.convert_tokens_to_ids(special))

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(st.sampled_from([*special, "a", " ", "\n", "<|", "온"]), min_size=1, max_size=6).map("".join))
    def check(text):
        for role in ("tool", "user"):
            hostile = renderer.observation([Message(role, f"x{text}x")], ended=True)
            plain = renderer.observation([Message(role, "x")], ended=True)
            assert [i for i in hostile if i in control] == [i for i in plain if i in control]
            shown = tokenizer.decode(hostile).encode().decode()
            assert f"x{text}x" in shown or json.dumps(f"x{text}x", ensure_ascii=False) in shown
            prompt = renderer.prompt([Message("user", f"x{text}x")])
            assert [i for i in prompt if i in control] == [
                i for i in renderer.prompt([Message("user", "x")]) if i in control
            ]

    check()


def test_the_guard_holds_where_the_tokenizer_has_no_special_tokens():
    """Some tokenizers (converted ones) add control tokens without calling them special."""
    backend = Tokenizer.from_str(make_tokenizer("smollm2").backend_tokenizer.to_str())
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["special"] = False
    loose = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    end = loose.convert_tokens_to_ids("<|im_end|>")
    assert end in loose.encode("<|im_end|>", add_special_tokens=False, split_special_tokens=True)  # the danger is real
    ids = renderer_for(loose, "chatml").observation([Message("tool", "<|im_end|>")], ended=True)
    assert ids.count(end) == 1
    assert end in loose.encode("<|im_end|>", add_special_tokens=False)  # the caller's tokenizer is left as it was


def test_lone_surrogates_do_not_end_a_run():
    renderer = renderer_for(make_tokenizer("smollm2"), "chatml")
    assert renderer.observation([Message("tool", "a\ud800b")], True) == renderer.observation(
        [Message("tool", "a?b")], True
    )


@pytest.mark.parametrize("kind", KINDS)
def test_end_ids(kind):
    tokenizer, renderer = setup(kind)
    ends = {"llama3": ["<|eot_id|>"], "gemma3": ["<end_of_turn>", "<eos>"], "llama3_1": ["<|eot_id|>", "<|eom_id|>"]}
    expected = ends.get(kind, ends["llama3_1"] if kind == "llama3_2" else ["<|im_end|>"])
    assert renderer.end_ids == set(tokenizer.convert_tokens_to_ids(expected))
    assert renderer.end_id == tokenizer.convert_tokens_to_ids(expected[0])


def test_llama_prints_the_template_s_date():
    for kind, date in (("llama3_1", "26 Jul 2024"), ("llama3_2", None)):
        tokenizer = make_tokenizer(kind)
        tokenizer.chat_template = template(kind)
        days = {date or datetime.now().strftime("%d %b %Y")}
        text = tokenizer.decode(renderer_for(tokenizer).prompt([Message("user", "a")]))
        days |= {date or datetime.now().strftime("%d %b %Y")}  # midnight may pass in between
        assert any(f"Today Date: {d}\n" in text for d in days)
        pinned = tokenizer.decode(renderer_for(tokenizer, date="02 Mar 2020").prompt([Message("user", "a")]))
        assert "Today Date: 02 Mar 2020\n" in pinned


# ---- choosing -------------------------------------------------------------------------------------------------------
def test_families_without_a_template():
    bare = make_tokenizer("smollm2").backend_tokenizer.to_str()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bare))
    assert tokenizer.chat_template is None
    with pytest.raises(OndolError, match=r'no chat template\n  -> .*chat = "chatml"'):
        renderer_for(tokenizer)
    text = tokenizer.decode(renderer_for(tokenizer, "chatml").prompt([Message("user", "hi")]))
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(OndolError, match=r"no token '<\|start_header_id\|>'|no token '<\|eot_id\|>'"):
        renderer_for(tokenizer, "llama3")
    with pytest.raises(OndolError, match="did you mean 'qwen3'"):
        renderer_for(tokenizer, "qwen")
    kinds = {"smollm2": "smollm2", "qwen2.5": "qwen2_5", "qwen3": "qwen3", "llama3": "llama3", "gemma3": "gemma3"}
    messages = [Message("user", "hi"), Message("assistant", "ho"), Message("user", "hi")]
    for family, kind in {**kinds, "llama3.1": "llama3_1"}.items():
        tokenizer, renderer = setup(kind)
        found, tokenizer.chat_template = tokenizer.chat_template, None
        try:
            assert renderer_for(tokenizer, family).prompt(messages) == renderer.prompt(messages)
        finally:
            tokenizer.chat_template = found
    assert set(FAMILIES) - set(kinds) == {"chatml", "llama3.1", "llama3.2"}


def test_an_unknown_template_is_refused_and_a_named_family_follows_the_template_when_it_can():
    tokenizer = make_tokenizer("smollm2")
    kept = tokenizer.chat_template
    try:
        tokenizer.chat_template = SMOLLM2.replace("'assistant\\n'", "'bot\\n'").replace(
            "assistant\n' }}{% endif", "bot' }}{% endif"
        )
        assert tokenizer.chat_template != SMOLLM2
        with pytest.raises(OndolError, match="no known family"):
            renderer_for(tokenizer)
        assert "SmolLM" not in tokenizer.decode(renderer_for(tokenizer, "chatml").prompt([Message("user", "a")]))
        tokenizer.chat_template = SMOLLM2
        assert "SmolLM" in tokenizer.decode(renderer_for(tokenizer, "chatml").prompt([Message("user", "a")]))
    finally:
        tokenizer.chat_template = kept


def test_misuse_is_named():
    renderer = renderer_for(make_tokenizer("llama3_1"), "llama3.1")
    call = ToolCall("f", {})
    with pytest.raises(OndolError, match="one tool call a turn"):
        renderer.prompt([Message("user", "a"), Message("assistant", "", (call, call))])
    with pytest.raises(OndolError, match="at least one message"):
        renderer.prompt([])
    with pytest.raises(ValueError, match="tool and user"):
        renderer.observation([Message("assistant", "a")], True)
    with pytest.raises(OndolError, match="fast tokenizer"):
        Codec(object(), [])


# ---- calls ----------------------------------------------------------------------------------------------------------
def renderers():
    kinds = {"chatml": "smollm2", "qwen3": "qwen3", "llama3.1": "llama3_1", "gemma3": "gemma3"}
    return {family: renderer_for(make_tokenizer(kind), family) for family, kind in kinds.items()}


@pytest.mark.parametrize("family", ["chatml", "qwen3", "llama3.1", "gemma3"])
def test_calls_round_trip(family):
    renderer = renderers()[family]
    hard = st.sampled_from(["</tool_call>", "\n```", "```tool_code\n", '"}', "\\", "<tool_call>", "; {"]) | json_values

    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.builds(ToolCall, texts.filter(bool), st.dictionaries(texts, hard, max_size=3)))
    def check(call):
        text = renderer.call_text(call)
        assert renderer.parse_calls(text) == [call]
        assert renderer.parse_calls(f"{text}\n{text}") == [call, call]
        if family != "llama3.1":
            assert renderer.parse_calls(f"I will add.\n{text}") == [call]
            # Sampling that stops at the first stop string has just the whole call.
            assert text.index(renderer.call_stop[0]) + len(renderer.call_stop[0]) == len(text)

    check()


@pytest.mark.parametrize("family", ["chatml", "qwen3", "llama3.1", "gemma3"])
def test_any_text_parses_without_an_exception(family):
    renderer = renderers()[family]
    bits = [
        '{"name": "f"',
        ', "arguments": {}',
        ', "parameters": {}',
        "}",
        "{",
        "[",
        "<tool_call>",
        "</tool_call>",
        "\n",
    ]
    bits += [
        "```tool_code\n",
        "\n```",
        "<|python_tag|>",
        "NaN",
        "1e999",
        '"\\ud800"',
        "null",
        ":",
        ",",
        "</think>",
        "[" * 3000,
    ]

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(st.sampled_from(bits) | st.text(max_size=5), max_size=12).map("".join))
    def check(text):
        for call in renderer.parse_calls(text):
            assert bool(call.error) != bool(call.name)
            assert call.error is None or call.arguments == {}
            json.dumps(call.arguments, ensure_ascii=False, allow_nan=False).encode()

    check()


@pytest.mark.parametrize("family", ["chatml", "qwen3", "llama3.1", "gemma3"])
def test_malformed_calls_are_data(family):
    renderer = renderers()[family]
    key = "parameters" if family == "llama3.1" else "arguments"
    frame = {"llama3.1": "{}", "gemma3": "```tool_code\n{}\n```"}.get(family, "<tool_call>\n{}\n</tool_call>")
    deep = "[" * 40 + "]" * 40
    for body in (
        *('{"name": "f"', '{"nam": "f"}', '{"name": 3}', '{"name": ""}', '{"name": null, "K": {}}', "{'name': 'f'}"),
        *('{"name": "f", "K": []}', '{"name": "f", "K": "{}"}', '{"name": "f", "K": {"a": NaN}}'),
        *(
            '{"name": "f", "K": {"a": 1e999}}',
            '{"name": "f", "K": {"a": "\\ud800"}}',
            '{"name": "f", "K": {"a": D}}'.replace("D", deep),
        ),
        '{"name": "f", "K": {"a": D}}'.replace("D", "[" * 100_000),
    ):
        (call,) = renderer.parse_calls(frame.replace("{}", body.replace("K", key), 1))
        assert (call.name, call.arguments) == ("", {}) and call.error, body
    (call,) = renderer.parse_calls(frame.replace("{}", '{"name": "f"}', 1))
    assert call == ToolCall("f", {})


def test_what_is_no_call():
    hermes, llama, gemma = (renderers()[f] for f in ("qwen3", "llama3.1", "gemma3"))
    call = ToolCall("f", {"a": 1})
    text = hermes.call_text(call)
    assert text == '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    assert hermes.parse_calls(f"<think>\nperhaps {text}\n</think>\n\nno") == []
    assert hermes.parse_calls(f"<think>\nyes\n</think>\n\n{text}") == [call]
    assert hermes.parse_calls(text.removesuffix("</tool_call>")) == []
    assert llama.parse_calls("The answer is {2}") == []
    assert llama.parse_calls('<|python_tag|>{"name": "f", "parameters": {"a": 1}}; {"name": "g"}') == [
        call,
        ToolCall("g", {}),
    ]
    assert gemma.parse_calls('```json\n{"name": "f"}\n```') == []
    assert gemma.parse_calls('```tool_code\n{"name": "f"}') == []
    many = "<tool_call>" * 100_000
    assert hermes.parse_calls(many) == []  # in linear time
    assert gemma.parse_calls("```tool_code\n" * 2) == [
        ToolCall("", {}, gemma.parse_calls("```tool_code\n```")[0].error)
    ]
    assert gemma.parse_calls("\n``` " + "```tool_code\nx " * 50_000) == []
