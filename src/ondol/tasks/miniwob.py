"""MiniWoB++: small web pages with an instruction each, in a real browser; the page itself says whether it was done.

The pages are those of the Python package `miniwob` (Liu et al. 2018, arXiv 1802.08802), of which nothing but the HTML is
used. A problem is a page and a seed: the same seed gives the same page. A response is a list of actions, one a line, and
its score is what the page gives, without its discount for the time that was taken (a model on a slow machine is not a
worse model).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from pydantic import Field, field_validator

from ondol.errors import OndolError, nearest
from ondol.records import Problem
from ondol.tasks._miniwob_solvers import SOLVERS, another
from ondol.tasks.base import DrawnTask
from ondol.tools.chromium import Reach, chromium
from ondol.tools.gui import Action, Screen
from ondol.tools.tab import PageError, Tab

WIDTH, HEIGHT = 160, 210
_WINDOW = 500, 320  # as in MiniWoB++ itself: pages that place a dialog look at the window
_SCORE_S = 120.0
_MOST_ACTIONS = 60  # of a response: more are not looked at
_START = """
(seed) => {
  Math.seedrandom(seed);
  core.EPISODE_MAX_TIME = 1e9;
  if (window.jQuery) jQuery.fx.off = true;  // what moves would be where it was
  core.startEpisodeReal();
  return core.getUtterance();
}
"""
_STATE = "() => [WOB_DONE_GLOBAL, WOB_RAW_REWARD_GLOBAL]"


def pages_folder() -> Path | None:
    """Where the package `miniwob` keeps its pages. It is not imported: that would take Selenium."""
    spec = importlib.util.find_spec("miniwob")
    return Path(spec.submodule_search_locations[0]) / "html" if spec and spec.submodule_search_locations else None


@dataclass(frozen=True)
class Seen:
    """What a page shows after an action, and whether it is over.

    Attributes:
        reward: the page's own, in [-1, 1]; 0 before the end.
        wrong: why the action could not be done; the screen is as it was then.
    """

    screen: Screen
    done: bool = False
    reward: float = 0.0
    wrong: str = ""


class MiniwobPage:
    """A page that is played; `ask` is its instruction."""

    def __init__(self, timeout_s: float = 15.0, executable: str | None = None) -> None:
        folder = pages_folder()
        if folder is None:
            raise OndolError("the pages of MiniWoB++ are not installed", "pip install --no-deps miniwob")
        self.tab = Tab(
            Reach(folder),
            *_WINDOW,
            timeout_s,
            shown=(WIDTH, HEIGHT),
            executable=executable,
            dense=True,
            skip="#query, #reward-display, #sync-task-cover, #click-canvas",
        )
        self.ask, self._page = "", ""

    async def start(self, page: str, seed: int, picture: bool = False) -> Seen:
        """Begin the problem anew."""
        if page != self._page or not self.tab.opened:
            await self.tab.goto(f"miniwob/{page}.html")
            self._page = page
        self.ask = await self.tab.evaluate(_START, str(seed))
        return Seen(await self.tab.look(picture))

    async def act(self, action: Action, picture: bool = False) -> Seen:
        """Do something to the page. Leaving it is not among what can be done: another page could say what it likes."""
        wrong = ""
        try:
            if action.kind in ("goto", "back"):
                raise PageError(f"this page is not left: no {action.kind}")
            await self.tab.act(action)
        except PageError as e:
            wrong = str(e)
        done, reward = await self.tab.evaluate(_STATE)
        return Seen(await self.tab.look(picture), bool(done), float(reward) if done else 0.0, wrong)

    async def close(self) -> None:
        self._page = ""
        await self.tab.close()


class Miniwob(DrawnTask):
    """Problems of MiniWoB++ pages that a scripted solver shows to be solvable."""

    pages: tuple[str, ...] = Field(default=tuple(SOLVERS), description="names of pages; by default all that are known")
    executable: str | None = Field(
        default=None, description="the browser's program; by default $ONDOL_CHROMIUM, or chromium on the PATH"
    )

    @field_validator("pages")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for page in value or ("",):
            if page not in SOLVERS:
                raise ValueError(f"no page is called '{page}'; {nearest(page, SOLVERS)}")
        return value

    def draw(self, random: Random) -> Problem:
        page, seed = random.choice(self.pages), random.randrange(1_000_000)
        return Problem("", f"{page} {seed}", "", {"page": page, "seed": seed})

    def score(self, problem: Problem, response: str) -> float:
        actions = []
        for line in response.split("\n")[:_MOST_ACTIONS]:
            try:
                actions.append(Action.parse(line))
            except ValueError:
                continue
        return self._played(lambda page: _play(page, problem, actions)) if actions else 0.0

    def gold(self, problem: Problem) -> str:
        """The solver's actions, found out by playing."""
        return "\n".join(map(str, self._played(lambda page: _solve(page, problem))[0]))

    def near_misses(self, problem: Problem) -> list[str]:
        """Not finished; the last click on nothing, and on another element of its kind; other texts."""
        actions, other = self._played(lambda page: _solve(page, problem))
        lasts = [Action("click", points=((0, 0),)), *([other] if other else [])]
        out = ["", *("\n".join(map(str, [*actions[:-1], last])) for last in lasts)]
        if any(a.kind == "type" for a in actions):
            others = [
                dataclasses.replace(a, text=f"{_other(a.text or '')}") if a.kind == "type" else a for a in actions
            ]
            out.append("\n".join(map(str, others)))
        return out

    def demonstration(self, problem: Problem, random: Random, right: bool) -> list[str]:
        said = self.gold(problem) if right else random.choice([m for m in self.near_misses(problem) if m])
        return said.split("\n")

    def _played(self, play: Any) -> Any:
        with _lock:  # one page for all scoring, opened when it is needed
            page = _pages.setdefault(self.executable, MiniwobPage(executable=self.executable))
            browser = chromium(self.executable)
            try:
                return browser.wait(_direct(page, play), _SCORE_S)
            except PageError as e:
                raise OndolError(f"a page of MiniWoB++ cannot be played: {e}", "try: ondol doctor") from e


_pages: dict[str | None, MiniwobPage] = {}
_lock = threading.Lock()


async def _direct(page: MiniwobPage, play: Any) -> Any:
    return await play(page)


async def _play(page: MiniwobPage, problem: Problem, actions: Sequence[Action]) -> float:
    await page.start(problem.data["page"], problem.data["seed"])
    for action in actions:
        seen = await page.act(action)
        if seen.done:
            return min(1.0, max(0.0, seen.reward))
    return 0.0


async def _solve(page: MiniwobPage, problem: Problem) -> tuple[list[Action], Action | None]:
    """The solver's actions, and a wrong one in place of the last."""
    seen = await page.start(problem.data["page"], problem.data["seed"])
    solver = SOLVERS[problem.data["page"]](page.ask, seen.screen)
    actions = [next(solver)]
    other = another(problem.data["page"], seen.screen, actions[-1])
    while not (seen := await page.act(actions[-1])).done:
        try:
            actions.append(solver.send(seen.screen))
        except StopIteration:
            break
        other = another(problem.data["page"], seen.screen, actions[-1])
    return actions, other


def _other(text: str) -> str:
    """Another text of the same kind: the last letter or digit is the next one."""
    last = text[-1:]
    return f"{text[:-1]}{'1' if last == '0' else '0'}" if last.isdigit() else f"{text}x"
