"""The critic: where its values come from, what it changes and what it must not, its stage, and its resume."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from test_every_method import learner_of, rollouts
from test_learner import groups_of, records_of, trajectories
from test_loop import Heard, Run, fresh, go, same

from float64 import exact
from ondol.errors import OndolError
from ondol.methods.gae import explained_variance
from ondol.methods.grpo import GRPO
from ondol.methods.ppo import PPO
from ondol.recipe import OptimizerSettings
from ondol.store import latest_checkpoint
from ondol.train import loop
from ondol.train.critic import Critic, CriticLearner
from ondol.train.learner import Learner
from ondol.train.optimizer import Optimizer

PPO_RUN = (
    "method={name='ppo', value_pretraining_steps=3, critic_learning_rate=1e-3, minibatches=2}",
    "train.steps=3",
    "train.checkpoint_every_steps=1",
    "evaluate.problems=0",
)


def copied(module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


@pytest.mark.parametrize("kind", ["separate", "shared"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # tied and untied output layers
def test_a_value_is_read_where_its_token_is_predicted(kind, family):
    """Against plain transformers on one sequence at a time; observations have none."""
    ts = trajectories(seed=31)
    model, _ = exact(family)
    critic = CriticLearner(model, kind, OptimizerSettings(), 1e-3)
    with torch.no_grad():
        critic.critic.head.weight.normal_(generator=torch.Generator().manual_seed(0))
        critic.critic.head.bias.fill_(0.25)
    learner = Learner(model, Optimizer(model, OptimizerSettings()), tokens_per_microbatch=120, critic=critic)
    found = learner.values(ts)
    plain, _ = exact(family)
    with torch.no_grad():
        for t, values in zip(ts, found, strict=True):
            states = plain.model(torch.tensor([t.ids])).last_hidden_state[0]
            want = (states @ critic.critic.head.weight[0] + 0.25)[[i - 1 for i in range(len(t.ids)) if t.trained[i]]]
            torch.testing.assert_close(values, want, atol=1e-10, rtol=0)


def test_values_begin_at_zero_and_what_is_trained():
    model, _ = exact("qwen2")
    separate, shared = Critic(model, "separate"), Critic(model, "shared")
    assert not any(v.any() for v in (separate.head.weight, separate.head.bias, shared.head.weight))
    assert set(shared.trainable()) == {"head.weight", "head.bias"}
    assert not any("lm_head" in n for n in separate.trainable()) and len(separate.trainable()) > 10
    assert all(p.requires_grad for p in model.parameters())


def test_a_separate_critic_leaves_the_policy_alone_and_a_shared_one_does_not():
    """The policy's gradient is that of the clipped loss; with a shared trunk value_coef times the value loss is in it."""
    groups = rollouts()
    ts = [t for g in groups for t in g.trajectories]
    norms = {}
    for kind, coef in (("separate", 0.5), ("separate", 5.0), ("shared", 1e-9), ("shared", 5.0)):
        method = PPO(critic=kind, value_coef=coef)
        learner = learner_of(method, 300)
        records_of(learner, ts)
        with torch.no_grad():  # so that values differ, and a trunk under them has a gradient
            learner.critic.critic.head.weight.normal_(std=0.01, generator=torch.Generator().manual_seed(0))
        norms[kind, coef] = learner.reinforce(groups, method)["gradient/norm"]
    assert norms["separate", 0.5] == norms["separate", 5.0] == pytest.approx(norms["shared", 1e-9], rel=1e-4)
    assert norms["shared", 5.0] != pytest.approx(norms["separate", 5.0], rel=1e-3)


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_pretraining_learns_values_and_leaves_the_policy_as_it_is(kind):
    groups = rollouts(seed=33)
    for g in groups:
        for t in g.trajectories:
            t.reward = float(t.ids[-1] % 2)  # the last token says it: a critic can learn much of it by heart
    method = PPO(critic=kind, epochs=2, value_clip=0)
    learner = learner_of(method, 500)
    before, state = copied(learner.model), learner.optimizer.state()
    seen = [learner.pretrain_values(groups, method) for _ in range(30 if kind == "separate" else 3)]
    assert seen[0]["value/explained_variance"] == pytest.approx(0, abs=1e-9)  # all values 0: nothing explained
    assert seen[-1]["value/loss"] < seen[0]["value/loss"]
    if kind == "separate":
        assert seen[-1]["value/explained_variance"] > 0.5
    assert same(before, copied(learner.model)) and learner.optimizer.state().keys() == state.keys()
    # what is told is of the values before the updates of that call
    told = learner.pretrain_values(groups, method)["value/explained_variance"]
    assert told != seen[-1]["value/explained_variance"]


