"""From logits to tokens: the draw against exact arithmetic, truncation against transformers, log-probs in float64."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ondol.engines.base import Sampling, uniforms
from ondol.engines.sampling import draw, sample, truncate

LAST = float(np.nextafter(1.0, 0.0))  # the largest a uniform number can be


def exact_draw(p: list[float], u: float) -> list[int]:
    """Tokens that inverse CDF may give: the exact one, and its neighbours with mass where float64 cannot tell."""
    total = sum(map(Fraction, p))
    target, slack = Fraction(u) * total, total * Fraction(1, 10**13)
    below, allowed = Fraction(0), []
    for i, mass in enumerate(map(Fraction, p)):
        if mass and below - slack <= target < below + mass + slack:
            allowed.append(i)
        below += mass
    return allowed


probabilities = st.one_of(
    st.just(0.0), st.floats(0, 1, width=32), st.sampled_from([1e-30, 1e-7, 1.0]), st.floats(0, 2**-20, width=32)
)
numbers = st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 5e-324, 1e-17, 0.5, LAST]))


@settings(max_examples=150, deadline=None)
@given(
    size=st.sampled_from([1, 2, 99, 255, 256, 257, 512, 700]),
    some=st.dictionaries(st.integers(0, 699), probabilities, max_size=40),
    u=numbers,
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_draw_is_the_inverse_cdf(size, some, u, dtype):
    p = torch.zeros(size, dtype=dtype)
    for i, mass in some.items():
        p[i % size] = mass
    if not p.sum() > 0:
        p[size // 2] = 0.25
    token = int(draw(p.unsqueeze(0), torch.tensor([u], dtype=torch.float64)))
    assert token in exact_draw(p.double().tolist(), u)


@pytest.mark.parametrize("size", [1, 256, 1000, 49152])
@pytest.mark.parametrize("u", [0.0, 0.3, LAST])
def test_draw_of_a_single_mass(size, u):
    for at in {0, size // 2, size - 1}:
        for mass in (1.0, 1e-20, 5e-324):  # with the last, u times the whole rounds up to the whole
            p = torch.zeros(3, size, dtype=torch.float64)
            p[:, at] = mass
            assert draw(p, torch.full((3,), u, dtype=torch.float64)).tolist() == [at] * 3


def test_draw_never_gives_a_token_without_mass():
    """All the mass in few tokens of early blocks, and numbers that round up to the whole of it."""
    generator = torch.Generator().manual_seed(0)
    p = torch.zeros(2000, 1000)
    p[:, :300] = torch.rand(2000, 300, generator=generator) * (torch.rand(2000, 300, generator=generator) < 0.05)
    p[:, 7] = 0.1
    for u in (0.0, LAST):
        tokens = draw(p, torch.full((2000,), u, dtype=torch.float64))
        assert (p.gather(1, tokens.unsqueeze(1)) > 0).all()


def test_rows_do_not_look_at_each_other():
    generator = torch.Generator().manual_seed(1)
    p = torch.rand(40, 777, generator=generator)
    u = torch.rand(40, generator=generator, dtype=torch.float64)
    together = draw(p, u).tolist()
    assert together == [int(draw(p[i : i + 1], u[i : i + 1])) for i in range(40)]


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.6), Sampling(temperature=1.5, top_p=0.8), Sampling(top_k=30, min_p=0.01)],
)
def test_frequencies(sampling):
    """Chi-square of 10,000 draws; far in the tail only if the distribution is wrong (the stream is fixed)."""
    logits = 2 * torch.randn(1, 300, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    n = 10_000
    tokens, _, _ = sample(logits.expand(n, -1), sampling, torch.from_numpy(uniforms((3, 1, 4), n)))
    p = reference(logits, sampling).softmax(-1)[0].numpy()
    seen, want = np.bincount(tokens.numpy(), minlength=300).astype(float), n * p
    assert seen[p == 0].sum() == 0
    rare = want < 5
    seen, want = np.append(seen[~rare], seen[rare].sum()), np.append(want[~rare], want[rare].sum())
    seen, want = seen[want > 0], want[want > 0]
    degrees = len(want) - 1
    chi2 = ((seen - want) ** 2 / want).sum()
    assert abs(chi2 - degrees) < 4 * (2 * degrees) ** 0.5


def reference(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """What transformers' warpers make of raw logits."""
    scores = logits.clone() / sampling.temperature
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    if sampling.min_p > 0:
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)
    return scores


