"""Verifiers against independent references, and against responses made to confuse them."""

from __future__ import annotations

import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol import parts
from ondol.errors import OndolError
from ondol.records import Problem
from ondol.rewards.base import marked_answer
from ondol.rewards.exact import Exact
from ondol.rewards.math import Math, _judge
from ondol.rewards.numeric import Numeric, last_number


def problem(answer: str) -> Problem:
    return Problem("i", "q", answer)


@pytest.mark.parametrize("name", sorted(parts.BUILT_IN["verifiers"]))
@pytest.mark.parametrize("answer", ["42", "-7", "1000000", "0"])
def test_gold_scores_one_and_near_misses_less(name, answer):
    verifier = parts.make("verifiers", name)
    assert verifier.score(problem(answer), verifier.gold(problem(answer))) == 1.0
    misses = verifier.near_misses(problem(answer))
    assert misses and all(0 <= verifier.score(problem(answer), m) < 1 for m in misses)


@given(st.text(), st.text(min_size=1))
def test_no_response_raises(response, answer):
    assert Exact().score(problem(answer), response) in (0.0, 1.0)
    assert Numeric().score(problem("5"), response) in (0.0, 1.0)


@given(
    st.integers(),
    st.sampled_from(
        [
            "{}",
            "The answer is {}.",
            "12 + 3 = {}",
            "({})",
            "${}$",
            "x={}",
            "**{}**",
            "{} apples",
            "答案是{}",
            "{}%",
            "\\boxed{{{}}}",
            "5, {}\n",
        ]
    ),
)
def test_numeric_reads_integers(n, wording):
    assert last_number(wording.format(n)) == n
    assert last_number(wording.format(f"{n:,}")) == n


@given(st.decimals(allow_nan=False, allow_infinity=False, places=6, min_value=-(10**9), max_value=10**9))
def test_numeric_reads_decimals(d):
    assert last_number(f"about {d:f} m") == Fraction(d)
    assert last_number(f"{d:e}") == Fraction(Decimal(f"{d:e}"))


@given(st.integers(-1000, 1000), st.integers(1, 1000))
def test_numeric_reads_fractions(a, b):
    assert last_number(f"so {a}/{b}") == Fraction(a, b)


@given(st.integers(10**20, 10**30))
def test_big_integers_compare_exactly(n):
    assert Numeric().score(problem(str(n)), str(n)) == 1.0
    assert Numeric().score(problem(str(n)), str(n + 1)) == 0.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7-5", 5),
        ("= -5", -5),
        ("−7", -7),
        ("-$5.50", Fraction(-11, 2)),
        ("$-5", -5),
        ("12 m2", 12),
        ("see step2", None),
        ("is...42", 42),
        ("3601.", 3601),
        ("12,34", 34),
        ("1,2345", 2345),
        (".5", Fraction(1, 2)),
        ("5/0", None),
        ("1e999999999", None),
        ("9" * 5000, None),
        ("", None),
        ("47*76+29=3601", 3601),
    ],
)
def test_numeric_edges(text, value):
    assert last_number(text) == value


def test_tolerances():
    assert Numeric(tolerance=0.1).score(problem("3.0"), "3.1") == 1.0
    assert Numeric(tolerance=0.1).score(problem("3.0"), "3.1000001") == 0.0
    assert Numeric(relative=0.01).score(problem("-200"), "-202") == 1.0
    assert Numeric(relative=0.01).score(problem("-200"), "-202.1") == 0.0
    with pytest.raises(OndolError, match="no number"):
        Numeric().score(problem("blue"), "5")


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("a <answer> 5 </answer> b", "5"),
        ("<answer>1</answer><answer>2</answer>", "2"),
        ("<answer>1</answer> \\boxed{2}", "2"),
        ("\\boxed{2} <answer>1</answer>", "1"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1\\}}", "\\{1\\}"),
        ("<answer><answer>3</answer>", "3"),
        ("\\boxed{1} and \\boxed{2", "1"),
        ("<answer>5", None),
        ("\\boxed 5", None),
        ("none", None),
        ("<answer></answer>", ""),
    ],
)
def test_marked_answers(text, marked):
    assert marked_answer(text) == marked


def test_exact_options():
    assert Exact().score(problem("New  York"), " new\nyork ") == 1.0
    assert Exact().score(problem("paris"), "I think <answer>Paris</answer>") == 1.0
    assert Exact(ignore_case=False).score(problem("paris"), "Paris") == 0.0
    assert Exact(ignore_space=False).score(problem("a b"), "a  b") == 0.0
    assert Exact().score(problem("é"), "e\u0301") == 1.0


@pytest.mark.parametrize(
    "hostile",
    [
        "1," * 200000,
        "-" * 400000,
        ",111" * 100000,
        "<answer>" * 60000,
        "\\boxed{" * 60000,
        "/1" * 200000,
        "1e" * 200000,
    ],
)
def test_long_nonsense_takes_linear_time(hostile):
    started = time.perf_counter()
    Numeric().score(problem("5"), hostile)
    Exact().score(problem("5"), hostile)
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    ("gold", "response", "score"),
    [
        ("1/2", "\\boxed{\\frac{1}{2}}", 1.0),
        ("x^2+2x+1", "\\boxed{(x+1)^2}", 1.0),
        ("\\frac{1}{2}", "so it is $0.5$", 1.0),
        ("\\sqrt{2}", "\\boxed{1.41}", 0.0),
        ("(1,2)", "<answer>(1, 2)</answer>", 1.0),
        ("$5$", "5", 1.0),
        ("2", "\\boxed{3}", 0.0),
        ("12", "\\boxed{12\\text{ cm}}", 1.0),
        ("x", "\\boxed{y}", 0.0),
        ("a", "\ud800", 0.0),
    ],
)
def test_math(gold, response, score):
    pytest.importorskip("math_verify")
    assert Math().score(problem(gold), response) == score


def test_math_is_killed_at_its_deadline_and_goes_on():
    pytest.importorskip("math_verify")
    assert Math().score(problem("\\sqrt{2}"), "\\boxed{\\sqrt{8}/2}") == 1.0  # the worker is warm
    pid = _judge.pid
    started = time.perf_counter()
    assert Math(timeout_s=0.5).score(problem("10"), "\\boxed{10^{10^{10^{10}}}}") == 0.0
    assert time.perf_counter() - started < 3
    assert Math().score(problem("\\sqrt{2}"), "\\boxed{\\sqrt{8}/2}") == 1.0
    assert _judge.pid != pid
