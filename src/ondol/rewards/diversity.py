"""How different the answers to one prompt are from each other, and how that joins a reward (Darling, arXiv 2509.02534).

Pure functions on the texts of one group. `ondol.rewards.scorers` has the parts that say which two answers mean the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

Clusters = list[list[int]]
Fusion = Literal["multiply", "add", "norm_add"]

FLOOR = 0.1  # of diversity; the official code's, the paper has none
SHORT_WORDS = 5  # the longest answer that words alone decide about, official code
PATIENCE = 0.8  # of a reader who goes through the answers, NoveltyBench (arXiv 2504.05228)
_EPS = 1e-6


# -- clusters ------------------------------------------------------------------------------------------------------------


def short_answer(a: str, b: str) -> bool | None:
    """Whether two short answers are the same: they share half of the longer one's words. None: not short, ask a model.

    Words are lower-cased and split at white space. Two empty answers are the same, an empty and another one are not.
    """
    u, v = a.lower().split(), b.lower().split()
    if not u or not v:
        return len(u) == len(v)
    longest = max(len(u), len(v))
    return 2 * len(set(u) & set(v)) >= longest if longest <= SHORT_WORDS else None


def merge(count: int, same: Iterable[tuple[int, int]]) -> Clusters:
    """Clusters of 0..count-1 by union-find: `same` pairs are together, and so are chains of them.

    Each cluster in rising order, clusters by their first members.
    """
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for a, b in same:
        a, b = sorted((root(a), root(b)))
        parent[b] = a
    clusters: dict[int, list[int]] = {}
    for i in range(count):
        clusters.setdefault(root(i), []).append(i)
    return list(clusters.values())


def partition(responses: Sequence[str], same: Callable[[str, str], bool]) -> Clusters:
    """Clusters of responses; `same` is asked once for each pair, the earlier response first."""
    n = len(responses)
    return merge(n, ((i, j) for i in range(n) for j in range(i + 1, n) if same(responses[i], responses[j])))


# -- diversity and reward ------------------------------------------------------------------------------------------------


def cluster_diversity(clusters: Clusters, floor: float = FLOOR) -> list[float]:
    """Share of the other responses that are in other clusters, at least `floor`; 1 for a response alone."""
    n = sum(map(len, clusters))
    out = [0.0] * n
    for members in clusters:
        for i in members:
            out[i] = max((n - len(members)) / (n - 1), floor) if n > 1 else 1.0
    return out


def among_right(
    responses: Sequence[str],
    right: Sequence[bool],
    diversity: Callable[[Sequence[str]], list[float]],
    floor: float = FLOOR,
) -> list[float]:
    """Diversity among right responses only: the others get `floor`, and so do all where not even two are right."""
    chosen = [i for i, r in enumerate(right) if r]
    out = [floor] * len(responses)
    if len(chosen) > 1:
        for i, d in zip(chosen, diversity([responses[i] for i in chosen])):
            out[i] = d
    return out


def fuse(
    quality: Sequence[float],
    diversity: Sequence[float],
    mode: Fusion = "multiply",
    *,
    add_bias: bool = False,
    weights: tuple[float, float] = (1.0, 1.0),
) -> list[float]:
    """The rewards of one group's responses out of their quality and their diversity.

    multiply: Q * D. A wrong answer of quality 0 gains nothing by being new. Where Q may be negative, more diversity would
        make it more so: `add_bias` takes the group's smallest Q off first.
    add: w1 * Q + w2 * D.
    norm_add: the same, both standardised in the group first (unbiased std; the source does not say which).
    """
    if mode == "multiply":
        base = min(quality, default=0.0) if add_bias else 0.0
        return [(q - base) * d for q, d in zip(quality, diversity, strict=True)]
    if mode == "norm_add":
        quality, diversity = _standard(quality), _standard(diversity)
    return [weights[0] * q + weights[1] * d for q, d in zip(quality, diversity, strict=True)]


def _standard(values: Sequence[float]) -> list[float]:
    if len(set(values)) <= 1:
        return [0.0] * len(values)
    mean = math.fsum(values) / len(values)
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return [(v - mean) / (std + _EPS) for v in values]


# -- how much there is of it ---------------------------------------------------------------------------------------------


def ngrams(text: str, n: int = 4) -> set[tuple[str, ...]]:
    """Runs of n words, words split at white space."""
    words = text.split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def ngram_novelty(responses: Sequence[str], n: int = 4) -> list[float]:
    """Of each response: its n-grams that no other response has, per n-gram that there is room for; 0 below n words."""
    sets = [ngrams(r, n) for r in responses]
    holders: dict[tuple[str, ...], int] = {}
    for grams in sets:
        for gram in grams:
            holders[gram] = holders.get(gram, 0) + 1
    room = [len(r.split()) - n + 1 for r in responses]
    return [sum(holders[g] == 1 for g in grams) / k if k > 0 else 0.0 for grams, k in zip(sets, room)]


def distinct_k(clusters: Clusters, k: int) -> int:
    """Clusters among the first k responses."""
    return sum(any(i < k for i in members) for members in clusters)


def utility_k(clusters: Clusters, utility: Sequence[float], k: int, patience: float = PATIENCE) -> float:
    """What a reader gets from the first k responses who stays for another one with probability `patience` (0 to 1, not 1)
    and values only what is new: (1 - p) / (1 - p^k) sum_i p^(i-1) [i is new] u_i. In [0, 1] where the utilities are.
    """
    new = {members[0] for members in clusters}
    gained = math.fsum(patience**i * u for i, u in enumerate(utility[:k]) if i in new)
    return gained * (1 - patience) / (1 - patience ** min(k, len(utility))) if utility and k > 0 else 0.0


def pairwise_f1(found: Clusters, true: Clusters) -> float:
    """F1 of "these two are together" over all pairs; 1 where neither puts any two together."""

    def together(clusters: Clusters) -> set[tuple[int, int]]:
        return {(i, j) for members in clusters for i in members for j in members if i < j}

    a, b = together(found), together(true)
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else 1.0
