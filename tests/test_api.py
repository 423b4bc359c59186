"""The library in five lines, as the README has it."""

from __future__ import annotations

import subprocess
import sys

import ondol

TINY = {
    "name": "five-lines",
    "model": {"path": "tiny:hidden=32,layers=1"},
    "task": "two-addends",
    "sampling": {"max_tokens": 6},
    "train": {"steps": 1, "prompts_per_step": 2, "samples_per_prompt": 2},
    "evaluate": {"problems": 2},
}


def test_five_lines(tmp_path) -> None:
    run = ondol.run(TINY, "train.steps=2", runs=tmp_path)
    with run:
        assert [rung["rung"] for rung in ondol.ladder(run)] == ["before", "after RL"]
        assert {m.step for m in run.db.metrics("score/mean", "rl")} == {1, 2}
        assert (run.path / "model" / "config.json").exists()
    with ondol.open_run("last", runs=tmp_path) as again:
        assert again.path == run.path and again.state == "finished"
    assert callable(ondol.run), "the rooms' names must not hide the calls'"


def test_import_is_light() -> None:
    code = "import ondol, sys; print([m for m in ('torch', 'transformers', 'pydantic', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
