"""What methods are made of: group statistics, ratios and clips, sums over sequences, weights. Pure functions on tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


# -- groups: rewards [N], group [N] integers in any order -----------------------------------------------------------------


def group_index(group: Tensor) -> tuple[Tensor, int]:
    """Group ids [N] as 0..K-1 [N], and K."""
    import torch

    _, index = torch.unique(group, return_inverse=True)
    return index, int(index.max()) + 1 if len(index) else 0


def group_sum(values: Tensor, index: Tensor, count: int) -> Tensor:
    """Sums [K] of values [N] by index [N]; differentiable."""
    import torch

    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, index, values)


def group_centre(rewards: Tensor, group: Tensor) -> Tensor:
    """R - mean of the group [N]; exactly 0 in a group of one and where all rewards are equal (no rounding residue)."""
    import torch

    index, k = group_index(group)
    mean = group_sum(rewards, index, k) / group_sum(torch.ones_like(rewards), index, k)
    high = torch.full_like(mean, -torch.inf).scatter_reduce(0, index, rewards, "amax")
    low = torch.full_like(mean, torch.inf).scatter_reduce(0, index, rewards, "amin")
    return torch.where((high == low)[index], 0.0, rewards - mean[index])


def group_std(rewards: Tensor, group: Tensor) -> Tensor:
    """Unbiased standard deviation of each trajectory's group [N]; 0 in a group of one."""
    import torch

    index, k = group_index(group)
    count = group_sum(torch.ones_like(rewards), index, k)
    return (group_sum(group_centre(rewards, group) ** 2, index, k) / (count - 1).clamp(min=1)).sqrt()[index]


def group_advantages(rewards: Tensor, group: Tensor, eps: float = 1e-4) -> Tensor:
    """(R - mean) / (std + eps) inside each group [N] (GRPO); exactly 0 where all rewards of a group are equal."""
    import torch

    centred, scale = group_centre(rewards, group), group_std(rewards, group) + eps
    return torch.where(scale > 0, centred / scale, 0.0)


def leave_one_out(values: Tensor, group: Tensor) -> Tensor:
    """v_i - mean of the other members of its group [N] (RLOO); 0 in a group of one. Differentiable."""
    import torch

    index, k = group_index(group)
    count = group_sum(torch.ones_like(values), index, k)[index]
    others = (group_sum(values, index, k)[index] - values) / (count - 1).clamp(min=1)
    return torch.where(count > 1, values - others, 0.0)


def batch_advantages(values: Tensor, eps: float) -> Tensor:
    """(v - mean) / (unbiased std + eps) over the whole batch [N] (REINFORCE++); exactly 0 where all are equal."""
    import torch

    return group_advantages(values, torch.zeros(len(values), dtype=torch.long, device=values.device), eps)


# -- tokens: all [T] -----------------------------------------------------------------------------------------------------


def ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    """exp(logp - old_logp), log ratio held within +-20 as verl does: e^89 overflows float32, and 0 * inf is NaN."""
    import torch

    return torch.exp((logp - old_logp).clamp(-20, 20))


def clipped_ratio_loss(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, low: float | Tensor, high: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """-min(r A, clip(r, 1 - low, 1 + high) A) per token.

    `low` and `high` are both numbers, or both bounds of each token [T]. Returns (loss, ratio, clipped), `clipped` being 1.0 where
    the clip bites (the gradient is zero there).
    """
    import torch

    r = ratio(logp, old_logp)
    plain, bounded = r * advantage, r.clamp(1 - low, 1 + high) * advantage  # type: ignore[arg-type]
    return -torch.minimum(plain, bounded), r, (bounded < plain).to(logp.dtype)


def dual_clip(loss: Tensor, advantage: Tensor, limit: float) -> Tensor:
    """Bound the loss of tokens with A < 0 by -limit * A (Ye et al. 2020): a ratio without upper bound must not explode."""
    import torch

    return torch.where(advantage < 0, torch.minimum(loss, -limit * advantage), loss)


def kl_k3(logp: Tensor, reference_logp: Tensor) -> Tensor:
    """exp(d) - d - 1, d = reference_logp - logp: unbiased for KL(policy || reference), never negative (Schulman's k3)."""
    import torch

    d = reference_logp - logp
    return torch.expm1(d) - d


def kl_k2(logp: Tensor, reference_logp: Tensor) -> Tensor:
    """(logp - reference_logp)^2 / 2: its gradient is that of a KL penalty -(logp - reference_logp) in the token's reward
    (Schulman's k2)."""
    return (logp - reference_logp) ** 2 / 2


# -- sequences of tokens -------------------------------------------------------------------------------------------------


def sequence_sum(values: Tensor, sequence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """values [T], sequence [T] -> (sums [S], tokens of each [S], index [T] into them); S sequences by rising id."""
    import torch

    index, s = group_index(sequence)
    return group_sum(values, index, s), group_sum(torch.ones_like(values), index, s), index


def first_of(values: Tensor, index: Tensor, count: int) -> Tensor:
    """One value [S] a sequence out of values [T] that are the same over each sequence; not differentiable."""
    out = values.detach().new_empty(count)
    out[index] = values.detach()
    return out


# -- weights of a token, by the lengths [N] of an update's trajectories --------------------------------------------------


def sequence_mean(lengths: Tensor) -> Tensor:
    """Mean over the tokens of each trajectory, then over trajectories (GRPO): 1 / (N * length)."""
    return 1 / (len(lengths) * lengths.clamp(min=1))


def token_mean(lengths: Tensor) -> Tensor:
    """Mean over all tokens of the update (DAPO): 1 / sum of lengths."""
    import torch

    return torch.ones_like(lengths) / lengths.sum().clamp(min=1)


def constant_length(lengths: Tensor, length: float) -> Tensor:
    """Sum over tokens divided by a constant length, mean over trajectories (Dr.GRPO): 1 / (N * length)."""
    import torch

    return torch.ones_like(lengths) / (max(len(lengths), 1) * length)
