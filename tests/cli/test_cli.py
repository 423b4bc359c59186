"""The command line as a person or a script uses it, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ondol.cli import main, parser

HEAVY = ("torch", "transformers", "pydantic", "numpy", "rich", "matplotlib", "sqlite3")
RECIPE = """
name = "small"
[model]
path = "tiny:hidden=32,layers=1,context=128"
[task]
name = "toy:Toy"
[env]
max_turns = 1
[sampling]
max_tokens = 24
[method]
name = "grpo"
kl_coef = 0.0
[train]
steps = 2
prompts_per_step = 3
samples_per_prompt = 4
[evaluate]
problems = 2
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a recipe and one finished run of it in `runs`."""
    place = tmp_path_factory.mktemp("place")
    (place / "small.toml").write_text(RECIPE)
    assert main(["train", str(place / "small.toml"), "--runs", str(place / "runs")]) == 0
    return place


@pytest.fixture(autouse=True)
def _here(place, monkeypatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.delenv("ONDOL_RUNS", raising=False)


def document(capsys, *argv: str):
    """What a command prints with --json: one document on stdout, and nothing else there."""
    capsys.readouterr()
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("code", ["import ondol", "from ondol.cli import main, parser; parser().format_help()"])
def test_starting_is_light(code) -> None:
    """`import ondol` and `ondol --help` import nothing that takes time."""
    check = f"import sys; {code}; print([m for m in {HEAVY} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60, check=True)
    assert out.stdout.strip() == "[]"


def test_help_of_every_command(capsys) -> None:
    for argv in (
        ["--help"],
        *([c, "--help"] for c in ("check", "train", "resume", "runs", "show", "export", "doctor")),
    ):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 0
        assert "example" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["trian"])
    assert ended.value.code == 2
    assert parser().prog == "ondol"


def test_check(capsys) -> None:
    """What it prints is a recipe: the same one."""
    import tomllib

    from ondol.recipe import load_recipe, to_table

    assert main(["check", "small.toml", "--set", "train.steps=7"]) == 0
    printed = tomllib.loads(capsys.readouterr().out)
    recipe = load_recipe("small.toml", ["train.steps=7"])
    assert printed["train"]["steps"] == 7
    assert to_table(load_recipe(printed)) == to_table(recipe)
    found = document(capsys, "check", "small.toml")
    assert found["ok"] and found["recipe"]["task"]["name"] == "toy:Toy"
    assert not Path("runs2").exists()


@pytest.mark.parametrize(
    "name", sorted(p.stem for p in (Path(__file__).parents[2] / "src/ondol/recipes").glob("*.toml"))
)
def test_the_recipes_that_come_with_it(capsys, name) -> None:
    if name == "letter-counting":
        pytest.importorskip("reasoning_gym")
    assert document(capsys, "check", name)["ok"]


def test_train_tells_what_it_did(capsys, place) -> None:
    found = document(capsys, "train", "small.toml", "--runs", "other", "--set", "seed=3")
    run = Path(found["run"])
    assert found["state"] == "finished" and Path(found["curves"]).stat().st_size > 1000
    assert [rung["rung"] for rung in found["ladder"]] == ["before", "after RL"]
    assert (run / "model" / "model.safetensors").is_file()
    import tomllib

    assert tomllib.loads((run / "recipe.toml").read_text())["seed"] == 3
    from ondol.store import Run

    with Run.open(run) as opened:
        assert opened.db.metrics("score/mean", "rl")[-1].value == found["metrics"]["score/mean"]


def test_the_runs_folder(capsys, monkeypatch, place) -> None:
    """--runs before $ONDOL_RUNS before ./runs."""
    assert [r["state"] for r in document(capsys, "runs")] == ["finished"]
    monkeypatch.setenv("ONDOL_RUNS", str(place / "nowhere"))
    assert document(capsys, "runs") == []
    assert len(document(capsys, "runs", "--runs", "runs")) == 1


def test_runs_and_show_for_people(capsys) -> None:
    assert main(["runs"]) == 0
    assert "small" in capsys.readouterr().out
    assert main(["show", "last", "--trajectories", "2", "--plot", "curves.png"]) == 0
    out = capsys.readouterr().out
    assert "finished" in out and "after RL" in out and "step 0" in out and "curves.png" in out
    assert Path("curves.png").stat().st_size > 1000


def test_show_for_scripts(capsys) -> None:
    found = document(capsys, "show", "last", "--trajectories", "100", "--phase", "rl", "--step", "2")
    assert {t["key"][0] for t in found["trajectories"]} == {2} and len(found["trajectories"]) == 12
    wrong = document(capsys, "show", "last", "--trajectories", "100", "--phase", "rl", "--wrong")["trajectories"]
    assert wrong and all(t["score"] < 1 for t in wrong)
    assert document(capsys, "show", "last")["trajectories"] == []
    assert {m["phase"] for m in found["metrics"]} == {"before", "rl", "after"}


def test_export(capsys, place) -> None:
    from transformers import AutoModelForCausalLM

    from ondol.records import Trajectory

    counts = {
        w: document(capsys, "export", "last", w, "-o", f"{w}.jsonl")["count"]
        for w in ("trajectories", "metrics", "events")
    }
    assert all(
        len(Path(f"{what}.jsonl").read_text().splitlines()) == n > 0 for what, n in counts.items() if what != "events"
    )
    assert counts["trajectories"] == 2 * 2 * 2 + 2 * 12
    rows = [json.loads(line) for line in Path("trajectories.jsonl").read_text().splitlines()]
    for row in rows:
        phase = row.pop("phase")
        assert phase.split("/")[0] in ("before", "rl", "after")
        assert Trajectory.from_dict(row).to_dict() == Trajectory.from_dict(json.loads(json.dumps(row))).to_dict()
    assert document(capsys, "export", "last", "model", "-o", "exported")["count"] >= 3
    assert AutoModelForCausalLM.from_pretrained("exported").config.hidden_size == 32


def test_train_from_a_run_and_from_its_export(capsys) -> None:
    """Both are the same dump, so they give the same model."""
    first = document(capsys, "train", "small.toml", "--runs", "sampled", "--rollout-only")
    assert not (Path(first["run"]) / "model").exists()
    document(capsys, "export", "last", "trajectories", "-o", "d.jsonl", "--runs", "sampled")
    one = document(capsys, "train", "small.toml", "--runs", "one", "--from-dump", "d.jsonl")
    two = document(capsys, "train", "small.toml", "--runs", "two", "--from-dump", first["run"])
    weights = [(Path(r["run"]) / "model" / "model.safetensors").read_bytes() for r in (one, two)]
    assert weights[0] == weights[1]


def test_a_plug_in_task_from_a_folder(tmp_path, monkeypatch, capsys) -> None:
    """A file beside the recipe, named as "module:Class"; its run says so and can be read back."""
    (tmp_path / "task_of_a_folder.py").write_text(
        "from toy import Toy\n\n\nclass Mine(Toy):\n    extra: int = 3\n\n"
        "    def score(self, problem, response):\n        return super().score(problem, response + 'x' * self.extra)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    argv = (
        "train",
        "small.toml",
        "--runs",
        str(tmp_path / "runs"),
        "--set",
        'task={name="task_of_a_folder:Mine",extra=4}',
    )
    found = document(capsys, *argv, "--set", "train.steps=1")
    from ondol.recipe import load_recipe

    again = load_recipe(Path(found["run"]) / "recipe.toml")
    assert type(again.task).__name__ == "Mine" and again.task.extra == 4


def test_doctor(capsys) -> None:
    main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {"python", "torch", "gpu", "python sandbox"} <= {row["what"] for row in found["checks"]}
    assert all(row["state"] in ("ok", "absent", "failed") for row in found["checks"])
    assert found["ok"] == all(row["state"] != "failed" for row in found["checks"])


def test_doctor_tells_packages_of_another_version(capsys, monkeypatch) -> None:
    from importlib import metadata

    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.30.0" if name == "mcp" else real(name))
    main(["doctor", "--json"])
    checks = {row["what"]: row for row in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["mcp"]["state"] == "absent" and checks["reasoning-gym"]["state"] == "ok"
    assert checks["mcp"]["detail"].startswith("1.30.0 is installed") and "'ondol[mcp]'" in checks["mcp"]["detail"]
