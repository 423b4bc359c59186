"""UI-TARS-2: its arms differ in what they say they differ in, exact numbers are exact, and a small run gives all others."""

from __future__ import annotations

from random import Random

import pytest

from ondol.compare.comparison import Comparison
from ondol.papers.base import Measured, Paper, find
from ondol.papers.results import Reproduction, arms_of
from ondol.recipe import load_recipe
from ondol.tasks.widgets import Widgets

SMALL = (
    "model.path=tiny:hidden=32,layers=1,context=512",
    "warm_start.problems=16",
    "train.steps=2",
    "train.prompts_per_step=4",
    "train.samples_per_prompt=2",
    "evaluate.problems=2",
    "evaluate.samples=2",
)


def paper() -> Paper:
    found = find("2509.02544").paper
    assert found is not None
    return found


def test_arms_differ_in_what_they_are_called_by() -> None:
    recipes = {arm.label: arm.recipe(0) for arm in arms_of(paper())}
    assert list(recipes) == ["full", "no-pretraining", "one-lambda", "grpo"]
    for recipe in recipes.values():  # the same work, and the same updates of a batch
        same = ("task", "env", "sampling", "warm_start", "optimizer", "train", "evaluate")
        assert all(getattr(recipe, part) == getattr(recipes["full"], part) for part in same)
        assert recipe.method.minibatches == recipes["full"].method.minibatches
        assert (recipe.method.clip_low, recipe.method.clip_high) == (0.2, 0.28)
    methods = {label: r.method for label, r in recipes.items()}
    shared = ("critic", "critic_learning_rate", "gamma", "value_clip", "whiten_advantages")
    for label in ("no-pretraining", "one-lambda"):
        assert all(getattr(methods[label], k) == getattr(methods["full"], k) for k in shared)
    assert methods["no-pretraining"].value_pretraining_steps == 0 < methods["full"].value_pretraining_steps
    assert methods["one-lambda"].value_pretraining_steps == methods["full"].value_pretraining_steps
    assert methods["no-pretraining"].lam_critic == methods["full"].lam_critic == 1.0
    assert methods["one-lambda"].lam == 0.95 and methods["grpo"].kl_coef == 0


def test_episodes_are_those_of_the_card() -> None:
    """4 to 12 turns of some 6 tokens, success at the end only; the warm start shows faults."""
    recipe = load_recipe("tiny-widgets")
    assert isinstance(recipe.task, Widgets) and recipe.warm_start is not None
    random, turns, right = Random(0), [], 0
    for i in range(200):
        problem = recipe.task.problem(i)
        good = recipe.task.demonstration(problem, random, True)
        bad = recipe.task.demonstration(problem, random, False)
        turns.append(len(good))
        right += recipe.task.score(problem, "\n".join(bad)) == 1
        assert recipe.task.score(problem, "\n".join(good)) == 1 and max(map(len, good)) <= recipe.sampling.max_tokens
    assert min(turns) >= 4 and max(turns) <= min(recipe.env.max_turns, 12) and right == 0
    assert 0 < recipe.warm_start.gold_share < 1


def test_targets_of_a_long_episode(tmp_path) -> None:
    comparison = Comparison([arms_of(paper())[0]], [0], tmp_path)
    seen = paper().studies["long-episode"](comparison, 0, tmp_path)
    assert seen["target_1"] == 1.0
    assert seen["start/target_095"] == pytest.approx(0.95**199, rel=1e-12)


def verdicts(full: dict[str, float], other: dict[str, float]) -> list[bool | None]:
    arms = {"full": full, "no-pretraining": other, "one-lambda": other, "grpo": other}
    measured = Measured(
        {label: {0: row} for label, row in arms.items()} | {"entropy": {0: {"start/full": 1, "full": 2}}}
    )
    outcomes = [claim.outcome(measured) for claim in paper().claims]
    return [None if o is None else o.held for o in outcomes]


def test_verdicts() -> None:
    good = {"start/explained_variance": 0.0, "explained_variance": 0.5, "area": 0.6, "area_all_episodes": 0.5}
    good |= {"start/score_sampled": 0.3, "score_sampled": 0.56}
    other = {"area": 0.6, "area_all_episodes": 0.7, "start/score_sampled": 0.3, "score_sampled": 0.9}
    assert verdicts(good, other) == [True, None, True, True, True, *[None] * 4]
    assert verdicts(good | {"explained_variance": 0.39}, other)[0] is False
    assert verdicts(good | {"start/explained_variance": 0.06}, other)[0] is False
    assert verdicts(good | {"score_sampled": 0.54}, other)[2] is False
    assert verdicts(good, other | {"area": 0.61})[3:5] == [False, False]


def test_a_small_run_gives_every_number(tmp_path) -> None:
    changes = [*SMALL]
    work = Reproduction(paper(), 1, tmp_path, changes)
    for arm in work.comparison.arms:
        assert arm.recipe(0).train.steps == 2
    work.run()
    result = work.result("ondol reproduce 2509.02544")
    rows = {label: arm["runs"][0]["measured"] for label, arm in result["arms"].items()}
    everywhere = {"area", "area_all_episodes", "score_sampled", "start/score_sampled"}
    assert all(everywhere <= set(rows[label]) for label in ("full", "no-pretraining", "one-lambda", "grpo"))
    assert (
        rows["full"]["area"] == pytest.approx(rows["full"]["score_last_quarter"], abs=1)
        and rows["full"]["turns_last_quarter"] <= 8
    )
    assert "start/entropy" in rows["full"]
    assert "start/explained_variance" in rows["full"] and "start/explained_variance" not in rows["no-pretraining"]
    assert (
        "explained_variance_last_quarter" in rows["no-pretraining"]
        and "explained_variance_last_quarter" not in rows["grpo"]
    )
    # before it learned anything the critic says 0 of every token: it explains nothing
    assert rows["full"]["start/explained_variance"] == 0.0
    # pretraining uses up the steps that are counted
    assert rows["full"]["area_all_episodes"] != rows["full"]["area"] or rows["full"]["area"] == 0
    assert rows["no-pretraining"]["area_all_episodes"] == rows["no-pretraining"]["area"]
    assert (tmp_path / "2509.02544-entropy.png").stat().st_size > 5000
    held = [c["held"] for c in result["claims"]]
    assert held[1] is True and held[2] is False and held[5:] == [None] * 4
