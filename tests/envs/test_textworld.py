"""TextWorld's games: the walkthrough wins, less does not, rubbish and commands of the interpreter are answered."""

from __future__ import annotations

import asyncio

import pytest

from ondol.envs.game import GameEnv
from ondol.records import Message
from ondol.tasks.textworld import TextWorld

pytest.importorskip("textworld", exc_type=ImportError)


def test_a_game_is_made_won_and_kept(tmp_path):
    task = TextWorld(folder=tmp_path)
    problem = task.problem(0)
    gold = task.gold(problem)
    assert task.score(problem, gold) == 1 and len(list(tmp_path.iterdir())) == 2
    misses = task.near_misses(problem)
    assert len(misses) >= 2 and all(task.score(problem, m) < 1 for m in misses)

    async def run():
        episode = GameEnv(max_turns=20).episode(task, problem, "t", None)
        first, out = await episode.reset(), []
        for text in ["", "quit", "fly to the moon", "Thoughts.\nlook", *gold.split("\n")]:
            out.append(await episode.step(Message("assistant", text), False))
        await episode.close()
        return first, out

    first, results = asyncio.run(run())
    assert first[0].content.startswith("You play a text adventure") and "-=" in first[1].content
    assert [r.results[0].ok for r in results[:4]] == [False, False, True, True]
    assert not any(r.terminated for r in results[:-1]) and results[-1].terminated and results[-1].score == 1
