"""MiniwobEnv: a MiniWoB++ page in Chromium, acted on turn by turn (task `miniwob`).

One action a turn, such as `click(3)` or `type(4, "hi")`. The observation is the page's text with its elements numbered,
and its picture where that is asked for. The page ends the episode and gives the reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from ondol.envs.base import Env, StepResult
from ondol.errors import OndolError
from ondol.records import Message, Problem, ToolResult
from ondol.tasks.base import Task
from ondol.tasks.miniwob import HEIGHT, WIDTH, Miniwob, MiniwobPage, Seen
from ondol.tools.gui import Action

SYSTEM = (
    f"You operate a web page of {WIDTH}x{HEIGHT} pixels. First comes the task, then the page, its elements with numbers in "
    "brackets. Reply with one action and nothing else: click(3) clicks element 3, click(120, 44) a place, type(4, hi) types "
    "hi into element 4, select(5, red) chooses an option, press(Enter) presses a key, scroll(down), drag(3, 7), wait()."
)


class MiniwobEnv(Env):
    """The page of a problem of the task `miniwob`. It ends the episode, or the last turn does, and then it has failed."""

    capabilities: ClassVar[frozenset[str]] = frozenset({"gui", "web"})
    modality: ClassVar[str] = "text, image"
    action_space: ClassVar[str] = "one action on the page a turn"

    max_turns: int = Field(default=20, ge=1, description="most turns; an episode that is not over by then has failed")
    pictures: bool = Field(default=False, description="every observation has a picture of the page")
    system: str | None = Field(
        default=None, description="system message; by default an explanation of page and actions, '' for none"
    )

    def episode(
        self, task: Task, problem: Problem, trajectory_id: str, renderer: Any, examples: Sequence[Message] = ()
    ) -> _Episode:
        if not isinstance(task, Miniwob):
            raise OndolError(
                f"the environment 'miniwob' has no page for a problem of the task {type(task).__name__}",
                "set task.name to miniwob, or leave env.name at tool",
            )
        return _Episode(self, task, problem, trajectory_id, examples)


class _Episode:
    def __init__(
        self, env: MiniwobEnv, task: Miniwob, problem: Problem, trajectory_id: str, examples: Sequence[Message]
    ) -> None:
        self.env, self.problem, self.id, self.examples = env, problem, trajectory_id, examples
        self.page = MiniwobPage(executable=task.executable)
        self.over = False

    async def reset(self) -> list[Message]:
        seen = await self.page.start(self.problem.data["page"], self.problem.data["seed"], self.env.pictures)
        said = SYSTEM if self.env.system is None else self.env.system
        first = [Message("system", said)] if said else []
        return [*first, *self.examples, self._shown(seen, f"{self.page.ask}\n")]

    async def step(self, action: Message, last_turn: bool) -> StepResult:
        if self.over:
            raise RuntimeError(f"episode {self.id} is over: reset a new one")
        try:
            seen = await self.page.act(Action.find(action.content), self.env.pictures)
        except ValueError as e:
            result = ToolResult(f"? {e}", ok=False, kind="bad_arguments")
            self.over = last_turn
            return StepResult([Message("user", result.text)] * (not last_turn), truncated=last_turn, results=[result])
        self.over = seen.done or last_turn
        message = self._shown(seen, f"? {seen.wrong}\n" if seen.wrong else "")
        kind = "error" if seen.wrong else "ok"
        result = ToolResult(message.content, ok=not seen.wrong, kind=kind, images=message.images)
        return StepResult(
            [] if self.over else [message],
            reward=seen.reward,
            terminated=seen.done,
            truncated=last_turn and not seen.done,
            score=max(0.0, min(1.0, seen.reward)),
            results=[result],
        )

    async def close(self) -> None:
        await self.page.close()

    def _shown(self, seen: Seen, before: str = "") -> Message:
        images = (seen.screen.image,) if seen.screen.image else ()
        return Message("user", f"{before}{seen.screen.text}", images=images)
