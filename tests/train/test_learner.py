"""The learner: its gradient against plain transformers on padded batches, however the work is cut and shared."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import FAMILIES
from float64 import exact
from ondol.errors import OndolError
from ondol.methods.grpo import GRPO
from ondol.models.tiny import make_tiny
from ondol.recipe import OptimizerSettings
from ondol.records import Group, Trajectory
from ondol.train.credit import credit
from ondol.train.learner import Learner
from ondol.train.logprobs import _Head, log_probs
from ondol.train.optimizer import Optimizer
from ondol.train.packing import Sequence_, pack
from ondol.train.updates import NotFinite, dump_batch
from train_data import TEMPERATURE, trajectories


def sequences(ts: list[Trajectory], method: GRPO | None = None) -> list[Sequence_]:
    method = method or GRPO(kl_coef=0)
    lengths = torch.tensor([sum(t.trained) for t in ts], dtype=torch.float64)
    weights = method.token_weights(lengths)
    return [Sequence_(t, i, (-1) ** i * (0.5 + i / 7), float(weights[i])) for i, t in enumerate(ts)]


def loss_fn(logp, batch, reference):
    """A loss whose slope depends on logp, the record and the advantage, smooth so that rounding cannot flip a clip."""
    ratio = torch.exp(0.2 * (logp - batch.logp.to(logp.dtype)))
    return -ratio * batch.advantage.to(logp.dtype), {"x/ratio": ratio.detach()}


def learner_of(family: str = "llama", rate: float = 1e-3, **settings) -> Learner:
    model, _ = exact(family)
    return Learner(model, Optimizer(model, OptimizerSettings(learning_rate=rate)), **settings)


def gradient(learner: Learner, batches, loss=loss_fn) -> tuple[float, dict[str, torch.Tensor]]:
    learner.optimizer.zero()
    value = learner.gradient(batches, loss).loss
    return value, {n: p.grad.clone() for n, p in learner.model.named_parameters()}


def padded_reference(family: str, chosen: list[Sequence_]) -> tuple[float, dict[str, torch.Tensor]]:
    """The same loss from transformers alone: right-padded batch, attention mask, dense log-softmax."""
    model, _ = exact(family)
    model.set_attn_implementation("sdpa")  # eager attention takes its softmax in float32
    longest = max(len(s.trajectory.ids) for s in chosen)

    def pad(rows, fill, dtype):
        return torch.tensor([[*r, *[fill] * (longest - len(r))] for r in rows], dtype=dtype)

    ts = [s.trajectory for s in chosen]
    ids = pad([t.ids for t in ts], 1, torch.long)
    out = model(ids, attention_mask=pad([[1] * len(t.ids) for t in ts], 0, torch.long)).logits
    logp = (out[:, :-1] / TEMPERATURE).log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    trained = pad([t.trained for t in ts], False, torch.bool)[:, 1:]
    old = pad([t.logp for t in ts], 0.0, torch.float64)[:, 1:]
    advantage = torch.tensor([[s.advantage] for s in chosen], dtype=torch.float64)
    weight = torch.tensor([[s.weight] for s in chosen], dtype=torch.float64)
    losses = -torch.exp(0.2 * (logp - old)) * advantage * weight
    loss = losses[trained].sum()
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters()}


def assert_same(a, b, atol: float = 1e-9) -> None:
    assert a[0] == pytest.approx(b[0], abs=atol)
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


# -- the gradient -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_equals_padded_transformers(family):
    chosen = sequences(trajectories())
    reference = padded_reference(family, chosen)
    assert max(g.abs().max() for g in reference[1].values()) > 1e-2
    learner = learner_of(family)
    shared, apart = pack(chosen, 10**6), pack(chosen, 10**6, share_prompts=False)
    assert len(shared) == 1 and len(shared[0].ids) < len(apart[0].ids)
    assert_same(gradient(learner, shared), reference)
    assert_same(gradient(learner, apart), reference)
    one_by_one = [b for s in chosen for b in pack([s], 10**6)]
    assert_same(gradient(learner, one_by_one), reference)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_accumulation_changes_nothing(family):
    chosen = sequences(trajectories(seed=1))
    learner = learner_of(family)
    want = gradient(learner, pack(chosen, 10**6))
    scale = max(g.abs().max().item() for g in want[1].values())
    counts = set()
    for budget in (1, 40, 100, 230):
        batches = pack(chosen, budget)
        counts.add(len(batches))
        assert_same(gradient(learner, batches), want, atol=1e-12 * max(scale, 1))
    assert len(counts) == 4
    assert_same(
        gradient(learner, [b for s in reversed(chosen) for b in pack([s], 1)]), want, atol=1e-12 * max(scale, 1)
    )


def test_eight_of_one_are_one_of_eight_after_updates():
    ts = trajectories(seed=2, prompts=2, samples=4)
    ends = []
    for budget in (1, 10**6):
        learner = learner_of(tokens_per_microbatch=budget)
        for _ in range(3):
            learner.imitate(ts)
        ends.append(learner.model.state_dict())
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], atol=1e-10, rtol=0)


def test_gradient_checkpointing_changes_nothing():
    chosen = sequences(trajectories(seed=3))
    plain, saving = learner_of("gemma3"), learner_of("gemma3", gradient_checkpointing=True)
    assert_same(gradient(saving, pack(chosen, 300)), gradient(plain, pack(chosen, 300)), atol=1e-12)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), budget=st.integers(1, 400), share=st.booleans())
def test_any_packing_gives_one_gradient(seed, budget, share):
    chosen = sequences(trajectories(seed, prompts=2, samples=3))
    learner = learner_of("gemma3")
    want = gradient(learner, pack(chosen, 1))
    assert_same(gradient(learner, pack(chosen, budget, share_prompts=share)), want, atol=1e-11)


# -- masks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [0.0, 1e30, float("nan"), float("inf"), -float("inf")])
def test_masked_tokens_have_no_influence_to_the_bit(poison):
    chosen = sequences(trajectories(seed=4))
    learner = learner_of()
    want = gradient(learner, pack(chosen, 100))
    batches = pack(chosen, 100)
    outside = 0
    for batch in batches:
        off = ~batch.trained
        outside += int(off.sum())
        for values in (batch.logp, batch.advantage, batch.weight):
            values[off] = poison
        batch.version[off] = 10**6
    assert outside > 10

    def spoiled(logp, batch, reference):
        assert batch.trained.all()
        return loss_fn(logp, batch, reference)

    got = gradient(learner, batches, spoiled)
    assert got[0] == want[0] and all(torch.equal(got[1][n], want[1][n]) for n in want[1])


def test_observations_are_no_targets():
    """Sampled or not, untrained tokens may as well not be targets; as context they count."""
    ts = trajectories(seed=4)
    learner = learner_of()
    want = gradient(learner, pack(sequences(ts), 10**6))
    bare = copy.deepcopy(ts)
    for t in bare:
        t.sampled = list(t.trained)
    assert_same(gradient(learner, pack(sequences(bare), 10**6)), want, atol=1e-12)
    moved = copy.deepcopy(ts)
    for t in moved:
        for at in range(t.prompt_length, len(t.ids)):
            if not t.sampled[at]:
                t.ids[at] = 4 + t.ids[at] % 90
    got = gradient(learner, pack(sequences(moved), 10**6))
    assert max((got[1][n] - want[1][n]).abs().max() for n in want[1]) > 1e-6


def test_a_batch_without_targets():
    ts = trajectories(seed=5, prompts=1, samples=2)
    learner = learner_of()
    for t in ts:
        t.sampled, t.trained = [False] * len(t.ids), [False] * len(t.ids)
    loss, grads = gradient(learner, pack(sequences(ts), 10**6))
    assert loss == 0.0 and not any(g.any() for g in grads.values())


# -- the output layer ---------------------------------------------------------------------------------------------


def dense_head(states, weight, target, temperature, cap):
    z = states @ weight.T
    z = z if cap is None else torch.tanh(z / cap) * cap
    logp = (z / temperature).log_softmax(-1)
    return logp.gather(-1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("budget", [1, 60, 10**6])  # a row at a time, two rows, all at once
@pytest.mark.parametrize("chunk", [60, 10**6])  # kept ones too are worked on in chunks
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_head_equals_autograd(cap, temperature, budget, chunk, rows, monkeypatch):
    monkeypatch.setattr("ondol.train.logprobs.HEAD_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(29, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 29, (rows,), generator=generator)
    slope = torch.randn(rows, generator=generator, dtype=torch.float64)
    logp, entropy = _Head.apply(states, weight, target, temperature, cap, budget)
    want, want_entropy = dense_head(states, weight, target, temperature, cap)
    close = {"atol": 1e-12, "rtol": 0}
    torch.testing.assert_close(logp, want, **close)
    torch.testing.assert_close(entropy, want_entropy, **close)
    assert not entropy.requires_grad
    got = torch.autograd.grad((logp * slope).sum(), (states, weight))
    for a, b in zip(got, torch.autograd.grad((want * slope).sum(), (states, weight))):
        torch.testing.assert_close(a, b, **close)
    if rows:
        assert torch.autograd.gradcheck(
            lambda s, w: _Head.apply(s, w, target, temperature, cap, budget)[0], (states, weight)
        )


def test_head_in_bfloat16_stays_near_float64():
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(9, 32, generator=generator).bfloat16(), torch.randn(300, 32, generator=generator)
    weight = (weight / 6).bfloat16()
    target = torch.randint(0, 300, (9,), generator=generator)
    logp, _ = _Head.apply(states, weight, target, 1.0, None, 1000)
    assert logp.dtype == torch.float32
    want, _ = dense_head(states.double(), weight.double(), target, 1.0, None)
    torch.testing.assert_close(logp, want, atol=0.03, rtol=0, check_dtype=False)


# -- updates ------------------------------------------------------------------------------------------------------


def groups_of(ts: list[Trajectory]) -> list[Group]:
    by: dict[str, list[Trajectory]] = {}
    for t in ts:
        by.setdefault(t.problem.id, []).append(t)
    return [Group(g[0].problem, g) for g in by.values()]


def records_of(learner: Learner, ts: list[Trajectory]) -> None:
    """Make the recorded log-probs those of the learner's own weights."""
    from ondol.train.logprobs import log_probs

    for t in ts:
        (batch,) = pack([Sequence_(t, 0, 0.0, 0.0)], 10**6)
        with torch.no_grad():
            logp = log_probs(learner.model, batch)[0].tolist()
        at = [i for i in range(t.prompt_length, len(t.ids)) if t.sampled[i]]
        for i, value in zip(at, logp, strict=True):
            t.logp[i] = value


