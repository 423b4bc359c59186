"""What every method promises, over all that are built in, asked in the learner's own order."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ondol.errors import OndolError
from ondol.methods.base import ActorCritic, Method, TokenInputs
from ondol.methods.preference import PreferenceMethod
from ondol.parts import BUILT_IN, find
from ondol.records import Finish, Group, Problem, StopReason, Trajectory, Turn
from ondol.store.metrics import metric
from ondol.train.credit import Credit, credit

NAMES = sorted(BUILT_IN["methods"])
WIDE = {"dtype": torch.float64}
MIXED = ((1, 0, 0, 1, 0), (0, 0, 1, 0, 0), (1, 1, 0, 1, 1), (0, 1, 0, 0, 0))
#: its loss has a factor that no gradient flows through by design, so that finite differences are another number
STOPS_GRADIENTS = {"cispo"}


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture
def cls(name) -> type[Method]:
    return find("methods", name)


@pytest.fixture
def method(cls) -> Method:
    return cls()


def answer(number: int, sample: int, score: float, length: int = 5) -> Trajectory:
    """A prompt of 2 tokens and one turn of `length`, at its end an observation's two, between two sampled ones."""
    masks = [True] * length
    if length > 2:
        masks[1:1] = [False, False]
    n, text = len(masks), f"answer {sample % 3}: {score}"
    return Trajectory(
        (0, number, sample),
        Problem(str(number), f"question {number}", "a"),
        list(range(2, 4 + n)),
        2,
        [False] * 2 + masks,
        [False] * 2 + masks,
        [0.0] * 2 + [-0.7 if m else 0.0 for m in masks],
        [-1] * 2 + [0 if m else -1 for m in masks],
        [Turn(2, 2 + n, text, Finish.END)],
        [],
        StopReason.ANSWERED,
        float(score),
        float(score),
    )


def groups_of(scores, lengths=(5, 3, 8, 1, 4)) -> list[Group]:
    made = [
        [answer(n, i, s, lengths[(n + i) % len(lengths)]) for i, s in enumerate(row)] for n, row in enumerate(scores)
    ]
    return [Group(ts[0].problem, ts) for ts in made]


def told(method: Method, groups: list[Group], values: float = 0.0) -> Credit:
    """Credit as the learner asks for it; a critic that says `values` everywhere. Skips where the filters leave nothing."""
    try:
        kept = method.keep(groups)
    except OndolError:
        kept = []
    if not kept:
        pytest.skip("its filters leave nothing of this")
    found = credit(
        kept, method, {}, lambda ts: [torch.full((sum(t.trained),), values, dtype=torch.float64) for t in ts]
    )
    for a in found.advantages:
        assert torch.isfinite(torch.as_tensor(a)).all()
    return found


def inputs(
    method: Method, found: Credit, *, spread: float = 0.4, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[TokenInputs, torch.Tensor]:
    """Tokens of what counts, log-probs at random, and their weights [T]."""
    chosen = [i for i, counts in enumerate(found.counted) if counts]
    lengths = torch.tensor([sum(found.trajectories[i].trained) for i in chosen])
    place = torch.arange(len(chosen)).repeat_interleave(lengths)
    n = len(place)
    generator = torch.Generator().manual_seed(seed)
    old = (-0.1 - 3 * torch.rand(n, generator=generator, **WIDE)).to(dtype)
    noise = (spread * torch.randn(2, n, generator=generator, **WIDE)).to(dtype)
    a = [torch.as_tensor(found.advantages[i], **WIDE).reshape(-1) for i in chosen]
    per_token = [v if len(v) == k else v.expand(k) for v, k in zip(a, lengths.tolist())]
    x = TokenInputs(
        logp=(old + noise[0]).clamp(max=-1e-3).requires_grad_(),
        old_logp=old,
        reference_logp=(old + noise[1]).clamp(max=-1e-3) if method.needs_reference else None,
        advantage=(torch.cat(per_token) if per_token else torch.zeros(0)).to(dtype),
        sequence=torch.tensor(chosen)[place] if n else place,
        group=torch.tensor([found.group[i] for i in chosen])[place] if n else place,
        reward=found.rewards[chosen][place].to(dtype),
    )
    weights = method.token_weights(lengths.to(torch.float64))[place]
    return with_constant(method, x), weights.to(dtype)


def with_constant(method: Method, x: TokenInputs) -> TokenInputs:
    if not type(method).needs_constant:
        return x
    with torch.no_grad():
        return dataclasses.replace(x, constant=method.constant(x))


def part_of(x: TokenInputs, mask: torch.Tensor) -> TokenInputs:
    """Some of the tokens; the constant stays the whole update's."""
    names = ("logp", "old_logp", "reference_logp", "advantage", "sequence", "group", "reward")
    return dataclasses.replace(x, **{k: None if getattr(x, k) is None else getattr(x, k)[mask] for k in names})


# -- what it says ---------------------------------------------------------------------------------------------------------


def test_tells_what_it_is(cls):
    for name in ("family", "objective", "kl", "mechanism", "signal", "source"):
        assert isinstance(getattr(cls, name), str) and getattr(cls, name), name
    assert isinstance(cls.clip, bool) and cls.min_samples >= 1
    assert cls.__doc__ and cls.__doc__ != Method.__doc__
    for name, field in cls.model_fields.items():
        assert field.description, f"{cls.__name__}.{name} has no description"


def test_settings_round_trip(name, cls, method):
    assert cls(**method.model_dump()) == method
    from ondol.recipe import load_recipe, to_table

    recipe = load_recipe({"task": "arithmetic", "method": name, "train": {"samples_per_prompt": 8}})
    assert load_recipe(to_table(recipe)).method == method


def test_reports_are_known_metrics(method):
    for name, value in method.reports(groups_of(MIXED)).items():
        assert metric(name) and isinstance(value, float)


# -- advantages -----------------------------------------------------------------------------------------------------------


def test_mixed_groups_have_advantages(method):
    found = told(method, groups_of(MIXED))
    assert any(found.touched(i) for i in range(len(found.group)))


def test_advantages_are_a_pure_function_of_groups_in_any_order(method):
    def by_key(groups) -> dict:
        found = told(method, groups)
        return {(t.key, i): torch.as_tensor(found.advantages[i], **WIDE) for i, t in enumerate(found.trajectories)}

    first, again = by_key(groups_of(MIXED)), by_key(groups_of(MIXED))
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first)
    turned = {k[0]: v for k, v in by_key(groups_of(MIXED)[::-1]).items()}
    for (key, _), value in first.items():
        torch.testing.assert_close(turned[key], value, atol=1e-12, rtol=0)


