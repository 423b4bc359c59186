"""OpenEnv: a real server of its own package, played through the game environment; wrong settings and a server that goes."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

from ondol.envs.game import GameEnv
from ondol.errors import OndolError
from ondol.records import Message
from ondol.tasks.openenv import OpenEnv

pytest.importorskip("openenv.core.generic_client")
pytest.importorskip("fastapi")


@pytest.fixture(scope="module")
def server():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    script = Path(__file__).parent / "openenv_server.py"
    process = subprocess.Popen([sys.executable, str(script), str(port)])
    try:
        for _ in range(300):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, "the server did not start"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait(timeout=10)


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    rows = []
    for seed in range(40):
        number = Random(seed).randint(1, 20)
        rows.append({"reset": {"seed": seed}, "actions": [str(number % 20 + 1), str(number)]})
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def play(task, problem, texts, max_turns=6):
    env = GameEnv(max_turns=max_turns)

    async def run():
        episode = env.episode(task, problem, "t", None)
        first, out = await episode.reset(), []
        for i, text in enumerate(texts):
            out.append(await episode.step(Message("assistant", text), i + 1 == max_turns))
            if out[-1].terminated or out[-1].truncated:
                break
        await episode.close()
        return first, out

    return asyncio.run(run())


def test_gold_answers_are_checked_on_the_server(server, problems):
    task = OpenEnv(url=server, file=problems, observation="told", rules="Reply with a number.")
    task.check(3)
    problem = task.problem(0)
    first, results = play(task, problem, problem.answer.split("\n"))
    assert first[0].content == "Reply with a number." and first[1].content.startswith("Guess my number")
    assert [r.reward for r in results] == [0.0, 1.0] and results[-1].terminated and results[-1].score == 1.0
    assert task.size("train") + task.size("test") == 40  # type: ignore[operator]

    wrong = Path(problems).with_name("wrong.jsonl")
    wrong.write_text("".join(json.dumps({"reset": {"seed": s}, "actions": ["0"]}) + "\n" for s in range(20)))
    with pytest.raises(OndolError, match="gold answer"):
        OpenEnv(url=server, file=str(wrong)).check(2)


def test_seeds_and_what_the_environment_refuses(server):
    task = OpenEnv(url=server)
    task.check(2)
    problem = task.problem(3)
    number = Random(problem.data["reset"]["seed"]).randint(1, 20)
    first, results = play(task, problem, ["a word", str(number)])
    assert json.loads(first[0].content)["told"].startswith("Guess")  # the whole observation, without rules
    assert not results[0].results[0].ok and "not a number" in results[0].messages[0].content
    assert results[1].score == 1.0
    objects = OpenEnv(url=server, action=None)
    _, results = play(objects, problem, ["no object", f'I say {{"message": "{number}"}}.'])
    assert [r.results[0].ok for r in results] == [False, True] and results[1].score == 1.0
    _, results = play(task, problem, ["0"] * 6)
    assert results[-1].terminated and results[-1].score == 0.0 and len(results) == 5


def test_many_at_once(server):
    task = OpenEnv(url=server)
    env = GameEnv()

    async def one(index):
        problem = task.problem(index)
        episode = env.episode(task, problem, str(index), None)
        await episode.reset()
        seed = problem.data["reset"]["seed"]
        result = await episode.step(Message("assistant", str(Random(seed).randint(1, 20))), False)
        await episode.close()
        return result.score

    async def run():
        return await asyncio.gather(*(one(i) for i in range(16)))

    assert asyncio.run(run()) == [1.0] * 16


def test_clear_errors(server, tmp_path):
    with pytest.raises(OndolError, match="start it, or set"):
        play(OpenEnv(url="http://127.0.0.1:9", timeout_s=2), OpenEnv().problem(0), [])
    with pytest.raises(OndolError, match="it has: told"):
        play(OpenEnv(url=server, observation="text"), OpenEnv().problem(0), [])
    for text, said in (("", "no problems"), ("{}", "line 1"), ('{"reset": {}, "actions": []}', "line 1")):
        path = tmp_path / f"{len(text)}.jsonl"
        path.write_text(text)
        with pytest.raises(OndolError, match=said):
            OpenEnv(file=str(path))
    with pytest.raises(OndolError, match="cannot be read"):
        OpenEnv(file=str(tmp_path / "none.jsonl"))
