"""Generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438) over the action tokens of an episode.

delta_t = r_t + gamma V_{t+1} - V_t;   A_t = sum_k (gamma lambda)^k delta_{t+k};   V after the last token is 0.

An episode of several turns is one row of action tokens: observations are taken out, so that the token before an
observation is followed by the first one of the next turn (UI-TARS-2, arXiv 2509.02544, section on multi-turn PPO).
All functions take one episode and work in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    *,
    mask: Tensor | None = None,
    last_value: float = 0.0,
) -> Tensor:
    """Advantages [T] of an episode's tokens, 0 where `mask` is off.

    Args:
        rewards, values: [T] reward after each token, value before it.
        mask: [T] action tokens; all without one. The reward of a token that is none goes to the last action token
            before it (to the first one, where there is none before).
        last_value: what comes after the last token is worth: 0 at an end, a value where an episode was cut short.
    """
    import torch

    n = len(values)
    at = list(range(n)) if mask is None else [t for t in range(n) if bool(mask[t])]
    out = torch.zeros(n, dtype=torch.float64, device=values.device)
    if not at:
        return out
    gathered, place = [0.0] * len(at), 0
    for t, r in enumerate(rewards.tolist()):
        while place + 1 < len(at) and at[place + 1] <= t:
            place += 1
        gathered[place] += r
    v = [*(values.tolist()[t] for t in at)] if mask is not None else values.tolist()
    advantage, following, found = 0.0, last_value, [0.0] * len(at)
    for k in reversed(range(len(at))):
        advantage = gathered[k] + gamma * following - v[k] + gamma * lam * advantage
        found[k], following = advantage, v[k]
    out[torch.tensor(at, device=out.device)] = torch.tensor(found, dtype=torch.float64, device=out.device)
    return out


def decoupled_gae(
    rewards: Tensor,
    values: Tensor,
    gamma: float = 1.0,
    *,
    lam_policy: float = 0.95,
    lam_critic: float = 1.0,
    mask: Tensor | None = None,
    last_value: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(advantages with `lam_policy`, value targets A + V with `lam_critic`), both [T], 0 where `mask` is off.

    With lam_critic = 1 the target is the return itself; below 1 a reward at the end of a long episode decays to nothing
    at its beginning (VAPO, arXiv 2504.05118).
    """
    import torch

    more = {"mask": mask, "last_value": last_value}
    advantages = gae(rewards, values, gamma, lam_policy, **more)
    targets = gae(rewards, values, gamma, lam_critic, **more) + values.to(torch.float64)
    return advantages, targets if mask is None else torch.where(mask.bool(), targets, 0.0)


def length_adaptive_lambda(lengths: Tensor, alpha: float) -> Tensor:
    """1 - 1 / (alpha * length) [N] of episodes with that many action tokens [N]: the horizon 1 / (1 - lambda) grows with
    the length. 0 up to length 1 / alpha, where the formula gives less."""
    import torch

    lengths = lengths.to(torch.float64)
    return (1 - 1 / (alpha * lengths).clamp(min=1.0)).clamp(0.0, 1.0)


def whiten(episodes: list[Tensor], eps: float = 1e-8) -> list[Tensor]:
    """All tokens of a batch shifted and scaled to mean 0 and standard deviation 1; exact zeros where all are equal."""
    import torch

    tokens = torch.cat(episodes) if episodes else torch.zeros(0)
    if len(tokens) < 2 or bool((tokens == tokens[0]).all()):
        return [torch.zeros_like(e) for e in episodes]
    mean, std = tokens.mean(), tokens.std()
    return [(e - mean) / (std + eps) for e in episodes]


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over tokens [T]; 0 where the returns do not vary. 1 is perfect, below 0
    is worse than a constant."""
    if len(returns) < 2 or bool((returns == returns[0]).all()):
        return 0.0
    return float(1 - (returns - values).var() / returns.var())
