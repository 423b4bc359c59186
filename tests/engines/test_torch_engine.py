"""The embedded engine: against transformers' generate, against itself in other company, and at every way to stop."""

from __future__ import annotations

import copy
import functools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ondol.engines.torch as torch_engine
from conftest import FAMILIES, make_family
from float64 import exact
from forcing import drain, forced
from ondol.engines.base import Request, Sampling
from ondol.engines.torch import TorchEngine
from ondol.errors import OndolError
from ondol.models.tiny import END, START, make_tiny
from ondol.records import Finish

CONTEXT = 256


def engine(family: str = "llama", **settings) -> TorchEngine:
    """In float64: rounding cannot flip a draw."""
    return TorchEngine(*exact(family), CONTEXT, **settings)


def prompts(count: int, seed: int = 0, longest: int = 120) -> list[list[int]]:
    """Random prompts of mixed lengths, some the same, some with a long common beginning."""
    rng = random.Random(seed)
    stem = [rng.randrange(4, 99) for _ in range(60)]
    out: list[list[int]] = []
    for i in range(count):
        ids = [rng.randrange(4, 99) for _ in range(rng.randint(1, longest))]
        out.append([ids, stem + ids[:20], list(out[-1]) if out else ids][i % 3])
    return out


# -- greedy, against transformers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate(family):
    model, tokenizer = make_family(family)
    reference, _ = make_family(family)
    ends = frozenset({tokenizer.eos_token_id})
    asked = prompts(8)
    ours = drain(
        TorchEngine(model, tokenizer, CONTEXT, max_batch=4, prefill_tokens=64),
        [Request(str(i), p, Sampling(temperature=0, max_tokens=24), (i,), end_ids=ends) for i, p in enumerate(asked)],
    )
    for i, prompt in enumerate(asked):
        out = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=24,
            pad_token_id=tokenizer.pad_token_id,
        )
        assert ours[str(i)].ids == out[0, len(prompt) :].tolist()
    assert len({tuple(c.ids) for c in ours.values()}) > 3


@pytest.mark.bundled
def test_greedy_equals_generate_on_the_bundled_model(smollm):
    tokenizer = smollm.tokenizer
    reference = smollm.model
    reference.set_attn_implementation("sdpa")
    texts = ["The capital of France is", "def add(a, b):\n", "Once upon a time there was a small"]
    asked = [tokenizer(t).input_ids for t in texts]
    greedy = Sampling(temperature=0, max_tokens=16)
    ours = drain(
        TorchEngine(copy.deepcopy(smollm.model), tokenizer, 512, max_batch=2),
        [Request(str(i), p, greedy, (i,)) for i, p in enumerate(asked)],
    )
    for i, prompt in enumerate(asked):
        out = reference.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=16, eos_token_id=None, pad_token_id=0
        )
        assert ours[str(i)].ids == out[0, len(prompt) :].tolist()


# -- the same whatever the company --------------------------------------------------------------------------------

KINDS = (Sampling(max_tokens=14), Sampling(temperature=0.7, top_p=0.9, max_tokens=11), Sampling(top_k=9, max_tokens=9))


def crowd() -> list[Request]:
    """12 prompts, sampled twice each, under three samplings."""
    return [
        Request(f"{p}/{s}", ids, KINDS[p % 2 + (s and p % 3 == 0)], (7, p, s), end_ids=frozenset({3}))
        for p, ids in enumerate(prompts(12, seed=3))
        for s in range(2)
    ]


@functools.cache
def expected(family: str) -> dict:
    """Each request in an engine of its own, without any sharing."""
    return {r.session: drain(engine(family, share_prefixes=False), [r])[r.session] for r in crowd()}


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "max_batch, prefill_tokens, share",
    [(1, 2048, True), (1, 7, False), (3, 2048, True), (3, 7, True), (64, 2048, False), (64, 2048, True), (64, 7, True)],
)
def test_same_samples_in_any_company(family, max_batch, prefill_tokens, share):
    requests = crowd()
    random.Random(max_batch * prefill_tokens).shuffle(requests)
    e = engine(family, max_batch=max_batch, prefill_tokens=prefill_tokens, share_prefixes=share)
    done = drain(e, requests)
    for session, want in expected(family).items():
        got = done[session]
        assert (got.ids, got.finish, got.text) == (want.ids, want.finish, want.text)
        torch.testing.assert_close(got.logp, want.logp, atol=1e-10, rtol=0)
        torch.testing.assert_close(got.logp_truncated, want.logp_truncated, atol=1e-10, rtol=0)
    assert (e.stats.prefix_hit_share > 0) == (share and max_batch > 1)
    assert e.stats.sampled_tokens == sum(len(c.ids) for c in done.values())


