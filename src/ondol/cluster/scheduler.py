"""Which engine a rollout goes to: the load-balanced scheduler of rStar2-Agent (arXiv 2508.20722, section 3.2), and its rivals.

A rollout stays with its engine until it ends, tools included, since its KV is there. What differs is how it gets there:

kv              waits in one queue, and goes to the engine with the most free KV tokens once a reservation for it fits
least-requests  goes at once to the engine with the fewest rollouts, which keeps a queue of its own
static          rollouts are dealt out in contiguous blocks beforehand

The size of a reservation is not stated in the paper. Ours is the larger of what a rollout holds and `reserve`, which should be about the mean final
length: reserving the worst case leaves most memory idle.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

from ondol.errors import OndolError, nearest

Policy = Literal["kv", "least-requests", "static"]
POLICIES: tuple[str, ...] = get_args(Policy)


@dataclass
class Place:
    """An engine as the scheduler sees it.

    Attributes:
        capacity: KV tokens that it has room for.
        held: rollout -> KV tokens that it holds there now.
        queue: rollouts that were given to it and wait for room.
    """

    capacity: int
    held: dict[str, int] = field(default_factory=dict)
    queue: deque[str] = field(default_factory=deque)

    @property
    def used(self) -> int:
        return sum(self.held.values())

    def reserved(self, reserve: int) -> int:
        return sum(max(tokens, reserve) for tokens in self.held.values())


class Scheduler:
    """Assigns rollouts to engines. It neither samples nor waits: `dispatch` says who starts where now.

    Args:
        capacities: KV tokens of each engine.
        policy: see above.
        reserve: tokens kept free for each rollout under `kv`.
        expected: how many rollouts will come, for `static` to deal them out in blocks.
        most: rollouts at once in one engine (its batch).
    """

    def __init__(
        self,
        capacities: Iterable[int],
        policy: Policy = "kv",
        *,
        reserve: int = 0,
        expected: int = 0,
        most: int = 1 << 30,
    ) -> None:
        self.places = [Place(c) for c in capacities]
        if not self.places or any(p.capacity < 1 for p in self.places):
            raise OndolError("a scheduler needs engines with room for at least one token each")
        if policy not in POLICIES:
            raise OndolError(f"no scheduling policy is called '{policy}'", nearest(policy, POLICIES))
        if policy == "static" and expected < 1:
            raise OndolError("static assignment has to know how many rollouts come", "give `expected`")
        if reserve > max(p.capacity for p in self.places):
            raise OndolError(
                f"no engine has room for a reservation of {reserve} tokens",
                "reserve about the mean length of a rollout",
            )
        self.policy, self.reserve, self.expected, self.most = policy, reserve, expected, most
        self.tokens: dict[str, int] = {}  # of those that wait
        self.at: dict[str, int] = {}  # rollout -> its engine
        self.queue: deque[str] = deque()
        self.came = self.evictions = 0

    def submit(self, rollout: str, tokens: int) -> None:
        """A new rollout that begins with so many tokens."""
        if rollout in self.tokens or rollout in self.at:
            raise OndolError(f"the rollout '{rollout}' is here already")
        if tokens > max(p.capacity for p in self.places):
            raise OndolError(
                f"no engine has room for the {tokens} tokens of '{rollout}'", "raise the engines' KV memory"
            )
        self.tokens[rollout] = tokens
        if self.policy == "kv":
            self.queue.append(rollout)
        elif self.policy == "static":
            place = min(self.came * len(self.places) // self.expected, len(self.places) - 1)
            self.places[place].queue.append(rollout)
        else:
            fewest = min(self.places, key=lambda p: len(p.held) + len(p.queue))
            fewest.queue.append(rollout)
        self.came += 1

    def dispatch(self) -> list[tuple[str, int]]:
        """(rollout, engine) of all that start now."""
        started: list[tuple[str, int]] = []
        while self.queue:
            rollout = self.queue[0]
            want = max(self.tokens[rollout], self.reserve)
            open_ = [
                i
                for i, p in enumerate(self.places)
                if len(p.held) < self.most and p.capacity - p.reserved(self.reserve) >= want
            ]
            if not open_:  # an idle engine takes a rollout whose reservation it could never fit
                open_ = [i for i, p in enumerate(self.places) if not p.held and p.capacity >= self.tokens[rollout]]
            if not open_:
                break
            self.queue.popleft()
            best = max(open_, key=lambda i: (self.places[i].capacity - self.places[i].reserved(self.reserve), -i))
            started.append(self._start(rollout, best))
        for i, place in enumerate(self.places):
            while (
                place.queue
                and len(place.held) < self.most
                and place.capacity - place.used >= self.tokens[place.queue[0]]
            ):
                started.append(self._start(place.queue.popleft(), i))
        return started

    def grow(self, rollout: str, tokens: int) -> None:
        """The rollout now holds so many tokens."""
        self.places[self.at[rollout]].held[rollout] = tokens

    def overflowing(self, engine: int) -> str | None:
        """The youngest rollout of an engine that holds more than it has room for; None when all fits."""
        place = self.places[engine]
        return next(reversed(place.held)) if place.used > place.capacity and len(place.held) > 1 else None

    def evict(self, rollout: str) -> None:
        """Take its KV away: it waits for its turn again, first in line, and is computed anew then."""
        engine = self.at.pop(rollout)
        place = self.places[engine]
        self.tokens[rollout] = place.held.pop(rollout)
        (self.queue if self.policy == "kv" else place.queue).appendleft(rollout)
        self.evictions += 1

    def finish(self, rollout: str) -> None:
        """It has ended, or was given up."""
        if rollout in self.at:
            self.places[self.at.pop(rollout)].held.pop(rollout)
        elif rollout in self.tokens:
            del self.tokens[rollout]
            for queue in (self.queue, *(p.queue for p in self.places)):
                if rollout in queue:
                    queue.remove(rollout)

    def _start(self, rollout: str, engine: int) -> tuple[str, int]:
        self.places[engine].held[rollout] = self.tokens.pop(rollout)
        self.at[rollout] = engine
        return rollout, engine
