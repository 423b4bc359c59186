"""Darling: rewards, advantages and settings."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ondol.errors import OndolError
from ondol.methods.base import Scored
from ondol.methods.darling import Darling
from ondol.methods.grpo import GRPO
from ondol.parts import make
from ondol.records import Finish, Group, Problem, Trajectory, Turn

WIDE = {"dtype": torch.float64}
PROBLEM = Problem("p", "q", "a")


def answer(text: str, score: float, sample: int = 0, reward: float | None = None) -> Trajectory:
    turns = [Turn(1, 2, text, Finish.END)]
    t = Trajectory((0, 0, sample), PROBLEM, [1, 1], 1, [False, True], [False, True], [0.0, -1.0], [-1, 0], turns)
    t.score, t.reward = score, score if reward is None else reward
    return t


def group_of(*answers: tuple[str, float]) -> Group:
    return Group(PROBLEM, [answer(text, score, i) for i, (text, score) in enumerate(answers)])


made = st.lists(
    st.tuples(st.sampled_from(["1+9", "9+1", "2+8", "4+6", "5+5", "x"]), st.sampled_from([0.0, 1.0])),
    min_size=1,
    max_size=8,
)


def kind(text: str) -> int:
    return -1 if text == "x" else min(int(text[0]), int(text[2])) // 3


@settings(max_examples=100, deadline=None)
@given(groups=st.lists(made, min_size=1, max_size=4), correct_only=st.booleans())
def test_rewards_and_advantages(groups, correct_only):
    """Loops from the formulas: r = Q max((n - |cluster|) / (n - 1), 0.1), A = r - mean."""
    method = Darling(scorer="canonical", correct_only=correct_only)
    got = method.shaped_rewards([group_of(*g) for g in groups])
    for answers, rewards in zip(groups, got):
        pool = [(t, s) for t, s in answers if s or not correct_only]
        for (text, score), r in zip(answers, rewards):
            n, alike = len(pool), sum(kind(t) == kind(text) for t, _ in pool)
            if correct_only and (not score or n < 2):
                d = 0.1
            else:
                d = max((n - alike) / (n - 1), 0.1) if n > 1 else 1.0
            assert r == pytest.approx(score * d)
    flat = torch.tensor([r for rs in got for r in rs], **WIDE)
    group = torch.tensor([i for i, rs in enumerate(got) for _ in rs])
    want = [r - sum(rs) / len(rs) for rs in got for r in rs]
    torch.testing.assert_close(method.advantages(Scored(flat, group)), torch.tensor(want, **WIDE), atol=1e-12, rtol=0)


def test_the_new_right_answer_is_worth_most():
    (rewards,) = Darling(scorer="canonical").shaped_rewards([group_of(("1+9", 1), ("9+1", 1), ("2+8", 1), ("4+6", 1), ("x", 0))])  # fmt: skip
    assert rewards == pytest.approx([0.5, 0.5, 0.5, 1.0, 0.0])


def test_quality_is_the_reward_and_right_the_score():
    group = Group(PROBLEM, [answer("1+9", 1.0, 0, -2.0), answer("4+6", 0.0, 1, -5.0), answer("5+5", 1.0, 2, -2.0)])
    assert Darling(add_bias=True).shaped_rewards([group]) == [[3.0, 0.0, 3.0]]
    assert Darling(correct_only=True).shaped_rewards([group])[0] == pytest.approx([-2.0, -0.5, -2.0])
    assert Darling(fusion="add", weights=(1, 2)).shaped_rewards([group]) == [[0.0, -3.0, 0.0]]


def test_groups_may_differ_in_size_and_order_of_members_is_nothing():
    answers = [("1+9", 1.0), ("4+6", 1.0), ("9+1", 0.0), ("x", 0.0), ("5+5", 1.0)]
    method = Darling(scorer="canonical")
    (rewards,) = method.shaped_rewards([group_of(*answers)])
    order = random.Random(0).sample(range(5), 5)
    small, shuffled = method.shaped_rewards([group_of(("1+9", 1.0)), group_of(*(answers[i] for i in order))])
    assert small == [1.0] and shuffled == [rewards[i] for i in order]


def test_without_diversity_it_is_grpo_without_std():
    """All answers different: rewards are left as they are."""
    groups = [group_of(("a", 1), ("b", 0), ("c", 1), ("d", 0))]
    assert Darling().shaped_rewards(groups) == GRPO().shaped_rewards(groups)
    lengths = torch.tensor([3.0, 1.0, 0.0, 4.0], **WIDE)
    assert Darling().token_weights(lengths).tolist() == [1 / 8] * 4


def test_reports():
    reports = Darling(scorer="canonical").reports([group_of(("1+9", 1), ("9+1", 1), ("4+6", 1)), group_of(("x", 0))])
    assert reports == {"diversity/mean": pytest.approx((0.5 + 0.5 + 1 + 1) / 4), "diversity/clusters": 1.5}


@pytest.mark.parametrize(
    "table, words",
    [
        ({"scorer": "exactt"}, "no scorer is called 'exactt'"),
        ({"scorer": {"name": "ngram", "m": 4}}, "method.scorer.m: there is no such key"),
        ({"scorer": "ondol.methods.grpo:GRPO"}, "GRPO is no scorer"),
        ({"fusion": "add", "add_bias": True}, "add_bias is for fusion"),
    ],
)
def test_wrong_settings(table, words):
    with pytest.raises(OndolError, match=words):
        make("methods", {"name": "darling", **table}, "method")


def test_settings_round_trip():
    method = Darling(scorer={"name": "ngram", "threshold": 0.5}, kl_coef=0.001)
    assert Darling(**method.model_dump()) == method and method.needs_reference
