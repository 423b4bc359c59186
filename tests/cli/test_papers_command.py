"""`ondol papers` and `ondol reproduce` as a person or a script uses them."""

from __future__ import annotations

import json

import pytest

from ondol.cli import main

SHAPE = {"id", "title", "family", "adds", "state", "claims"}
CLAIM = {"text", "paper", "measured", "held", "seeds", "command"}
TRIAL = (
    "model.path=tiny:hidden=32,layers=1,context=64",
    "warm_start.problems=4",
    "warm_start.samples_per_problem=10",
    "train.steps=1",
    "train.prompts_per_step=4",
    "train.samples_per_prompt=4",
    "evaluate.problems=2",
    "evaluate.samples=2",
)


def test_the_list(capsys) -> None:
    assert main(["papers", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 49
    for row in found:
        assert set(row) == SHAPE and row["state"] in ("held", "not held", "not run", "planned")
        assert all(set(c) == CLAIM for c in row["claims"])
        assert bool(row["claims"]) == (row["state"] != "planned")
    assert main(["papers"]) == 0
    said = capsys.readouterr().out
    assert "2509.02333" in said and "planned" in said


def test_one_paper(capsys) -> None:
    assert main(["papers", "2509.02333"]) == 0
    said = capsys.readouterr().out
    assert "43.8 %" in said and "must" in said and "DAPO-Math-17k" in said
    assert main(["papers", "2509.02333", "--json"]) == 0
    assert [row["id"] for row in json.loads(capsys.readouterr().out)] == ["2509.02333"]
    assert main(["papers", "2508.18966"]) == 0
    assert "planned" in capsys.readouterr().out


def test_each_arm_tells_the_command_that_it_comes_of(capsys) -> None:
    from ondol.papers.base import find
    from ondol.papers.results import read

    result = read(find("2509.01055"))
    assert result is not None and len({arm["command"] for arm in result["arms"].values()}) > 1
    assert main(["papers", "2509.01055"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for arm in result["arms"].values():
        assert arm["command"] in said and f"{len(arm['runs'])} seeds" in said and arm["commit"][:12] in said


@pytest.mark.parametrize("scale", ["gpu", "full"])
def test_other_scales_say_what_they_would_run(scale, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "2509.02333", "--scale", scale]) == 0
    said = capsys.readouterr().out
    assert "not run here" in said and "GPU" in said
    assert main(["reproduce", "2509.02333", "--scale", scale, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "not run"
    assert list(tmp_path.iterdir()) == []


def test_a_short_reproduction(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes = [word for text in TRIAL for word in ("--set", text)]
    words = ["reproduce", "2509.01563", "--seeds", "1", "--results", "out", "--folder", "runs", *changes]
    assert main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "not held: GSPO raises the solve rate" in said and "ondol reproduce 2509.01563" in said
    result = json.loads((tmp_path / "out" / "2509.01563-laptop.changed.json").read_text())
    assert result["changes"] == list(TRIAL) and result["command"].startswith(
        "ondol reproduce 2509.01563 --scale laptop"
    )
    assert (tmp_path / "runs" / "2509.01563.png").stat().st_size > 1000
    assert str(tmp_path) not in json.dumps(result), "no path of this machine in what is published"
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] in ("not run", "not held")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["papers", "2509.02334"], "2509.02333"),
        (["reproduce", "2509.0233"], "2509.02333"),
        (["reproduce", "2508.18966"], "planned"),
        (["reproduce", "2509.02333", "--scale", "laptpo"], "laptop"),
        (["reproduce", "2509.02333", "--seeds", "0"], "--seeds 0"),
        (["reproduce", "2509.02333", "--jobs", "-1"], "--jobs -1"),
        (["reproduce", "2509.02333", "--set", "train.stepss=1"], "stepss"),
    ],
)
def test_wrong_use(words, what, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    assert what in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
