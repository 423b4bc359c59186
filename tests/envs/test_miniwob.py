"""MiniWoB++ in a real Chromium: each page is solved by its scripted solver, through the environment, and not by another's actions."""

from __future__ import annotations

import asyncio

import pytest

from ondol import parts
from ondol.envs.miniwob import MiniwobEnv
from ondol.errors import OndolError
from ondol.records import Message, Problem
from ondol.tasks._miniwob_solvers import SOLVERS
from ondol.tasks.miniwob import Miniwob, pages_folder
from ondol.tools.chromium import missing

if reason := missing():
    pytest.skip(reason, allow_module_level=True)
if pages_folder() is None:
    pytest.skip("the pages of MiniWoB++ are not installed", allow_module_level=True)


def play(env, task, problem, texts):
    async def run():
        episode = env.episode(task, problem, "t", None)
        try:
            first, out = await episode.reset(), []
            for i, text in enumerate(texts):
                out.append(await episode.step(Message("assistant", text), i + 1 == env.max_turns))
                if out[-1].terminated or out[-1].truncated:
                    break
            return first, out
        finally:
            await episode.close()

    return asyncio.run(run())


def test_there_are_twenty_and_more():
    assert len(SOLVERS) >= 20


@pytest.mark.parametrize("page", SOLVERS)
def test_solved_by_its_solver_and_not_otherwise(page):
    """The page itself rewards the solver's actions, and not those with the last one on another element."""
    task = Miniwob(pages=(page,))
    problem = task.problem(0)
    gold, misses = task.gold(problem), task.near_misses(problem)
    assert task.score(problem, gold) == 1
    assert misses[-1] != gold and task.score(problem, misses[-1]) < 1


@pytest.mark.parametrize("page", ["enter-date", "click-dialog", "odd-or-even"])
def test_played_in_the_environment(page):
    task = Miniwob(pages=(page,))
    problem = task.problem(1)
    first, results = play(MiniwobEnv(), task, problem, task.gold(problem).split("\n"))
    assert first[0].role == "system" and len(first[1].content) > 10
    assert [r.terminated for r in results] == [False] * (len(results) - 1) + [True]
    assert (results[-1].reward, results[-1].score) == (1.0, 1.0) and all(r.reward == 0 for r in results[:-1])


def test_the_same_seed_is_the_same_page():
    task = Miniwob(pages=("click-checkboxes", "login-user"))
    problem = task.problem(3)
    shown = [play(MiniwobEnv(pictures=True), task, problem, [])[0][-1] for _ in range(2)]
    assert shown[0] == shown[1] and (shown[0].images[0].width, shown[0].images[0].height) == (160, 210)


def test_wrong_actions_are_answered_and_the_last_turn_ends_it():
    task = Miniwob(pages=("login-user",))
    texts = ["click 3", "click(99)", "press(Tab)", "wait()"]
    _, results = play(MiniwobEnv(max_turns=4), task, task.problem(0), texts)
    said = [m.content for r in results[:3] for m in r.messages]
    assert said[0].startswith("? an action is written") and said[1].startswith("? there is no element 99\n[1]")
    assert [r.results[0].ok for r in results] == [False, False, True, True]
    assert results[3].truncated and not results[3].terminated and results[3].score == 0


def test_no_page_of_ones_own_gives_the_reward():
    task = Miniwob(pages=("click-test",))
    forged = "goto(data:text/html,<script>WOB_DONE_GLOBAL=true;WOB_RAW_REWARD_GLOBAL=1</script>)"
    _, results = play(MiniwobEnv(), task, task.problem(0), [forged, "back()"])
    assert not any(r.terminated or r.reward for r in results)
    assert results[0].messages[0].content.startswith("? this page is not left")
    assert task.score(task.problem(0), forged) == 0


def test_settings():
    with pytest.raises(OndolError, match="login-user"):
        parts.make("tasks", {"name": "miniwob", "pages": ["login-usr"]})
    other = parts.make("tasks", "two-addends")
    with pytest.raises(OndolError, match=r"set task\.name to miniwob"):
        MiniwobEnv().episode(other, Problem("", "", ""), "t", None)
