"""From logits to tokens: truncation, log-probabilities, and a draw that needs one uniform number a row."""

from __future__ import annotations

import torch
from torch import Tensor

from ondol.engines.base import Sampling

_BLOCK = 256


def truncate(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [N, V] (already divided by the temperature) with tokens outside top-k, top-p, min-p at -inf.

    Applied in that order, each on what the one before left, as transformers does.
    """
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)  # of equals the first stay
        p = ordered.softmax(dim=-1, dtype=torch.float64)
        drop = p.cumsum(dim=-1) - p >= sampling.top_p  # a token stays while the mass before it is short of top_p
        drop[:, 0] = False
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    if sampling.min_p > 0:
        p = logits.softmax(dim=-1)
        logits = logits.masked_fill(p < sampling.min_p * p.max(dim=-1, keepdim=True).values, -torch.inf)
    return logits


def draw(p: Tensor, u: Tensor) -> Tensor:
    """Inverse CDF: for each row of p [N, V] (need not sum to one) the first token whose cumulated mass passes u [N].

    Two levels (blocks, then inside one block) keep it cheap next to a full cumulative sum; sums are float64.
    """
    rows, vocabulary = p.shape
    if pad := -vocabulary % _BLOCK:
        p = torch.nn.functional.pad(p, (0, pad))
    blocks = p.view(rows, -1, _BLOCK)
    edges = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target = u.to(torch.float64) * edges[:, -1]
    block = torch.searchsorted(edges, target.unsqueeze(-1), right=True).squeeze(-1)
    # rounding may leave the target a hair past the row's mass, or the block's: then the last one that has any
    block = torch.minimum(block, (edges < edges[:, -1:]).sum(dim=-1))
    index = torch.arange(rows, device=p.device)
    before = torch.where(block > 0, edges[index, (block - 1).clamp(min=0)], 0.0)
    inside = blocks[index, block].to(torch.float64).cumsum(dim=-1)
    within = torch.searchsorted(inside, (target - before).unsqueeze(-1), right=True).squeeze(-1)
    last = (inside < inside[:, -1:]).sum(dim=-1)
    return block * _BLOCK + torch.minimum(within, last)


def sample(logits: Tensor, sampling: Sampling, u: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Draw one token a row.

    Args:
        logits: [N, V], raw.
        u: [N] uniform numbers in [0, 1), float64, one from each row's own stream.
    Returns:
        tokens [N]; log-probabilities [N] at the temperature, untruncated; the same under the truncated
        distribution, or None when no truncation is on.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    if sampling.temperature == 0:
        tokens = logits.argmax(dim=-1)
        return tokens, _logp(logits, tokens), None
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if not sampling.truncated:
        top = logits.amax(dim=-1, keepdim=True)
        p = (logits - top).exp_()
        tokens = draw(p, u)
        mass = p.sum(dim=-1, dtype=torch.float64)
        picked = (logits.gather(-1, tokens.unsqueeze(-1)) - top).squeeze(-1)
        return tokens, (picked - mass.log()).to(logits.dtype), None
    kept = truncate(logits, sampling)
    tokens = draw(kept.softmax(dim=-1), u)
    return tokens, _logp(logits, tokens), _logp(kept, tokens)


def _logp(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)
