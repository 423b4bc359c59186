"""The capability matrix: six rows that say what they need, run on any engine, and tell why where they cannot."""

from __future__ import annotations

import json
import sys

import pytest

import ondol
from ondol.benchmarks import BENCHMARKS, matrix
from ondol.cli import main
from ondol.evaluate import held_out
from ondol.models.chat import renderer_for
from ondol.models.tiny import character_tokenizer
from ondol.rollout.driver import Plan, rollout
from ondol.rollout.scripted import ScriptEngine

CAPABILITIES = ["planning", "tool use", "memory", "reasoning", "self-improvement", "perception"]


def expert(benchmark, task, problem) -> list[str]:
    """Turns of somebody who can do it."""
    match benchmark.capability:
        case "planning":
            return task.gold(problem).split("\n")
        case "tool use":
            return [f"<calculator>{problem.data['expression']}</calculator>", problem.answer]
        case "memory" | "perception":
            from random import Random

            return list(task.demonstration(problem, Random(0), True))
        case "self-improvement":
            return ["1", problem.answer]
        case _:
            return [task.gold(problem)]


def test_six_capabilities() -> None:
    assert [b.capability for b in BENCHMARKS] == CAPABILITIES
    for b in BENCHMARKS:
        if b.package is not None:
            pytest.importorskip(b.package[0])
        assert b.available() is None and b.environment and b.needs
        task, env = b.make()
        assert b.capability in env.exercises(), "an environment asks for what it stands for"
        task.check(3)


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda b: b.capability)
def test_an_expert_solves_it_and_one_who_says_nothing_does_not(benchmark) -> None:
    if benchmark.package is not None:
        pytest.importorskip(benchmark.package[0])
    task, env = benchmark.make()
    problems, renderer = held_out(task, 6), renderer_for(character_tokenizer(context=10_000))
    from ondol.engines.base import Sampling

    for script, low, high in ((expert, 1, 1), (lambda *a: ["-"] * env.max_turns, 0, 0.2)):
        scripts = {(n, 0): script(benchmark, task, p) for n, p in enumerate(problems)}
        plan = Plan(task, env, problems, 1, Sampling(max_tokens=benchmark.max_tokens), seed=(0,))
        groups = rollout(ScriptEngine(renderer, scripts), renderer, plan)
        scores = [t.score for g in groups for t in g.trajectories]
        assert low <= sum(scores) / len(scores) <= high, [t.info for g in groups for t in g.trajectories]
        if script is expert:
            longest = max(len(text) for texts in scripts.values() for text in texts)
            assert longest <= 4 * benchmark.max_tokens, "an expert's turn fits"


def test_what_is_not_there_is_told(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "reasoning_gym" else real(name, *a)
    )
    reasons = {b.capability: b.available() for b in BENCHMARKS}
    assert {c for c, r in reasons.items() if r} == {"planning", "reasoning"}
    assert "pip install 'ondol[tasks]'" in str(reasons["planning"])
    argv = ["evaluate", "tiny:hidden=16,layers=1,context=1024", "--by", "capability", "--problems", "1", "--json"]
    assert main(argv) == 0
    rows = json.loads(capsys.readouterr().out)["capabilities"]
    assert [r["capability"] for r in rows] == CAPABILITIES
    for row in rows:
        assert row["available"] == ("score" in row) == (row["reason"] is None) == (reasons[row["capability"]] is None)


def test_the_command(capsys) -> None:
    pytest.importorskip("reasoning_gym")
    argv = ["evaluate", "tiny:hidden=16,layers=1,context=1024", "--by", "capability", "--problems", "2"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    lines = out[out.index("\ncapability") :].splitlines()[1:]
    assert lines[0].split() == ["capability", "environment", "score", "±", "chance", "needs", "available"]
    assert [
        c for c, line in zip(CAPABILITIES, lines[1:]) if line.startswith(c) and line.rstrip().endswith("yes")
    ] == CAPABILITIES
    assert "before any training" in out and "memory tool" in out and max(map(len, map(str.rstrip, lines))) <= 80


def test_from_python() -> None:
    pytest.importorskip("reasoning_gym")
    rows = ondol.capabilities("tiny:hidden=16,layers=1,context=1024", problems=1)
    assert [r.benchmark.capability for r in rows] == CAPABILITIES
    assert all(r.reason is None and r.result is not None and r.result.problems == 1 for r in rows)


@pytest.mark.parametrize(
    "argv", [["nonesuch"], ["some/where.toml"], ["tiny", "--samples", "3"], ["tiny", "--problems", "0"]]
)
def test_the_command_refuses(argv, capsys) -> None:
    assert main(["evaluate", *argv, "--by", "capability"]) == 1
    assert "error: " in capsys.readouterr().err


def test_rows_come_in_order_and_the_same_again() -> None:
    pytest.importorskip("reasoning_gym")
    renderer = renderer_for(character_tokenizer(context=10_000))

    def once():
        chosen = [b for b in BENCHMARKS if b.capability in ("memory", "self-improvement")]
        engine = ScriptEngine(renderer, {(n, 0): ["7"] * 30 for n in range(3)})
        return [
            (r.benchmark.capability, r.result.score if r.result else None)
            for r in matrix(engine, renderer, 3, benchmarks=chosen)
        ]

    assert once() == once() and [c for c, _ in once()] == ["memory", "self-improvement"]