class EveryGroup(GRPO):
    """GRPO that computes zero-advantage trajectories, too."""

    @property
    def skip_zero_advantage(self) -> bool:
        return False


def test_skipping_zero_advantages_changes_no_update():
    ts = trajectories(seed=6, prompts=4)
    for t in ts[:4] + ts[8:12]:
        t.reward = 1.0  # groups of equals
    ts[4].reward, ts[5].reward = 0.0, 1.0
    ends, metrics = [], []
    for method in (GRPO(kl_coef=0), EveryGroup(kl_coef=0)):
        learner = learner_of()
        mine = copy.deepcopy(ts)
        records_of(learner, mine)
        metrics.append(learner.reinforce(groups_of(mine), method))
        ends.append(learner.model.state_dict())
    assert metrics[0]["learner/tokens"] < metrics[1]["learner/tokens"]
    assert metrics[0]["gradient/norm"] == pytest.approx(metrics[1]["gradient/norm"], rel=1e-12)
    assert metrics[0]["groups/zero_advantage_share"] >= 0.5
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], atol=1e-9, rtol=0)


def test_reinforce_is_grpo_written_out():
    """Two updates of two minibatches against the formula on one sequence at a time, autograd and torch's AdamW."""
    ts = trajectories(seed=7, prompts=4)
    for i, t in enumerate(ts):
        t.reward = float(i % 3 == 0)
    learner = learner_of("qwen2")
    records_of(learner, ts)
    method = GRPO(kl_coef=0, minibatches=2, epochs=2)
    learner.reinforce(groups_of(ts), method)
    model, _ = exact("qwen2")
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(2):
        for half in (ts[:8], ts[8:]):
            total = torch.zeros((), dtype=torch.float64)
            for t in half:
                rewards = torch.tensor([o.reward for o in half if o.problem == t.problem], dtype=torch.float64)
                advantage = (t.reward - rewards.mean()) / (rewards.std() + 1e-4)
                logp = (model(torch.tensor([t.ids])).logits[0, :-1] / TEMPERATURE).log_softmax(-1)
                at = [i for i in range(len(t.ids)) if t.trained[i]]
                for i in at:
                    ratio = torch.exp(logp[i - 1, t.ids[i]] - t.logp[i])
                    least = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                    total = total - least / len(at) / len(half)
            total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adamw.step(), adamw.zero_grad()
    want = model.state_dict()
    for name, value in learner.model.state_dict().items():
        torch.testing.assert_close(value, want[name], atol=1e-7, rtol=0)  # 1e-6 in the clipping norm's own formula


