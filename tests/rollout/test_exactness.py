"""The whole way, rollout to learner: log-probs agree, and neither clock nor company changes an episode."""

from __future__ import annotations

import asyncio
import copy
import random

import pytest
import torch

from conftest import FAMILIES, make_family
from float64 import exact
from forcing import forced
from ondol.engines.base import Sampling
from ondol.engines.torch import TorchEngine
from ondol.envs.tool import ToolEnv
from ondol.methods.grpo import GRPO
from ondol.models.chat import renderer_for
from ondol.recipe import OptimizerSettings
from ondol.records import Finish, StopReason, Trajectory
from ondol.rollout.driver import Plan, rollout
from ondol.train.learner import Learner
from ondol.train.logprobs import log_probs
from ondol.train.optimizer import Optimizer
from ondol.train.packing import Sequence_, pack
from scripted import Echo, Probe

CONTEXT = 256
PROBLEMS, SAMPLES = 3, 4


def script_of(tokenizer, tool: str):
    """What the model says: up to two calls in a few words of its own making, then whatever it samples."""

    def script(seed: tuple[int, ...]) -> list[int]:
        problem, sample, turn = seed[-3:]
        if turn >= (problem + sample) % 3:
            return []
        text = f"{'so ' * sample}<{tool}>{3 + problem}*{sample + 1}+{turn}</{tool}>"
        return [tokenizer.convert_tokens_to_ids(c) for c in text]

    return script


def episodes(
    model, tokenizer, *, tools=("calculator",), sampling=None, overlap=False, family=None, **engine
) -> list[Trajectory]:
    """Rollouts of a random model made to call tools: multi-turn, with observations."""
    made = TorchEngine(model, tokenizer, CONTEXT, **engine)
    name = tools[0] if isinstance(tools[0], str) else tools[0].name
    task = Echo()
    plan = Plan(
        task=task,
        env=ToolEnv(tools=tools, max_turns=3, system="Use tools."),
        problems=[task.problem(i) for i in range(PROBLEMS)],
        samples=SAMPLES,
        sampling=sampling or Sampling(temperature=0.9, max_tokens=45),
        seed=(1, 0),
        overlap_tools=overlap,
    )
    with forced(script_of(tokenizer, name)):
        groups = rollout(made, renderer_for(tokenizer), plan)
    assert not made.busy
    ts = [t for g in groups for t in g.trajectories]
    assert {len(t.turns) for t in ts} == {1, 2, 3}
    assert all(r.ok for t in ts for turn in t.turns for r in turn.results)
    return ts


def gap(model, ts: list[Trajectory], *, budget: int = 10**6, share: bool = True) -> float:
    """Largest difference between recorded log-probs and the learner's."""
    worst, count = 0.0, 0
    chosen = [Sequence_(t, i, 0.0, 0.0) for i, t in enumerate(ts)]
    for batch in pack(chosen, budget, share_prompts=share):
        with torch.no_grad():
            logp, _ = log_probs(model, batch)
        worst = max(worst, (logp.double() - batch.logp)[batch.sampled].abs().max().item())
        count += int(batch.sampled.sum())
    assert count == sum(t.sampled_tokens for t in ts)
    return worst


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_learner_reproduces_recorded_log_probs(family, dtype, tolerance):
    model, tokenizer = make_family(family) if dtype == torch.float32 else exact(family)
    ts = episodes(model, tokenizer, max_batch=5, prefill_tokens=70)
    assert min(len(t.ids) for t in ts) > 8  # more than gemma's window
    for budget, share in ((10**6, True), (10**6, False), (200, True), (1, False)):
        assert gap(model, ts, budget=budget, share=share) < tolerance
    ts[0].ids[ts[0].prompt_length - 1] ^= 1  # and it would show
    assert gap(model, ts) > 1e-2


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_plain_transformers_gives_the_same_log_probs(family):
    """Neither our attention nor our packing: the whole sequence through the model as it was."""
    model, tokenizer = exact(family)
    ts = episodes(model, tokenizer)
    plain, _ = exact(family)
    for t in ts:
        with torch.no_grad():
            logp = (plain(torch.tensor([t.ids])).logits[0, :-1] / t.temperature).log_softmax(-1)
        for at in range(1, len(t.ids)):
            if t.sampled[at]:
                assert logp[at - 1, t.ids[at]].item() == pytest.approx(t.logp[at], abs=1e-9)


