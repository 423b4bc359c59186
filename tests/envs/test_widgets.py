"""The widgets' world: the solver reaches every goal from anywhere, rubbish never raises, the same problem is the same world."""

from __future__ import annotations

import asyncio
import copy
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ondol import parts
from ondol.envs.widgets import SYSTEM, WidgetsEnv
from ondol.errors import OndolError
from ondol.models.chat import renderer_for
from ondol.models.tiny import character_tokenizer
from ondol.records import Message
from ondol.tasks.widgets import COMMANDS, END, WORDS, Widgets, goal_of, kind, world_of
from ondol.tools.gui import Action

TASKS = (Widgets(), Widgets(tabs=1, widgets=1, goals=(1, 1)), Widgets(tabs=4, widgets=12, goals=(1, 6), seed=3))
tasks = st.sampled_from(TASKS)
actions = st.one_of(
    st.text(max_size=12),
    st.builds("c{}".format, st.one_of(st.integers(0, 12), st.sampled_from("abcdz"))),
    st.builds("t{}:{}".format, st.integers(0, 12), st.sampled_from(WORDS)),
    st.builds("r:{}".format, st.sampled_from(COMMANDS)),
)


def play(env, task, problem, texts, most=None):
    """Results of the turns, up to the end."""

    async def run():
        episode = env.episode(task, problem, "t", None)
        first, out = await episode.reset(), []
        for i, text in enumerate(texts):
            out.append(await episode.step(Message("assistant", text), i + 1 == (most or env.max_turns)))
            if out[-1].terminated or out[-1].truncated:
                break
        await episode.close()
        return first, out

    return asyncio.run(run())


@given(tasks, st.integers(0, 500), st.lists(actions, max_size=8))
def test_the_solver_reaches_the_goal_from_anywhere(task, index, before) -> None:
    problem = task.problem(index)
    world, goal = world_of(problem), goal_of(problem)
    for action in before:
        world.act(action)
    for action in world.solve(goal)[:-1]:
        assert world.act(action) is None
    assert world.misses(goal) == []


@given(tasks, st.integers(0, 500))
def test_the_gold_answer_is_played_out_and_fits(task, index) -> None:
    problem = task.problem(index)
    texts = problem.answer.split("\n")
    assert len(texts) <= task.most_turns
    first, results = play(WidgetsEnv(max_turns=task.most_turns), task, problem, texts)
    assert [m.role for m in first] == ["system", "user"] and first[0].content == SYSTEM
    assert [r.reward for r in results] == [0.0] * (len(texts) - 1) + [1.0] and results[-1].score == 1
    assert all(r.results[0].ok for r in results[:-1])
    said, screen = problem.question.split("\n")
    world = world_of(problem)
    assert screen == world.screen() and world.misses(goal_of(problem))
    changed = [f"{w}{s}" for w, s in goal_of(problem).items() if world.states[w] != s]
    assert said.split() == changed, "the goal names what is to change, and nothing else"


@given(tasks, st.integers(0, 50), st.lists(actions, max_size=11))
def test_rubbish_is_answered_and_changes_nothing(task, index, texts) -> None:
    problem = task.problem(index)
    before = copy.deepcopy(problem)
    env = WidgetsEnv(system="")
    _, results = play(env, task, problem, texts)
    for text, result in zip(texts, results):
        assert result.reward == 0 or text.strip() == END
        if not result.terminated and not result.truncated:
            assert len(result.messages) == 1 and len(result.messages[0].content) < 60
            assert result.messages[0].content.startswith("? ") == (not result.results[0].ok)
    assert problem == before
    _, again = play(env, task, problem, texts)
    assert [r.messages for r in again] == [r.messages for r in results]


@given(st.integers(0, 500), st.lists(actions, max_size=8))
def test_the_text_of_actions_scores_as_the_episode_does(index, texts) -> None:
    task = TASKS[0]
    problem = task.problem(index)
    texts = [t for t in texts if "\n" not in t and t.strip() != END]
    _, results = play(WidgetsEnv(), task, problem, [*texts, END])
    assert results[-1].score == task.score(problem, "\n".join([*texts, END]))


