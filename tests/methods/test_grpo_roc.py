"""GRPO-RoC: penalties, counts and selectors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ondol.errors import OndolError
from ondol.methods.grpo_roc import GRPORoC, answer_tags, error_penalty, error_share, says_error, shares
from ondol.parts import make
from ondol.records import Finish, Group, Problem, StopReason, ToolResult, Trajectory, Turn

PROBLEM = Problem("p", "q", "a")
OK, ERROR = ToolResult("2"), ToolResult("TypeError: no", False, "error")
CRASH = ToolResult("error: no worker", False, "crashed")
QUEUE = ToolResult("took too long", False, "timeout")


def trajectory(score=1.0, results=(OK,), sample=0, text="7", stop=StopReason.ANSWERED) -> Trajectory:
    turns = [Turn(1, 2, "call", Finish.STOP, [], [r]) for r in results] + [Turn(2, 3, text, Finish.END)]
    t = Trajectory((0, 0, sample), PROBLEM, [1], 1, [False], [False], [0.0], [-1], turns)
    t.score = t.reward = score
    t.stop_reason = stop
    return t


def test_error_penalty():
    assert error_penalty(trajectory(results=())) == 0.5
    assert error_penalty(trajectory(results=(OK, ERROR, OK, OK))) == 0.25
    assert error_penalty(trajectory(results=(ERROR, CRASH))) == 1  # infrastructure is nobody's fault
    assert error_penalty(trajectory(results=(CRASH,))) == 0
    # the official detector reads: it misses a time-out and is fooled by a word
    fooled = trajectory(results=(QUEUE, ToolResult("the mean error is 3")))
    assert error_penalty(fooled, says_error) == 0.5 == error_penalty(fooled)
    assert error_penalty(trajectory(results=(ToolResult("0 errors"),)), says_error) == 1
    assert error_share([trajectory(results=(OK, ERROR, CRASH)), trajectory(results=())]) == 0.5
    assert error_share([]) == 0


@pytest.mark.parametrize(
    "text, penalty",
    [
        ("no tags", 1),
        ("<answer>7</answer>", 0),
        ("<answer>7", 1),
        ("<answer>7</answer></answer>", 1),
        ("<answer>7</answer><answer>8</answer>", 0.5),  # one too many in two turns
        ("<answer>1</answer>" * 9, 1),
    ],
)
def test_format_penalty(text, penalty):
    t = trajectory(text=text)
    assert answer_tags(t) == penalty
    assert GRPORoC(format="answer_tags").penalty(t) == penalty
    assert GRPORoC(format="none").penalty(t) == 0
    assert GRPORoC().penalty(trajectory(stop=StopReason.TURN_LENGTH, results=(ERROR,))) == 2


def official(pos: int, neg: int, keep: int) -> tuple[int, int]:
    """Transcribed from the card's words."""
    n_neg, n_pos = round(neg * (keep / (pos + neg))), round(pos * (keep / (pos + neg)))
    if n_neg <= min(2, neg):
        n_neg = min(2, neg)
        n_pos = keep - n_neg
    if n_pos <= min(2, pos):
        n_pos = min(2, pos)
        n_neg = keep - n_pos
    return n_pos, n_neg


@pytest.mark.parametrize("keep", [4, 8, 16])
def test_counts_are_the_official_ones(keep):
    for pos in range(2 * keep + 1):
        n_pos, n_neg = shares(pos, 2 * keep - pos, keep)
        assert (n_pos, n_neg) == official(pos, 2 * keep - pos, keep)
        assert abs(n_pos - pos / 2) <= 2 and min(n_pos, n_neg) >= min(2, pos, 2 * keep - pos)


def test_some_counts():
    assert shares(31, 1, 16) == (15, 1) and shares(1, 31, 16) == (1, 15)  # the only one is kept
    assert shares(29, 3, 16) == (14, 2) and shares(16, 16, 16) == (8, 8)
    assert shares(0, 32, 16) == (0, 16) and shares(32, 0, 16) == (16, 0)
    assert shares(5, 3, 8) == (5, 3)


