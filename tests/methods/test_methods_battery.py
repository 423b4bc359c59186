"""What every method promises, over all that are built in."""

from __future__ import annotations

import pytest
import torch

from ondol.methods.base import Method, TokenInputs
from ondol.parts import BUILT_IN, find
from ondol.records import Group, Problem, StopReason, Trajectory

NAMES = sorted(BUILT_IN["methods"])
WIDE = {"dtype": torch.float64}


@pytest.fixture(params=NAMES)
def cls(request) -> type[Method]:
    return find("methods", request.param)


@pytest.fixture
def method(cls) -> Method:
    return cls()


def random_batch(seed: int = 0, groups: int = 5, size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 5, (groups * size,), generator=generator).to(torch.float64) / 4
    rewards[:size] = 1.0  # a group of equals
    return rewards, torch.arange(groups).repeat_interleave(size)


def inputs(method: Method, n: int = 40, seed: int = 0, dtype: torch.dtype = torch.float64) -> TokenInputs:
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(n, generator=generator, dtype=dtype)
    noise = 0.4 * torch.randn(2, n, generator=generator, dtype=dtype)
    return TokenInputs(
        logp=(old + noise[0]).requires_grad_(),
        old_logp=old,
        reference_logp=old + noise[1] if method.needs_reference else None,
        advantage=torch.randn(8, generator=generator, dtype=dtype)[torch.arange(n) // 5],
        sequence=torch.arange(n) // 5,
    )


def test_tells_what_it_is(cls):
    for name in ("family", "objective", "kl", "mechanism", "signal", "source"):
        assert isinstance(getattr(cls, name), str) and getattr(cls, name), name
    assert isinstance(cls.clip, bool) and cls.min_samples >= 1
    assert cls.__doc__ and cls.__doc__ != Method.__doc__
    for name, field in cls.model_fields.items():
        assert field.description, f"{cls.__name__}.{name} has no description"


def test_settings_round_trip(cls, method):
    assert cls(**method.model_dump()) == method
    from ondol.recipe import load_recipe, to_table

    (name,) = [n for n in NAMES if find("methods", n) is cls]
    recipe = load_recipe({"task": "arithmetic", "method": name, "train": {"samples_per_prompt": 8}})
    assert load_recipe(to_table(recipe)).method == method


def test_advantages(method):
    rewards, group = random_batch()
    got = method.advantages(rewards, group)
    assert got.shape == rewards.shape and torch.isfinite(got).all()
    assert got.any(), "no advantage at all"
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(method.advantages(rewards[order], group[order]), got[order])
    again = method.advantages(rewards, group)
    assert torch.equal(got, again), "not a pure function"
    better = rewards.clone()
    better[5] += 1  # a better reward never makes an answer's own advantage worse
    assert method.advantages(better, group)[5] >= got[5] - 1e-12


def test_weights_do_not_depend_on_micro_batches(method):
    lengths = torch.tensor([5.0, 1.0, 0.0, 9.0], **WIDE)
    weights = method.token_weights(lengths)
    assert weights.shape == lengths.shape and torch.isfinite(weights).all() and (weights >= 0).all()
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(method.token_weights(lengths[order]), weights[order])


def test_loss_is_finite_and_pure(method):
    x = inputs(method)
    loss, reports = method.token_loss(x)
    assert loss.shape == x.logp.shape and loss.dtype == torch.float64 and torch.isfinite(loss).all()
    for name, values in reports.items():
        assert values.shape == loss.shape and not values.requires_grad, name
        assert "/" in name
    again, _ = method.token_loss(x)
    assert torch.equal(loss, again)
    (gradient,) = torch.autograd.grad(loss.sum(), x.logp)
    assert torch.isfinite(gradient).all() and gradient.any()


def test_gradient(method):
    x = inputs(method, n=12, seed=3)

    def loss(logp):
        return method.token_loss(TokenInputs(logp, x.old_logp, x.reference_logp, x.advantage, x.sequence))[0]

    assert torch.autograd.gradcheck(loss, x.logp.detach().requires_grad_(), eps=1e-7, atol=1e-5)


def test_first_update_goes_the_way_of_the_advantage(method):
    """With equal weights on all sides the gradient is -A: better answers become more probable."""
    x = inputs(method)
    logp = x.old_logp.clone().requires_grad_()
    reference = x.old_logp if method.needs_reference else None
    loss, _ = method.token_loss(TokenInputs(logp, x.old_logp, reference, x.advantage, x.sequence))
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert (torch.sign(gradient) == -torch.sign(x.advantage)).all()


def test_zero_advantage_means_no_gradient_where_it_says_so(method):
    if not method.skip_zero_advantage:
        pytest.skip("this method learns from zero advantages, too")
    x = inputs(method)
    zero = TokenInputs(x.logp, x.old_logp, x.reference_logp, torch.zeros_like(x.advantage), x.sequence)
    (gradient,) = torch.autograd.grad(method.token_loss(zero)[0].sum(), x.logp)
    assert not gradient.any()


def test_whole_sequences_may_be_computed_apart(method):
    x = inputs(method)
    whole, _ = method.token_loss(x)
    for a, b in ((0, 15), (15, 40)):
        part = TokenInputs(
            x.logp[a:b],
            x.old_logp[a:b],
            None if x.reference_logp is None else x.reference_logp[a:b],
            x.advantage[a:b],
            x.sequence[a:b],
        )
        torch.testing.assert_close(method.token_loss(part)[0], whole[a:b])


def test_keep_gives_some_of_the_groups_in_order(method):
    problem = Problem("p", "q", "a")

    def answer(score: float) -> Trajectory:
        return Trajectory((0, 0, 0), problem, [1], 1, [False], [False], [0.0], [-1], [], [], StopReason.ANSWERED, score, score)  # fmt: skip

    groups = [Group(problem, [answer(s) for s in scores]) for scores in ((0, 1, 1), (0, 0, 0), (1, 1, 1), (0.5, 1, 0))]
    kept = method.keep(groups)
    assert [any(g is k for k in kept) for g in groups].count(True) == len(kept)
    assert [i for g in kept for i, h in enumerate(groups) if h is g] == sorted(
        i for g in kept for i, h in enumerate(groups) if h is g
    )