def test_wrong_actions_are_named() -> None:
    task = Widgets(tabs=2, widgets=6)
    problem = next(
        p
        for p in map(task.problem, range(999))
        if {kind(w.states[i]) for w in [world_of(p)] for i in w.tabs[0]} == {"switch", "field"}
    )
    world = world_of(problem)
    here, away = world.tabs[0], world.tabs[1][0]
    switch = next(w for w in here if kind(world.states[w]) == "switch")
    field = next(w for w in here if kind(world.states[w]) == "field")
    states = dict(world.states)
    for action, said in {
        "": "unknown action",
        "click 3": "unknown action",
        f"c{away}": f"no {away} here",
        f"t{switch}:ok": f"{switch} is a switch",
        f"c{field}": f"{field} is a field",
        "cz": "no tab z",
        "r:ls": "no terminal here",
        f"t{field}:(": "unknown action",
    }.items():
        assert world.act(action) == said
    assert world.states == states and world.opened == 0
    assert world.act("cb") is None and world.act("r:halt") in ("no such command", "no terminal here")


def test_an_episode_without_an_end_has_failed() -> None:
    task = TASKS[0]
    problem = task.problem(0)
    texts = problem.answer.split("\n")[:-1]
    _, results = play(WidgetsEnv(), task, problem, texts + ["cb"] * 12)
    assert len(results) == 12 and results[-1].truncated and not results[-1].terminated
    assert all(r.score == r.reward == 0 for r in results) and results[-1].messages == []


def test_an_action_after_the_end_is_the_callers_mistake() -> None:
    episode = WidgetsEnv().episode(TASKS[0], TASKS[0].problem(0), "t", None)
    asyncio.run(episode.step(Message("assistant", END), False))
    with pytest.raises(RuntimeError, match="is over"):
        asyncio.run(episode.step(Message("assistant", END), False))


@settings(max_examples=60)
@given(tasks, st.integers(0, 300), st.integers(0, 99))
def test_demonstrations_are_what_they_are_said_to_be(task, index, seed) -> None:
    problem = task.problem(index)
    for right in (True, False):
        shown = task.demonstration(problem, Random(seed), right)
        assert shown[-1] == END and shown.count(END) == 1 and len(shown) <= task.most_turns
        assert task.score(problem, "\n".join(shown)) == float(right)
        assert shown == task.demonstration(problem, Random(seed), right)


def test_the_same_question_is_the_same_world() -> None:
    seen = {}
    task = Widgets(tabs=2, widgets=3, goals=(1, 1))
    for i in range(400):
        p = task.problem(i)
        assert seen.setdefault(p.question.split("\n")[0], p) == p
    assert 10 < len(seen) < 200


def test_prompts_are_short() -> None:
    """Characters are tokens: an episode of a tiny model fits 512, at the longest."""
    task, renderer = Widgets(), renderer_for(character_tokenizer())
    for i in range(50):
        problem = task.problem(i)
        ids = renderer.prompt([Message("user", problem.question)])
        turns = problem.answer.split("\n")
        _, results = play(WidgetsEnv(system=""), task, problem, turns)
        seen = [renderer.observation(r.messages, ended=True) for r in results[:-1]]
        assert len(ids) + sum(len(t) + 1 for t in turns) + sum(map(len, seen)) < 400


def test_wrong_settings_and_pairs_are_refused() -> None:
    for table in ({"tabs": 7}, {"goals": [3, 2]}, {"goals": [0, 2]}, {"goals": [1, 7]}):
        with pytest.raises(OndolError):
            parts.make("tasks", {"name": "widgets", **table})
    task = Widgets()
    with pytest.raises(OndolError, match="may take"):
        WidgetsEnv(max_turns=task.most_turns - 1).episode(task, task.problem(0), "t", None)
    other = parts.make("tasks", "two-addends")
    with pytest.raises(OndolError, match=r"set task\.name to widgets"):
        WidgetsEnv().episode(other, other.problem(0), "t", None)


# The same world as a screen of elements and places

SCREENS = tuple(
    Widgets(tabs=tabs, widgets=count, goals=goals, actions=way, look=look)
    for tabs, count, goals in ((2, 6, (2, 3)), (3, 30, (1, 6)), (1, 1, (1, 1)))
    for way in ("numbers", "places")
    for look in ("phone", "desktop")
)
screens = st.sampled_from(SCREENS)
gui_actions = st.one_of(
    st.text(max_size=12),
    st.builds("click({})".format, st.integers(0, 40)),
    st.builds("click({}, {})".format, st.integers(0, 400), st.integers(0, 400)),
    st.builds('type({}, "{}")'.format, st.integers(0, 40), st.sampled_from(WORDS + COMMANDS)),
    st.builds('type("{}")'.format, st.sampled_from(WORDS + COMMANDS)),
    st.builds("run({})".format, st.sampled_from(COMMANDS)),
    st.builds("drag(90, {}, 90, {})".format, st.integers(0, 300), st.integers(0, 300)),
    st.sampled_from(["scroll(down)", "scroll(up)", "back()", "home()", "wait()", "hover(3)", "scroll(left)"]),
)


