"""ProgramEnv: agents written with the plain openai client, in threads and as processes, as the environment."""

from __future__ import annotations

import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import ondol
from ondol.engines.base import Sampling
from ondol.envs.program import ProgramEnv, _endpoint
from ondol.models.chat import renderer_for
from ondol.records import StopReason
from ondol.rollout.driver import Plan, rollout
from scripted import TOKENIZER, ScriptedEngine, encode
from small_run import RECIPE, has_learned
from toy import Toy

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytestmark = pytest.mark.timeout(120)
AGENTS = Path(__file__).with_name("plain_agents.py")
COMMAND = (sys.executable, str(AGENTS))


def run(env, script, problems=2, samples=2, timeout_s=60.0):
    task = Toy(question="1+{}")
    engine = ScriptedEngine(script)
    plan = Plan(
        task,
        env,
        [task.problem(i) for i in range(problems)],
        samples,
        Sampling(max_tokens=64),
        (0,),
        timeout_s=timeout_s,
    )
    return [t for g in rollout(engine, renderer_for(TOKENIZER), plan) for t in g.trajectories], engine


def said(problem: int, sample: int, turn: int) -> str:
    return [f"<add>1+{problem}</add>", f"{1 + problem}$", f"again {sample}$"][turn]


@pytest.mark.parametrize("how", [{"function": "plain_agents:loop"}, {"command": COMMAND}])
def test_an_agent_with_a_loop_of_its_own(how, monkeypatch):
    monkeypatch.syspath_prepend(str(AGENTS.parent))
    found, engine = run(ProgramEnv(stop=("</add>",), **how), said)
    renderer = renderer_for(TOKENIZER)
    for t in found:
        problem, sample = t.key[1:]
        assert t.stop_reason is StopReason.ANSWERED, t.info
        assert [turn.text for turn in t.turns] == [said(problem, sample, i).rstrip("$") for i in range(3)]
        assert t.score == Toy(question="1+{}").score(t.problem, f"again {sample}")
        assert t.reward == t.score and len(t.restarts) == 1
        assert t.messages[0].content == "Be brief." and t.messages[1].content == t.problem.question
        assert t.messages[3].content == str(1 + problem) and t.messages[5].content == f"Repeat: {1 + problem}"
        # the record is what was sampled: the prompt, then each turn's own ids where the mask says so
        assert t.ids[: t.prompt_length] == renderer.prompt(t.messages[:2])
        for number, turn in enumerate(t.turns):
            assert t.ids[turn.start : turn.end] == encode(said(problem, sample, number))
        assert t.ids[t.restarts[0] : t.turns[2].start] == renderer.prompt(t.messages[5:6])
    assert len(found) == 4 and len(engine.requests) == 12


def test_faults_are_the_trajectories_own(monkeypatch):
    monkeypatch.syspath_prepend(str(AGENTS.parent))
    answer = lambda p, s, t: f"{t}$"  # noqa: E731
    (a, *_), _ = run(ProgramEnv(function="plain_agents:silent"), answer, 1, 1)
    assert a.stop_reason is StopReason.ERROR and "without a request" in a.info["error"]
    (b, *_), _ = run(ProgramEnv(function="plain_agents:broken"), answer, 1, 1)
    assert b.stop_reason is StopReason.ERROR and "lost my way" in b.info["error"] and len(b.turns) == 1
    (c, *_), _ = run(ProgramEnv(function="plain_agents:endless", max_turns=3), answer, 1, 1)
    assert len(c.turns) == 3 and c.stop_reason is StopReason.ERROR and "3 turns" in c.info["error"]
    (d, *_), _ = run(ProgramEnv(command=(sys.executable, "-c", "import sys; sys.exit('no model here')")), answer, 1, 1)
    assert d.stop_reason is StopReason.ERROR and "no model here" in d.info["error"]
    (e, *_), _ = run(ProgramEnv(command=("/no/such/program",)), answer, 1, 1)
    assert e.stop_reason is StopReason.ERROR and "does not start" in e.info["error"]
    (f, *_), _ = run(
        ProgramEnv(command=(sys.executable, "-c", "import time; time.sleep(60)")), answer, 1, 1, timeout_s=1.0
    )
    assert f.stop_reason is StopReason.TIMEOUT


def test_many_at_once(monkeypatch):
    monkeypatch.syspath_prepend(str(AGENTS.parent))
    found, _ = run(ProgramEnv(function="plain_agents:once"), lambda p, s, t: f"{p}.{s}$", problems=6, samples=8)
    assert [t.response for t in found] == [f"{p}.{s}" for p in range(6) for s in range(8)]
    assert all(t.stop_reason is StopReason.ANSWERED for t in found)


def test_wrong_settings():
    for wrong in (
        {"function": "plain_agents:once", "command": ["x"]},
        {"function": "no_such_module:f"},
        {"function": "json:nothing"},
    ):
        with pytest.raises(ValueError):
            ProgramEnv(**wrong)


def test_the_endpoint_refuses_strangers(monkeypatch):
    monkeypatch.syspath_prepend(str(AGENTS.parent))
    point = _endpoint()

    def ask(headers, body):
        request = urllib.request.Request(f"{point.url}/none/v1/chat/completions", body, headers)
        try:
            return urllib.request.urlopen(request, timeout=20).status
        except urllib.error.HTTPError as e:
            return e.code

    key = {"authorization": f"Bearer {point.key}"}
    ok = b'{"messages": [{"role": "user", "content": "x"}]}'
    assert ask({}, ok) == 401
    assert [ask(key, b) for b in (b"{", b"{}", ok)] == [400, 400, 410]


def test_an_agent_that_only_asks_is_trained_as_without_it(tmp_path, monkeypatch):
    """Through its base URL and through no URL at all: the same trajectories, and the same model."""
    monkeypatch.syspath_prepend(str(AGENTS.parent))
    found = []
    for name, env in (
        ("plain", {"max_turns": 1}),
        ("agent", {"name": "program", "function": "plain_agents:once", "max_turns": 1}),
    ):
        with ondol.run({**RECIPE, "env": env}, runs=tmp_path / name) as run:
            assert has_learned(run)
            said = [(t.key, t.ids, t.sampled, t.logp, t.version, t.score) for t in run.db.trajectories(phase="rl")]
            found.append((said, (run.path / "model" / "model.safetensors").read_bytes()))
    assert found[0] == found[1]
