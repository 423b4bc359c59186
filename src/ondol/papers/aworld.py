"""AWorld (arXiv 2508.20404): rollouts side by side make practice affordable, many of them find what one does not, and
learning from them helps.

Studies, without training: the time that errands over a far-away model take one after the other and side by side, with a
worker killed on the way; and what more tries are worth to a weak model. One arm is trained: sums with a calculator, SFT on
successful traces, then GRPO over rollouts that two worker processes play.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from random import Random

from ondol.compare.arms import Arm
from ondol.compare.comparison import Comparison
from ondol.papers import tool_sums
from ondol.papers.base import Claim, Measured, Outcome, Paper
from ondol.papers.measure import known, mean, series
from ondol.store import Run

_EPISODES, _AT_ONCE = 64, 16
_TRIES = (1, 2, 4, 8, 16, 32)
#: reasoning-gym's, the easiest settings
_PUZZLES = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    "gcd": {"max_value": 60},
}
_PUZZLES_EACH = 16
_DRAWS = 4000  # subsets of the tries, to see how often one has a right answer


def _arms() -> Sequence[Arm]:
    # settled on seed 100: with fewer traces SFT solves nothing, with 1400 nearly all; larger steps forget what SFT has taught
    learning = ("warm_start.problems=1000", "optimizer.learning_rate=2e-4", "train.steps=100")
    settings = ("warm_start.gold_share=1", *learning, "rollout.processes=2")
    return tool_sums.arms("practice=grpo", settings=settings)


def _measure(run: Run, arm: str) -> dict[str, float]:
    """As for all papers on tool sums, and where a step's time goes."""
    return tool_sums.measure(run, arm) | known(
        rollout_s=mean(series(run, "rollout/seconds")), learner_s=mean(series(run, "learner/seconds"))
    )


# -- studies --------------------------------------------------------------------------------------------------------------


def _speed(comparison: Comparison, seed: int, folder: Path) -> dict[str, float]:
    from ondol.papers.errands import measure

    return measure(seed, _EPISODES, _AT_ONCE)


