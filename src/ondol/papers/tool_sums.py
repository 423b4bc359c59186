"""The small agent that the papers on tool use are tried on: sums of three numbers, worked out in several turns with the
calculator. A model from scratch of 140,000 parameters that reads and writes characters:

    12+17+25  <c>12+17</c>  <result>29</result>  <c>29+25</c>  <result>54</result>  54

Demonstrations play the same episodes in the real environment, with faults that the papers are about: void turns, calls
that fail, wrong answers.
"""

from __future__ import annotations

import copy
import math
import re
import string
from collections.abc import Sequence
from random import Random
from typing import Any, ClassVar

from pydantic import Field, model_validator

from ondol.compare.arms import Arm, parse_arm
from ondol.compare.comparison import outcome
from ondol.methods.grpo_roc import error_share
from ondol.methods.simpletir import has_void_turn
from ondol.papers.measure import known, mean, percentile, series
from ondol.recipe import override
from ondol.records import Problem, Trajectory, Turn
from ondol.store import Run
from ondol.tasks.base import DrawnTask
from ondol.tools.calculator import Calculator

SAMPLES = 8  # of a held-out problem
_ANSWER = re.compile(r"[0-9]{1,6}")


class Calc(Calculator):
    """The calculator under a name of one letter, which is a token for each."""

    name: ClassVar[str] = "c"


class ToolSums(DrawnTask):
    """Sums of three numbers of two digits; a response is a number and nothing else."""

    low: int = Field(default=10, ge=0, description="smallest operand")
    high: int = Field(default=33, le=9999, description="largest operand; with 33 every sum has two digits")
    void_share: float = Field(
        default=0.0, ge=0, le=1, description="demonstrations: share with a void turn, letters that mean nothing"
    )
    failing_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="demonstrations: share of calls that fail first, as their second number lacks",
    )

    in_head: bool = Field(default=False, description="demonstrations: the answer at once, without the calculator")

    @model_validator(mode="after")
    def _sound(self) -> ToolSums:
        if self.low > self.high:
            raise ValueError(f"low..high: {self.low} > {self.high}, the range is empty")
        return self

    def draw(self, random: Random) -> Problem:
        numbers = [random.randint(self.low, self.high) for _ in range(3)]
        return Problem("", "+".join(map(str, numbers)), str(sum(numbers)), {"numbers": numbers})

    def score(self, problem: Problem, response: str) -> float:
        text = response.strip()
        return float(_ANSWER.fullmatch(text) is not None and text == problem.answer)

    def near_misses(self, problem: Problem) -> list[str]:
        value = int(problem.answer)
        return ["", str(value + 1), f"={value}", f"{value}.", f"0{value}", f"{value} {value}", f"<c>{value}</c>"]

    def demonstration(self, problem: Problem, random: Random, right: bool) -> list[str]:
        """A call for each plus, each on the result before it, then the answer; a wrong one is at most 9 off."""
        total, *rest = problem.data["numbers"]
        turns: list[str] = []
        for number in () if self.in_head else rest:
            if random.random() < self.failing_share:
                turns.append(f"<c>{total}+</c>")
            turns.append(f"<c>{total}+{number}</c>")
            total += number
        total = int(problem.answer)
        turns.append(str(total if right else total + random.choice([d for d in range(-9, 10) if d])))
        if random.random() < self.void_share:
            turns[random.randrange(len(turns)) :] = [_letters(random)]  # the episode ends there
        return turns


def _letters(random: Random) -> str:
    return "".join(random.choice(string.ascii_lowercase) for _ in range(random.randint(4, 12)))


def says_nothing(trajectory: Trajectory, turn: Turn) -> bool:
    """Void here: no call, and no number either."""
    return not turn.calls and _ANSWER.fullmatch(turn.text.strip()) is None


_TABLE: dict[str, Any] = {
    "name": "tool-sums",
    "model": {"path": "tiny:hidden=64,layers=2,context=384"},
    "task": {"name": "ondol.papers.tool_sums:ToolSums"},
    "env": {"name": "tool", "tools": ["ondol.papers.tool_sums:Calc"], "max_turns": 5, "system": ""},
    "sampling": {"max_tokens": 16},
    "warm_start": {
        "from_task": True,
        "gold_share": 0.8,
        "problems": 2000,
        "samples_per_problem": 1,
        "traces_per_update": 16,
        "epochs": 4,
        "learning_rate": 3e-3,
    },
    "method": {"name": "grpo", "kl_coef": 0.0, "minibatches": 4},
    "optimizer": {"learning_rate": 1e-3},
    "train": {
        "steps": 40,
        "prompts_per_step": 16,
        "samples_per_prompt": 8,
        "tokens_per_microbatch": 8192,
        "checkpoint_every_steps": 30,
    },
    "evaluate": {"problems": 32, "samples": SAMPLES},
}


def arms(*texts: str, settings: Sequence[str] = ()) -> list[Arm]:
    """Arms in the words of `ondol compare`, on the recipe above with other settings."""
    table = copy.deepcopy(_TABLE)
    for setting in settings:
        override(table, setting)
    return [parse_arm(text, table) for text in texts]


def measure(run: Run, arm: str) -> dict[str, float]:
    """Evaluations, what the held-out episodes were like, and the gradient before it was clipped.

    Of a step's updates the greatest gradient norm is taken; percentiles are over steps.
    """
    found: dict[str, float] = dict(outcome(run, arm))
    for phase, prefix in (("before", "start/"), ("after", "")):
        episodes = list(run.db.trajectories(phase=f"{phase}/sampled"))
        found |= {prefix + name: value for name, value in shares(episodes).items()}
    norms = series(run, "gradient/norm_max")
    return found | known(
        gradient_p50=percentile(norms, 0.5),
        gradient_p95=percentile(norms, 0.95),
        gradient_max=max(norms, default=None),
        ratio_max=max(series(run, "policy/ratio_max"), default=None),
        clip_share=mean(series(run, "policy/clip_share")),
        trained_trajectories=mean(series(run, "groups/response_utilisation")),
    )


def shares(episodes: Sequence[Trajectory]) -> dict[str, float]:
    """Of episodes: share with a void turn; of tool results in all and in right ones: share of errors."""
    right = [t for t in episodes if t.score >= 1]
    return {
        "void_share": sum(has_void_turn(t, says_nothing) for t in episodes) / max(len(episodes), 1),
        "error_share": error_share(episodes),
        "error_share_in_right": error_share(right) if right else math.nan,
        "turns": sum(len(t.turns) for t in episodes) / max(len(episodes), 1),
    }
