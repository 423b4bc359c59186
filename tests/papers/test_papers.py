"""Papers: the map is whole, claims are judged by numbers alone, and what is shown is what the files say."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from random import Random

import pytest

from ondol.compare.statistics import summary
from ondol.errors import OndolError
from ondol.papers.base import RUNNING, SCALES, STATES, Entry, Measured, Missing, Paper, catalogue, find
from ondol.papers.measure import percentile
from ondol.papers.results import (
    Reproduction,
    arms_of,
    check_scale,
    claims_of,
    measured_of,
    overview,
    read,
    runnable,
    state_of,
    write,
)

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "results" / "papers").glob("*.json"))
SMALL = (
    "model.path=tiny:hidden=32,layers=1,context=64",
    "warm_start.problems=4",
    "warm_start.samples_per_problem=10",
    "warm_start.epochs=1",
    "train.steps=2",
    "train.prompts_per_step=4",
    "train.samples_per_prompt=4",
    "evaluate.problems=2",
    "evaluate.samples=2",
)


def entries() -> list[Entry]:
    return [e for e in catalogue().values() if e.paper is not None]


def paper_of(entry: Entry) -> Paper:
    assert entry.paper is not None
    return entry.paper


def fabricated(paper: Paper, value: float) -> dict:
    """A result in which everything that any claim asks for is `value`."""
    asked: dict[str, set[str]] = {}

    class Asks(Measured):
        def values(self, arm, name):
            asked.setdefault(arm, set()).add(name)
            return [value]

    for claim in paper.claims:
        if claim.judge is not None:
            claim.judge(Asks({}))
    arms = {
        label: {"runs": [{"seed": s, "measured": dict.fromkeys(sorted(names), value)} for s in (0, 1, 2)]}
        for label, names in asked.items()
    }
    return {"version": 1, "paper": paper.id, "scale": "laptop", "command": "made up", "seeds": [0, 1, 2], "arms": arms}


# -- the map --------------------------------------------------------------------------------------------------------------


def test_the_catalogue_is_whole() -> None:
    found = catalogue()
    assert len(found) == 49 and set(RUNNING) <= set(found)
    for key, entry in found.items():
        assert re.fullmatch(r"\d{4}\.\d{5}", key)
        assert entry.title and entry.family and entry.adds, key
        assert overview(entry, Path("nowhere"))["state"] == ("planned" if key not in RUNNING else "not run")


@pytest.mark.parametrize("entry", entries(), ids=lambda e: e.id)
def test_a_paper_that_runs_is_complete(entry: Entry) -> None:
    paper = paper_of(entry)
    assert paper.id == entry.id and paper.claims and set(paper.scales) == set(SCALES)
    labels = [arm.label for arm in arms_of(paper)]
    assert len(labels) == len(set(labels)) and not set(labels) & set(paper.studies)
    for claim in paper.claims:
        assert claim.text and claim.paper and claim.how and claim.must
    asked = set(fabricated(paper, 0.5)["arms"])
    assert asked <= {*labels, *paper.studies}, "claims look at arms that exist"


def test_unknown_papers_and_scales() -> None:
    with pytest.raises(OndolError, match=r"did you mean '2509\.02333'"):
        find("2509.0233")
    assert find("arXiv:2509.02333").title == "DCPO" and find("darling").id == "2509.02534"
    with pytest.raises(OndolError, match="did you mean 'laptop'"):
        check_scale("labtop")
    with pytest.raises(OndolError, match="planned"):
        runnable(find("2508.18966"))


# -- claims ---------------------------------------------------------------------------------------------------------------


LESS_IS_BETTER = ("start/", "orphans", "kv/", "longest_context", "turns_again", "formula_off")


@pytest.mark.parametrize("entry", entries(), ids=lambda e: e.id)
def test_claims_are_judged_by_the_numbers_alone(entry: Entry) -> None:
    """Every claim can hold and can fail; without a number it is not run."""
    paper = paper_of(entry)
    verdicts: list[set] = [set() for _ in paper.claims]
    random = Random(0)
    for _ in range(300):
        result = fabricated(paper, 0.0)
        mostly = random.choice([0.02, 0.5, 0.98])  # how often a number is a good one
        for arm in result["arms"].values():
            numbers = {
                name: random.choice(
                    (0.95, 1.0, 3.0, 12.0)
                    if (random.random() < mostly) != name.startswith(LESS_IS_BETTER)
                    else (0.0, 0.1)
                )
                for name in arm["runs"][0]["measured"]
            }
            for row in arm["runs"]:
                row["measured"] = numbers
        for seen, claim in zip(verdicts, claims_of(paper, result)):
            seen.add(claim["held"])
    for seen, claim in zip(verdicts, paper.claims):
        assert {True, False} <= seen if claim.judge else seen == {None} and "not run" in claim.how, (claim.text, seen)
    nothing = claims_of(paper, None)
    assert all(c["held"] is None and c["measured"] is None and c["seeds"] == 0 for c in nothing)
    for label in fabricated(paper, 0.5)["arms"]:
        less = fabricated(paper, 0.5)
        del less["arms"][label]
        assert any(c["held"] is None for c in claims_of(paper, less)), label


def test_what_is_not_finite_holds_nothing() -> None:
    paper = paper_of(find("2509.02333"))
    result = fabricated(paper, 0.5)
    for row in result["arms"]["dcpo"]["runs"]:
        row["measured"] = dict.fromkeys(row["measured"])  # null, as a file has it
    assert [c["held"] for c in claims_of(paper, result)] == [False, False, False]


def test_states() -> None:
    entry, planned = find("2509.02333"), find("2508.18966")

    def state(*verdicts) -> str:
        return state_of(entry, [{"held": v} for v in verdicts])

    assert state(True, True) == "held" and state(True, None) == "not run" and state(None) == "not run"
    assert state(True, None, False) == "not held" and state_of(planned, []) == "planned"
    assert set(STATES) == {"held", "not held", "not run", "planned"}


def test_missing_numbers_are_missing() -> None:
    m = Measured({"a": {0: {"x": 1.0}, 1: {"x": 3.0}}})
    assert m.mean("a", "x") == 2.0 and m.text("a", "x") == "2.00 ± 1.41"
    for arm, name in (("b", "x"), ("a", "y")):
        with pytest.raises(Missing):
            m.values(arm, name)


def test_percentiles() -> None:
    assert percentile([], 0.5) is None
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0 and percentile([0.0, 10.0], 0.9) == pytest.approx(9.0)
    assert percentile([5.0], 0.99) == 5.0 and percentile([1.0, 2.0], 0.0) == 1.0 and percentile([1.0, 2.0], 1.0) == 2.0


# -- result files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_what_is_shown_is_what_the_file_says(path: Path) -> None:
    """Means and spreads follow from the runs, claims from the means; `ondol papers` shows these and no others."""
    result = json.loads(path.read_text())
    entry = find(result["paper"])
    paper = paper_of(entry)
    assert path.stem == f"{result['paper']}-{result['scale']}" and result["changes"] == []
    assert result["command"].startswith(f"ondol reproduce {entry.id}") and result["commit"] and result["machine"]["cpu"]
    assert {arm.label for arm in paper.arms()} <= set(result["arms"])
    for arm in result["arms"].values():
        assert (
            [row["seed"] for row in arm["runs"]] == result["seeds"]
            or " --only " in arm["command"]
            or " --long" in arm["command"]
        )
        for name, mean in arm["mean"].items():
            values = [v for row in arm["runs"] if (v := row["measured"].get(name)) is not None]
            found = summary(values)
            assert mean == pytest.approx(found["mean"], abs=2e-6)
            assert arm["spread"][name] == pytest.approx(found["spread"], abs=2e-6)
    recomputed = claims_of(paper, result)
    assert result["claims"] == recomputed
    shown = overview(entry, path.parent)
    assert [c["measured"] for c in shown["claims"]] == [c["measured"] for c in result["claims"]]
    assert [c["held"] for c in shown["claims"]] == [c["held"] for c in result["claims"]]
    assert shown["state"] == state_of(entry, recomputed)


def test_results_come_with_the_package() -> None:
    shipped = Path(__file__).parents[2] / "src" / "ondol" / "papers" / "results"
    assert shipped.resolve() == (ROOT / "results" / "papers").resolve()


def test_a_claim_written_into_the_file_changes_nothing(tmp_path) -> None:
    entry = find("2509.02333")
    result = fabricated(paper_of(entry), 0.5)
    result["claims"] = [{"text": "all is well", "held": True}]
    (tmp_path / f"{entry.id}-laptop.json").write_text(json.dumps(result))
    shown = overview(entry, tmp_path)
    assert shown["state"] == "not held" and shown["claims"][0]["held"] is False
    assert shown["claims"][0]["command"] == "made up" and shown["claims"][0]["seeds"] == 3


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"paper": "2509.02333", "version": 1}', '{"paper": "x", "version": 1}']
)
def test_a_damaged_file_is_told(tmp_path, text) -> None:
    entry = find("2509.02333")
    (tmp_path / f"{entry.id}-laptop.json").write_text(text)
    with pytest.raises(OndolError, match="is no result of"):
        read(entry, tmp_path)


# -- reproduce ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trial(tmp_path_factory) -> tuple[Path, dict]:
    """Keye's arms and hints, as small as can be."""
    place = tmp_path_factory.mktemp("trial")
    work = Reproduction(paper_of(find("2509.01563")), 2, place / "runs", SMALL)
    work.run()
    return place, work.result("ondol reproduce 2509.01563")