@pytest.mark.parametrize("tool", ["python", "calculator"])
def test_real_tools_answer_and_their_words_are_not_trained(tool):
    model, tokenizer = exact()
    for t in episodes(model, tokenizer, tools=(tool,)):
        for n, turn in enumerate(t.turns[:-1]):
            p, s = t.key[1:]
            assert turn.finish is Finish.STOP and [r.text for r in turn.results] == [str((3 + p) * (s + 1) + n)]
            after = tokenizer.decode(t.ids[turn.end : t.turns[n + 1].start])
            assert f"<result>{(3 + p) * (s + 1) + n}</result>" in after
            assert not any(t.trained[turn.end : t.turns[n + 1].start])
        assert t.stop_reason in (StopReason.TURN_LENGTH, StopReason.ANSWERED, StopReason.EMPTY, StopReason.MAX_TURNS)


def told(ts: list[Trajectory]) -> list[tuple]:
    return [(t.key, t.ids, t.sampled, t.stop_reason, t.reward, [turn.finish for turn in t.turns]) for t in ts]


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0.9, max_tokens=45), Sampling(top_p=0.9, top_k=20, max_tokens=45)]
)
def test_neither_clock_nor_company_changes_an_episode(sampling):
    rng = random.Random(0)

    async def slow(session, text):
        await asyncio.sleep(rng.random() / 50)
        return eval(text)

    model, tokenizer = exact()
    want = episodes(model, tokenizer, tools=(Probe(work=slow),), sampling=sampling)
    for overlap, engine in (
        (True, {}),
        (False, {"max_batch": 2}),
        (True, {"max_batch": 3, "prefill_tokens": 11}),
        (False, {"share_prefixes": False}),
    ):
        got = episodes(model, tokenizer, tools=(Probe(work=slow),), sampling=sampling, overlap=overlap, **engine)
        assert told(got) == told(want)
        for a, b in zip(got, want):
            torch.testing.assert_close(a.logp, b.logp, atol=1e-10, rtol=0)
            torch.testing.assert_close(a.logp_truncated, b.logp_truncated, atol=1e-10, rtol=0)
            if sampling.truncated:
                assert len(a.logp_truncated) == len(a.ids)


def test_again_is_the_same_to_the_bit():
    """In float32, with tools that come back in any order: without overlap not one bit moves."""
    rng = random.Random(0)

    async def slow(session, text):
        await asyncio.sleep(rng.random() / 50)
        return eval(text)

    model, tokenizer = make_family("qwen3")
    first, second = (episodes(model, tokenizer, tools=(Probe(work=slow),), max_batch=5) for _ in range(2))
    assert told(first) == told(second)
    assert [t.logp for t in first] == [t.logp for t in second]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_mismatch_metric_over_two_updates(family):
    """Sample, update, sync, sample: the detector stays quiet, and sounds when the engine keeps old caches."""
    model, tokenizer = make_family(family)
    model = copy.deepcopy(model)
    engine = TorchEngine(model, tokenizer, CONTEXT)
    learner = Learner(model, Optimizer(model, OptimizerSettings(learning_rate=3e-3)), tokens_per_microbatch=300)
    renderer, task = renderer_for(tokenizer), Echo()
    env = ToolEnv(tools=("calculator",), max_turns=3, system="Use tools.")
    for step in range(3):
        plan = Plan(task, env, [task.problem(i) for i in range(2)], 4, Sampling(max_tokens=30), (1, 0), step=step)
        with forced(script_of(tokenizer, "calculator")):
            groups = rollout(engine, renderer, plan)
        for g in groups:
            for i, t in enumerate(g.trajectories):
                t.reward = float(i % 2)
                assert set(t.version) == {-1, step}
        metrics = learner.reinforce(groups, GRPO(kl_coef=0))
        assert metrics["mismatch/max_abs"] < 1e-4 and metrics["policy/clip_share"] == 0
        learner.version = step + 1
        engine.sync(step + 1)
    version = engine.version
    engine.sync = lambda v: None  # a broken engine
    with forced(script_of(tokenizer, "calculator")):
        plan.step = 3
        groups = rollout(engine, renderer, plan)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.01)
    for i, t in enumerate(t for g in groups for t in g.trajectories):
        t.reward = float(i % 2)
    learner.version = version
    assert learner.reinforce(groups, GRPO(kl_coef=0))["mismatch/max_abs"] > 1e-2
