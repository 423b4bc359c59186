"""Sums with a calculator in several turns: the task checks itself, and demonstrations are real episodes."""

from __future__ import annotations

from random import Random

import pytest

from ondol.errors import OndolError
from ondol.methods.simpletir import has_void_turn
from ondol.models.load import load_model
from ondol.papers import tool_sums
from ondol.papers.base import find
from ondol.papers.results import Reproduction, arms_of
from ondol.papers.simpletir import exactly
from ondol.papers.tool_sums import ToolSums, says_nothing, shares
from ondol.recipe import load_recipe
from ondol.records import Finish, StopReason, Trajectory, Turn
from ondol.tasks.base import Task
from ondol.train.dump import groups_of
from ondol.train.logprobs import log_probs
from ondol.train.packing import Sequence_, pack
from ondol.train.prompts import problems
from ondol.train.warm_start import demonstrations


def recipe_of(*settings: str):
    (arm,) = tool_sums.arms("grpo", settings=settings)
    return arm.recipe(0)


def shown(*settings: str, count: int = 60) -> list[Trajectory]:
    recipe = recipe_of("warm_start.samples_per_problem=2", *settings)
    loaded = load_model(recipe.model.path)
    return demonstrations(recipe, loaded, problems(recipe, count, 0, "warm_start"))


def test_the_task_checks_itself() -> None:
    ToolSums().check(50)
    ToolSums(low=0, high=9999).check(20)
    with pytest.raises(ValueError, match="range is empty"):
        ToolSums(low=40)


@pytest.mark.parametrize("response", ["", "  ", "54.", "=54", "054", "54 54", "5 4", "<c>54</c>", "5.4e1", "+54", "५४"])
def test_near_misses_are_wrong(response: str) -> None:
    task = ToolSums()
    problem = next(p for p in (task.problem(i) for i in range(5000)) if p.answer == "54")
    assert task.score(problem, "54") == 1 == task.score(problem, "54\n") and task.score(problem, response) == 0


def test_demonstrations_are_real_episodes() -> None:
    """Ids are what a rollout would have recorded, and every result is the calculator's."""
    made = shown("warm_start.gold_share=0.5", "task.failing_share=0.3")
    renderer = load_model("tiny").renderer
    assert len(made) == 120 and [t.key for t in made] == [(0, i, s) for i in range(60) for s in range(2)]
    for t in made:
        results = [r for turn in t.turns for r in turn.results]
        assert all(r.ok == (not turn.text.endswith("+</c>")) for turn in t.turns for r in turn.results)
        assert sum(r.ok for r in results) == 2 and t.stop_reason is StopReason.ANSWERED
        assert t.score == (t.turns[-1].text == t.problem.answer) and not has_void_turn(t, says_nothing)
        assert not any(t.sampled) and sum(t.trained) == sum(turn.end - turn.start for turn in t.turns)
        assert all(t.trained[turn.start : turn.end] == [True] * (turn.end - turn.start) for turn in t.turns)
        assert t.ids[: t.prompt_length] == renderer.prompt(t.messages[:1])
        texts = [renderer.codec.text(turn.text) for turn in t.turns]
        ends = [[] if turn.finish is Finish.STOP else [renderer.end_id] for turn in t.turns]
        assert [t.ids[turn.start : turn.end] for turn in t.turns] == [a + b for a, b in zip(texts, ends)]
        assert len({len(c) for c in (t.ids, t.trained, t.sampled, t.logp, t.version)}) == 1
    right = sum(t.score for t in made) / len(made)
    failing = shares(made)["error_share"]
    assert 0.35 < right < 0.65 and 0.15 < failing < 0.32  # 0.3 of the calls are preceded by one: 0.3 / 1.3


def test_void_turns_end_a_demonstration() -> None:
    made = shown("task.void_share=0.25", "warm_start.gold_share=1")
    void = [t for t in made if has_void_turn(t, says_nothing)]
    assert 0.13 < len(void) / len(made) < 0.37 and shares(made)["void_share"] == len(void) / len(made)
    assert all(t.score == (t not in void) for t in made)
    assert {len(t.turns) for t in void} == {1, 2, 3}


@pytest.mark.parametrize(
    "text, void", [("54", False), (" 54\n", False), ("hm", True), ("", True), ("<c>12+1", True), ("5 4", True)]
)
def test_what_is_void(text: str, void: bool) -> None:
    turn = Turn(0, 1, text, Finish.END)
    assert says_nothing(shown(count=1)[0], turn) is void


class Endless(ToolSums):
    def demonstration(self, problem, random: Random, right):
        return ["<c>1+1</c>"]


class Mixed(ToolSums):
    def demonstration(self, problem, random: Random, right):
        return "7" if random.random() < 0.5 else ["7"]


@pytest.mark.parametrize("task, said", [(Endless, "asks for another"), (Mixed, "now an answer, now a list")])
def test_demonstrations_that_cannot_be(task: type[Task], said: str) -> None:
    with pytest.raises(OndolError, match=said):
        shown(f"task.name={__name__}:{task.__name__}", count=4)


def test_a_demonstration_longer_than_the_context() -> None:
    with pytest.raises(OndolError, match=r"the context of .* is 100"):
        shown("model.path=tiny:context=100", count=1)


def test_a_recipe_by_reference_is_whole() -> None:
    from ondol.recipe import to_table

    recipe = recipe_of()
    assert load_recipe(to_table(recipe)) == recipe


def test_void_trajectories_have_no_gradient() -> None:
    """The study of SimpleTIR, on demonstrations as if a model that was never trained had sampled them."""
    loaded = load_model("tiny:hidden=32,layers=1,context=512", dtype="float64")
    made = shown("task.void_share=0.4", "warm_start.gold_share=0.5", "warm_start.samples_per_problem=6", count=5)
    for t in made:
        (batch,) = pack([Sequence_(t, 0, 1.0, 1.0)], 10_000)
        logp = iter(log_probs(loaded.model, batch)[0].tolist())
        t.logp = [next(logp) if trained else 0.0 for trained in t.trained]
    methods = {arm.label: arm.recipe(0).method for arm in arms_of(paper()) if not arm.label.startswith("smollm2")}
    seen = exactly(loaded.model, groups_of(made), methods)
    assert seen["void_trajectories"] > 0 and seen["change_kept"] == 0 < seen["change_all"]
    assert seen["formula_error"] <= 1e-12 and 0 < seen["token_norm_void"] < 2**0.5


def paper():
    found = find("2509.02479").paper
    assert found is not None
    return found


def test_long_arms_are_run_when_asked_for(tmp_path) -> None:
    few = Reproduction(paper(), 1, tmp_path).comparison
    hours = Reproduction(paper(), 1, tmp_path, only=[a.label for a in paper().long_arms()]).comparison
    assert [a.label for a in few.arms] == ["all", "kept"]
    assert [a.label for a in hours.arms] == ["smollm2-all", "smollm2-kept"]
