"""WidgetsEnv: a small graphical interface in text, acted in turn by turn (task `widgets`).

One action a turn, some six characters: "cb" opens tab b, "c3" turns switch 3 over, "t4:hi" types into field 4, "r:ls" runs
a command in the terminal of the open tab, "end" says that the goal is reached. The observation is the screen, or what
was wrong with the action. Nothing is rewarded before the end.

With the task's `actions` at "numbers" or "places" the observation is a screen of elements, the actions are `click(3)` or
`click(90, 60)`, `type(4, "hi")`, `scroll(down)`, `back()`, `done()`, and `pictures` adds the screen as a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from ondol.envs.base import Env, StepResult
from ondol.errors import OndolError
from ondol.records import Image, Message, Problem, ToolResult
from ondol.tasks.base import Task
from ondol.tasks.widgets import Widgets, goal_of, world_of
from ondol.tasks.widgets_screen import picture

SYSTEM = (
    "You operate an app. The first line is the goal, the second the screen: its tabs as letters, the open one in upper "
    "case, then the widgets of that tab. 3- and 3+ is a switch that is off or on, 4() an empty field, 4(hi) one with text, "
    "5$ls a terminal in which ls was run. Leave what the goal does not name as it is. Reply with one action and nothing "
    "else: cb opens tab b, c3 turns switch 3, t4:hi types hi into field 4, r:ls runs ls in the terminal, end when all is "
    "done."
)
SYSTEM_ON_SCREEN = (
    "You operate an app on a screen of {width}x{height} pixels. First comes the goal, then the screen: its tabs, and the "
    "widgets of the open tab, with numbers in brackets. Leave what the goal does not name as it is. Reply with one action and "
    "nothing else: {pointing}, scroll(down), back(), done() when all is done."
)
POINTING = {
    "numbers": 'click(3) clicks element 3, type(4, "hi") types hi into field 4, type(5, "ls") runs ls in terminal 5',
    "places": 'click(90, 60) clicks that place, type("hi") types into the field that was clicked, or runs hi in a terminal',
}


class WidgetsEnv(Env):
    """The interface of a problem of the task `widgets`. The episode ends with "end", or fails after the last turn."""

    capabilities: ClassVar[frozenset[str]] = frozenset({"gui", "terminal"})
    action_space: ClassVar[str] = "one short command a turn"

    max_turns: int = Field(default=12, ge=1, description="most turns; an episode without an end by then has failed")
    pictures: bool = Field(default=False, description="observations have a picture of the screen")
    system: str | None = Field(
        default=None, description="system message; by default an explanation of screen and actions, '' for none"
    )

    def episode(
        self, task: Task, problem: Problem, trajectory_id: str, renderer: Any, examples: Sequence[Message] = ()
    ) -> _Episode:
        if not isinstance(task, Widgets):
            raise OndolError(
                f"the environment 'widgets' has no interface for a problem of the task {type(task).__name__}",
                "set task.name to widgets, or leave env.name at tool",
            )
        if task.most_turns > self.max_turns:
            raise OndolError(
                f"a goal of this task may take {task.most_turns} turns, env.max_turns is {self.max_turns}",
                "raise env.max_turns, or lower task.goals",
            )
        return _Episode(self, task, problem, trajectory_id, examples)


class _Episode:
    def __init__(
        self, env: WidgetsEnv, task: Widgets, problem: Problem, trajectory_id: str, examples: Sequence[Message]
    ) -> None:
        self.env, self.task, self.problem, self.id, self.examples = env, task, problem, trajectory_id, examples
        self.world, self.goal = world_of(problem), goal_of(problem)
        self.over = False

    async def reset(self) -> list[Message]:
        said = self._explanation() if self.env.system is None else self.env.system
        first = [Message("system", said)] if said else []
        return [*first, *self.examples, Message("user", self.problem.question, images=self._images())]

    async def step(self, action: Message, last_turn: bool) -> StepResult:
        if self.over:
            raise RuntimeError(f"episode {self.id} is over: reset a new one")
        text = action.content.strip()
        if self.task.ends(text):
            self.over = True
            score = float(not self.world.misses(self.goal))
            return StepResult([], reward=score, terminated=True, score=score)
        wrong = self.task.carry_out(self.world, text)
        seen = self._text() if wrong is None else f"? {wrong}"
        images = self._images() if wrong is None else ()
        result = ToolResult(seen, ok=wrong is None, kind="ok" if wrong is None else "bad_arguments", images=images)
        self.over = last_turn
        observation = [] if last_turn else [Message("user", seen, images=images)]
        return StepResult(observation, truncated=last_turn, results=[result])

    def screenshot(self) -> Image:
        """The screen as it is now."""
        return picture(self.world)

    def _images(self) -> tuple[Image, ...]:
        return (self.screenshot(),) if self.env.pictures else ()

    def _text(self) -> str:
        if self.task.actions == "short":
            return self.world.screen()
        return self.world.view(places=self.task.actions == "places").text

    def _explanation(self) -> str:
        way, look = self.task.actions, self.world.look
        if way == "short":
            return SYSTEM
        return SYSTEM_ON_SCREEN.format(width=look.width, height=look.height, pointing=POINTING[way])

    async def close(self) -> None:
        pass