def _tries(comparison: Comparison, seed: int, folder: Path) -> dict[str, float]:
    """The bundled model at reasoning-gym's easiest arithmetic, 32 tries each: pass@k by the formula and by drawing k tries."""
    from ondol.engines.base import Sampling
    from ondol.engines.torch import TorchEngine
    from ondol.envs.tool import ToolEnv
    from ondol.evaluate import evaluate, held_out, pass_at_k
    from ondol.models.load import load_model
    from ondol.tasks.reasoning_gym import ReasoningGym

    loaded = load_model("smollm2-135m-instruct")
    engine = TorchEngine(loaded.model, loaded.tokenizer, loaded.context_length, max_batch=64)
    env = ToolEnv(max_turns=1, system="Answer with the number alone.")
    right: list[list[bool]] = []
    for n, (dataset, options) in enumerate(_PUZZLES.items()):
        task = ReasoningGym(dataset=dataset, options=options, seed=seed)
        problems = held_out(task, _PUZZLES_EACH)
        sampling = Sampling(max_tokens=24, temperature=1.0)
        found = evaluate(engine, loaded.renderer, task, env, problems, sampling, seed=(seed, n), samples=max(_TRIES))
        right += [[s >= 1.0 for s in g.scores] for g in found.groups]
    random, out = Random(f"{seed}/subsets"), {}
    for k in _TRIES:
        out[f"pass@{k}"] = sum(pass_at_k(len(r), sum(r), k) for r in right) / len(right)
        hits = sum(any(random.sample(r, k)) for r in right for _ in range(_DRAWS // len(right)))
        out[f"drawn@{k}"] = hits / (len(right) * (_DRAWS // len(right)))
    return out | {
        "gain": out["pass@32"] - out["pass@1"],
        "least_rise": min(out[f"pass@{b}"] - out[f"pass@{a}"] for a, b in pairwise(_TRIES)),
        "formula_off": max(abs(out[f"pass@{k}"] - out[f"drawn@{k}"]) for k in _TRIES),
    }


# -- claims ---------------------------------------------------------------------------------------------------------------


def _faster(m: Measured) -> Outcome:
    got, off = m.mean("speed", "speed_up"), abs(m.mean("speed", "of_expected") - 1)
    worst = max(abs(x - 1) for x in m.values("speed", "of_expected"))
    waiting = min(m.values("speed", "waiting_share"))
    return Outcome(
        got >= 8 and waiting >= 0.9 and off <= 0.35,
        f"{m.text('speed', 'sequential_s', 1)} s one after the other, {m.text('speed', 'concurrent_s', 1)} s with {_AT_ONCE} at once: "
        f"{m.text('speed', 'speed_up', 1)} times, where min({_AT_ONCE}, total / longest) is {m.text('speed', 'expected_speed_up', 1)} "
        f"({off:.0%} off on the mean of seeds, {worst:.0%} at worst); waiting is {waiting:.0%} of the time or more. A step of the arm practice: rollout "
        f"{m.text('practice', 'rollout_s')} s, training {m.text('practice', 'learner_s')} s",
    )


def _survives(m: Measured) -> Outcome:
    same, right, lost = (min(m.values("speed", name)) for name in ("same_share", "right_share", "lost_workers"))
    held, again, turns = (m.values("speed", name) for name in ("held_by_lost", "again", "turns_again"))
    once = all(h >= a >= 1 and h >= t for h, a, t in zip(held, again, turns, strict=True))
    return Outcome(
        same >= 1 and right >= 1 and lost >= 1 and once,
        f"answers right {right:.0%}, trajectories the same in all three ways {same:.0%}; 4 processes x 8, one killed: "
        f"{m.text('speed', 'processes_s', 1)} s with their start; of {_EPISODES} episodes {m.text('speed', 'again', 1)} were taken up "
        f"again, of {_EPISODES * 7} turns {m.text('speed', 'turns_again', 1)} asked for twice",
    )


def _more_tries(m: Measured) -> Outcome:
    gain, rise, off = (
        m.mean("tries", "gain"),
        min(m.values("tries", "least_rise")),
        max(m.values("tries", "formula_off")),
    )
    return Outcome(
        rise > 0 and gain >= 0.25 and off <= 0.02,
        f"pass@1 {m.text('tries', 'pass@1')}, pass@4 {m.text('tries', 'pass@4')}, pass@32 {m.text('tries', 'pass@32')}; rising: "
        f"{'yes' if rise > 0 else 'no'}; the formula is at most {100 * off:.1f} points off what drawing finds",
    )


def _learns(m: Measured) -> Outcome:
    name = "score_sampled"
    gain = m.mean("practice", name) - m.mean("practice", f"start/{name}")
    return Outcome(gain >= 0.15, f"{m.text('practice', f'start/{name}')} -> {m.text('practice', name)}")


PAPER = Paper(
    id="2508.20404",
    claims=(
        Claim(
            text="Rollouts side by side take a fraction of the time, as long as episodes mostly wait",
            paper="7 695 s -> 525 s for a training cycle's rollouts (14.6 times); with training 7 839 -> 669 s",
            how=f"{_EPISODES} errands of seven turns with SQLite, and CPython and files in a sandbox each on a tool server over MCP; a "
            "hand-written agent whose turns take as long as if a far-away model had said them (log-normal, median 0.4 s, spread 0.8: simulated "
            f"waits, real tools); one at a time against {_AT_ONCE} at once in one process",
            must=f"at least 8 times; within 35 % of min({_AT_ONCE}, total / longest); at least 90 % of the time is waiting",
            judge=_faster,
        ),
        Claim(
            text="The answers do not depend on how rollouts are spread, and a lost worker's go on from their checkpoint",
            paper="said, not measured: slow or dead rollouts are replaced",
            how="the same errands in 4 worker processes x 8, one killed when a quarter is done",
            must="all right and the same in the three ways; only what the killed worker held is taken up again, and no turn but those under way is asked for twice",
            judge=_survives,
        ),
        Claim(
            text="More rollouts solve more tasks",
            paper="GAIA validation, up to 32 rollouts: Claude-3.7-Sonnet 47.9 -> 76.4, GPT-4o 27.3 -> 65.5",
            how=f"SmolLM2-135M-Instruct at {', '.join(_PUZZLES)} of reasoning-gym, {_PUZZLES_EACH} held-out problems each, 32 tries; unbiased pass@k, "
            f"and the share of {_DRAWS} draws of k of the tries that have a right one",
            must="rising with k, pass@32 at least 25 points above pass@1, formula and draws within 2 points",
            judge=_more_tries,
        ),
        Claim(
            text="SFT on successful traces, then GRPO over distributed rollouts: the agent gets better",
            paper="Qwen3-32B on GAIA's test set: pass@1 21.59 -> 32.23",
            how=f"pass@1 on held-out sums with a calculator, {tool_sums.SAMPLES} samples each, after SFT and after RL; rollouts by two processes",
            must="at least 15 points more",
            judge=_learns,
        ),
    ),
    arms=_arms,
    measure=_measure,
    studies={"speed": _speed, "tries": _tries},
    scales={
        "laptop": f"{_EPISODES} errands three ways; 48 puzzles x 32 tries of SmolLM2-135M; a model from scratch, 100 steps of 16 prompts x 8 samples",
        "gpu": "SmolLM2-135M or a model of 0.5B behind a batching engine, 256 episodes; GRPO 60-100 steps",
        "full": "GAIA and a Kubernetes cluster, Qwen3-32B: SFT on 886 traces, then GRPO with 32 rollouts a task on two nodes of 8 A100",
    },
)
