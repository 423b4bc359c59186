"""The types that travel between rooms, and nothing else does.

Message      one turn of a conversation, as text (a view: token ids are the record)
ToolCall     what an assistant message asks a tool to do;  ToolResult: what came back
Image        a picture in a message or a result, known by the hash of its PNG
Problem      one question of a task, with what its verifier needs
Turn         one sampled stretch of a trajectory, and what the environment answered
Trajectory   token ids of a whole episode with masks, log-probs, weight versions, score and reward
Group        the trajectories of one problem at one step
Batch        tokens of many trajectories packed flat, for the learner
StopReason   why a trajectory ended; Finish: why one turn did
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Image:
    """A picture that the agent saw. Equal pictures have equal hashes, and are stored once.

    Attributes:
        sha256: of the PNG file's bytes, in hex.
        width, height: in pixels.
        png: the file's bytes; None in a record that was read back, whose run keeps the file (`store.Images`).
    """

    sha256: str
    width: int
    height: int
    png: bytes | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, png: bytes) -> Image:
        """The image that a PNG file holds. Raises ValueError for anything else."""
        if png[:8] != b"\x89PNG\r\n\x1a\n" or png[12:16] != b"IHDR" or len(png) < 33:
            raise ValueError("an image must be the bytes of a PNG file")
        width, height = struct.unpack(">II", png[16:24])
        return cls(hashlib.sha256(png).hexdigest(), width, height, png)

    def __str__(self) -> str:
        return f"image {self.width}x{self.height}"


@dataclass(frozen=True)
class ToolCall:
    """A request to a tool. `error` is set when the model's text could not be parsed as a call."""

    name: str
    arguments: dict[str, Any]
    error: str | None = None


@dataclass(frozen=True)
class ToolResult:
    """What a tool gave back. `text` is what the model sees; failures are data, not exceptions."""

    text: str
    ok: bool = True
    kind: str = "ok"  # ok | error | timeout | memory | unknown_tool | bad_arguments | crashed
    seconds: float = 0.0
    images: tuple[Image, ...] = ()
    reward: float = 0.0  # added to the trajectory's; at least 0
    done: bool = False  # the episode is over, the turn that made the call is its answer


@dataclass(frozen=True)
class Message:
    """One message of a conversation. `name` is the tool's name in a tool message."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    images: tuple[Image, ...] = ()


@dataclass(frozen=True)
class Problem:
    """One question. `id` is stable over runs; `answer` is the gold answer; `data` is the verifier's own."""

    id: str
    question: str
    answer: str
    data: dict[str, Any] = field(default_factory=dict)


class Finish(StrEnum):
    """Why the engine stopped one turn."""

    END = "end"  # the model's end-of-turn token
    STOP = "stop"  # one of the request's stop strings
    LENGTH = "length"  # the turn's token limit
    CONTEXT = "context"  # the model's context is full
    TIMEOUT = "timeout"  # the request's deadline passed
    ERROR = "error"  # the engine (an endpoint, say) failed


class StopReason(StrEnum):
    """Why a trajectory ended. Exported as metrics, one share each."""

    ANSWERED = "answered"  # the model ended its turn without calling a tool
    EMPTY = "empty"  # it ended its turn at once, with no text
    MAX_TURNS = "max_turns"  # it called a tool on its last turn; the tool was not called
    TURN_LENGTH = "turn_length"  # a turn reached its token limit without an end or a call
    RESPONSE_LENGTH = "response_length"  # turns and observations used up the trajectory's tokens
    CONTEXT = "context"  # no room left for another turn
    ENV_DONE = "env_done"  # the environment ended the episode
    TIMEOUT = "timeout"  # the trajectory's deadline passed
    ERROR = "error"  # engine or environment failed; `info["error"]` says how


@dataclass
class Turn:
    """One sampled stretch `ids[start:end]` of a trajectory, its text, and the environment's answer."""

    start: int
    end: int
    text: str
    finish: Finish
    calls: list[ToolCall] = field(default_factory=list)
    results: list[ToolResult] = field(default_factory=list)


