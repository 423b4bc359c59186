"""Every method through the learner: its step is the same however the work is cut, and it moves the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from test_learner import groups_of, records_of, trajectories

from float64 import exact
from ondol.methods.base import ActorCritic
from ondol.parts import BUILT_IN, find
from ondol.recipe import OptimizerSettings
from ondol.records import Finish, Group, Turn
from ondol.train.critic import CriticLearner
from ondol.train.learner import Learner
from ondol.train.optimizer import Optimizer


def rollouts(seed: int = 20, prompts: int = 3, samples: int = 6) -> list[Group]:
    ts = trajectories(seed, prompts, samples)
    for i, t in enumerate(ts):
        t.turns = [Turn(t.prompt_length, len(t.ids), f"answer {i}", Finish.END)]
        t.score = t.reward = float(i % 6 in (0, 3))
    return groups_of(ts)


def learner_of(method, budget: int, share: bool = True) -> Learner:
    model, _ = exact("llama")
    settings = OptimizerSettings(learning_rate=1e-3)
    critic = None
    if isinstance(method, ActorCritic):
        critic = CriticLearner(model, method.critic, settings, 1e-3)
    learner = Learner(
        model, Optimizer(model, settings), tokens_per_microbatch=budget, share_prompts=share, critic=critic
    )
    if method.needs_reference:
        learner.reference = copy.deepcopy(learner.model)
    return learner


SHARED = [(n, {"critic": "shared"}) for n in ("ppo", "vapo")]


@pytest.mark.parametrize("name, changes", [*((n, {}) for n in sorted(BUILT_IN["methods"])), *SHARED])
def test_a_step_is_the_same_however_it_is_cut(name, changes):
    cls = find("methods", name)
    method = cls(**{"minibatches": 1 if cls.on_policy else 2, **changes})
    groups = rollouts()
    records_of(learner_of(method, 1), [t for g in groups for t in g.trajectories])
    before, _ = exact("llama")
    ends, metrics = [], []
    for budget, share in ((1, True), (10**6, True), (150, False)):
        learner = learner_of(method, budget, share)
        for _ in range(2):  # the second step has ratios other than 1, and a critic with an opinion
            metrics.append(learner.reinforce(groups, method))
        ends.append(dict(learner.model.state_dict()))
        if learner.critic is not None:
            ends[-1] |= {f"critic.{k}": v for k, v in learner.critic.critic.state_dict().items()}
    for other in ends[1:]:
        for key, value in ends[0].items():
            torch.testing.assert_close(value, other[key], atol=1e-8, rtol=0, msg=lambda m, key=key: f"{key}: {m}")
    start = before.state_dict()
    assert max(float((ends[0][k] - v).abs().max()) for k, v in start.items()) > 1e-4
    assert metrics[0]["groups/response_utilisation"] > 0 and metrics[0]["gradient/norm"] > 0
    assert metrics[0]["updates/skipped"] == 0
    for step in metrics:  # what papers argue with is there for every method, and finite
        assert 0 <= step["policy/clip_share"] <= 1 and step["policy/entropy"] > 0 and step["policy/kl_old_k3"] >= 0
        assert ("value/explained_variance" in step) == isinstance(method, ActorCritic)
    # the first update meets the policy that sampled; the second, where there is one, has moved on
    assert (metrics[0]["policy/kl_old_k3"] > 1e-12) == (method.minibatches > 1)
