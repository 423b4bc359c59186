"""What an engine is: token ids in, token ids with log-probabilities out.

Sampling      how to draw (a recipe's settings)
Request       one turn to sample, continuing `ids`
Completion    what was sampled
Engine        submit requests, step until they come back
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from pydantic import Field

from ondol.parts import Part
from ondol.records import Finish, Message


class Sampling(Part):
    """How tokens are drawn. Truncation is off by default: what is sampled is then the policy itself."""

    temperature: float = Field(default=1.0, ge=0, description="0 is greedy")
    top_p: float = Field(default=1.0, gt=0, le=1, description="nucleus: smallest set of tokens with at least this mass")
    top_k: int = Field(default=0, ge=0, description="keep the k most probable tokens; 0 is off")
    min_p: float = Field(
        default=0.0, ge=0, lt=1, description="drop tokens below this share of the most probable one's mass"
    )
    max_tokens: int = Field(default=256, gt=0, description="most new tokens in one turn")

    @property
    def truncated(self) -> bool:
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)


@dataclass(frozen=True)
class Request:
    """One turn to sample.

    Attributes:
        session: the trajectory it belongs to; an engine may keep the session's KV between turns.
        ids: everything so far (prompt, earlier turns, observations).
        seed: the key of this turn's own random stream, e.g. (run, phase, step, problem, sample, turn).
        stop: strings that end the turn; they may be split over tokens, and stay in the text.
        end_ids: tokens that end the turn; they stay in the ids.
        messages: the same conversation as text, for engines that take no ids.
        timeout_s: deadline for this turn, from when the engine takes it up (waiting for a free place does not count).
    """

    session: str
    ids: Sequence[int]
    sampling: Sampling
    seed: tuple[int, ...]
    stop: tuple[str, ...] = ()
    end_ids: frozenset[int] = frozenset()
    messages: Sequence[Message] = ()
    timeout_s: float = 600.0


@dataclass
class Completion:
    """One sampled turn: lists have one entry per new token. `logp` and `logp_truncated` as in `Trajectory`.

    `version` is that of the weights it began with; where they changed in the middle (`TorchEngine.renew`), `versions` has one for each token.
    `seconds` is how long the engine worked on it, without waiting for a free place.
    """

    session: str
    ids: list[int]
    logp: list[float]
    logp_truncated: list[float]
    text: str
    finish: Finish
    version: int
    error: str = ""
    cached_tokens: int = 0
    seconds: float = 0.0
    versions: list[int] = field(default_factory=list)

    @property
    def token_versions(self) -> list[int]:
        """The version of the weights that sampled each token."""
        return self.versions or [self.version] * len(self.ids)


@dataclass
class EngineStats:
    """Counters since the engine was made."""

    sampled_tokens: int = 0
    prefilled_tokens: int = 0
    reused_tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def prefix_hit_share(self) -> float:
        """Share of prompt tokens whose KV was copied instead of computed."""
        total = self.prefilled_tokens + self.reused_tokens
        return self.reused_tokens / total if total else 0.0


class Engine(Protocol):
    """Samples turns. Not thread-safe: one caller submits and steps."""

    version: int
    stats: EngineStats

    def submit(self, request: Request) -> None:
        """Queue a turn, one at a time of a session. Raises OndolError when it can never fit the context."""
        ...

    def step(self) -> list[Completion]:
        """Do some work; the turns that ended in it. Returns at once when nothing is queued."""
        ...

    @property
    def busy(self) -> bool:
        """Whether any submitted turn has not come back."""
        ...

    def release(self, session: str) -> None:
        """Forget a session (its trajectory has ended, or was given up): its KV, and its turn if one is under way."""
        ...

    def sync(self, version: int) -> None:
        """The weights have changed and are now `version`: forget all KV."""
        ...


def uniforms(seed: tuple[int, ...], count: int) -> np.ndarray:
    """`count` uniform numbers in [0, 1), float64, from the stream that `seed` alone names.

    Philox is counter-based: streams of different seeds are independent, and a stream does not depend on how
    many others are drawn beside it (design decision 6).
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed))).random(count)
