"""Preference methods on a fixed set of pairs, as offline: the chosen answers come to have the higher reward."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from ondol.models.tiny import make_tiny
from ondol.parts import find
from ondol.recipe import OptimizerSettings
from ondol.records import Group, Problem, Trajectory
from ondol.train.learner import Learner
from ondol.train.optimizer import Optimizer


def recorded(pairs: int = 8) -> list[Group]:
    """Answers of random letters, better and worse ones alike; sampled by other weights than the learner's."""
    rng, out = random.Random(0), []
    for p in range(pairs):
        problem, prompt = Problem(str(p), "q", "a"), [rng.randrange(4, 60) for _ in range(4)]
        group = Group(problem, [])
        for s in range(3):
            n = rng.randint(2, 6)
            policy = [False] * 4 + [True] * n
            ids = prompt + [rng.randrange(4, 60) for _ in range(n)]
            logp, version = [-4.0 * k for k in policy], [9 if k else -1 for k in policy]
            t = Trajectory((0, p, s), problem, ids, 4, policy, list(policy), logp, version)
            t.score = t.reward = s / 2
            group.trajectories.append(t)
        out.append(group)
    return out


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "orpo", "kto"])
def test_chosen_answers_win(name):
    method = find("methods", name)()
    model, _ = make_tiny(hidden=32, layers=1, context=32)
    learner = Learner(model, Optimizer(model, OptimizerSettings(learning_rate=3e-3)), tokens_per_microbatch=64)
    if method.needs_reference:
        learner.reference = copy.deepcopy(model).requires_grad_(False).eval()
    groups, losses = recorded(), []
    for _ in range(40):
        metrics = learner.reinforce(groups, method)
        losses.append(metrics["loss/policy"])
        assert all(torch.isfinite(torch.tensor(v)) for v in metrics.values())
    # an answer of KTO may stay on the wrong side of z0, which rises with the good ones
    assert metrics["preference/accuracy"] >= (0.8 if name == "kto" else 0.9) and metrics["preference/margin"] > 0
    assert losses[-1] < losses[0]