def test_reference_and_its_penalty():
    ts = trajectories(seed=8)
    learner = learner_of(rate=0.02)
    learner.reference = copy.deepcopy(learner.model)
    records_of(learner, ts)
    method = GRPO(kl_coef=0.04)
    first = learner.reinforce(groups_of(ts), method)
    assert first["policy/kl_k3"] == pytest.approx(0, abs=1e-12)
    assert first["policy/ratio_max"] == pytest.approx(1, abs=1e-9) and first["policy/clip_share"] == 0
    records_of(learner, ts)
    assert learner.reinforce(groups_of(ts), method)["policy/kl_k3"] > 1e-4


def test_mismatch_is_seen_and_only_where_versions_agree():
    ts = trajectories(seed=9)
    learner = learner_of(rate=1e-9)
    records_of(learner, ts)
    assert learner.reinforce(groups_of(ts), EveryGroup(kl_coef=0))["mismatch/max_abs"] < 1e-9
    at = next(i for i in range(len(ts[0].ids)) if ts[0].sampled[i])
    ts[0].logp[at] -= 0.25
    assert learner.reinforce(groups_of(ts), EveryGroup(kl_coef=0))["mismatch/max_abs"] == pytest.approx(0.25, abs=1e-3)
    learner.version = 5
    assert "mismatch/max_abs" not in learner.reinforce(groups_of(ts), EveryGroup(kl_coef=0))