def test_streams():
    ids = prompts(1)[0]
    requests = [Request(str(s), ids, Sampling(max_tokens=30), (1, s)) for s in range(8)]
    first = {k: c.ids for k, c in drain(engine(), requests).items()}
    assert len({tuple(v) for v in first.values()}) == 8
    assert first == {k: c.ids for k, c in drain(engine(), requests).items()}
    other = drain(engine(), [Request("0", ids, Sampling(max_tokens=30), (2, 0))])
    assert other["0"].ids != first["0"]


def test_common_prompts_are_computed_once_even_in_chunks():
    ids = list(range(4, 84)) * 2
    for chunk in (2048, 50):
        e = engine(prefill_tokens=chunk)
        drain(e, [Request(str(s), ids, Sampling(max_tokens=3), (s,)) for s in range(8)])
        assert e.stats.prefilled_tokens <= len(ids) + 7 * 16  # up to 16 tokens are not worth waiting for
        assert e.stats.prefilled_tokens + e.stats.reused_tokens >= 8 * (len(ids) - 1)


# -- sessions -----------------------------------------------------------------------------------------------------


def converse(e: TorchEngine, turns: int = 4, sessions: int = 3, between=lambda e, s: None) -> dict:
    """Several sessions of several turns with observations between; (session, turn) -> completion."""
    ids = {str(s): p for s, p in enumerate(prompts(sessions, seed=5, longest=20))}
    out = {}
    for turn in range(turns):
        done = drain(e, [Request(s, p, Sampling(max_tokens=6 + turn), (int(s), turn)) for s, p in ids.items()])
        for s, c in done.items():
            ids[s] = [*ids[s], *c.ids, *range(10 + turn, 25 + int(s))]
            out[s, turn] = c
            between(e, s)
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_turns_equal_a_fresh_prefill(family):
    kept = converse(engine(family))
    fresh = converse(engine(family, share_prefixes=False), between=lambda e, s: e.release(s))
    evicted = converse(engine(family, max_batch=2))
    for key, want in fresh.items():
        assert want.cached_tokens == 0
        for got in (kept[key], evicted[key]):
            assert got.ids == want.ids
            torch.testing.assert_close(got.logp, want.logp, atol=1e-10, rtol=0)
        if key[1]:
            assert kept[key].cached_tokens > 0


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(1, 50), tail=st.lists(st.integers(4, 98), min_size=1, max_size=20))
def test_a_session_may_come_back_with_other_tokens(cut, tail):
    start = list(range(4, 54))
    e = engine()
    drain(e, [Request("a", start, Sampling(max_tokens=5), (0,))])
    ids = start[:cut] + tail
    again = drain(e, [Request("a", ids, Sampling(max_tokens=5), (1,))])["a"]
    fresh = drain(engine(), [Request("a", ids, Sampling(max_tokens=5), (1,))])["a"]
    assert again.ids == fresh.ids and again.cached_tokens >= min(cut, len(ids) - 1)
    torch.testing.assert_close(again.logp, fresh.logp, atol=1e-10, rtol=0)


def test_release_gives_up_queued_and_running_turns():
    e = engine(max_batch=1)
    for name in "abc":
        e.submit(Request(name, [5, 6, 7], Sampling(max_tokens=5), (ord(name),)))
    e.step()
    e.release("a"), e.release("b")  # one is running, one is queued
    assert set(drain(e)) == {"c"} and not e.busy
    e.release("c"), e.release("never seen")


def test_one_turn_at_a_time_of_a_session():
    e = engine()
    request = Request("a", [5, 6, 7], Sampling(max_tokens=5), (0,))
    e.submit(request)
    with pytest.raises(OndolError, match="under way"):
        e.submit(request)
    e.step()
    with pytest.raises(OndolError, match="under way"):
        e.submit(request)
    assert len(drain(e)["a"].ids) == 5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pack", [True, False])
