"""The POMDP protocol (arXiv 2509.02547, section 2): reset, step; single-turn is the T = 1 case of the same code.

Env       settings of an environment; makes episodes
Episode   one run of it: `reset` gives the first observation, `step` takes an action
Action    an assistant message: its text, and the tool calls parsed from it (none: a text action)
StepResult  observation, reward, and whether the episode is over
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from pydantic import Field

from ondol.parts import Part
from ondol.records import Message, Problem, ToolResult
from ondol.tasks.base import Task
from ondol.tools.calls import CallStyle


@dataclass
class StepResult:
    """What an action led to.

    Attributes:
        messages: the observation, appended to the conversation (never trained on).
        reward: r(s, a): task reward at the end, verified sub-progress before it.
        terminated: the episode is over, in a final state of the world.
        truncated: it was cut short (no bootstrap value is implied by `terminated`).
        score: task success in [0, 1]; meaningful at the end.
        results: what tools returned, in the order of the action's calls.
        anew: `messages` open a new context: the policy sees them, and nothing of what was said before.
    """

    messages: list[Message]
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    score: float = 0.0
    results: list[ToolResult] = field(default_factory=list)
    anew: bool = False
    info: dict[str, Any] = field(default_factory=dict)


class Episode(Protocol):
    """One run of an environment. An action after the end is an error of the caller."""

    async def reset(self) -> list[Message]:
        """The first observation: the whole conversation before the policy's first turn."""
        ...

    async def step(self, action: Message, last_turn: bool) -> StepResult:
        """Apply an assistant message. On the `last_turn` no tool is called (its result could not be read)."""
        ...

    async def close(self) -> None:
        """Free what the episode holds; called once, however it ended."""
        ...


class Env(Part):
    """Base of all environments; fields are a recipe's `[env]` settings."""

    capabilities: ClassVar[frozenset[str]] = frozenset()
    modality: ClassVar[str] = "text"
    action_space: ClassVar[str] = "text"

    max_turns: int = Field(default=1, ge=1, description="most turns the policy gets; 1 is single-turn")

    @property
    def turns_in_context(self) -> int:
        """Most turns that one context has to hold: all, unless the environment begins contexts anew."""
        return self.max_turns

    def exercises(self) -> frozenset[str]:
        """The capabilities that these settings ask for."""
        return self.capabilities

    def takes(self, task: Task) -> None:
        """Raises OndolError where episodes cannot be made of the task's problems."""

    def without_tools(self) -> Env:
        """The same, for measuring what a model can do in its head."""
        return self.model_copy(update={"tools": (), "max_turns": 1, "system": None})

    def call_style(self, renderer: Any) -> CallStyle | None:
        """How the model's text becomes tool calls, None when there are no tools."""
        return None

    def schemas(self, renderer: Any) -> list[dict[str, Any]]:
        """Tool schemas that the chat template is given."""
        return []

    def facts(self) -> dict[str, Any]:
        """What this machine gives the environment, for the record of a run. Raises OndolError where it needs more."""
        return {}

    def episode(
        self, task: Task, problem: Problem, trajectory_id: str, renderer: Any, examples: Sequence[Message] = ()
    ) -> Episode:
        """A fresh episode. `examples` are worked conversations put before the question (for warm starts)."""
        raise NotImplementedError(f"{type(self).__name__} must define episode()")
