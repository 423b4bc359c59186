"""Which problems a step works on: decided by the recipe, the phase and the number alone, so that a resumed run asks the same."""

from __future__ import annotations

import numpy as np

from ondol.recipe import Recipe
from ondol.records import Problem

#: first number after the run's seed in every random stream, so that no two uses share one
PHASES = {"rl": 0, "warm_start": 1, "sft": 2, "evaluate": 3, "order": 4, "value": 5, "resample": 6}

#: an endless task's phases draw from far apart
_FIRST = {"rl": 0, "warm_start": 1 << 24, "value": 1 << 25, "resample": 1 << 26}


def problems(recipe: Recipe, count: int, first: int, phase: str) -> list[Problem]:
    """Training problems `first ... first + count` of a phase: a finite task is gone through in a new order each epoch."""
    task, size = recipe.task, recipe.task.size("train")
    if size is None:
        return [task.problem(_FIRST[phase] + first + i, "train") for i in range(count)]
    out = []
    for i in range(first, first + count):
        epoch, at = divmod(i, size)
        out.append(task.problem(order(recipe, size, phase, epoch)[at], "train"))
    return out


def order(recipe: Recipe, count: int, phase: str, epoch: int) -> list[int]:
    """0 ... count - 1 in an order of the phase's epoch."""
    seed = np.random.SeedSequence((recipe.seed, PHASES["order"], PHASES[phase], epoch))
    return np.random.Generator(np.random.Philox(seed)).permutation(count).tolist()
