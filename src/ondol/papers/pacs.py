"""PACS (arXiv 2509.02522): the verifiable reward as a label that a score made of the policy has to predict."""

from __future__ import annotations

from collections.abc import Sequence

from ondol.compare.arms import Arm
from ondol.papers.base import Claim, Measured, Outcome, Paper
from ondol.papers.pilot import SAMPLES, arms, measure

_BETAS = {"pacs-0.1": 0.1, "pacs": 1.0, "pacs-10": 10.0}
_LAST = f"pass@{SAMPLES}"


def _arms() -> Sequence[Arm]:
    return arms(
        "grpo", *(f"{label}=pacs:beta={beta}" for label, beta in _BETAS.items()), "ppo=ppo:critic_learning_rate=1e-3"
    )


def _learns(m: Measured) -> Outcome:
    name = "score_sampled"
    gain = m.mean("pacs", name) - m.mean("pacs", f"start/{name}")
    return Outcome(gain >= 0.3, f"{m.text('pacs', f'start/{name}')} -> {m.text('pacs', name)}")


def _passes(m: Measured) -> Outcome:
    held = m.mean("pacs", _LAST) >= m.mean("grpo", _LAST) - 0.05
    return Outcome(held, f"PACS {m.text('pacs', _LAST)}, GRPO {m.text('grpo', _LAST)}, PPO {m.text('ppo', _LAST)}")


def _beta(m: Measured) -> Outcome:
    name = "score_sampled"
    means = [m.mean(label, name) for label in _BETAS]
    said = ", ".join(f"beta {beta:g}: {m.text(label, name)}" for label, beta in _BETAS.items())
    return Outcome(max(means) - min(means) >= 0.1, said)


PAPER = Paper(
    id="2509.02522",
    claims=(
        Claim(
            text="PACS learns from verifiable rewards, without critic, clip or KL",
            paper="AIME 2025 pass@256 59.78 (Qwen2.5-7B)",
            how="pass@1 on held-out numbers, 32 samples each, against that of the warm start",
            must="at least 0.3 more than at the start",
            judge=_learns,
        ),
        Claim(
            text="PACS keeps as many problems within reach as GRPO",
            paper="AIME 2025 pass@256 59.78 against PPO 46.46 and GRPO 45.42 (Qwen2.5-7B)",
            how=f"unbiased {_LAST} on held-out numbers",
            must="not below GRPO's by more than 0.05",
            judge=_passes,
        ),
        Claim(
            text="beta is the setting that matters",
            paper="named as the sensitive knob: small, and the score hardly moves; large, and the sigmoid saturates",
            how="pass@1 at beta 0.1, 1 and 10",
            must="best and worst differ by at least 0.1",
            judge=_beta,
        ),
    ),
    arms=_arms,
    measure=measure,
    scales={
        "laptop": "tiny-addends, 150 steps of 16 prompts x 8 samples in 4 updates, learning rate 1e-3, 5 arms",
        "gpu": "SmolLM2-135M-Instruct on reasoning-gym chain_sum, G = 8, 64 prompts, 100 steps, pass@1 and pass@64; one GPU",
        "full": "Qwen2.5-7B on DeepScaleR, 1024 prompts a step, 300 steps; 8 x 8 GPUs",
    },
)
