"""Pass@k training against all subsets, counted one by one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_sequences import WIDE, answers, assert_advantages, assert_gradient, assert_loss, clipped, mean, tame

from ondol.errors import OndolError
from ondol.methods.base import Scored
from ondol.methods.pass_at_k import PassAtK


def by_enumeration(rewards: list[float], k: int) -> list[float]:
    """Every subset of k is a group with the reward of its best; an answer's advantage is the mean of its groups'."""
    subsets = list(itertools.combinations(range(len(rewards)), k))
    values = [float(any(rewards[i] >= 1 for i in s)) for s in subsets]
    sigma = math.sqrt(mean([(v - mean(values)) ** 2 for v in values]))
    if sigma == 0:
        return [0.0] * len(rewards)
    return [mean([(v - mean(values)) / sigma for s, v in zip(subsets, values) if i in s]) for i in range(len(rewards))]


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=4, max_size=8), min_size=1, max_size=4),
    k=st.integers(1, 4),
)
def test_advantages(groups, k):
    assert_advantages(PassAtK(k=k), groups, lambda gs: [by_enumeration(g, k) for g in gs])


def test_one_right_answer_counts_for_more_with_k():
    rewards = torch.tensor([1.0] + [0.0] * 7, **WIDE)
    x = Scored(rewards, torch.zeros(8, dtype=torch.long))
    hard = [float(PassAtK(k=k).advantages(x)[0]) for k in (1, 4)]
    easy = [float(PassAtK(k=k).advantages(Scored(1 - rewards, x.group)).abs().max()) for k in (1, 4)]
    assert hard[0] > hard[1] > 0 and easy[0] > 0 and easy[1] == 0  # seven of eight right: every four hold one


def test_too_few_answers():
    with pytest.raises(OndolError, match="pass@4 training needs 4"):
        PassAtK().advantages(Scored(torch.ones(3, **WIDE), torch.zeros(3, dtype=torch.long)))
    assert PassAtK().advantages(Scored(torch.ones(0, **WIDE), torch.zeros(0, dtype=torch.long))).shape == (0,)


def loss(update) -> float:
    return -sum(clipped(r, a.advantage, 0.2, 0.2) / len(a.logp) for a in update for r in a.ratios()) / len(update)


@settings(max_examples=30, deadline=None)
@given(update=answers())
def test_loss(update):
    assert_loss(PassAtK(), update, loss)


def test_gradient():
    assert_gradient(PassAtK(), tame(7), loss)
