"""The small model that the papers on policy optimisation are tried on: recipe tiny-addends (a decoder of 130,000
parameters from scratch, N in 10..60, a warm start that is half wrong), with 32 samples of each held-out number.
"""

from __future__ import annotations

from ondol.compare.arms import Arm, parse_arm
from ondol.compare.comparison import outcome
from ondol.papers.measure import by_step, known, last_quarter, mean, series
from ondol.recipe import override, read_table
from ondol.store import Run

SAMPLES = 32  # of a held-out problem, for pass@1 ... pass@32


def arms(*texts: str, learning_rate: float = 1e-3, steps: int = 150) -> list[Arm]:
    """Arms in the words of `ondol compare`, on the pilot's recipe."""
    table = read_table("tiny-addends")
    for setting in (
        f"optimizer.learning_rate={learning_rate}",
        f"train.steps={steps}",
        f"evaluate.samples={SAMPLES}",
        # 963 updates: the pilots had 900 (card of 2509.02534). With the recipe's own 550 RL learns one answer a number by
        # heart, and held-out numbers stay unsolved
        "warm_start.epochs=7",
    ):
        override(table, setting)
    return [parse_arm(text, table) for text in texts]


def measure(run: Run, arm: str) -> dict[str, float]:
    """Evaluations at the start and the end, and what happened in training.

    clipped is the share of all response tokens whose ratio was clipped, as verl and the papers on it count: a response
    without advantage is never clipped, but is counted. Our learner leaves such responses out, so its own share
    (clipped_of_trained) is multiplied by the share of responses that were trained on.
    """
    clips = by_step(run, "policy/clip_share", "groups/response_utilisation")
    return outcome(run, arm) | known(
        utilisation_last_quarter=last_quarter(run, "groups/response_utilisation"),
        clipped=mean([c * u for c, u in clips]),
        clipped_of_trained=mean(series(run, "policy/clip_share")),
        entropy_last_quarter=last_quarter(run, "policy/entropy"),
        score_last_quarter=last_quarter(run, "score/mean"),
        preference_accuracy_last_quarter=last_quarter(run, "preference/accuracy"),
        explained_variance_last_quarter=last_quarter(run, "value/explained_variance"),
        gradient_norm_mean=mean(series(run, "gradient/norm")),
    )
