"""Clusters, diversity, fusion and novelty against brute force."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ondol.rewards.diversity import (
    among_right,
    cluster_diversity,
    distinct_k,
    fuse,
    merge,
    ngram_novelty,
    pairwise_f1,
    partition,
    short_answer,
    utility_k,
)

edges = st.integers(0, 9).flatmap(
    lambda n: st.tuples(st.just(n), st.sets(st.tuples(st.integers(0, max(n - 1, 0)), st.integers(0, max(n - 1, 0)))))
)


def brute_partition(n: int, same: set[tuple[int, int]]) -> set[frozenset[int]]:
    """Spread labels until nothing changes."""
    label = list(range(n))
    changed = True
    while changed:
        changed = False
        for a, b in same:
            low = min(label[a], label[b])
            changed |= label[a] != low or label[b] != low
            label[a] = label[b] = low
    return {frozenset(i for i in range(n) if label[i] == x) for x in label}


@settings(max_examples=200, deadline=None)
@given(edges)
def test_clusters(case):
    n, same = case
    same = {e for e in same if n}
    clusters = merge(n, same)
    assert {frozenset(c) for c in clusters} == brute_partition(n, same)
    assert clusters == sorted(sorted(c) for c in clusters)  # in a fixed order
    texts = [str(i) for i in range(n)]
    asked = []

    def judge(a: str, b: str) -> bool:
        asked.append((int(a), int(b)))
        return (int(a), int(b)) in same or (int(b), int(a)) in same

    assert partition(texts, judge) == clusters
    assert asked == [(i, j) for i in range(n) for j in range(i + 1, n)]


@settings(max_examples=200, deadline=None)
@given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=10), floor=st.sampled_from([0.0, 0.1, 0.5]))
def test_diversity_is_the_share_of_others_elsewhere(labels, floor):
    n = len(labels)
    clusters = merge(n, ((i, j) for i in range(n) for j in range(i) if labels[i] == labels[j]))
    got = cluster_diversity(clusters, floor)
    for i in range(n):
        others = [labels[j] != labels[i] for j in range(n) if j != i]
        assert got[i] == pytest.approx(max(sum(others) / len(others), floor) if others else 1.0)
    assert distinct_k(clusters, n) == len(set(labels)) and distinct_k(clusters, 1) == 1


def test_all_the_same_and_all_different():
    assert cluster_diversity([[0, 1, 2]]) == [0.1] * 3
    assert cluster_diversity([[0], [1], [2]]) == [1.0] * 3
    assert cluster_diversity([[0]]) == [1.0] and cluster_diversity([]) == []


@settings(max_examples=100, deadline=None)
@given(made=st.lists(st.tuples(st.booleans(), st.integers(0, 2)), min_size=1, max_size=8))
def test_among_right(made):
    def diversity(labels):
        n = len(labels)
        return cluster_diversity(merge(n, ((i, j) for i in range(n) for j in range(i) if labels[i] == labels[j])))

    got = among_right([str(label) for _, label in made], [right for right, _ in made], diversity)
    c = sum(right for right, _ in made)
    for (right, label), d in zip(made, got):
        mine = sum(r and x == label for r, x in made)
        assert d == pytest.approx(max((c - mine) / (c - 1), 0.1) if right and c > 1 else 0.1)


@pytest.mark.parametrize(
    "a, b, same",
    [
        ("", "", True),
        ("", "x", False),
        ("  ", "a long text of many words indeed", False),
        ("Paris", "paris ", True),
        ("Paris", "Lyon", False),
        ("the red fox", "a red fox", True),  # 2 * 2 >= 3
        ("the red fox", "a red hen", False),  # 2 * 1 < 3
        ("a b c d", "a b x y", True),  # exactly half
        ("one two three four five", "one", False),
        ("one two three four five six", "one", None),
        ("17+25", "25+17", False),
    ],
)
def test_short_answers(a, b, same):
    assert short_answer(a, b) is same and short_answer(b, a) is same


numbers = st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 1)), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(made=numbers, w=st.floats(0, 2))
def test_fusion(made, w):
    q, d = ([x[k] for x in made] for k in (0, 1))
    assert fuse(q, d) == pytest.approx([a * b for a, b in made])
    assert fuse(q, d, "add", weights=(w, 2 - w)) == pytest.approx([w * a + (2 - w) * b for a, b in made])
    biased = fuse(q, d, add_bias=True)
    assert biased == pytest.approx([(a - min(q)) * b for a, b in made]) and min(biased) >= 0
    normal = fuse(q, d, "norm_add")
    if min(max(q) - min(q), max(d) - min(d)) > 1e-2:
        want = [
            (a - statistics.mean(q)) / (statistics.stdev(q) + 1e-6)
            + (b - statistics.mean(d)) / (statistics.stdev(d) + 1e-6)
            for a, b in made
        ]
        assert normal == pytest.approx(want, rel=1e-6, abs=1e-6)
    assert all(map(math.isfinite, normal))


def test_wrong_answers_gain_nothing_by_being_new():
    assert fuse([0, 0, 1, 1], [1, 0.5, 0.1, 1]) == [0, 0, 0.1, 1]
    # a better but less new answer of negative quality must not fall behind
    assert fuse([-1.0, -3.0], [0.1, 1.0], add_bias=True) == pytest.approx([0.2, 0.0])


words = st.lists(st.sampled_from("abc"), max_size=9).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(words, max_size=5), n=st.integers(1, 4))
def test_novelty(texts, n):
    for i, value in enumerate(ngram_novelty(texts, n)):
        w = texts[i].split()
        mine = {tuple(w[k : k + n]) for k in range(len(w)) if k + n <= len(w)}
        others = {
            tuple(v[k : k + n])
            for j, text in enumerate(texts)
            if j != i
            for v in [text.split()]
            for k in range(len(v))
            if k + n <= len(v)
        }
        assert value == pytest.approx(len(mine - others) / (len(w) - n + 1) if len(w) >= n else 0)


def test_utility():
    clusters, utility, p = [[0, 2], [1]], [0.5, 1.0, 1.0], 0.8
    want = (1 - p) / (1 - p**3) * (0.5 + p * 1.0)
    assert utility_k(clusters, utility, 3) == pytest.approx(want)
    assert utility_k([[0], [1], [2]], [1.0] * 3, 3) == pytest.approx(1)  # all new and perfect
    assert utility_k([[0], [1], [2]], [1.0] * 3, 9) == pytest.approx(1)
    assert utility_k([], [], 3) == 0


def test_f1():
    assert pairwise_f1([[0, 1], [2]], [[0, 1], [2]]) == 1 == pairwise_f1([[0], [1]], [[0], [1]])
    assert pairwise_f1([[0], [1]], [[0, 1]]) == 0
    assert pairwise_f1([[0, 1, 2]], [[0, 1], [2]]) == pytest.approx(2 * (1 / 3) * 1 / (1 / 3 + 1))