@dataclass
class Trajectory:
    """One episode. All lists below have one entry per token of `ids` (prompt, sampled and observation tokens).

    Attributes:
        key: (step, problem, sample): what this trajectory is, unique in a run's phase.
        prompt_length: tokens of `ids` before the first sampled one.
        sampled: the policy produced this token.
        trained: this token counts in the loss (a subset of `sampled`, except in SFT data given by hand and where
            `mask_observations` is off).
        logp: log-probability of a sampled token under the policy at the temperature used, before any
            truncation (top-k, top-p, min-p); 0.0 where not sampled.
        logp_truncated: the same under the truncated distribution that was really sampled from; empty when
            no truncation was on.
        version: version of the weights that produced a sampled token; -1 elsewhere.
        score: task success in [0, 1]; what filters, stopping rules and reports use.
        reward: what the method learns from; equals `score` unless shaped.
        restarts: where in `ids` the context began anew, in order: tokens from there on were sampled without sight of
            those before. Empty in environments that keep the whole conversation.
    """

    key: tuple[int, int, int]
    problem: Problem
    ids: list[int]
    prompt_length: int
    sampled: list[bool]
    trained: list[bool]
    logp: list[float]
    version: list[int]
    turns: list[Turn] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    stop_reason: StopReason = StopReason.ERROR
    score: float = 0.0
    reward: float = 0.0
    logp_truncated: list[float] = field(default_factory=list)
    temperature: float = 1.0
    restarts: list[int] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def contexts(self) -> list[tuple[int, int]]:
        """The stretches of `ids` that were each seen as one context: a single one, unless there are restarts."""
        cuts = [0, *self.restarts, len(self.ids)]
        return list(itertools.pairwise(cuts))

    @property
    def response(self) -> str:
        """Text of the last sampled turn: what the verifier reads."""
        return self.turns[-1].text if self.turns else ""

    @property
    def sampled_tokens(self) -> int:
        return sum(self.sampled)

    def observe(self, ids: Sequence[int]) -> None:
        """Append tokens that the policy did not produce."""
        n = len(ids)
        self.ids += ids
        self.sampled += [False] * n
        self.trained += [False] * n
        self.logp += [0.0] * n
        self.version += [-1] * n
        if self.logp_truncated:
            self.logp_truncated += [0.0] * n

    def act(
        self,
        turn: Turn,
        ids: Sequence[int],
        logp: Sequence[float],
        logp_truncated: Sequence[float],
        versions: Sequence[int],
    ) -> None:
        """Append a sampled turn, which begins where the tokens so far end."""
        start, n = len(self.ids), len(ids)
        self.ids += ids
        self.sampled += [True] * n
        self.trained += [True] * n
        self.logp += logp
        self.version += versions
        if logp_truncated:
            self.logp_truncated += [0.0] * (start - len(self.logp_truncated)) + list(logp_truncated)
        self.turns.append(turn)
        self.messages.append(Message("assistant", turn.text, tuple(turn.calls)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON. Floats keep every bit (repr round-trips); images are references, without their bytes."""
        data = dataclasses.asdict(self)
        for holder in (*data["messages"], *(r for t in data["turns"] for r in t["results"])):
            for image in holder["images"]:
                del image["png"]
        return data

    @property
    def images(self) -> list[Image]:
        """Every different image of the episode, in the order it was seen."""
        holders = (*self.messages, *(r for t in self.turns for r in t.results))
        return list(dict.fromkeys(image for holder in holders for image in holder.images))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Trajectory:
        """Inverse of `to_dict`."""

        def call(d: dict[str, Any]) -> ToolCall:
            return ToolCall(**d)

        def images(d: dict[str, Any]) -> tuple[Image, ...]:  # records written before there were images have none
            return tuple(Image(**i) for i in d.get("images", ()))

        turns = [
            Turn(
                **{
                    **t,
                    "finish": Finish(t["finish"]),
                    "calls": [call(c) for c in t["calls"]],
                    "results": [ToolResult(**{**r, "images": images(r)}) for r in t["results"]],
                }
            )
            for t in data["turns"]
        ]
        messages = [
            Message(**{**m, "calls": tuple(call(c) for c in m["calls"]), "images": images(m)}) for m in data["messages"]
        ]
        return cls(
            **{
                **data,
                "key": tuple(data["key"]),
                "problem": Problem(**data["problem"]),
                "turns": turns,
                "messages": messages,
                "stop_reason": StopReason(data["stop_reason"]),
            }
        )


@dataclass
class Group:
    """The trajectories of one problem at one step: what group methods compare."""

    problem: Problem
    trajectories: list[Trajectory]

    @property
    def scores(self) -> list[float]:
        return [t.score for t in self.trajectories]

    @property
    def rewards(self) -> list[float]:
        return [t.reward for t in self.trajectories]


@dataclass
class Segment:
    """A stretch `start:end` of a packed batch whose tokens see all of `parent` (if any) and, causally, themselves."""

    start: int
    end: int
    parent: Segment | None = None


@dataclass
class Batch:
    """A micro-batch for the learner: N context tokens laid flat without padding, T of them targets.

    Shared prompts appear once: a group's prompt is one segment and each response is a segment below it. Every
    context token is *valid* (there is no padding to mask); `sampled` and `trained` are kept per target.

    Attributes:
        ids, positions: [N] token ids and their positions in their own sequences.
        segments: which tokens see which.
        source: [T] index into N of the token whose hidden state predicts the target.
        target: [T] the target's token id.
        sequence, group: [T] which trajectory and which group of the whole step the target belongs to.
        sampled, trained: [T] masks, as in `Trajectory`; a token that is neither is no target.
        logp: [T] log-probability recorded at sampling (0 where not sampled).
        version: [T] version of the weights that sampled it (-1 where none).
        advantage: [T]; reward: [T] of the target's trajectory; weight: [T] share of the target in the loss (0 where not
            trained).
        value, returns: [T] a critic's value before the step, and what it should have been (0 without a critic).
        temperature: of the sampling distribution.
        sequence_tokens: tokens if nothing were shared; N / sequence_tokens is what sharing saves.
    """

    ids: Tensor
    positions: Tensor
    segments: list[Segment]
    source: Tensor
    target: Tensor
    sequence: Tensor
    group: Tensor
    sampled: Tensor
    trained: Tensor
    logp: Tensor
    version: Tensor
    advantage: Tensor
    reward: Tensor
    value: Tensor
    returns: Tensor
    weight: Tensor
    temperature: float
    sequence_tokens: int

    def only(self, targets: Tensor) -> Batch:
        """The same context with some of its targets: mask [T]."""
        per_target = {f: getattr(self, f)[targets] for f in TARGET_COLUMNS}
        return dataclasses.replace(self, **per_target)

    def to(self, device: Any) -> Batch:
        """The same batch with its tensors on another device."""
        moved = {
            f.name: v.to(device) if hasattr(v := getattr(self, f.name), "to") else v for f in dataclasses.fields(self)
        }
        return Batch(**moved)


#: the columns of a Batch that have one entry per target
TARGET_COLUMNS = (
    "source",
    "target",
    "sequence",
    "group",
    "sampled",
    "trained",
    "logp",
    "version",
    "advantage",
    "reward",
    "value",
    "returns",
    "weight",
)
