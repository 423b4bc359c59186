"""Gymnasium's games as text: the gold answer wins in the game itself, rubbish is answered, each game shows where one is."""

from __future__ import annotations

import asyncio

import pytest

from ondol import parts
from ondol.envs.game import GameEnv
from ondol.errors import OndolError
from ondol.records import Message
from ondol.tasks.gymnasium import Gymnasium

gymnasium = pytest.importorskip("gymnasium")

GAMES = ("FrozenLake-v1", "FrozenLake8x8-v1", "Taxi-v4", "CliffWalking-v1", "Blackjack-v1")


def play(env, task, problem, texts):
    async def run():
        episode = env.episode(task, problem, "t", None)
        first, out = await episode.reset(), []
        for i, text in enumerate(texts):
            out.append(await episode.step(Message("assistant", text), i + 1 == env.max_turns))
            if out[-1].terminated or out[-1].truncated:
                break
        await episode.close()
        return first, out

    return asyncio.run(run())


@pytest.mark.parametrize("name", GAMES)
def test_the_gold_answer_wins_in_the_game_itself(name):
    task = Gymnasium(id=name)
    for index in range(3):
        problem = task.problem(index)
        words = problem.answer.split("\n")
        first, results = play(GameEnv(max_turns=60), task, problem, words)
        assert [r.terminated for r in results] == [False] * (len(words) - 1) + [True] and results[-1].score == 1
        assert all(w in first[0].content for w in words) and first[1].content in problem.question

        numbers = [task.words.index(w) for w in words]  # the same in gymnasium, without us
        world = gymnasium.make(
            name, **({"desc": board(first[1].content), "is_slippery": False} if "Frozen" in name else {})
        )
        world.reset(seed=problem.data["seed"])
        rewards = []
        for n in numbers:
            _, reward, done, _, _ = world.step(n)
            rewards.append(float(reward))
        assert done and rewards == [r.reward for r in results]
        assert (
            rewards[-1]
            == {"Frozen": 1.0, "Taxi": 20.0, "Cliff": -1.0, "Blackjack": 1.0}[
                next(k for k in ("Frozen", "Taxi", "Cliff", "Blackjack") if name.startswith(k))
            ]
        )


def board(text: str) -> list[str]:
    return [line.replace("[", "").replace("]", "").strip() for line in text.splitlines() if line.strip()]


def test_what_is_shown():
    def first(name):
        task = Gymnasium(id=name)
        return play(GameEnv(), task, task.problem(0), [])[0][1].content

    lake = first("FrozenLake-v1")
    assert lake.startswith("[S]") and len(board(lake)) == 4 and "\x1b" not in lake
    assert "taxi at row" in first("Taxi-v4") and first("CliffWalking-v1").count("x") == 1
    assert "your cards: " in first("Blackjack-v1") and "the dealer shows" in first("Blackjack-v1")


def test_rubbish_and_the_last_turn():
    task = Gymnasium()
    _, results = play(GameEnv(max_turns=3), task, task.problem(0), ["", "fly", "Thoughts.\n Right."])
    assert [r.results[0].ok for r in results] == [False, False, True] and results[0].messages[0].content.startswith(
        "? one of: left"
    )
    assert results[-1].truncated and results[-1].score == 0


def test_other_games_and_wrong_settings():
    slippery = Gymnasium(id="FrozenLake-v1", options={"is_slippery": True, "map_name": "4x4"})
    assert slippery.score(slippery.problem(0), slippery.problem(0).answer) == 1, "found by trying: the seed decides"
    for settings, said in (
        ({"id": "NoSuch-v0"}, "cannot make 'NoSuch-v0'"),
        ({"id": "CartPole-v1"}, "cannot be shown as text"),
        ({"id": "Pendulum-v1"}, "no finite set of actions"),
        ({"id": "FrozenLake-v1", "actions": ["a"]}, "has 4 actions"),
        ({"id": "FrozenLake-v1", "options": {"no": 1}}, "cannot make"),
    ):
        with pytest.raises(OndolError, match=said):
            parts.make("tasks", {"name": "gymnasium", **settings})
    other = parts.make("tasks", "two-addends")
    with pytest.raises(OndolError, match=r"set task\.name to gymnasium"):
        GameEnv().episode(other, other.problem(0), "t", None)
