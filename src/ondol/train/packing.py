"""Trajectories to packed micro-batches: no padding, common prompts and beginnings of prompts once, bounded by a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ondol.records import Batch, Segment, Trajectory


@dataclass
class Sequence_:
    """One trajectory to train on. `index` names it in the whole update; `weight` is that of each of its tokens."""

    trajectory: Trajectory
    index: int
    advantage: float
    weight: float


def pack(sequences: Sequence[Sequence_], tokens_per_microbatch: int, *, share_prompts: bool = True) -> list[Batch]:
    """Pack in the given order. With `share_prompts`, neighbours with the same prompt share it, and all prompts of a
    micro-batch share their common beginning (a system message, say).

    A micro-batch holds at most `tokens_per_microbatch` tokens (a single longer sequence gets one of its own), so
    memory follows that number and not the number of prompts or samples. A trajectory is never split.
    """
    batches: list[Batch] = []
    chosen: list[list[Sequence_]] = []  # families of one prompt
    used = 0
    for s in sequences:
        t = s.trajectory
        tail = len(t.ids) - t.prompt_length
        family = chosen[-1] if chosen and share_prompts else None
        joins = family is not None and _prompt(family[0].trajectory) == _prompt(t)
        cost = tail + (0 if joins else t.prompt_length)
        if chosen and used + cost > tokens_per_microbatch:
            batches.append(_batch(chosen, share_prompts))
            chosen, used, joins = [], 0, False
            cost = len(t.ids)
        if joins:
            chosen[-1].append(s)
        else:
            chosen.append([s])
        used += cost
    if chosen:
        batches.append(_batch(chosen, share_prompts))
    return batches


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
    rows: list[tuple[int, int, int, bool, bool, float, int, float, float]] = []
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
            segment = Segment(len(ids), len(ids) + len(t.ids) - start, root)
            if segment.end == segment.start:
                continue
            segments.append(segment)
            for at in range(start, len(t.ids)):
                if not (t.sampled[at] or t.trained[at]) or at == 0:
                    continue
                source = root.end - 1 if at == start and root is not None else segment.start + at - start - 1
                weight = s.weight if t.trained[at] else 0.0
                rows.append(
                    (
                        source,
                        t.ids[at],
                        s.index,
                        t.sampled[at],
                        t.trained[at],
                        t.logp[at],
                        t.version[at],
                        s.advantage,
                        weight,
                    )
                )
            ids += t.ids[start:]
            positions += range(start, len(t.ids))
    columns = list(zip(*rows)) if rows else [()] * 9
    kinds = (
        torch.long,
        torch.long,
        torch.long,
        torch.bool,
        torch.bool,
        torch.float64,
        torch.long,
        torch.float64,
        torch.float64,
    )
    source, target, sequence, sampled, trained, logp, version, advantage, weight = (
        torch.tensor(c, dtype=k) for c, k in zip(columns, kinds)
    )
    return Batch(
        ids=torch.tensor(ids, dtype=torch.long),
        positions=torch.tensor(positions, dtype=torch.long),
        segments=segments,
        source=source,
        target=target,
        sequence=sequence,
        sampled=sampled,
        trained=trained,
        logp=logp,
        version=version,
        advantage=advantage,
        weight=weight,
        temperature=families[0][0].trajectory.temperature or 1.0,
        sequence_tokens=sequence_tokens,
    )