def test_explained_variance_is_of_the_returns():
    groups = rollouts(seed=34)
    method = PPO()
    learner = learner_of(method, 500)
    learner.pretrain_values(groups, method)
    values = torch.cat(learner.values([t for g in groups for t in g.trajectories]))
    returns = torch.cat(
        [torch.full((sum(t.trained),), t.reward, dtype=torch.float64) for g in groups for t in g.trajectories]
    )
    want = explained_variance(values, returns)
    assert learner.reinforce(groups, method)["value/explained_variance"] == pytest.approx(want, abs=1e-12)


def test_a_critic_that_is_not_there():
    learner, groups = learner_of(GRPO(kl_coef=0), 300), groups_of(trajectories())
    with pytest.raises(OndolError, match="needs a critic"):
        learner.reinforce(groups, PPO())


def test_a_bad_value_loss_changes_nothing():
    class Bad(PPO):
        def value_loss(self, value, old_value, returns):
            return super().value_loss(value, old_value, returns) * float("nan")

    learner, groups = learner_of(Bad(), 100), rollouts()
    before, critic = copied(learner.model), copied(learner.critic.critic)
    with pytest.raises(OndolError, match="critic's loss is not finite"):
        learner.reinforce(groups, Bad())
    assert same(before, copied(learner.model)) and same(critic, copied(learner.critic.critic))
    assert learner.updates == 0


# -- in a run -------------------------------------------------------------------------------------------------------------


def metrics_of(run: Run) -> dict:
    clocks = ("seconds", "tokens_per_s", "memory/")
    return {
        (m.phase, m.step, m.name): m.value for m in run.db.metrics() if not any(clock in m.name for clock in clocks)
    }


def test_the_stage_before_rl(tmp_path) -> None:
    heard = Heard()
    run, _ = go(tmp_path, *PPO_RUN, reporter=heard)
    assert heard.stages == [("value", 3), ("rl", 3)]
    for phase in ("value", "rl"):
        for name in ("value/loss", "value/explained_variance", "value/gradient_norm"):
            assert len(run.db.metrics(name, phase)) == 3
    assert not run.db.metrics("loss/policy", "value") and len(run.db.metrics("loss/policy", "rl")) == 3
    seen = {(row.phase, row.problem_id) for row in run.db.trajectory_rows()}
    assert {phase for phase, _ in seen} == {"value", "rl"}


def test_pretraining_alone_leaves_the_policy_to_the_bit(tmp_path, monkeypatch) -> None:
    def die(self, step):
        raise RuntimeError("cut")

    monkeypatch.setattr(loop.Trainer, "_reinforce", die)
    with pytest.raises(RuntimeError, match="cut"):
        go(tmp_path, *PPO_RUN)
    cut = Run.open(Run.find(tmp_path, "last"))
    path = latest_checkpoint(cut.checkpoints, print)
    assert same(load_file(path / "model.safetensors"), fresh())
    assert any(v.any() for k, v in load_file(path / "critic.safetensors").items() if k.startswith("head"))


@pytest.mark.parametrize("kind", ["separate", "shared"])
@pytest.mark.parametrize("at", ["_pretrain_values", "_reinforce"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_is_as_an_uninterrupted_one(tmp_path, monkeypatch, kind, at, lora) -> None:
    changes = [*PPO_RUN, f"method.critic={kind}"]
    if lora:
        pytest.importorskip("peft")
        changes.append("model.lora={rank=2, targets=['q_proj', 'down_proj']}")
    whole, expected = go(tmp_path / "a", *changes)
    real = getattr(loop.Trainer, at)
    with monkeypatch.context() as m:

        def once(self, step):
            if step == 2:
                raise RuntimeError("cut")
            real(self, step)

        m.setattr(loop.Trainer, at, once)
        with pytest.raises(RuntimeError, match="cut"):
            go(tmp_path / "b", *changes)
    resumed, found = go(tmp_path / "b", *changes, again=Run.open(Run.find(tmp_path / "b", "last")))
    assert same(found, expected) and metrics_of(resumed) == metrics_of(whole)
    paths = [latest_checkpoint(r.checkpoints, print) for r in (whole, resumed)]
    for name in ("critic", "critic-optimizer"):
        first, second = (load_file(p / f"{name}.safetensors") for p in paths)
        assert same(first, second) and first


def test_a_critic_learns_under_gradient_checkpointing(tmp_path) -> None:
    _, plain = go(tmp_path / "a", *PPO_RUN)
    _, saving = go(tmp_path / "b", *PPO_RUN, "train.gradient_checkpointing=true")
    assert max(float((plain[k] - saving[k]).abs().max()) for k in plain) < 1e-5