settings_of_sampling = st.builds(
    Sampling,
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
    top_k=st.sampled_from([0, 1, 2, 7, 50, 1000]),
    min_p=st.sampled_from([0.0, 0.001, 0.1, 0.9]),
)


@settings(max_examples=150, deadline=None)
@given(sampling=settings_of_sampling, seed=st.integers(0, 10**6), ties=st.booleans(), size=st.sampled_from([1, 5, 300]))
def test_truncation_equals_transformers(sampling, seed, ties, size):
    logits = 3 * torch.randn(6, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if ties:
        logits = (2 * logits).round() / 2
    ours, theirs = truncate(logits / sampling.temperature, sampling), reference(logits, sampling)
    if not ties or sampling.top_p == 1:
        assert torch.equal(ours, theirs)
    else:  # which of equals a nucleus keeps is arbitrary, and so is their rounding at its very edge; how much mass is not
        kept = [x.sort(dim=-1, descending=True).values for x in (ours, theirs)]
        counts = [(k > -torch.inf).sum(-1) for k in kept]
        assert ((counts[0] - counts[1]).abs() <= 1).all()
        assert torch.equal(ours[ours > -torch.inf], (logits / sampling.temperature)[ours > -torch.inf])
    assert (ours > -torch.inf).any(-1).all()


def test_of_equals_a_nucleus_keeps_the_first():
    kept = truncate(torch.zeros(1, 10), Sampling(top_p=0.35))
    assert (kept > -torch.inf).tolist() == [[True] * 4 + [False] * 6]


@settings(max_examples=100, deadline=None)
@given(
    sampling=st.one_of(settings_of_sampling, st.just(Sampling(temperature=0))),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    scale=st.sampled_from([1.0, 30.0]),
)
def test_log_probs(sampling, seed, dtype, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(5, 400, generator=generator, dtype=torch.float64)).to(dtype)
    tokens, logp, cut = sample(logits, sampling, torch.rand(5, generator=generator, dtype=torch.float64))
    wide = logits.double() / (sampling.temperature or 1)
    picked = tokens.unsqueeze(-1)
    close = {"atol": 1e-12 if dtype == torch.float64 else 5e-5, "rtol": 0, "check_dtype": False}
    torch.testing.assert_close(logp, wide.log_softmax(-1).gather(-1, picked).squeeze(-1), **close)
    assert logp.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if sampling.temperature == 0:
        assert torch.equal(tokens, logits.argmax(-1)) and cut is None
    elif not sampling.truncated:
        assert cut is None
    else:
        kept = truncate(logits.float() / sampling.temperature if dtype != torch.float64 else wide, sampling)
        torch.testing.assert_close(cut, kept.double().log_softmax(-1).gather(-1, picked).squeeze(-1), **close)
        assert torch.isfinite(cut).all() and (cut >= logp - 1e-5).all()


def test_streams_of_different_keys():
    keys = [(run, phase, step, p, s, t) for run in (0, 7) for phase in (0, 1) for step in (0, 3) for p in (0, 1)
            for s in (0, 1) for t in (0, 1)]  # fmt: skip
    firsts = [tuple(uniforms(k, 4)) for k in keys]
    assert len(set(firsts)) == len(keys)
    assert all(0 <= u < 1 for f in firsts for u in f)
    assert np.array_equal(uniforms((1, 2, 3, 4), 9)[:5], uniforms((1, 2, 3, 4), 5))
    together = np.concatenate([uniforms(k, 1000) for k in keys])
    assert abs(together.mean() - 0.5) < 0.005
    neighbours = np.corrcoef([uniforms((0, 0, 0, 0, s, 0), 2000) for s in range(20)])
    assert np.abs(neighbours - np.eye(20)).max() < 0.12