@pytest.mark.parametrize("where", ["loss", "gradient", "stop"])
def test_a_bad_update_changes_nothing(where):
    ts = trajectories(seed=10)
    learner = learner_of(tokens_per_microbatch=60)
    learner.imitate(ts)
    weights = {n: v.clone() for n, v in learner.model.state_dict().items()}
    state = {n: v.clone() for n, v in learner.optimizer.state().items()}
    calls = [0]

    def bad(logp, batch, reference):
        calls[0] += 1
        loss = -logp
        if calls[0] == 3:  # after two good micro-batches
            if where == "loss":
                loss = loss * float("nan")
            elif where == "gradient":
                loss = torch.sqrt(loss - loss.detach())  # zero, with an infinite slope
        return loss, {}

    def stop():
        if where == "stop" and calls[0] == 2:
            raise KeyboardInterrupt

    learner.stop = stop
    batches = learner.pack(sequences(ts))
    assert len(batches) > 3
    with pytest.raises(KeyboardInterrupt if where == "stop" else NotFinite) as caught:
        learner.apply(batches, bad)
    if where == "loss":
        assert torch.equal(caught.value.batch.ids, batches[2].ids)
    assert all(torch.equal(v, weights[n]) for n, v in learner.model.state_dict().items())
    now = learner.optimizer.state()
    assert now.keys() == state.keys() and all(torch.equal(now[n], state[n]) for n in state)
    assert all(p.grad is None for p in learner.model.parameters())


def test_what_cannot_be_learned_from_is_refused():
    learner, ts = learner_of(), trajectories(seed=11)
    ts[3].reward = float("inf")
    with pytest.raises(OndolError, match=r"rewards are not finite.*\(0, 0, 3\)"):
        learner.reinforce(groups_of(ts), GRPO(kl_coef=0))
    for t in ts:
        t.trained = [False] * len(t.ids)
    with pytest.raises(OndolError, match="none of the trajectories"):
        learner.imitate(ts)


def test_imitation_is_mean_negative_log_likelihood():
    ts = trajectories(seed=12)
    for t in ts:
        t.temperature = 1.0
    loss = learner_of().imitate(ts)["loss/sft"]
    (model, _), total, count = exact(), 0.0, 0
    with torch.no_grad():
        for t in ts:
            logp = model(torch.tensor([t.ids])).logits[0].log_softmax(-1)
            picked = [-logp[i - 1, t.ids[i]].item() for i in range(len(t.ids)) if t.trained[i]]
            total, count = total + sum(picked), count + len(picked)
    assert loss == pytest.approx(total / count, abs=1e-10)


