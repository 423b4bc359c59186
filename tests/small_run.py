"""A run small enough to be made several times in a test, by workers elsewhere too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

RECIPE = {
    "name": "two",
    "seed": 5,
    # float64 and one row at a time: then not even the last bit depends on who else is sampled
    "model": {"path": "tiny:hidden=32,layers=1,context=128", "dtype": "float64"},
    "task": {"name": "toy:Toy", "calls": False},  # even a random model gets half of what it ends right
    "env": {"max_turns": 1},
    "sampling": {"max_tokens": 24},  # of which it ends a fifth: one token in a hundred is the end
    "optimizer": {"learning_rate": 1e-3},
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


def has_learned(run) -> bool:
    """Two runs that learned nothing are easily equal."""
    return any(m.value > 0 for m in run.db.metrics("gradient/norm", "rl"))
