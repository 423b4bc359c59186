"""The numbers of a batch of rollouts that papers argue with."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.records import Finish, Group, Problem, StopReason, ToolCall, ToolResult, Trajectory, Turn
from ondol.rollout.statistics import is_void, statistics, what_failed

PROBLEM = Problem("p", "q", "a")


def one(score: float, *turns: Turn, text: str = "yes") -> Trajectory:
    made = list(turns) or [Turn(0, 1, text, Finish.END)]
    return Trajectory((0, 0, 0), PROBLEM, [], 0, [], [], [], [], made, score=score, reward=score)


def group(scores, texts=None) -> Group:
    return Group(PROBLEM, [one(s, text=t) for s, t in zip(scores, texts or ["yes"] * len(scores))])


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=5), min_size=1, max_size=4))
def test_pass_at_k_is_the_mean_over_all_subsets(rows):
    stats = statistics([group(r) for r in rows])
    k = min(map(len, rows))
    for size in {1, k}:
        shares = []
        for row in rows:
            subsets = list(itertools.combinations(row, size))
            shares.append(sum(any(s >= 1 for s in chosen) for chosen in subsets) / len(subsets))
        assert stats[f"answers/pass@{size}"] == pytest.approx(sum(shares) / len(shares))


def test_distinct_right_answers():
    groups = [group((1, 1, 1, 0), ("a", " a\n", "b", "c")), group((0, 0), ("a", "b"))]
    assert statistics(groups)["answers/distinct_right"] == 1.0  # two kinds in one group, none in the other
    assert statistics(groups, lambda problem, text: "same")["answers/distinct_right"] == 0.5
    assert statistics(groups, lambda problem, text: None)["answers/distinct_right"] == 0.0


def test_void_turns():
    call = [ToolCall("calculator", {})]
    assert is_void(Turn(0, 1, "", Finish.END)) and is_void(Turn(0, 1, " \n", Finish.STOP))
    assert is_void(Turn(0, 1, "and so on", Finish.LENGTH)) and is_void(Turn(0, 1, "and so on", Finish.CONTEXT))
    assert not is_void(Turn(0, 1, "42", Finish.END)) and not is_void(Turn(0, 1, "", Finish.LENGTH, call))
    ts = [one(0, Turn(0, 1, "x", Finish.STOP, call), Turn(1, 2, "", Finish.END)), one(1), one(1)]
    assert statistics([Group(PROBLEM, ts)])["rollout/void_share"] == 0.25


def test_tool_errors_of_right_trajectories():
    good, bad = ToolResult("4"), ToolResult("no", ok=False, kind="error")

    def with_results(score, *results):
        return one(score, Turn(0, 1, "x", Finish.STOP, [], list(results)))

    ts = [with_results(1, good, bad), with_results(0, bad, bad), with_results(0.5, bad)]
    stats = statistics([Group(PROBLEM, ts)])
    assert stats["tools/error_share"] == 0.8 and stats["tools/error_share_in_positives"] == 0.5
    assert "tools/error_share_in_positives" not in statistics([Group(PROBLEM, ts[1:])])


@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6))
def test_failures_are_told_of_when_they_are_most(errors, late, fine):
    made = [one(0.0) for _ in range(errors + late + fine)]
    for t in made:
        t.stop_reason = StopReason.ANSWERED
    for t in made[:errors]:
        t.stop_reason, t.info["error"] = StopReason.ERROR, "no\nserver"
    for t in made[errors : errors + late]:
        t.stop_reason = StopReason.TIMEOUT
    said = what_failed(made)
    assert (said is not None) == (errors + late > fine)
    if said:
        assert ("no server" in said) == (errors > 0) and ("rollout.timeout_s" in said) == (late > 0)