def test_weights_that_change_in_the_middle_of_turns(family, pack):
    """Turns go on; each token's log-prob is its own version's of everything before it, whoever shares the cache."""
    model, tokenizer = exact(family)
    e = TorchEngine(model, tokenizer, CONTEXT, max_batch=4, prefill_tokens=32, pack_weights=pack)
    requests = [Request(str(i), p, Sampling(max_tokens=16), (i,)) for i, p in enumerate(prompts(7, longest=70))]
    for request in requests:
        e.submit(request)

    def plain():
        made = copy.deepcopy(model)
        made.set_attn_implementation("sdpa")
        return made

    versions, done = {0: plain()}, {}
    for version in (1, 2):
        for _ in range(9):
            done |= {c.session: c for c in e.step()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.03)
        versions[version] = plain()
        e.renew(version)
    done |= drain(e)
    assert len(done) == 7 and any(len(set(c.token_versions)) > 1 for c in done.values())
    for request in requests:
        c = done[request.session]
        assert len(c.ids) == len(c.token_versions) == 16 and c.token_versions == sorted(c.token_versions)
        ids = torch.tensor([[*request.ids, *c.ids]])
        with torch.no_grad():  # transformers' own forward pass, all tokens at once
            want = {v: m(ids).logits[0, :-1].log_softmax(-1)[-16:] for v, m in versions.items()}
        got = [float(want[v][i, token]) for i, (v, token) in enumerate(zip(c.token_versions, c.ids))]
        assert c.logp == pytest.approx(got, abs=1e-8)


def test_sync_forgets_what_old_weights_computed():
    model, tokenizer = exact()
    e = TorchEngine(model, tokenizer, CONTEXT)
    request = Request("a", list(range(4, 40)), Sampling(max_tokens=12), (0,))
    before = drain(e, [request])["a"]
    e.submit(request)
    e.step()
    with pytest.raises(OndolError, match="being sampled"):
        e.sync(1)
    assert e.version == 0
    drain(e)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    e.sync(1)
    after = drain(e, [request])["a"]
    fresh = drain(TorchEngine(copy.deepcopy(model), tokenizer, CONTEXT), [request])["a"]
    assert (before.version, after.version, after.cached_tokens) == (0, 1, 0)
    assert after.logp == fresh.logp and after.ids == fresh.ids
    assert max(abs(a - b) for a, b in zip(after.logp, before.logp)) > 1e-3


# -- how a turn ends ----------------------------------------------------------------------------------------------


@functools.cache
def tiny():
    return make_tiny(hidden=16, layers=1, heads=2, kv_heads=1, context=64)


def end_of(text_ids, *, stop=(), max_tokens=40, context=64, prompt=3, model_and_tokenizer=None):
    """The completion of a turn whose draws are given."""
    model, tokenizer = model_and_tokenizer or tiny()
    request = Request(
        "a", [5] * prompt, Sampling(max_tokens=max_tokens), (0,), tuple(stop), frozenset({tokenizer.eos_token_id})
    )
    with forced(lambda seed: text_ids):
        return drain(TorchEngine(model, tokenizer, context), [request])["a"]


def characters(text: str) -> list[int]:
    tokenizer = tiny()[1]
    return [tokenizer.eos_token_id if c == "$" else tokenizer.convert_tokens_to_ids(c) for c in text]


@pytest.mark.parametrize("stop", ["</python>", "x" * 30, ">", "a very long stop string, of many tokens."])
def test_stop_string_over_many_tokens(stop):
    done = end_of(characters(f"ab{stop}cd"))
    assert done.finish is not Finish.STOP
    done = end_of(characters(f"ab{stop}cd{stop}"), stop=("never", stop), max_tokens=60)
    assert (done.finish, done.text) == (Finish.STOP, f"ab{stop}")
    assert done.ids == characters(f"ab{stop}") and len(done.logp) == len(done.ids)