@settings(max_examples=300, deadline=None)
@given(
    right=st.integers(0, 40),
    wrong=st.integers(0, 40),
    keep=st.integers(1, 40),
    a=st.integers(0, 5),
    b=st.integers(0, 5),
)
def test_counts_add_up(right, wrong, keep, a, b):
    n_right, n_wrong = shares(right, wrong, keep, a, b)
    assert 0 <= n_right <= right and 0 <= n_wrong <= wrong and n_right + n_wrong == min(keep, right + wrong)


rolled = st.lists(
    st.tuples(st.sampled_from([0.0, 1.0]), st.lists(st.sampled_from([OK, ERROR, CRASH]), max_size=3)),
    min_size=2,
    max_size=16,
)


@settings(max_examples=150, deadline=None)
@given(made=rolled, selector=st.sampled_from(["greedy", "sample"]))
def test_keep(made, selector):
    group = Group(PROBLEM, [trajectory(s, rs, i) for i, (s, rs) in enumerate(made)])
    method = GRPORoC(selector=selector)
    kept = method.keep([group])
    if len({s for s, _ in made}) == 1:
        assert kept == []
        return
    (small,) = kept
    order = [t.key[2] for t in small.trajectories]
    assert order == sorted(set(order)) and len(order) == max(len(made) // 2, 2)
    assert all(t is group.trajectories[t.key[2]] for t in small.trajectories)
    again = GRPORoC(selector=selector).keep([group])[0]
    assert [t.key for t in again.trajectories] == [t.key for t in small.trajectories]
    if selector == "greedy":
        left = [t for t in group.trajectories if t.score and t not in small.trajectories]
        chosen = [method.penalty(t) for t in small.trajectories if t.score]
        assert max(chosen, default=0) <= min(map(method.penalty, left), default=9)
        wrong = [i for i, (s, _) in enumerate(made) if not s]
        assert [i for i in order if i in wrong] == wrong[: sum(i in wrong for i in order)]


def test_the_sampling_selector_draws_by_weight():
    """Of two right ones with penalties 0 and 1 and one place: weights 10 and 1 / 1.1."""
    method = GRPORoC(selector="sample", keep_samples=2, min_right=1, min_wrong=1)
    clean, wrong_first, n = 0, 0, 2000
    for i in range(n):
        group = [trajectory(1, (OK,), 4 * i), trajectory(1, (ERROR,), 4 * i + 1), trajectory(0, (), 4 * i + 2), trajectory(0, (), 4 * i + 3)]  # fmt: skip
        (kept,) = method.keep([Group(PROBLEM, group)])
        clean += kept.trajectories[0] is group[0]
        wrong_first += kept.trajectories[1] is group[2]
    assert clean / n == pytest.approx(10 / (10 + 1 / 1.1), abs=0.025)
    assert wrong_first / n == pytest.approx(0.5, abs=0.05)


def test_groups_that_are_too_small_or_just_right():
    mixed = Group(PROBLEM, [trajectory(i % 2, sample=i) for i in range(4)])
    assert GRPORoC(keep_samples=5).keep([mixed]) == []
    assert [g.trajectories for g in GRPORoC(keep_samples=4).keep([mixed])] == [mixed.trajectories]
    equal = Group(PROBLEM, [trajectory(1, sample=i) for i in range(4)])
    assert GRPORoC(keep_samples=4).keep([equal, mixed])[0].trajectories == mixed.trajectories


def noisy(result: ToolResult) -> bool:
    return "noise" in result.text


def test_settings():
    method = GRPORoC()
    assert (method.clip_low, method.clip_high, method.kl_coef) == (0.2, 0.28, 0) and not method.needs_reference
    assert method.token_weights(torch.tensor([1.0, 3.0])).tolist() == [0.25, 0.25]
    own = GRPORoC(errors=f"{__name__}:noisy", format="none")
    assert own.penalty(trajectory(results=(ERROR, ToolResult("noise")))) == 0.5
    for wrong in ({"errors": "flags"}, {"format": "nowhere:f"}, {"keep_samples": 3}, {"errors": f"{__name__}:OK"}):
        with pytest.raises(OndolError):
            make("methods", {"name": "grpo-roc", **wrong}, "method")


def test_reports():
    group = Group(PROBLEM, [trajectory(1, (OK, ERROR)), trajectory(0, (ERROR, ERROR)), trajectory(1, (OK, OK))])
    assert GRPORoC().reports([group]) == {"tools/error_share": 0.5, "tools/error_share_right": 0.25}
