"""VerlTool's studies: the same work whoever waits, the clock's part as predicted, and ids that stay."""

from __future__ import annotations

from random import Random

import pytest

from ondol.papers import slow_tools
from ondol.papers.base import find
from ondol.papers.retokenised import count, pair
from ondol.papers.slow_tools import SteadyEngine, drawn_wait, said, same_share, simulated
from ondol.papers.verltool import PoorlyCalled
from ondol.recipe import load_recipe, to_table


def test_the_simulated_engine_and_its_clock() -> None:
    """Small times: what was measured is near the sums of what was drawn, and all trajectories are equal."""
    found = simulated(7, 2, 12, step_s=0.002, wait_s=0.05)
    assert found["same_share"] == 1 and found["tools_at_once"] > 1
    assert found["async_s_2"] < found["sync_s_2"]
    assert found["ratio_2"] == pytest.approx(found["expected_2"], abs=0.25)
    assert found["expected_2"] < 0.9


def test_equality_can_fail() -> None:
    found = {}
    for seed in (1, 2):
        renderer, task = slow_tools.load_model("tiny:context=4096").renderer, slow_tools.ToolSums()
        engine = SteadyEngine(renderer, lambda s: said(1, s), 0.0)
        env = slow_tools._env(slow_tools.SlowPython(wait_s=0.0), 2)
        found[seed] = slow_tools._timed(engine, renderer, env, task, [task.problem(0)], (seed, 1), True)[1]
    assert same_share(found[1], found[1]) == 1 and same_share(found[1], found[2]) == 0
    assert [r.ok for t in found[1] for turn in t.turns for r in turn.results] == [True]


def test_turns_and_waits_are_of_their_trajectory() -> None:
    assert said(1, (3, 1, 0, 5, 0, 0)) == said(1, (3, 1, 0, 5, 0, 0)) != said(1, (3, 1, 0, 6, 0, 0))
    assert said(1, (3, 1, 0, 5, 0, 0)).endswith("</python>") and said(1, (3, 1, 0, 5, 0, 1)).isascii()
    waits = sorted(drawn_wait(0.3, f"t{i}", 0) for i in range(2001))
    assert waits[1000] == pytest.approx(0.3, rel=0.1) and drawn_wait(0.0, "t", 0) == 0
    lengths = sorted(len(said(9, (0, 0, 0, i, 0, 0))) for i in range(2001))
    assert lengths[1000] == pytest.approx(slow_tools.TURN_TOKENS, rel=0.1)


@pytest.mark.bundled
def test_tokens_drift_when_encoded_together_and_ours_do_not() -> None:
    found = count(0, pairs=80)
    assert found["own_share"] == 1 and 0 < found["changed"] <= found["changed_sampled"] <= 80
    assert {pair(Random(0), i)[0] for i in range(4)} != {pair(Random(1), i)[0] for i in range(4)}


def test_demonstrations_of_a_poor_user() -> None:
    task = PoorlyCalled()
    task.check(20)
    random, kinds = Random(0), {"guess": 0, "misread": 0, "right": 0}
    for i in range(600):
        problem = task.problem(i)
        turns = task.demonstration(problem, random, True)
        right = task.score(problem, turns[-1]) == 1
        kinds["right" if right else "guess" if len(turns) == 1 else "misread"] += 1
        assert len(turns) in (1, 3) and (len(turns) == 3 or not right)
    assert 0.25 < kinds["guess"] / 600 < 0.35 and 0.26 < kinds["right"] / 600 < 0.37


def test_arms_differ_in_the_mask_alone() -> None:
    paper = find("2509.01055").paper
    assert paper is not None
    masked, unmasked = (arm.recipe(0) for arm in paper.arms())
    tables = [to_table(r) for r in (masked, unmasked)]
    assert [t["rollout"].pop("mask_observations") for t in tables] == [True, False] and tables[0] == tables[1]
    assert load_recipe(to_table(masked)) == masked
    (long,) = paper.long_arms()
    assert long.recipe(0).model.path == "smollm2-135m-instruct"
