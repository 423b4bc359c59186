"""rStar2-Agent (arXiv 2508.20722), of which this is GRPO-RoC: resampling on correct.

Arms: GRPO-RoC, which samples 16 of a prompt and trains on 8, and GRPO with 8 and the paper's other settings (clip-higher,
token mean, no KL, groups of equal reward left out), which is what GRPO-RoC does where it keeps all it samples. In three of ten calls that the warm
start shows, a call fails first and is made again, and such an episode ends as well as any other: the outcome alone does
not tell them apart. The code judge is tried as a study, without a model. The scheduler has no code here yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ondol.compare.arms import Arm
from ondol.compare.comparison import Comparison
from ondol.papers import tool_sums
from ondol.papers.base import Claim, Measured, Outcome, Paper

_SOME = 0.01  # errors that GRPO must have left for the comparison to tell anything


def _arms() -> Sequence[Arm]:
    return tool_sums.arms(
        "grpo=grpo-roc:keep_samples=8",
        "grpo-roc=grpo-roc:keep_samples=8,train.samples_per_prompt=16",
        settings=(
            "task.failing_share=0.3",
            "warm_start.epochs=10",  # longer episodes: with 4 it reaches 0.07 on held-out sums (seed 100)
            "optimizer.learning_rate=1e-3",
            "method.minibatches=1",  # one update a batch, as in the official recipe
            "train.steps=100",
            "train.prompts_per_step=8",
        ),
    )


def _code_judge(comparison: Comparison, seed: int, folder: Path) -> dict[str, float]:
    """The mix of 500 jobs, 40 of them hostile, for 4 workers; and 200 healthy ones over HTTP, singly and in batches."""
    import asyncio

    from ondol.sandbox.judge_trial import batches, verdicts

    return asyncio.run(verdicts(500, seed)) | asyncio.run(batches(200, seed))


def _scheduler_study(comparison: Comparison, seed: int, folder: Path) -> dict[str, float]:
    """The card's simulation: the same rollouts under three policies."""
    from ondol.cluster.scheduler import POLICIES
    from ondol.cluster.simulate import Workload, simulate

    found = {policy: simulate(Workload(), policy, seed) for policy in POLICIES}  # type: ignore[arg-type]
    out: dict[str, float] = {}
    for policy, seen in found.items():
        out |= {f"{policy}/makespan_s": seen.makespan_s, f"{policy}/evictions": float(seen.evictions)}
        out[f"{policy}/utilisation"] = seen.utilisation
    return out


def _errors(m: Measured) -> Outcome:
    name = "error_share_in_right"
    roc, grpo = m.mean("grpo-roc", name), m.mean("grpo", name)
    none = "" if grpo >= _SOME else "; GRPO has next to none left to halve: this tells nothing"
    return Outcome(
        grpo >= _SOME and roc <= 0.5 * grpo,
        f"GRPO-RoC {m.text('grpo-roc', name, 3)}, GRPO {m.text('grpo', name, 3)}; "
        f"at the start {m.text('grpo', f'start/{name}', 3)}{none}",
    )


def _score(m: Measured) -> Outcome:
    name = "score_sampled"
    return Outcome(
        m.mean("grpo-roc", name) >= m.mean("grpo", name) - 0.02,
        f"GRPO-RoC {m.text('grpo-roc', name)}, GRPO {m.text('grpo', name)}; at the start {m.text('grpo', f'start/{name}')}",
    )


def _judge(m: Measured) -> Outcome:
    right, faster = m.mean("code_judge", "right_reasons"), m.mean("code_judge", "batch_speedup")
    healthy, orphans = m.mean("code_judge", "healthy_right"), m.mean("code_judge", "orphans")
    return Outcome(
        right >= 1 and healthy >= 1 and orphans == 0 and faster >= 2,
        f"right reasons {right:.3f}, healthy jobs right {healthy:.3f}, {orphans:.0f} processes left behind, "
        f"batches {faster:.1f} times as fast",
    )


def _scheduler(m: Measured) -> Outcome:
    kv, static, least = (m.mean("scheduler", f"{p}/makespan_s") for p in ("kv", "static", "least-requests"))
    evicted, of = m.mean("scheduler", "kv/evictions"), m.mean("scheduler", "static/evictions")
    return Outcome(
        kv <= 0.75 * static and evicted <= 0.1 * of,
        f"{(static - kv) / max(static, 1e-9):.0%} shorter than static ({m.text('scheduler', 'kv/makespan_s', 0)} s against "
        f"{m.text('scheduler', 'static/makespan_s', 0)}), {evicted:.0f} evictions against {of:.0f}, engines at work "
        f"{m.text('scheduler', 'kv/utilisation')} of the time against {m.text('scheduler', 'static/utilisation')}; least-requests "
        f"takes {least:.0f} s with {m.mean('scheduler', 'least-requests/evictions'):.0f} evictions",
    )


PAPER = Paper(
    id="2508.20722",
    claims=(
        Claim(
            text="GRPO-RoC's right answers come with fewer tool errors than GRPO's",
            paper="with GRPO 10 to 15 % of the tool calls in right trajectories stay errors; with RoC they fall",
            how=f"held-out sums after RL, {tool_sums.SAMPLES} samples each: share of errors among tool results in right ones",
            must=f"at most half of GRPO's, which has at least {_SOME}",
            judge=_errors,
        ),
        Claim(
            text="GRPO-RoC is as accurate as GRPO at the same number of trajectories trained on",
            paper="AIME24 80.6 (14B, the whole system)",
            how=f"pass@1 on held-out sums, {tool_sums.SAMPLES} samples each",
            must="not below GRPO's by more than 0.02",
            judge=_score,
        ),
        Claim(
            text="The code-judge service gives each job its reason, and batches pay",
            paper="45,000 concurrent calls a step, 0.3 s mean latency",
            how="500 jobs, of which 10 loop, 10 take memory, 10 are no Python and 10 fork, 4 workers; 200 healthy ones over "
            "HTTP on loopback, one call after the other and through the batching client",
            must="all reasons right, healthy jobs unharmed, no process left; batches at least 2 times as fast as single calls",
            judge=_judge,
        ),
        Claim(
            text="Dispatching by free KV memory beats a static assignment",
            paper="fewer idle workers and evictions; a simulation of the card: makespan 29 to 39 % shorter",
            how="simulation of 8 engines with 60,000 KV tokens each, 1024 rollouts of 32 prompts, mean of about 2,500 tokens, 3 turns; "
            "reservation of 2,500 tokens",
            must="makespan at least 25 % shorter, at most a tenth of the evictions",
            judge=_scheduler,
        ),
    ),
    arms=_arms,
    measure=tool_sums.measure,
    studies={"code_judge": _code_judge, "scheduler": _scheduler_study},
    scales={
        "laptop": "sums in several turns with a calculator, a model from scratch, 100 steps of 8 prompts x 8 trained samples, 2 arms",
        "gpu": "SmolLM2-135M-Instruct, Hermes tool calls, reasoning-gym arithmetic, 16 -> 8 samples, 60 steps; one GPU",
        "full": "Qwen3-14B-Base, 512 prompts x 32 -> 16 samples, 510 steps in three stages; 64 GPUs",
    },
)