def test_a_reproduction_holds_every_number(trial) -> None:
    place, result = trial
    assert set(result["arms"]) == {"gspo", "grpo", "hints"} and result["seeds"] == [0, 1]
    assert [r["seed"] for r in result["arms"]["gspo"]["runs"]] == [0, 1]
    measured = measured_of(result)
    assert math.isfinite(measured.mean("gspo", "score_sampled")) and measured.mean("hints", "problems") == 44
    assert 0 <= measured.mean("hints", "all_wrong") <= 1
    assert next(c["held"] for c in result["claims"]) is False, "two steps teach nothing"
    assert result["machine"]["cpu"] and result["arms"]["gspo"]["recipe"]["method"]["name"] == "gspo"
    assert "run" not in result["arms"]["gspo"]["runs"][0], "paths of this machine stay here"
    again = Reproduction(paper_of(find("2509.01563")), 2, place / "runs", SMALL)
    again.run()
    same = again.result("ondol reproduce 2509.01563")
    assert same["arms"] == result["arms"], "a second call finds everything, and measures the same"


def test_a_trial_is_never_shown_as_a_result(trial, tmp_path) -> None:
    _, result = trial
    path = write(result, tmp_path)
    assert path.name == "2509.01563-laptop.changed.json"
    assert read(find("2509.01563"), tmp_path) is None
    real = copy.deepcopy(result) | {"changes": []}
    assert write(real, tmp_path).name == "2509.01563-laptop.json"
    assert read(find("2509.01563"), tmp_path) == real
    assert overview(find("2509.01563"), tmp_path)["state"] == "not held"


