"""A context that begins anew inside a trajectory: what was sampled without sight of the past is learned from without it."""

from __future__ import annotations

import copy

import pytest
import torch

import ondol
from forcing import forced
from ondol.engines.base import Sampling
from ondol.engines.torch import TorchEngine
from ondol.envs.stream import StreamEnv
from ondol.models.chat import renderer_for
from ondol.models.tiny import make_tiny
from ondol.records import Trajectory
from ondol.rollout.driver import Plan, rollout
from ondol.rollout.scripted import ScriptEngine
from ondol.tasks.recall import Recall
from ondol.train.dump import _checked
from ondol.train.logprobs import log_probs
from ondol.train.packing import Sequence_, pack


@pytest.fixture(scope="module")
def rolled():
    """Episodes of a tiny model whose context is shorter than an episode: (the same model again, renderer, scripted, sampled)."""
    model, tokenizer = make_tiny(hidden=32, layers=2, context=128)
    renderer = renderer_for(tokenizer)
    task, env = Recall(pairs=5), StreamEnv(tools=["memory"], system="")
    plan = Plan(task, env, [task.problem(0), task.problem(1)], 2, Sampling(max_tokens=40), seed=(0,))
    scripts = {(p, s): ["-" * (1 + s)] * 5 + ["<memory>list</memory>", "7"] for p in range(2) for s in range(2)}
    played = [t for g in rollout(ScriptEngine(renderer, scripts), renderer, plan) for t in g.trajectories]

    def says(seed) -> list[int]:
        problem, sample, turn = seed[-3:]
        text = scripts[problem, sample][turn]
        return [*renderer.codec.text(text), *([] if text.endswith(">") else [renderer.end_id])]

    with forced(says):  # what a random model would never say, with the log-probabilities it gives to it
        sampled = [
            t for g in rollout(TorchEngine(model, tokenizer, 128, max_batch=3), renderer, plan) for t in g.trajectories
        ]
    return make_tiny(hidden=32, layers=2, context=128)[0], model, renderer, played, sampled


def forward(model, ids: list[int]) -> torch.Tensor:
    """log-probability of each token given those before it, by the model alone; the first is nan."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].float()
    logp = logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(ids[1:]).unsqueeze(-1)).squeeze(-1)
    return torch.cat([torch.tensor([torch.nan]), logp])


def test_contexts_are_those_of_the_episode(rolled) -> None:
    _, _, renderer, played, sampled = rolled
    assert [t.ids for t in sampled] == [t.ids for t in played]
    for t in sampled:
        assert len(t.restarts) == 5 and len(t.ids) > 128 and max(b - a for a, b in t.contexts) < 128
        text = renderer.codec._backend.decode(t.ids, skip_special_tokens=False)
        assert t.score == float(t.problem.answer == "7") and text.count("user") >= 6
        for (start, end), part in zip(t.contexts, t.problem.data["parts"]):
            piece = renderer.codec._backend.decode(t.ids[start:end], skip_special_tokens=False)
            assert part in piece and sum(p in piece for p in t.problem.data["parts"]) == 1


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [1, 300, 10_000])
def test_the_learner_sees_what_the_sampler_saw(rolled, share, budget) -> None:
    """Log-probabilities in a packed batch are those of each context alone, whatever it is packed with."""
    plain, model, _, played, _ = rolled
    for t in played:
        t.sampled = [True if i >= t.prompt_length else s for i, s in enumerate(t.sampled)]  # every token is a target
        t.sampled = [s and i not in t.restarts for i, s in enumerate(t.sampled)]
    want = {i: torch.cat([forward(plain, t.ids[a:b]) for a, b in t.contexts]) for i, t in enumerate(played)}
    seen = 0
    for batch in pack([Sequence_(t, i, 0.0, 1.0, i // 2) for i, t in enumerate(played)], budget, share_prompts=share):
        with torch.no_grad():
            logp, _ = log_probs(model, batch)
        for i in batch.sequence.unique().tolist():
            mine = batch.sequence == i
            sampled = torch.tensor(played[i].sampled)
            assert torch.equal(batch.target[mine], torch.tensor(played[i].ids)[sampled])
            torch.testing.assert_close(logp[mine].float(), want[i][sampled], rtol=1e-4, atol=1e-5)
            seen += 1
    assert seen == len(played)


def test_what_was_sampled_is_reproduced(rolled) -> None:
    _, model, _, _, sampled = rolled
    assert all(len(t.restarts) == 5 and t.sampled_tokens > 20 for t in sampled)
    for batch in pack([Sequence_(t, i, 0.0, 1.0) for i, t in enumerate(sampled)], 10_000):
        with torch.no_grad():
            logp, _ = log_probs(model, batch)
        torch.testing.assert_close(logp.double(), batch.logp, rtol=1e-4, atol=1e-5)


def test_engines_without_ids_are_told_the_same(rolled) -> None:
    """An endpoint gets messages: those of the context alone, as many as its ids hold."""
    renderer, asked = rolled[2], []

    class Listening(ScriptEngine):
        def submit(self, request) -> None:
            asked.append((list(request.ids), list(request.messages)))
            super().submit(request)

    task, env = Recall(pairs=3), StreamEnv(tools=["memory"], system="Keep notes.", window=2)
    scripts = {(0, 0): ["<memory>write a: 1</memory>", "-", "-", "<memory>list</memory>", "7"]}
    plan = Plan(task, env, [task.problem(0)], 1, Sampling(), seed=(0,))
    rollout(Listening(renderer, scripts), renderer, plan)
    assert [len(messages) for _, messages in asked] == [2, 4, 2, 4, 6]
    for ids, messages in asked:
        assert (
            messages[0].role == "system" and renderer.prompt(messages[:2]) == ids[: len(renderer.prompt(messages[:2]))]
        )


def test_a_run_learns_over_restarts(tmp_path) -> None:
    """Warm start, RL and evaluation; the learner reproduces what was sampled, which a wrong context would show."""
    overrides = (
        "model.path=tiny:hidden=32,layers=1,context=160",
        "task.pairs=6",
        "warm_start.problems=4",
        "warm_start.epochs=1",
        "train.steps=1",
        "train.prompts_per_step=2",
        "train.samples_per_prompt=10",
        "method.minibatches=1",
        "evaluate.problems=2",
    )
    tokenizer = make_tiny(hidden=32, layers=1)[1]

    def says(seed) -> list[int]:
        """Nothing while pairs go by; each sample answers with its own digit, so one of ten is right."""
        sample, turn = seed[-2:]
        text = "-" if turn < 6 else str(sample % 10)
        return [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]

    with forced(says), ondol.run("tiny-recall", *overrides, runs=tmp_path) as run:
        assert run.state == "finished"
        assert {len(t.restarts) for t in run.db.trajectories(phase="rl")} == {6}
        assert [m.value for m in run.db.metrics("score/mean", "rl")] == [pytest.approx(0.1)]
        (mismatch,) = [m.value for m in run.db.metrics("mismatch/max_abs", "rl")]
        assert mismatch < 1e-4


def test_records_keep_restarts(rolled) -> None:
    t = rolled[4][0]
    again = Trajectory.from_dict(t.to_dict())
    assert again == t and _checked(again).restarts == t.restarts
    old = t.to_dict()
    del old["restarts"]
    assert Trajectory.from_dict(old).contexts == [(0, len(t.ids))]
    for wrong in ([5, 2], [10**6], [0], ["x"]):
        bad = copy.deepcopy(t)
        bad.restarts = wrong
        with pytest.raises((ValueError, TypeError)):
            _checked(bad)
