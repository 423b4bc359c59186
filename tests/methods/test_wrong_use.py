"""What cannot work is refused with the key in question, before any model loads."""

from __future__ import annotations

import pytest
import torch
from pydantic import Field

from ondol.errors import OndolError
from ondol.methods.base import ActorCritic, Method
from ondol.methods.grpo import GRPO
from ondol.methods.ppo import PPO
from ondol.parts import BUILT_IN, find
from ondol.recipe import load_recipe


class NoCritic(GRPO):
    """Wants values, and is no actor-critic."""

    def token_advantages(self, x, values):
        return values, values


class NoLoss(Method):
    """Has half of what a method needs."""

    def advantages(self, x):
        return x.rewards

    def token_weights(self, lengths):
        return torch.ones_like(lengths)


class NoLambdas(ActorCritic):
    """A critic, and no way from its values to advantages."""


class OwnWay(PPO):
    """Its own way from values to advantages."""

    scale: float = Field(default=1.0, description="of advantages")

    def token_advantages(self, x, values):
        return [v * self.scale for v in values], values


def recipe(method, **train):
    return load_recipe({"task": "arithmetic", "method": method, "train": train})


@pytest.mark.parametrize(
    "method, train, said",
    [
        ("ppoo", {}, "no method is called 'ppoo'.*did you mean 'ppo'"),
        ({"name": "ppo", "critic": "none"}, {}, "method.critic.*'separate' or 'shared'"),
        ({"name": "ppo", "critic_learning_rate": 0}, {}, "method.critic_learning_rate.*greater than 0"),
        ({"name": "vapo", "value_pretraining_steps": -1}, {}, "method.value_pretraining_steps"),
        ({"name": "grpo", "critic": "shared"}, {}, "method.critic: there is no such key"),
        (f"{__name__}:NoCritic", {}, "NoCritic needs a critic.*ActorCritic"),
        (f"{__name__}:NoLambdas", {}, r"NoLambdas does not define lambdas\(\)"),
        (f"{__name__}:NoLoss", {}, r"NoLoss does not define token_loss\(\)"),
        ({"name": "pass-at-k", "k": 9}, {"samples_per_prompt": 8}, "PassAtK .* with these settings.*at least 9, not 8"),
        ({"name": "grpo-roc", "keep_samples": 8}, {"samples_per_prompt": 4}, "GRPORoC .*at least 8, not 4"),
        (
            {"name": "simpletir", "drop_overlong": True, "min_valid": 4},
            {"samples_per_prompt": 3},
            "SimpleTIR .*at least 4, not 3",
        ),
        ({"name": "reinforce", "minibatches": 2}, {}, "method.*REINFORCE has no ratio.*minibatches = 1"),
        ({"name": "rloo", "epochs": 2}, {}, "method.*RLOO has no ratio.*epochs = 1"),
        ({"name": "grpo", "minibatches": 9}, {"prompts_per_step": 8}, r"minibatches \(9\) cannot exceed"),
    ],
)
def test_is_refused(method, train, said):
    with pytest.raises(OndolError, match=f"(?s){said}"):
        recipe(method, **train)


@pytest.mark.parametrize("name", sorted(BUILT_IN["methods"]))
def test_groups_of_one_are_for_methods_that_take_them(name):
    if find("methods", name).min_samples > 1:
        with pytest.raises(OndolError, match=r"train.samples_per_prompt must be at least"):
            recipe(name, samples_per_prompt=1)
        assert recipe(name, samples_per_prompt=1, steps=0)  # nothing is trained: nothing is compared
    else:
        assert recipe(name, samples_per_prompt=1)


def test_what_is_complete_is_taken():
    assert recipe(f"{__name__}:OwnWay").method.scale == 1.0
    assert recipe(f"{__name__}:NoLoss", steps=0)