def test_a_better_answer_has_no_worse_advantage(method):
    if isinstance(method, PreferenceMethod):
        pytest.skip("who makes a pair changes with the scores")
    seen = []
    for row in ((1, 0, 0, 1, 0), (1, 1, 0, 1, 0)):
        groups = groups_of((row, *MIXED[1:]))
        found = told(method, groups)
        at = [i for i, t in enumerate(found.trajectories) if t.key == (0, 0, 1)]
        seen.append(torch.as_tensor(found.advantages[at[0]]).mean() if at else None)
    if None in seen:
        pytest.skip("its filters took the answer in question")
    assert seen[1] >= seen[0] - 1e-12


@pytest.mark.parametrize("score", [0, 1])
def test_groups_of_equals(method, score):
    found = told(method, groups_of(((score,) * 5,) * 2))
    x, weights = inputs(method, found)
    loss, _ = method.token_loss(x)
    (gradient,) = torch.autograd.grad((loss * weights).sum(), x.logp)
    assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()


def test_groups_of_one(cls, method):
    if cls.min_samples > 1:
        pytest.skip("it compares samples")
    found = told(method, groups_of(((1,), (0,), (1,))))
    x, weights = inputs(method, found)
    loss, _ = method.token_loss(x)
    (gradient,) = torch.autograd.grad((loss * weights).sum(), x.logp)
    assert torch.isfinite(gradient).all() and gradient.any()


def test_answers_of_no_length(method):
    found = told(method, groups_of(MIXED, lengths=(0, 3, 0, 1, 4)))
    x, weights = inputs(method, found)
    loss, _ = method.token_loss(x)
    assert loss.shape == weights.shape and torch.isfinite(loss).all() and torch.isfinite(weights).all()


def test_nothing_at_all(method):
    """An update without a token: no division by nothing."""
    assert len(method.token_weights(torch.zeros(0, **WIDE))) == 0
    assert torch.isfinite(method.token_weights(torch.zeros(3, **WIDE))).all()
    none = torch.zeros(0, **WIDE)
    at = torch.zeros(0, dtype=torch.long)
    x = TokenInputs(none.clone().requires_grad_(), none, none if method.needs_reference else None, none, at, at, none)
    if type(method).needs_constant:
        x = dataclasses.replace(x, constant=torch.zeros((), **WIDE))
    loss, reports = method.token_loss(x)
    assert loss.shape == (0,) and all(v.shape == (0,) for v in reports.values())


def test_keep_gives_some_in_order(method):
    groups = groups_of(((0, 1, 1, 0, 0), (0, 0, 0, 0, 0), (1, 1, 1, 1, 1), (0, 1, 0, 0, 1)))
    kept = method.keep(groups)
    order = [int(g.problem.id) for g in kept]
    assert order == sorted(order)
    for g in kept:
        (whole,) = [h for h in groups if h.problem.id == g.problem.id]
        assert g.trajectories and all(any(t is o for o in whole.trajectories) for t in g.trajectories)
    assert [len(r) for r in method.shaped_rewards(kept)] == [len(g.trajectories) for g in kept]
    assert [len(c) for c in method.counted(kept)] == [len(g.trajectories) for g in kept]


