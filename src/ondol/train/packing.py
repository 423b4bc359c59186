"""Trajectories to packed micro-batches: no padding, common prompts and beginnings of prompts once, bounded by a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch

from ondol.records import TARGET_COLUMNS, Batch, Segment, Trajectory


@dataclass
class Sequence_:
    """One trajectory to train on, L of its tokens trained.

    Attributes:
        index: names it in the whole step.
        advantage: a number, or one per trained token [L].
        weight: of each trained token in the loss: a number, or one per trained token [L].
        group: names its group in the whole step.
        reward: as the method shaped it.
        value, returns: [L] for critics; None without one.
    """

    trajectory: Trajectory
    index: int
    advantage: float | Sequence[float]
    weight: float | Sequence[float]
    group: int = 0
    reward: float = 0.0
    value: Sequence[float] | None = None
    returns: Sequence[float] | None = None


def pack(
    sequences: Sequence[Sequence_],
    tokens_per_microbatch: int,
    *,
    share_prompts: bool = True,
    whole_groups: bool = False,
) -> list[Batch]:
    """Pack in the given order. With `share_prompts`, neighbours with the same prompt share it, and all prompts of a
    micro-batch share their common beginning (a system message, say).

    A micro-batch holds at most `tokens_per_microbatch` tokens (a single longer sequence gets one of its own), so
    memory follows that number and not the number of prompts or samples. A trajectory is never split; with
    `whole_groups` neighbours of one group are not parted either, and a group beyond the budget gets a batch of its own.
    """
    batches: list[Batch] = []
    chosen: list[list[Sequence_]] = []  # families of one prompt
    used = 0
    units = [list(g) for _, g in groupby(sequences, lambda s: s.group)] if whole_groups else [[s] for s in sequences]
    for unit in units:
        last = chosen[-1][0].trajectory if chosen and share_prompts else None
        cost = _cost(unit, last, share_prompts)
        if chosen and used + cost > tokens_per_microbatch:
            batches.append(_batch(chosen, share_prompts))
            chosen, used = [], 0
            cost = _cost(unit, None, share_prompts)
        for s in unit:
            if chosen and share_prompts and _prompt(chosen[-1][0].trajectory) == _prompt(s.trajectory):
                chosen[-1].append(s)
            else:
                chosen.append([s])
        used += cost
    if chosen:
        batches.append(_batch(chosen, share_prompts))
    return batches


def _cost(unit: list[Sequence_], last: Trajectory | None, share: bool) -> int:
    """Tokens that the unit adds after a trajectory `last`."""
    cost = 0
    for s in unit:
        t = s.trajectory
        joins = share and last is not None and _prompt(last) == _prompt(t)
        cost += len(t.ids) - (t.prompt_length if joins else 0)
        last = t
    return cost


def _prompt(t: Trajectory) -> list[int]:
    return t.ids[: t.prompt_length]


def _common_beginning(prompts: list[list[int]]) -> int:
    """How many first tokens all prompts share; at least one token of each is left over."""
    first, last = min(prompts), max(prompts)  # in lexical order: what these two share, all share
    most = min(len(p) for p in prompts) - 1
    return next((i for i in range(most) if first[i] != last[i]), max(most, 0))


def _batch(families: list[list[Sequence_]], share: bool) -> Batch:
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    rows: list[tuple[int | float, ...]] = []
    sequence_tokens = 0
    base, begun = None, 0
    if share and len(families) > 1 and (begun := _common_beginning([_prompt(f[0].trajectory) for f in families])):
        base = Segment(0, begun)
        segments.append(base)
        ids += families[0][0].trajectory.ids[:begun]
        positions += range(begun)
    for family in families:
        first = family[0].trajectory
        start = first.prompt_length
        root = None
        if start > 0:
            root = Segment(len(ids), len(ids) + start - begun, base)
            segments.append(root)
            ids += first.ids[begun:start]
            positions += range(begun, start)
            if any(any(s.trajectory.trained[:start]) for s in family):
                raise ValueError("prompt tokens cannot be trained when they are shared: set prompt_length to 0")
        for s in family:
            t = s.trajectory
            sequence_tokens += len(t.ids)
            count = 0  # trained tokens so far
            # a context that began anew is a root of its own: it sees nothing of the prompt or of what was said before
            for number, (a, b) in enumerate(pairwise([start, *t.restarts, len(t.ids)])):
                if b == a:
                    continue
                segment = Segment(len(ids), len(ids) + b - a, None if number else root)
                segments.append(segment)
                for at in range(a, b):
                    if not (t.sampled[at] or t.trained[at]) or (at == a and segment.parent is None):
                        continue
                    source = root.end - 1 if at == a and root is not None else segment.start + at - a - 1
                    own = (source, t.ids[at], s.index, s.group, t.sampled[at], t.trained[at], t.logp[at], t.version[at])
                    k = count if t.trained[at] else None
                    rows.append(
                        (
                            *own,
                            s.advantage if isinstance(s.advantage, (int, float)) else _at(s.advantage, k),
                            s.reward,
                            _at(s.value, k),
                            _at(s.returns, k),
                            0.0 if k is None else s.weight if isinstance(s.weight, (int, float)) else _at(s.weight, k),
                        )
                    )
                    count += t.trained[at]
                ids += t.ids[a:b]
                positions += range(b - a) if number else range(a, b)
    kinds = {"sampled": torch.bool, "trained": torch.bool}
    kinds |= dict.fromkeys(("source", "target", "sequence", "group", "version"), torch.long)
    columns = zip(*rows) if rows else ([] for _ in TARGET_COLUMNS)
    per_target = {
        name: torch.tensor(column, dtype=kinds.get(name, torch.float64))
        for name, column in zip(TARGET_COLUMNS, columns, strict=True)
    }
    return Batch(
        ids=torch.tensor(ids, dtype=torch.long),
        positions=torch.tensor(positions, dtype=torch.long),
        segments=segments,
        temperature=families[0][0].trajectory.temperature or 1.0,
        sequence_tokens=sequence_tokens,
        **per_target,
    )


def _at(values: Sequence[float] | None, k: int | None) -> float:
    """Entry `k` of values per trained token; 0 for a token that is not trained, or without values."""
    return 0.0 if values is None or k is None else float(values[k])
