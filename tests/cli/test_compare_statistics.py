"""Means, intervals, pass@k: against brute force, tables and scipy-free references."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ondol.compare.statistics import paired, summary, t_quantile
from ondol.errors import OndolError
from ondol.evaluate import many_samples, pass_at_k, summarise
from ondol.records import Finish, Group, Problem, StopReason, Trajectory, Turn
from ondol.tasks.two_addends import TwoAddends

VALUES = st.floats(-1e3, 1e3)


@pytest.mark.parametrize(
    ("freedom", "t"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (10, 2.22814), (29, 2.04523), (1000, 1.96234)],
)
def test_t_quantiles_are_those_of_the_tables(freedom, t) -> None:
    assert t_quantile(freedom) == pytest.approx(t, abs=2e-5)


@given(st.lists(VALUES, min_size=2, max_size=9))
def test_summary(values) -> None:
    found = summary(values)
    assert found["mean"] == pytest.approx(statistics.mean(values), abs=1e-9)
    assert found["spread"] == pytest.approx(statistics.stdev(values), abs=1e-9)
    assert summary(values[:1])["spread"] is None and summary([])["mean"] is None


@given(st.dictionaries(st.integers(0, 9), st.tuples(VALUES, VALUES), min_size=2, max_size=9), VALUES)
def test_paired_differences_do_not_see_what_seeds_share(pairs, shift) -> None:
    a, b = {s: x for s, (x, _) in pairs.items()}, {s: y for s, (_, y) in pairs.items()}
    found = paired(a, b)
    assert found["low"] <= found["mean"] <= found["high"] and found["n"] == len(pairs)
    moved = paired({s: v + shift * s for s, v in a.items()}, {s: v + shift * s for s, v in b.items()})
    assert moved["mean"] == pytest.approx(found["mean"], abs=1e-6)
    assert moved["high"] == pytest.approx(found["high"], abs=1e-5, rel=1e-6)
    turned = paired(b, a)
    assert (turned["mean"], turned["low"]) == (pytest.approx(-found["mean"]), pytest.approx(-found["high"]))
    assert paired(a, {99: 1.0})["mean"] is None and paired({1: 3.0}, {1: 1.0, 2: 5.0})["low"] is None


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(case) -> None:
    n, c, k = case
    tries = [i < c for i in range(n)]
    draws = list(itertools.combinations(tries, k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


@pytest.mark.parametrize("case", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)])
def test_pass_at_k_refuses_what_means_nothing(case) -> None:
    with pytest.raises(OndolError):
        pass_at_k(*case)


def group(n: int, texts: list[str]) -> Group:
    task = TwoAddends()
    problem = Problem(str(n), str(n), f"1+{n - 1}", {"n": n})

    def one(i: int, text: str) -> Trajectory:
        t = Trajectory((0, 0, i), problem, [1], 0, [True], [True], [0.0], [0], turns=[Turn(0, 1, text, Finish.END)])
        t.stop_reason, t.score = StopReason.ANSWERED, task.score(problem, text)
        return t

    return Group(problem, [one(i, text) for i, text in enumerate(texts)])


def test_many_samples() -> None:
    groups = [group(20, ["1+19", "2+18", "19+1", "5+5"]), group(21, ["x", "y", "", "10+11"])]
    found = many_samples(summarise(groups, 4), TwoAddends())
    assert list(found) == ["eval/pass@1", "eval/pass@2", "eval/pass@4", "eval/distinct_right"]
    assert found["eval/pass@1"] == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert found["eval/pass@2"] == pytest.approx((1 + 1 / 2) / 2) and found["eval/pass@4"] == 1.0
    assert found["eval/distinct_right"] == 1.0, "1+19, 19+1 and 2+18 are of one bucket of 3"
    odd = many_samples(summarise([group(20, ["1+19"] * 6)], 6), TwoAddends())
    assert list(odd) == [f"eval/pass@{k}" for k in (1, 2, 4, 6)] + ["eval/distinct_right"]
    assert many_samples(summarise([group(20, ["1+19"])], 1), TwoAddends()) == {}
    cut = many_samples(summarise([group(20, ["1+19"] * 2), group(21, ["x"] * 4)], 4), TwoAddends())
    assert cut["eval/pass@4"] == 0.0 and cut["eval/pass@2"] == 0.5, "a group that was cut short has no pass@4"


@settings(max_examples=20)
@given(st.lists(st.booleans(), min_size=2, max_size=12))
def test_pass_at_1_is_the_score(rights) -> None:
    groups = [group(30, ["1+29" if r else "no" for r in rights])]
    result = summarise(groups, len(rights))
    found = many_samples(result, TwoAddends())
    assert found["eval/pass@1"] == pytest.approx(result.score)
    rising = [v for k, v in found.items() if k.startswith("eval/pass@")]
    assert rising == sorted(rising) and math.isclose(rising[-1], float(any(rights)))
