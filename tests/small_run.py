"""A run small enough to be made several times in a test, by workers elsewhere too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

RECIPE = {
    "name": "two",
    "seed": 5,
    # float64 and one row at a time: then not even the last bit depends on who else is sampled
    "model": {"path": "tiny:hidden=32,layers=1,context=64", "dtype": "float64"},
    "task": {"name": "toy:Toy", "calls": False},  # even a random model gets half of it right
    "env": {"max_turns": 1},
    "sampling": {"max_tokens": 6},
    "rollout": {"max_batch": 1},
    "train": {"steps": 2, "prompts_per_step": 3, "samples_per_prompt": 4},
    "method": {"name": "grpo", "kl_coef": 0.0},
    "evaluate": {"problems": 0},
}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Processes that are started find what the tests find."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
