"""Rollouts over simulated engines, to try schedulers without a cluster: the set-up of the card of arXiv 2508.20722.

An engine gives every row one token a step; a step takes longer with more rows. Rollouts of one prompt share its difficulty, which is why static
blocks are uneven. A row whose tool is at work keeps its KV and takes no steps. An engine that runs out of KV memory evicts its youngest row,
whose tokens are computed anew when it comes back.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from random import Random

from ondol.cluster.scheduler import Policy, Scheduler

_CHUNK = 16  # tokens of each row between two looks at the queue


@dataclass(frozen=True)
class Workload:
    """Lengths are log-normal; `spread` between prompts and within one. The mean is about 2,500 tokens, the card's reservation. Times in seconds:
    those of a 14B model in bfloat16 on an H100, by its memory bandwidth (28 GB of weights a step, 0.2 MB of KV a token) and its FLOPs.
    """

    engines: int = 8
    kv_tokens: int = 60_000
    prompts: int = 32
    samples: int = 32
    prompt_tokens: int = 200
    median_tokens: float = 1900.0
    spread_prompts: float = 0.8
    spread_samples: float = 0.5
    longest: int = 8000
    turns: int = 3
    tool_s: float = 0.5
    step_s: float = 0.0084  # an engine's step with no row
    row_s: float = 0.000117  # and for each row
    prefill_s: float = 0.00007  # a token computed anew after an eviction


@dataclass(frozen=True)
class Found:
    """Seconds until the last rollout ended, rollouts evicted, and the share of its time that the mean engine had rows to step."""

    makespan_s: float
    evictions: int
    utilisation: float


class _Row:
    def __init__(self, prompt: int, length: int, turns: int, random: Random) -> None:
        self.tokens, self.left = prompt, length
        # where its tools are called, as tokens left by then
        self.calls = sorted((random.randint(1, max(1, length - 1)) for _ in range(turns - 1)), reverse=True)
        self.back = 0.0  # when its tool is done

    def until_stop(self) -> int:
        return self.left - self.calls[0] if self.calls else self.left


def rollouts(work: Workload, seed: int) -> list[_Row]:
    random = Random(seed)
    rows = []
    for _ in range(work.prompts):
        hard = random.gauss(0, work.spread_prompts)
        for _ in range(work.samples):
            length = work.median_tokens * math.exp(hard + random.gauss(0, work.spread_samples))
            rows.append(_Row(work.prompt_tokens, min(work.longest, max(16, round(length))), work.turns, random))
    return rows


def simulate(work: Workload, policy: Policy, seed: int, reserve: int = 2500) -> Found:
    """All rollouts of a step under a policy. The same seed gives every policy the same rollouts."""
    rows = {f"{i:05d}": row for i, row in enumerate(rollouts(work, seed))}
    scheduler = Scheduler(
        [work.kv_tokens] * work.engines, policy, reserve=reserve if policy == "kv" else 0, expected=len(rows)
    )
    for name, row in rows.items():
        scheduler.submit(name, row.tokens)
    clocks = [(0.0, i) for i in range(work.engines)]
    heapq.heapify(clocks)
    busy, owed, ended = [0.0] * work.engines, [0.0] * work.engines, 0.0
    evicted: set[str] = set()
    remaining = len(rows)
    while remaining:
        now, engine = heapq.heappop(clocks)
        for name, place in scheduler.dispatch():
            rows[name].back = max(rows[name].back, now)
            if name in evicted:
                evicted.discard(name)
                owed[place] += work.prefill_s * rows[name].tokens
        place = scheduler.places[engine]
        active = [n for n in place.held if rows[n].back <= now]
        if not active:  # it waits for a tool, or for work
            waits = [rows[n].back for n in place.held]
            others = [t for t, _ in clocks if t > now]
            heapq.heappush(clocks, (min(waits) if waits else min(others, default=now + work.step_s), engine))
            continue
        room = place.capacity - place.used
        steps = max(1, min(_CHUNK, room // len(active), *(rows[n].until_stop() for n in active)))
        spent = steps * (work.step_s + work.row_s * len(active)) + owed[engine]
        now, owed[engine] = now + spent, 0.0
        busy[engine] += spent
        for name in active:
            row = rows[name]
            row.tokens, row.left = row.tokens + steps, row.left - steps
            scheduler.grow(name, row.tokens)
            if row.calls and row.left <= row.calls[0]:
                row.calls.pop(0)
                row.back = now + work.tool_s
            if row.left <= 0:
                scheduler.finish(name)
                remaining -= 1
                ended = max(ended, now)
        while (youngest := scheduler.overflowing(engine)) is not None:
            scheduler.evict(youngest)
            evicted.add(youngest)
        heapq.heappush(clocks, (now, engine))
    return Found(ended, scheduler.evictions, sum(busy) / (ended * work.engines))
