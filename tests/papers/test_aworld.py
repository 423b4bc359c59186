"""AWorld's studies: an agent that reads its tools, real tools, and rollouts that end the same however they are spread."""

from __future__ import annotations

import pytest

from ondol.papers.base import find
from ondol.papers.errands import Errands, latency, measure, price, prices, says
from ondol.recipe import load_recipe, to_table

pytestmark = pytest.mark.timeout(180)


def test_the_agent_reads_what_its_tools_say() -> None:
    asked, turns = "<|im_start|>user\n57*83+item12+item40<|im_end|>", []
    for result in ("4731", "price\n512", "price\n100", "5343", "wrote note.txt", "5343", None):
        turns.append(says(asked))
        if result is not None:
            asked += f"{turns[-1]}<result>{result}</result>"
    assert "57 * 83" in turns[0] and "item = 12" in turns[1] and "item = 40" in turns[2]
    assert turns[3] == "<cpython>print(product + 512 + 100)</cpython>"
    assert turns[4].endswith("5343</files>") and turns[6] == "5343"
    assert says("hello") == "I was asked nothing."
    Errands().check(20)
    assert f"(12, {price(12)})" in prices()


def test_latencies_are_of_their_turn() -> None:
    assert latency(1, (0, 3, 2)) == latency(1, (0, 3, 2)) != latency(2, (0, 3, 2))
    drawn = sorted(latency(0, (0, i, 0)) for i in range(2001))
    assert drawn[1000] == pytest.approx(0.4, rel=0.1)


def test_errands_three_ways() -> None:
    """Few and quick, with every real part: tools, the server, processes, one of them killed."""
    found = measure(3, count=10, at_once=5)
    assert found["right_share"] == found["same_share"] == found["lost_workers"] == 1
    assert found["speed_up"] > 1.5 and 1 < found["expected_speed_up"] <= 5
    assert found["held_by_lost"] >= found["again"] >= 1 and 0 <= found["turns_again"] <= found["held_by_lost"]


def test_the_arm_plays_its_rollouts_by_processes() -> None:
    paper = find("2508.20404").paper
    assert paper is not None
    (arm,) = paper.arms()
    recipe = arm.recipe(0)
    assert recipe.rollout.processes == 2 and recipe.warm_start is not None and recipe.warm_start.gold_share == 1
    assert load_recipe(to_table(recipe)) == recipe