@given(screens, st.integers(0, 200))
def test_the_gold_answer_is_played_out_on_a_screen(task, index) -> None:
    problem = task.problem(index)
    texts = problem.answer.split("\n")
    assert len(texts) <= task.most_turns
    first, results = play(WidgetsEnv(max_turns=task.most_turns), task, problem, texts)
    assert results[-1].score == results[-1].reward == 1 and all(r.results[0].ok for r in results[:-1])
    assert first[0].content.startswith("You operate an app on a screen of")
    assert all(("," in t) == (task.actions == "places") for t in texts if t.startswith("click"))
    if task.actions == "places":  # the text alone says where to click
        seen = [first[-1].content, *(m.content for r in results for m in r.messages)]
        assert all(f"at {t[6:-1]}" in said for t, said in zip(texts, seen) if t.startswith("click"))
    for miss in task.near_misses(problem):
        assert task.score(problem, miss) < 1, miss


@given(screens, st.integers(0, 100), st.lists(gui_actions, max_size=10))
def test_rubbish_on_a_screen(task, index, texts) -> None:
    """Never an exception, never a reward; what the observation says is there can be acted on; the goal stays in reach."""
    problem = task.problem(index)
    _, results = play(WidgetsEnv(max_turns=40), task, problem, texts)
    assert all(r.reward == 0 and len(r.messages) == 1 for r in results)
    world, goal = world_of(problem), goal_of(problem)
    for text in texts:
        before = copy.deepcopy(vars(world))
        if task.carry_out(world, text) is not None:
            assert vars(world) == before, text
        seen = world.view()
        assert 0 <= world.opened < len(world.tabs) and world.scrolled >= 0
        for e in seen.elements:
            assert e.box[0] >= 0 and e.box[1] >= 0 and e.box[2] <= seen.width and e.box[3] <= seen.height
            assert seen.at(((e.box[0] + e.box[2]) // 2, (e.box[1] + e.box[3]) // 2)) is e
    for action in world.solve_on_screen(goal, places=task.actions == "places")[:-1]:
        assert world.do(action) is None
    assert world.misses(goal) == []


def test_phones_and_desktops_scroll_go_back_and_say_what_is_wrong() -> None:
    task = Widgets(tabs=2, widgets=20, goals=(1, 2), actions="numbers")
    problem = next(p for p in map(task.problem, range(99)) if len(world_of(p).tabs[0]) > 9)
    world = world_of(problem)
    here = world.tabs[0]
    last = here[-1]
    assert (
        f"({len(here) - 7} more below)" in world.view().text and world.do(Action("click", (last,))) == f"no {last} here"
    )
    assert world.do(Action("drag", points=((90, 250), (90, 10)))) is None and world.scrolled == min(6, len(here) - 7)
    assert world.do(Action("scroll", text="down")) is None or world.scrolled == len(here) - 7
    assert last in [e.number for e in world.view().elements]
    assert world.do(Action("scroll", text="down")) == "there is no more"
    assert world.do(Action("back")) == "nothing to go back to"
    assert world.do(Action("click", (22,))) is None and world.opened == 1 and world.scrolled == 0
    assert world.do(Action("back")) is None and world.opened == 0
    assert world.do(Action("type", text="hi")) == "nothing has the focus"
    assert world.do(Action("hover", (1,))) == "hover does nothing here"
    places = Widgets(tabs=2, widgets=20, goals=(1, 2), actions="places")
    assert places.carry_out(world, "click(1)") == "point to a place, as in click(90, 60)"


def test_pictures_of_the_screen_are_the_same_and_show_the_state() -> None:
    task = Widgets(actions="places", look="desktop")
    problem = task.problem(0)
    env = WidgetsEnv(pictures=True, max_turns=20)
    first, results = play(env, task, problem, problem.answer.split("\n"))
    images = [first[-1].images[0], *(m.images[0] for r in results[:-1] for m in r.messages)]
    assert {(i.width, i.height) for i in images} == {(320, 200)}
    assert images == [first[-1].images[0], *(r.results[0].images[0] for r in results[:-1])]
    again, _ = play(env, task, problem, [])
    assert again == first and len(set(images)) == len(images), "each action of the gold answer is to be seen"


def test_the_short_way_is_as_it_was() -> None:
    """Recipes and results rest on these problems."""
    assert Widgets().problem(0).question == "1+ 2-\nAb 1- 2+ 3- 4- 5$"
    assert Widgets(seed=3, tabs=4, widgets=12).problem(5).question == "1$rm 7-\nAbcd 1$ 2-"
