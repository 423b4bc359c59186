"""DCPO (arXiv 2509.02333): dynamic clip bounds, and advantages that remember a prompt's history.

Arms: GRPO with a symmetric and with an asymmetric clip, DCPO, and each of its parts alone on GRPO. OTM alone is with the
paper's plain sum over answers; divided by their number it would be GRPO itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from ondol.compare.arms import Arm
from ondol.papers.base import Claim, Measured, Outcome, Paper
from ondol.papers.pilot import arms, measure


def _arms() -> Sequence[Arm]:
    return arms(
        "grpo",
        "asymmetric=grpo:clip_high=0.28",
        "dcpo",
        "dac=dcpo:dac=true,sas=false,otm=false",
        "sas=dcpo:dac=false,sas=true,otm=false",
        "otm=dcpo:dac=false,sas=false,otm=true,otm_scale=1",
    )


def _utilisation(m: Measured) -> Outcome:
    name = "utilisation_last_quarter"
    return Outcome(
        m.mean("dcpo", name) >= 2 * m.mean("grpo", name), f"DCPO {m.text('dcpo', name)}, GRPO {m.text('grpo', name)}"
    )


def _clipped(m: Measured) -> Outcome:
    name, trained = "clipped", "clipped_of_trained"
    return Outcome(
        m.mean("dcpo", name) < m.mean("grpo", name),
        f"DCPO {m.text('dcpo', name, 4)}, GRPO {m.text('grpo', name, 4)} of all response tokens "
        f"({m.text('dcpo', trained, 4)} and {m.text('grpo', trained, 4)} of those trained on)",
    )


def _score(m: Measured) -> Outcome:
    name = "score_sampled"
    return Outcome(
        m.mean("dcpo", name) >= m.mean("grpo", name) - 0.05, f"DCPO {m.text('dcpo', name)}, GRPO {m.text('grpo', name)}"
    )


PAPER = Paper(
    id="2509.02333",
    claims=(
        Claim(
            text="DCPO makes use of far more responses than GRPO",
            paper="response utilisation 71.8 % against GRPO's 43.8 %, mean over models",
            how="share of responses with an advantage, mean over the last quarter of the steps",
            must="DCPO's at least twice GRPO's",
            judge=_utilisation,
        ),
        Claim(
            text="DCPO clips fewer tokens than GRPO's symmetric clip at the same number of updates of a batch",
            paper="token clip ratio about 10 times lower than GRPO's and DAPO's",
            how="share of response tokens whose ratio was clipped, mean over all steps, 4 updates of a batch for both",
            must="DCPO's below GRPO's",
            judge=_clipped,
        ),
        Claim(
            text="DCPO is at least as good as GRPO",
            paper="Avg@32 45.2 against 41.6 (Qwen2.5-Math-7B, mean of four benchmarks)",
            how="pass@1 on held-out numbers, 32 samples each",
            must="DCPO's not lower than GRPO's by more than 0.05",
            judge=_score,
        ),
    ),
    arms=_arms,
    measure=measure,
    scales={
        "laptop": "tiny-addends, 150 steps of 16 prompts x 8 samples in 4 updates, learning rate 1e-3, 6 arms",
        "gpu": "SmolLM2-135M-Instruct on reasoning-gym arithmetic, a fixed pool of 256 prompts, 100 steps; one GPU",
        "full": "Qwen2.5-Math-7B on DAPO-Math-17k, G = 16, 512 prompts a step, Avg@32; 8 GPUs or more",
    },
)
