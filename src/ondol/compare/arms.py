"""An arm: a method with settings, on the recipe that all arms share.

grpo                              a method with its own defaults
dcpo:dac=false,minibatches=2      with settings
wide=grpo:clip_high=0.28          with a label
grpo:optimizer.learning_rate=5e-4 a key of the recipe, where it begins with one of its tables
my_module:MyMethod:beta=2         one's own, by reference
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ondol.errors import OndolError
from ondol.methods.base import Method
from ondol.parts import find
from ondol.recipe import Recipe, load_recipe, override

_LABEL = re.compile(r"([^:=,]+)=(?=[^=])")
_SETTINGS = re.compile(r":(?=[A-Za-z_][\w.-]*=)")
_NEXT = re.compile(r",(?=[A-Za-z_][\w.-]*=)")


@dataclass(frozen=True)
class Arm:
    """One line of a comparison. `table` is a whole recipe; its seeds are replaced by those of the comparison."""

    label: str
    table: dict[str, Any]

    def recipe(self, seed: int) -> Recipe:
        """The recipe of one seed: the run's and the task's are the same number, so that a seed changes all that is drawn."""
        table = copy.deepcopy(self.table)
        table["seed"] = seed
        override(table, f"task.seed={seed}")
        try:
            return load_recipe(table)
        except OndolError as e:
            raise OndolError(f"arm '{self.label}': {e.what}", e.remedy) from e


def parse_arm(text: str, base: dict[str, Any]) -> Arm:
    """Read an arm as the command line has it; see above.

    The budget is the recipe's: `minibatches` and `epochs` of its method go to every arm whose method can make several
    updates of a batch. The other settings of its method go to arms of that method only; any other starts from its own
    defaults.
    """
    label, rest = None, text
    if found := _LABEL.match(text):
        label, rest = found[1].strip(), text[found.end() :]
    name, *settings = _SETTINGS.split(rest, maxsplit=1)
    if not name.strip() or name.endswith(":") or (label is not None and not label):
        raise OndolError(f"arm '{text}': not of the form [LABEL=]METHOD[:KEY=VALUE,...]", "such as dcpo:dac=false")
    table = copy.deepcopy(base)
    table["method"] = method_table(base, name.strip())
    for setting in _NEXT.split(settings[0]) if settings else ():
        first = setting.partition("=")[0].partition(".")[0].strip()
        of_recipe = "." in setting.partition("=")[0] and first in Recipe.model_fields
        override(table, setting if of_recipe else f"method.{setting}")
    return Arm(label or rest, table)


def method_table(base: dict[str, Any], name: str) -> dict[str, Any]:
    """The recipe's method with another name: the same updates of a batch, and its own defaults else."""
    known = base.get("method", "grpo")
    known = {"name": known} if isinstance(known, str) else dict(known)
    if known.get("name") == name:
        return known
    try:
        cls = find("methods", name)
    except OndolError:  # said with its arm when the recipe is made
        cls = Method
    if getattr(cls, "on_policy", False):
        return {"name": name}
    return {"name": name} | {k: v for k, v in known.items() if k in Method.model_fields}


def parse_arms(texts: Sequence[str], base: dict[str, Any]) -> list[Arm]:
    """All arms; each must have a label of its own, and a sound recipe. An arm without one is called by its method, or,
    where that is in two arms, by all that was said of it."""
    arms = [parse_arm(t, base) for t in texts]
    names = [str(a.table["method"]["name"]) for a in arms]
    for i, (arm, name, text) in enumerate(zip(arms, names, texts, strict=True)):
        if arm.label == text.strip() and names.count(name) == 1 and name not in {a.label for a in arms}:
            arms[i] = Arm(name, arm.table)
    labels = [a.label for a in arms]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise OndolError(f"two arms are called '{twice[0]}'", f"give one a label of its own: other={twice[0]}")
    for arm in arms:
        arm.recipe(0)
    return arms