def test_half_precision_learns_in_small_steps():
    """At a rate far below bfloat16's step the loss still goes down as in float32."""
    ts = trajectories(seed=13, prompts=2)
    after = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = make_tiny(hidden=32)[0].to(dtype)
        learner = Learner(model, Optimizer(model, OptimizerSettings(learning_rate=1e-4)), tokens_per_microbatch=50)
        losses = [learner.imitate(ts)["loss/sft"] for _ in range(25)]
        after[dtype] = losses[0] - losses[-1]
    assert after[torch.float32] > 0.05
    assert after[torch.bfloat16] == pytest.approx(after[torch.float32], rel=0.2)


def test_many_micro_batches_add_up_in_half_precision():
    """512 times the same gradient is 512 gradients; a bfloat16 sum would stop near 256."""
    model = make_tiny(hidden=16, layers=1, heads=2)[0].bfloat16()
    learner = Learner(model, Optimizer(model, OptimizerSettings()))
    batches = pack(sequences(trajectories(seed=13, prompts=1, samples=1)), 10**6)
    norms = []
    for count in (1, 512):
        learner.optimizer.zero()
        learner.gradient(batches * count, loss_fn)
        norms.append(float(learner.optimizer.gradient_norm()))
    assert norms[1] == pytest.approx(512 * norms[0], rel=1e-3)


def test_dumped_batch(tmp_path):
    from safetensors.torch import load_file

    (batch,) = pack(sequences(trajectories(seed=14)), 10**6)
    dump_batch(batch, tmp_path / "batch.safetensors")
    back = load_file(tmp_path / "batch.safetensors")
    assert torch.equal(back["ids"], batch.ids) and torch.equal(back["logp"], batch.logp)
    assert back["segments"].shape == (len(batch.segments), 3)
    for row, segment in zip(back["segments"].tolist(), batch.segments):
        assert (row[0], row[1]) == (segment.start, segment.end)
        assert (row[2] == -1) == (segment.parent is None)


# -- masks that a rollout sets ------------------------------------------------------------------------------------


def test_observations_that_are_trained_on_begin_at_a_ratio_of_one():
    """They were not sampled, so what they are compared with are the weights before the first update."""
    learner, ts = learner_of(tokens_per_microbatch=40), trajectories()
    records_of(learner, ts)
    for t in ts:
        t.trained = [False] * t.prompt_length + [True] * (len(t.ids) - t.prompt_length)
    before = [list(t.logp) for t in ts]
    found = learner._with_old_logp(ts)
    assert [t.logp for t in ts] == before  # the record stays
    for t, full in zip(ts, found):
        (batch,) = pack([Sequence_(t, 0, 1.0, 1.0)], 10**6)
        with torch.no_grad():
            now = log_probs(learner.model, batch)[0].tolist()
        assert full.logp[t.prompt_length :] == pytest.approx(now, abs=1e-9)
        assert [lp for lp, s in zip(full.logp, t.sampled) if s] == [lp for lp, s in zip(t.logp, t.sampled) if s]
    metrics = learner.reinforce(groups_of(ts), GRPO(kl_coef=0))
    assert metrics["policy/ratio_max"] == pytest.approx(1, abs=1e-6) and metrics["learner/tokens"] > 0


def test_a_trajectory_that_is_masked_whole_has_a_reward_and_no_gradient():
    learner, ts = learner_of(), trajectories()
    records_of(learner, ts)
    for t in ts[::2]:
        t.trained = [False] * len(t.ids)
    found = credit(groups_of(ts), GRPO(kl_coef=0), {})
    assert all(
        a != 0 for a, g in zip(found.advantages, found.group) if len({t.reward for t in ts[4 * g : 4 * g + 4]}) > 1
    )
    assert [found.touched(i) for i in range(len(ts))] == [i % 2 == 1 and a != 0 for i, a in enumerate(found.advantages)]
    garbled = [dataclasses.replace(t, logp=[lp - 1 for lp in t.logp]) if i % 2 == 0 else t for i, t in enumerate(ts)]
    one, other = learner_of(), learner_of()
    one.reinforce(groups_of(ts), GRPO(kl_coef=0))
    other.reinforce(groups_of(garbled), GRPO(kl_coef=0))
    for a, b in zip(one.model.parameters(), other.model.parameters()):
        assert torch.equal(a, b)
    for t in ts:
        t.trained = [False] * len(t.ids)
    assert learner.reinforce(groups_of(ts), GRPO(kl_coef=0))["updates/skipped"] == 1
