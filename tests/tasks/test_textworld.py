"""TextWorld's games: told in English, won by their walkthrough, and safe against what else their interpreter can do."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ondol.tasks.textworld import TextWorld

pytest.importorskip("textworld")
pytest.importorskip("jericho")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv("ONDOL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize("shape", [(1, 2, 1), (3, 5, 3), (6, 12, 6)])
def test_checks_itself(shape) -> None:
    rooms, objects, quest = shape
    TextWorld(rooms=rooms, objects=objects, quest=quest).check(4)


def test_a_game_is_told_and_won() -> None:
    task = TextWorld()
    problem = task.problem(0)
    game = task.open(problem)
    first = game.start()
    assert problem.question.split("\n", 1)[1][:40] in first and len(first.splitlines()) > 2
    assert ">" not in first
    for number, line in enumerate(task.gold(problem).split("\n")):
        told = game.act(line)
        assert told.ok and told.text
        assert told.done == (number == len(task.gold(problem).split("\n")) - 1)
    assert told.score == 1.0 and not game.act("look").ok
    game.close()
    again = task.open(problem)  # from the cache
    assert again.start() == first
    again.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(max_size=300)
    | st.sampled_from(["save", "restore", "quit", "restart", "script", "take " * 100, "go north\nsave"])
)
def test_whatever_is_said_the_game_goes_on(said) -> None:
    task = TextWorld(rooms=1, objects=2, quest=1)
    game = task.open(task.problem(0))
    try:
        game.start()
        game.act(said)
        assert game.act("look").text
    finally:
        game.close()


def test_saving_and_leaving_are_not_commands() -> None:
    task = TextWorld(rooms=1, objects=2, quest=1)
    game = task.open(task.problem(0))
    game.start()
    for word in ("save", "restore", "quit", "restart", "script on", "undo", "transcript"):
        assert not game.act(word).ok
    game.close()
