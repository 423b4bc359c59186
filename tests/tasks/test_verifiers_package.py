"""Environments of the package verifiers, driven by themselves through the environment `program`: prompts, tools, rewards, faults, training."""

from __future__ import annotations

import pickle
import signal
from pathlib import Path

import pytest

import ondol
from ondol.engines.base import Sampling
from ondol.envs.program import ProgramEnv
from ondol.errors import OndolError
from ondol.models.chat import renderer_for
from ondol.recipe import load_recipe
from ondol.records import StopReason
from ondol.rollout.driver import Plan, rollout
from scripted import TOKENIZER, ScriptedEngine
from small_run import RECIPE

pytest.importorskip("verifiers.envs.environment")
pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def make(won=2.5, gold="<answer>{answer}</answer>", **args):
    from ondol.tasks.verifiers import Verifiers

    return Verifiers(environment="verifiers-sums", args=args, won=won, gold_response=gold)


def run(task, script, count=2, samples=2, **settings):
    engine = ScriptedEngine(script)
    problems = [task.problem(i) for i in range(count)]
    plan = Plan(task, ProgramEnv(**settings), problems, samples, Sampling(max_tokens=200), (0,), timeout_s=60.0)
    return [t for g in rollout(engine, renderer_for(TOKENIZER), plan) for t in g.trajectories]


@pytest.mark.parametrize("kind", ["tags", "tool"])
def test_checks_itself(kind) -> None:
    make(kind=kind).check(6)
    make(kind=kind, gold=None).check(6)
    with pytest.raises(OndolError, match=r"scores 0\.4"):
        make(won=5.0, gold="{answer}<answer>{answer}</answer>").check(1)
    with pytest.raises(OndolError, match="spaces"):
        make(kind="loose", gold=None, won=1.0).check(1)


def test_rows_and_splits() -> None:
    task = make()
    assert (task.size("train"), task.size("test")) == (40, 8)
    assert {task.problem(i, "test").question for i in range(8)} == {f"What is {a} + {a + 1}?" for a in range(100, 108)}
    alone = make(evaluated=False)
    train, test = ({alone.problem(i, s).question for i in range(alone.size(s))} for s in ("train", "test"))
    assert len(train) + len(test) == 40 and test and not train & test
    assert pickle.loads(pickle.dumps(task)).problem(3) == task.problem(3) == make().problem(3)


def test_a_rollout_is_the_environments_own() -> None:
    task = make()

    def said(problem: int, sample: int, turn: int) -> str:
        answer = task.problem(problem).answer
        return (f"<answer>{answer}</answer>$", f"It is <answer>{answer}</answer>$", "<answer>7.5</answer>$")[sample]

    found = run(task, said, samples=3)
    assert [t.reward for t in found] == [2.5, 2.0, 0.5] * 2
    assert [t.score for t in found] == [1.0, 0.8, 0.2] * 2
    for t in found:
        assert t.stop_reason is StopReason.ANSWERED and len(t.turns) == 1
        assert [(m.role, m.content) for m in t.messages[:2]] == [
            ("system", "Answer in tags."),
            ("user", t.problem.question),
        ]
        assert t.response == t.turns[0].text


def test_its_tools_are_its_own() -> None:
    task = make(kind="tool")

    def said(problem: int, sample: int, turn: int) -> str:
        a = int(task.problem(problem).question.split()[2])
        call = f'<tool_call>\n{{"name": "add", "arguments": {{"a": {a}, "b": {a + 1}}}}}\n</tool_call>$'
        return call if turn == 0 else f"<answer>{2 * a + 1}</answer>$"

    for t in run(task, said):
        assert t.stop_reason is StopReason.ANSWERED and t.score == 1.0 and len(t.turns) == 2
        told = t.messages[3]
        assert told.role == "tool" and told.content == t.problem.answer
        assert "add" in TOKENIZER.decode(t.ids[: t.prompt_length])  # the model is shown the tool


def test_faults_are_the_trajectories_own(caplog) -> None:
    loose = make(kind="loose", won=1.0)
    fine, crash, nan = run(loose, lambda p, s, t: ("fine$", "crash$", "nan$")[s], count=1, samples=3)
    assert fine.score == 1.0
    (silent,) = run(loose, lambda p, s, t: "$", count=1, samples=1)
    assert silent.score == silent.reward == 0.0
    assert crash.stop_reason is StopReason.ERROR or crash.score == 0.0  # verifiers counts a failing function as 0
    assert nan.stop_reason is StopReason.ERROR and "nan" in nan.info["error"]
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>$'
    (short,) = run(make(kind="tool"), lambda p, s, t: call, count=1, samples=1, max_turns=2)
    assert short.stop_reason is StopReason.ERROR and len(short.turns) == 2 and "2 turns" in short.info["error"]


def test_wrong_settings_say_so() -> None:
    from ondol.tasks.verifiers import Verifiers

    for wrong, word in (
        ({}, "environment is missing"),
        ({"environment": "no-such-environment"}, "no-such-environment"),
        ({"environment": "verifiers-sums", "args": {"kind": "groups"}}, "group"),
        ({"environment": "verifiers-sums", "args": {"kind": "broken"}}, "no key for the judge"),
        ({"environment": "verifiers-sums", "gold_response": "tags"}, "{answer}"),
    ):
        with pytest.raises(ValueError, match=word):
            Verifiers(**wrong)
    with pytest.raises(OndolError, match="gold_response"):
        make(gold=None).demonstration(make().problem(0), None, True)
    with pytest.raises(OndolError, match="no program for the task"):
        load_recipe({"env": {"name": "program"}, "task": "arithmetic"})


def test_it_leaves_signals_alone() -> None:
    from ondol.tasks import verifiers

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    verifiers._load.cache_clear()
    make(evaluated=False)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_training_on_it(tmp_path) -> None:
    task = {"name": "verifiers", "environment": "verifiers-sums", "gold_response": "<answer>{answer}</answer>"}
    recipe = {**RECIPE, "task": task, "env": {"name": "program", "max_turns": 1}}
    with ondol.run(recipe, runs=tmp_path) as run:
        found = list(run.db.trajectories(phase="rl"))
        assert found and all(t.messages[0].content == "Answer in tags." for t in found)