# -- weights --------------------------------------------------------------------------------------------------------------


def test_weights_do_not_depend_on_order(method):
    lengths = torch.tensor([5.0, 1.0, 0.0, 9.0], **WIDE)
    weights = method.token_weights(lengths)
    assert weights.shape == lengths.shape and torch.isfinite(weights).all() and (weights >= 0).all()
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(method.token_weights(lengths[order]), weights[order])


# -- the loss -------------------------------------------------------------------------------------------------------------


def test_loss_is_finite_and_pure(method):
    x, _ = inputs(method, told(method, groups_of(MIXED)))
    loss, reports = method.token_loss(x)
    assert loss.shape == x.logp.shape and loss.dtype == torch.float64 and torch.isfinite(loss).all()
    for name, values in reports.items():
        assert values.shape == loss.shape and not values.requires_grad, name
        assert metric(name)
    again, _ = method.token_loss(x)
    assert torch.equal(loss, again)
    (gradient,) = torch.autograd.grad(loss.sum(), x.logp)
    assert torch.isfinite(gradient).all() and gradient.any()


def test_gradient_is_the_slope(name, method):
    if name in STOPS_GRADIENTS:
        pytest.skip("no gradient flows through a factor of its loss, by design")
    x, _ = inputs(method, told(method, groups_of(MIXED[:2], lengths=(2, 1, 3))), seed=3)

    def loss(logp):
        return method.token_loss(dataclasses.replace(x, logp=logp))[0]

    assert torch.autograd.gradcheck(loss, x.logp.detach().requires_grad_(), eps=1e-7, atol=1e-5)


def test_first_update_goes_the_way_of_the_advantage(method):
    """With equal weights on all sides: better answers become more probable, the chosen ones up, the rejected down."""
    x, weights = inputs(method, told(method, groups_of(MIXED)))
    logp = x.old_logp.clone().requires_grad_()
    x = dataclasses.replace(x, logp=logp, reference_logp=x.old_logp if method.needs_reference else None)
    x = with_constant(method, x)
    loss, _ = method.token_loss(x)
    (gradient,) = torch.autograd.grad((loss * weights).sum(), logp)
    directed = x.advantage != 0
    assert directed.any() and (torch.sign(gradient) == -torch.sign(x.advantage))[directed].all()


def test_zero_advantage_means_no_gradient_where_it_says_so(method):
    if not method.skip_zero_advantage:
        pytest.skip("this method learns from zero advantages, too")
    x, _ = inputs(method, told(method, groups_of(MIXED)))
    zero = dataclasses.replace(x, advantage=torch.zeros_like(x.advantage))
    (gradient,) = torch.autograd.grad(method.token_loss(zero)[0].sum(), x.logp)
    assert not gradient.any()


def test_parts_may_be_computed_apart(cls, method):
    """Whole sequences, or whole groups where the loss couples a group."""
    x, _ = inputs(method, told(method, groups_of(MIXED)))
    whole, reports = method.token_loss(x)
    unit = x.group if cls.whole_groups else x.sequence
    for own in unit.unique():
        loss, told_apart = method.token_loss(part_of(x, unit == own))
        torch.testing.assert_close(loss, whole[unit == own])
        for name, values in told_apart.items():
            torch.testing.assert_close(values, reports[name][unit == own])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("gap", [50.0, -50.0])
def test_extreme_ratios_stay_finite(method, gap, dtype):
    x, weights = inputs(method, told(method, groups_of(MIXED)), dtype=dtype)
    every_other = torch.arange(len(x.logp)) % 2 == 0
    shift = torch.where(every_other, gap, 0.0).to(dtype)
    old = x.old_logp - shift.clamp(min=0)  # a log-probability is never above 0
    logp = (x.old_logp + shift.clamp(max=0)).clamp(max=-1e-3).requires_grad_()
    reference = None if x.reference_logp is None else old
    x = with_constant(method, dataclasses.replace(x, logp=logp, old_logp=old, reference_logp=reference))
    loss, _ = method.token_loss(x)
    (gradient,) = torch.autograd.grad((loss * weights).sum(), logp)
    assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()


# -- critics --------------------------------------------------------------------------------------------------------------


def test_a_critic_that_is_right_leaves_no_advantage(method):
    """Values that are the returns: nothing to learn but the whitening of noise, and a value loss of 0."""
    if not isinstance(method, ActorCritic):
        pytest.skip("no critic")
    found = told(method, groups_of(((1, 1, 1, 1, 1),) * 2), values=1.0)
    assert not any(found.touched(i) for i in range(len(found.group)))
    returns = torch.cat(found.returns)
    assert not method.value_loss(torch.ones_like(returns), torch.ones_like(returns), returns).any()
