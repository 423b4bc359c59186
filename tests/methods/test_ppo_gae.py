"""GAE against sums written from the formula, and what follows from it for PPO, VAPO and UI-TARS-2's PPO."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ondol.methods.base import Scored
from ondol.methods.gae import decoupled_gae, explained_variance, gae, length_adaptive_lambda, whiten
from ondol.methods.ppo import PPO
from ondol.methods.reinforce import REINFORCE
from ondol.methods.ui_tars import UITarsPPO
from ondol.methods.vapo import VAPO
from ondol.records import Finish, Group, Problem, StopReason, ToolCall, Trajectory, Turn

WIDE = {"dtype": torch.float64}
numbers = st.floats(-3, 3, allow_nan=False)
unit = st.floats(0, 1)
episodes = st.lists(st.tuples(numbers, numbers, st.booleans()), max_size=12)


def columns(episode) -> list[torch.Tensor]:
    return [torch.tensor([e[k] for e in episode], dtype=torch.bool if k == 2 else torch.float64) for k in range(3)]


def by_the_formula(rewards: list[float], values: list[float], gamma: float, lam: float, last: float = 0.0):
    """A_t = sum over k of (gamma lambda)^k delta_{t+k}, each sum on its own."""
    n, following = len(values), [*values[1:], last]
    delta = [rewards[t] + gamma * following[t] - values[t] for t in range(n)]
    return [math.fsum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]


@settings(deadline=None)
@given(episode=episodes, gamma=unit, lam=unit, last=numbers)
def test_gae_is_its_formula(episode, gamma, lam, last):
    rewards, values, _ = columns(episode)
    got = gae(rewards, values, gamma, lam, last_value=last)
    want = by_the_formula(rewards.tolist(), values.tolist(), gamma, lam, last)
    torch.testing.assert_close(got, torch.tensor(want, **WIDE), atol=1e-9, rtol=0)


@settings(deadline=None)
@given(episode=episodes, gamma=unit, lam=unit)
def test_observations_are_as_if_they_were_not_there(episode, gamma, lam):
    """The tokens of an episode in one row; a reward on an observation goes to the last action before it."""
    rewards, values, mask = columns(episode)
    got = gae(rewards, values, gamma, lam, mask=mask)
    at = [t for t in range(len(mask)) if mask[t]]
    assert not got[~mask].any()
    if not at:
        return
    moved = dict.fromkeys(at, 0.0)
    for t, r in enumerate(rewards.tolist()):
        moved[max((a for a in at if a <= t), default=at[0])] += r
    want = by_the_formula(list(moved.values()), values[mask].tolist(), gamma, lam)
    torch.testing.assert_close(got[mask], torch.tensor(want, **WIDE), atol=1e-9, rtol=0)


@settings(deadline=None)
@given(episode=episodes.filter(bool), gamma=unit, lam=unit)
def test_special_lambdas(episode, gamma, lam):
    rewards, values, _ = columns(episode)
    n = len(values)
    one_step = rewards + gamma * torch.cat([values[1:], torch.zeros(1, **WIDE)]) - values
    torch.testing.assert_close(gae(rewards, values, gamma, 0.0), one_step)
    returns = [math.fsum(gamma ** (k - t) * float(rewards[k]) for k in range(t, n)) for t in range(n)]
    monte_carlo = torch.tensor(returns, **WIDE)
    torch.testing.assert_close(gae(rewards, values, gamma, 1.0), monte_carlo - values, atol=1e-9, rtol=0)
    advantages, targets = decoupled_gae(rewards, values, gamma, lam_policy=lam, lam_critic=1.0)
    torch.testing.assert_close(targets, monte_carlo, atol=1e-9, rtol=0)  # whatever the values say
    torch.testing.assert_close(advantages, gae(rewards, values, gamma, lam))


def test_value_targets_of_a_long_episode():
    """UI-TARS-2: with lambda 0.95 nothing of the reward is left at the first of 200 tokens, with 1 all of it is."""
    rewards, values = torch.zeros(200, **WIDE), torch.zeros(200, **WIDE)
    rewards[-1] = 1.0
    assert decoupled_gae(rewards, values, lam_critic=0.95)[1][0] < 0.05
    assert decoupled_gae(rewards, values, lam_critic=1.0)[1][0] == 1.0


def test_length_adaptive_lambda():
    lengths = torch.tensor([0, 1, 20, 21, 40, 2000])
    got = length_adaptive_lambda(lengths, 0.05)
    torch.testing.assert_close(got, torch.tensor([0, 0, 0, 1 - 1 / 1.05, 0.5, 0.99], **WIDE))
    long = torch.arange(30, 500)
    torch.testing.assert_close(1 / (1 - length_adaptive_lambda(long, 0.05)), 0.05 * long.to(torch.float64))


@given(st.lists(st.lists(numbers, max_size=6), max_size=5))
def test_whitening(rows):
    made = whiten([torch.tensor(r, **WIDE) for r in rows])
    assert [len(m) for m in made] == [len(r) for r in rows]
    flat, before = torch.cat([*made, torch.zeros(0, **WIDE)]), [v for r in rows for v in r]
    assert torch.isfinite(flat).all()
    if len(set(before)) <= 1:
        assert not flat.any()
    elif torch.tensor(before, **WIDE).std() > 1e-3:
        assert flat.mean() == pytest.approx(0, abs=1e-9) and flat.std() == pytest.approx(1, abs=1e-4)


def test_explained_variance():
    returns = torch.tensor([0.0, 1.0, 1.0, 0.0], **WIDE)
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(torch.full_like(returns, 0.3), returns) == 0.0
    assert explained_variance(1 - returns, returns) == pytest.approx(-3)
    assert explained_variance(returns, torch.ones(4, **WIDE)) == 0.0  # nothing varies: nothing to explain
    assert explained_variance(returns[:1], returns[:1]) == explained_variance(returns[:0], returns[:0]) == 0.0


# -- the methods ----------------------------------------------------------------------------------------------------------


def scored(rewards) -> Scored:
    return Scored(torch.tensor(rewards, **WIDE), torch.arange(len(rewards)))


@given(rewards=st.lists(numbers, min_size=1, max_size=6), lengths=st.lists(st.integers(0, 9), min_size=6, max_size=6))
def test_without_values_and_with_lambda_one_it_is_reinforce(rewards, lengths):
    method, x = PPO(lam=1.0, whiten_advantages=False), scored(rewards)
    advantages, _ = method.token_advantages(x, [torch.zeros(n, **WIDE) for n in lengths[: len(rewards)]])
    for a, whole in zip(advantages, REINFORCE().advantages(x), strict=True):
        assert torch.equal(a, whole.expand(len(a)))


def test_an_episode_of_one_token():
    for method in (PPO(whiten_advantages=False), VAPO(whiten_advantages=False)):
        (a,), (target,) = method.token_advantages(scored([1.0]), [torch.tensor([0.3], **WIDE)])
        assert a.tolist() == pytest.approx([0.7]) and target.tolist() == pytest.approx([1.0])


def test_vapo_lambdas_follow_each_length():
    method, values = VAPO(alpha=0.5, whiten_advantages=False), [torch.rand(n, **WIDE) for n in (3, 11)]
    advantages, targets = method.token_advantages(scored([1.0, -1.0]), values)
    for v, r, a, target in zip(values, (1.0, -1.0), advantages, targets, strict=True):
        rewards = [0.0] * (len(v) - 1) + [r]
        want = by_the_formula(rewards, v.tolist(), 1.0, 1 - 1 / (0.5 * len(v)))
        torch.testing.assert_close(a, torch.tensor(want, **WIDE))
        torch.testing.assert_close(target, torch.full_like(v, r))


@given(
    value=st.lists(numbers, min_size=4, max_size=4),
    old=st.lists(numbers, min_size=4, max_size=4),
    clip=st.floats(0.01, 1),
)
def test_value_loss_is_its_formula(value, old, clip):
    returns = [0.5, -1.0, 2.0, 0.0]
    want = []
    for v, o, r in zip(value, old, returns):
        held = o + max(-clip, min(clip, v - o))
        want.append(0.5 * max((v - r) ** 2, (held - r) ** 2))
    loss = PPO(value_clip=clip).value_loss(*(torch.tensor(c, **WIDE) for c in (value, old, returns)))
    torch.testing.assert_close(loss, torch.tensor(want, **WIDE))


def test_values_have_a_gradient_where_the_clip_does_not_bite():
    value = torch.tensor([0.1, 0.9], **WIDE).requires_grad_()
    old, returns = torch.zeros(2, **WIDE), torch.ones(2, **WIDE)
    (gradient,) = torch.autograd.grad(PPO().value_loss(value, old, returns).sum(), value)
    assert gradient[0] == pytest.approx(-0.9) and gradient[1] == 0  # the second has moved 0.9 towards its return
    (gradient,) = torch.autograd.grad(PPO(value_clip=0).value_loss(value, old, returns).sum(), value)
    torch.testing.assert_close(gradient, (value - returns).detach())


def test_returns_are_discounted_from_the_end():
    got = PPO(gamma=0.5).returns(scored([4.0, 1.0]), [3, 0])
    assert [g.tolist() for g in got] == [[1.0, 2.0, 4.0], []]


def episode(turns: int = 1, stop: StopReason = StopReason.ANSWERED, reward: float = 1.0, **last) -> Trajectory:
    made = [Turn(0, 1, "text", Finish.END) for _ in range(turns)]
    for name, value in last.items():
        setattr(made[-1], name, value)
    return Trajectory((0, 0, 0), Problem("p", "q", "a"), [], 0, [], [], [], [], made, [], stop, reward, reward)


def test_episodes_cut_short():
    ts = [episode(stop=s) for s in (StopReason.ANSWERED, StopReason.MAX_TURNS, StopReason.TURN_LENGTH)]
    values = [torch.tensor([0.1, 0.4], **WIDE)] * 3
    x = Scored(torch.zeros(3, **WIDE), torch.arange(3), ts)
    ends = PPO(lam=1.0, whiten_advantages=False).token_advantages(x, values)[1]
    goes_on = PPO(lam=1.0, whiten_advantages=False, bootstrap_truncated=True).token_advantages(x, values)[1]
    assert [float(t[0]) for t in ends] == pytest.approx([0, 0, 0])
    assert [float(t[0]) for t in goes_on] == pytest.approx([0, 0.4, 0.4])


def test_right_answers_are_imitated_by_their_own_mean():
    """VAPO: the weights of an update turn the loss into the clipped one plus 0.1 times a mean over positive tokens."""
    from ondol.methods.base import TokenInputs

    logp = torch.tensor([-1.0, -2.0, -3.0, -0.5, -0.25], **WIDE).requires_grad_()
    sequence, reward = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0.0, 0, 0, 1, 1], **WIDE)
    zeros = torch.zeros(5, **WIDE)
    x = TokenInputs(logp, logp.detach(), None, zeros, sequence, sequence, reward)
    method = VAPO()
    share = method.constant(x)
    assert share == pytest.approx(0.4)
    x = TokenInputs(logp, logp.detach(), None, zeros, sequence, sequence, reward, share)
    weights = method.token_weights(torch.tensor([3.0, 2.0], **WIDE))[sequence]
    total = (method.token_loss(x)[0] * weights).sum()
    assert total.item() == pytest.approx(0.1 * (0.5 + 0.25) / 2)


def test_shaped_reward():
    broken = [ToolCall("x", {}, error="no JSON")]
    ts = [
        episode(),
        episode(reward=0.0),
        episode(calls=broken),
        episode(finish=Finish.LENGTH),
        episode(turns=15),
        episode(turns=0),
    ]
    group = [Group(ts[0].problem, ts)]
    assert UITarsPPO().shaped_rewards(group) == [[1.0, 0.0, 1.0, 1.0, 1.0, 1.0]]
    assert UITarsPPO(shape_rewards=True).shaped_rewards(group)[0] == pytest.approx([1.0, 0.0, 0.9, 0.9, 0.975, 0.9])