def test_what_takes_hours_is_added_to_the_rest(tmp_path) -> None:
    """`--long` measures its own arms; the others' numbers stay with their command, and so the other way round."""
    entry = find("2509.02479")
    paper = paper_of(entry)
    hours = [arm.label for arm in paper.long_arms()]
    made, arms = (
        fabricated(paper, 0.5),
        lambda labels, found: {k: v for k, v in found.items() if (k in hours) == labels},
    )
    own = {"commit": "abc", "dirty": False, "machine": {"cpu": "a"}, "changes": [], "seeds": [0, 1, 2]}
    rest = made | own | {"command": "short", "arms": arms(False, made["arms"])}
    long = Reproduction(paper, 1, tmp_path / "runs", only=hours)
    assert [a.label for a in long.comparison.arms] == hours
    mine = {k: v | {"command": "long", "runs": v["runs"][:1]} for k, v in arms(True, made["arms"]).items()}
    result = made | own | {"command": "long", "arms": mine}
    both = long.added(result, rest)
    assert set(both["arms"]) == set(made["arms"]) and both["command"] == "short"
    claims = both["claims"]
    assert {(c["command"], c["seeds"]) for c in claims} == {("short", 3), ("long", 1)}
    short = Reproduction(paper, 1, tmp_path / "runs").added(rest, both)
    assert short["arms"].keys() == both["arms"].keys() and short["claims"] == claims
    assert long.added(result, None) == result
    with pytest.raises(OndolError, match="did you mean 'kept'"):
        Reproduction(paper, 1, tmp_path, only=["kep"])
    study = Reproduction(paper_of(find("2509.01563")), 1, tmp_path / "runs", only=["hints"])
    with pytest.raises(OndolError, match="not finished"):  # it looks at an arm, which is not run for it
        study.run()
    assert study.arms == ["hints"] and not list((tmp_path / "runs").glob("runs/*"))


def test_no_seeds_no_reproduction(tmp_path) -> None:
    with pytest.raises(OndolError, match="0 seeds"):
        Reproduction(paper_of(find("2509.01563")), 0, tmp_path)