@settings(max_examples=80, deadline=None)
@given(
    text=st.text("ab<>$", max_size=30),
    stop=st.lists(st.text("ab<>", min_size=1, max_size=4), max_size=3),
    max_tokens=st.integers(1, 30),
    room=st.integers(1, 30),
)
def test_ends_as_a_plain_scan_says(text, stop, max_tokens, room):
    text += "$"
    for n in range(1, len(text) + 1):
        so_far = text[:n]
        if so_far.endswith("$"):
            want = (Finish.END, so_far[:-1])
        elif any(s in so_far for s in stop):
            want = (Finish.STOP, so_far)
        elif n == max_tokens:
            want = (Finish.LENGTH, so_far)
        elif n == room:
            want = (Finish.CONTEXT, so_far)
        else:
            continue
        break
    done = end_of(characters(text), stop=stop, max_tokens=max_tokens, context=3 + room)
    assert (done.finish, done.text) == want
    assert done.ids == characters(so_far) and len(done.logp) == n and done.logp_truncated == []


def test_the_last_allowed_token_may_complete_the_stop_string():
    assert end_of(characters("ab</x>"), stop=("</x>",), max_tokens=6).finish is Finish.STOP
    assert end_of(characters("ab</x>"), stop=("</x>",), max_tokens=5).finish is Finish.LENGTH
    assert end_of(characters("ab</x>"), stop=("</x>",), context=9).finish is Finish.STOP
    assert end_of(characters("ab$"), max_tokens=3).finish is Finish.END


@functools.cache
def byte_pairs():
    """A byte-level BPE tokenizer with a few long merges, and a random model of its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=[END, START])
    raw.train_from_iterator(["x</py>yy</py>z"] * 50, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END, bos_token=START)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval(), tokenizer


def test_stop_string_inside_a_longer_token():
    _, tokenizer = byte_pairs()
    whole = tokenizer.encode("x</py>yy</py>z", add_special_tokens=False)
    assert len(whole) == 1  # the stop string stands in the middle of one token, twice
    done = end_of([*whole, 5, 6], stop=("</py>",), model_and_tokenizer=byte_pairs())
    assert (done.finish, done.text, done.ids) == (Finish.STOP, "x</py>", whole)


@pytest.mark.parametrize("before", ["", "é", "온돌 ", "🔥" * 9])
def test_stop_string_cut_inside_characters(before):
    _, tokenizer = byte_pairs()
    ids = tokenizer.encode(before + "온돌 방 끝.", add_special_tokens=False)
    done = end_of([*ids, 300 % len(tokenizer)], stop=("방 끝",), model_and_tokenizer=byte_pairs(), max_tokens=60)
    assert (done.finish, done.text) == (Finish.STOP, before + "온돌 방 끝")


def test_prompts_that_cannot_fit_are_refused():
    model, tokenizer = tiny()
    e = TorchEngine(model, tokenizer, 64)
    with pytest.raises(OndolError, match="64 tokens does not fit"):
        e.submit(Request("a", [5] * 64, Sampling(), (0,)))
    with pytest.raises(OndolError, match="no tokens"):
        e.submit(Request("a", [], Sampling(), (0,)))
    assert not e.busy
    done = drain(e, [Request("a", [5] * 63, Sampling(), (0,))])["a"]
    assert done.finish is Finish.CONTEXT and len(done.ids) == 1


def test_deadlines(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(torch_engine.time, "monotonic", lambda: now[0])
    e = engine(max_batch=2)
    for name, timeout_s in (("short", 5.0), ("long", 50.0), ("queued", 5.0)):
        e.submit(Request(name, [5, 6, 7], Sampling(max_tokens=12), (len(name),), timeout_s=timeout_s))
    done = {}
    for _ in range(40):
        done |= {c.session: c for c in e.step()}
        now[0] += 1
    assert not e.busy
    assert (done["short"].finish, len(done["short"].ids), done["short"].seconds) == (Finish.TIMEOUT, 5, 5.0)
    assert (done["long"].finish, len(done["long"].ids)) == (Finish.LENGTH, 12)
    assert len(done["queued"].ids) == 5  # its clock began when it got its place
    assert done["short"].text == e.tokenizer.decode(done["short"].ids)


def test_deadline_of_all_at_once():
    e = engine()
    done = drain(e, [Request(str(i), [5, 6], Sampling(), (i,), timeout_s=0.0) for i in range(3)])
    assert [(c.finish, c.ids, c.text) for c in done.values()] == [(Finish.TIMEOUT, [], "")] * 3
    assert e.step() == []
