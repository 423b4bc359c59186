"""A training step with many rollout workers, simulated: where the time goes, and when more workers stop helping.

Batches grow with the workers: each brings `episodes_per_worker` to a step. Three things are shared: the ledger (one process; every saved turn is a transaction), the source of the
weights, and the learner. Everything else is the workers' own.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from random import Random

_BATCHES = 8  # a steady state, nearly


@dataclass(frozen=True)
class Service:
    """Service times. Seconds, bytes, tokens.

    Attributes:
        turn_s: median time of a turn in a worker that has its usual company; log-normal with `spread`.
        tool_s: of the tool call after each turn but the last.
        ledger_s: of one transaction; two and one a turn for each episode (claim and finish, and a save a turn).
        weights_bytes: of one version;  bytes_per_s: of one link, and of the source.
        load_s: until a worker has put them in place.
        tokens_per_episode, learner_tokens_per_s: of one learner process.
    """

    turn_s: float
    tool_s: float
    ledger_s: float
    weights_bytes: float
    bytes_per_s: float
    load_s: float
    tokens_per_episode: float
    learner_tokens_per_s: float
    spread: float = 0.5
    turns: int = 2


@dataclass(frozen=True)
class Setting:
    """What a user sets. `broadcast`: workers hand the weights on (as Ray's object store does), instead of all asking the source."""

    workers: int
    at_once: int = 8
    episodes_per_worker: int = 16
    learners: int = 1
    asynchronous: bool = True
    broadcast: bool = True


@dataclass(frozen=True)
class Step:
    """Seconds of one step in the steady state, and of its parts. `efficiency`: the time that the episodes alone would take with all workers busy, over the step's."""

    seconds: float
    rollouts_s: float
    weights_s: float
    learner_s: float
    ledger_share: float
    efficiency: float
    bottleneck: str


def transfer_s(service: Service, setting: Setting) -> float:
    """Until a new version has reached the last worker's machine."""
    once = service.weights_bytes / service.bytes_per_s
    hops = math.ceil(math.log2(setting.workers + 1)) if setting.broadcast else setting.workers
    return once * hops


def rollouts_s(service: Service, setting: Setting, seed: int = 0, batches: int = 1) -> tuple[float, float, float]:
    """A step's rollouts by an event simulation: (seconds until the last one ended, seconds if only the episodes counted and were spread evenly, the ledger's busy share).

    Of several `batches` the next begins in each slot as soon as the one before has no episode left for it; then a step's share of the whole is given.
    """
    random = Random(seed)
    count = setting.workers * setting.episodes_per_worker * batches
    episodes = []
    for _ in range(count):
        turns = [service.turn_s * math.exp(random.gauss(0, service.spread)) for _ in range(service.turns)]
        episodes.append([t + service.tool_s for t in turns[:-1]] + turns[-1:])
    slots = setting.workers * setting.at_once
    alone = sum(map(sum, episodes)) / slots
    # (when, order, what is left of the episode; None: the slot asks for one)
    events: list[tuple[float, int, list[float] | None]] = [(0.0, i, None) for i in range(slots)]
    heapq.heapify(events)
    free, busy, ended, number = 0.0, 0.0, 0.0, slots
    while events:
        now, _, left = heapq.heappop(events)
        if left is None and not episodes:
            continue
        free = max(now, free) + service.ledger_s  # its turn at the ledger
        busy += service.ledger_s
        if left is None:
            left = episodes.pop()
        number += 1
        if left:
            heapq.heappush(events, (free + left[0], number, left[1:]))
        else:
            ended = max(ended, free)
            heapq.heappush(events, (free, number, None))
    return ended / batches, alone / batches, busy / ended


def step(service: Service, setting: Setting, seed: int = 0) -> Step:
    """One step. Asynchronously (`train.staleness = 1`) the learner works on a batch while the next is sampled, which workers begin while others finish the one before, and new
    weights travel meanwhile, so that a worker waits only until they are in place; else everybody waits for the last."""
    rollouts, alone, ledger = rollouts_s(service, setting, seed, _BATCHES if setting.asynchronous else 1)
    transfer = transfer_s(service, setting)
    tokens = setting.workers * setting.episodes_per_worker * service.tokens_per_episode
    learner = tokens / (service.learner_tokens_per_s * setting.learners)
    placed = transfer + service.load_s
    if setting.asynchronous:
        parts = {"rollouts": rollouts + service.load_s, "weights": transfer, "learner": learner}
        seconds = max(parts.values())
        bottleneck = max(parts, key=lambda part: parts[part])
    else:
        seconds = rollouts + placed + learner
        bottleneck = "learner" if learner > rollouts + placed else "weights" if placed > 0.25 * rollouts else "rollouts"
    if bottleneck == "rollouts" and ledger > 0.9:
        bottleneck = "ledger"
    return Step(seconds, rollouts, placed, learner, ledger, alone / seconds, bottleneck)
