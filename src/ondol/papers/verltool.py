"""VerlTool (arXiv 2509.01055): rollouts that wait for nobody, observations that are not trained on, ids that are kept.

Arms: GRPO with observations masked and not, on sums with a calculator. The warm start shows a poor user of tools: some
guess without a call, some put a wrong number into one; the answer is then copied faithfully. Studies, without training:
the time that asynchronous rollouts save, and what encoding conversations anew would do to their tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from random import Random

from pydantic import Field

from ondol.compare.arms import Arm, parse_arm
from ondol.compare.comparison import Comparison
from ondol.errors import OndolError
from ondol.papers import tool_sums
from ondol.papers.base import Claim, Measured, Outcome, Paper
from ondol.papers.tool_sums import ToolSums
from ondol.recipe import override, read_table
from ondol.records import Problem
from ondol.store import Run

_TRAJECTORIES = 64


class PoorlyCalled(ToolSums):
    """Sums, shown by someone who sometimes guesses instead of calling, and sometimes calls with a wrong number."""

    guess_share: float = Field(default=0.3, ge=0, le=1, description="demonstrations: share without a call")
    misread_share: float = Field(
        default=0.55, ge=0, le=1, description="of the others: share with a wrong number in a call"
    )

    def demonstration(self, problem: Problem, random: Random, right: bool) -> list[str]:
        numbers = list(problem.data["numbers"])
        if not right or random.random() < self.guess_share:
            return [str(sum(numbers) + random.choice([d for d in range(-9, 10) if d]))]
        if random.random() < self.misread_share:
            at = random.randrange(3)
            numbers[at] = random.choice([n for n in range(self.low, self.high + 1) if n != numbers[at]])
        total, *rest = numbers
        turns = []
        for number in rest:
            turns.append(f"<c>{total}+{number}</c>")
            total += number
        return [*turns, str(total)]


_TASK = "task.name=ondol.papers.verltool:PoorlyCalled"
_ARMS = ("masked=grpo", "unmasked=grpo:rollout.mask_observations=false")


def _arms() -> Sequence[Arm]:
    return tool_sums.arms(*_ARMS, settings=(_TASK, "warm_start.gold_share=1", "train.steps=45"))


def _long_arms() -> Sequence[Arm]:
    """SmolLM2 and the real Python tool: the recipe `arithmetic`."""
    table = copy.deepcopy(read_table("arithmetic"))
    override(table, "evaluate.samples=2")
    return [parse_arm("smollm2=grpo", table)]


def _measure(run: Run, arm: str) -> dict[str, float]:
    """As for all papers on tool sums, and the share of held-out episodes with a call."""
    out = tool_sums.measure(run, arm)
    for phase, prefix in (("before", "start/"), ("after", "")):
        episodes = list(run.db.trajectories(phase=f"{phase}/sampled"))
        if episodes:
            called = sum(any(turn.results for turn in t.turns) for t in episodes)
            out[f"{prefix}called_share"] = called / len(episodes)
    return out


# -- studies --------------------------------------------------------------------------------------------------------------


def _speed(comparison: Comparison, seed: int, folder: Path) -> dict[str, float]:
    """Wall time of 64 trajectories, asynchronous and with a turn barrier, on the simulated engine; means of two draws."""
    from ondol.papers.slow_tools import simulated

    draws = [simulated(s, calls, _TRAJECTORIES) for s in (2 * seed, 2 * seed + 1) for calls in (1, 3)]
    found: dict[str, list[float]] = {}
    for name, value in (item for draw in draws for item in draw.items()):
        found.setdefault(name, []).append(value)
    least = ("same_share", "tools_at_once")
    return {name: min(v) if name in least else sum(v) / len(v) for name, v in found.items()}


def _real_engine(comparison: Comparison, seed: int, folder: Path) -> dict[str, float]:
    """The same with the embedded engine on this CPU and the policy that the arm "masked" ends with, greedily."""
    from ondol.papers.slow_tools import embedded

    path = comparison.jobs["masked", seed].finished
    if path is None:
        raise OndolError(f"the run of seed {seed} is not finished", "run the arms first")
    recipe = comparison.arms[0].recipe(seed)
    return embedded(recipe, path / "model", seed, _TRAJECTORIES)


def _tokens(comparison: Comparison, seed: int, folder: Path) -> dict[str, float]:
    from ondol.papers.retokenised import count

    return count(seed)


# -- claims ---------------------------------------------------------------------------------------------------------------


def _faster(m: Measured) -> Outcome:
    one, three = m.mean("speed", "ratio_1"), m.mean("speed", "ratio_3")
    return Outcome(
        one <= 0.75 and three <= 0.6 and three < one,
        f"{m.text('speed', 'ratio_1')} at 1 call, {m.text('speed', 'ratio_3')} at 3 ({m.text('speed', 'async_s_3', 1)} s "
        f"against {m.text('speed', 'sync_s_3', 1)} s); the sums of the drawn times say {m.text('speed', 'expected_1')} "
        f"and {m.text('speed', 'expected_3')}",
    )


def _same(m: Measured) -> Outcome:
    told, real = min(m.values("speed", "same_share")), min(m.values("engine", "same_share"))
    peak = min(m.values("speed", "tools_at_once"))
    return Outcome(
        told == 1 and real == 1 and peak > 1,
        f"equal: {told:.0%} and {real:.0%}; at least {peak:.0f} tools at once; on this CPU asynchronous / barrier "
        f"{m.text('engine', 'ratio')} ({m.text('engine', 'async_s', 1)} s against {m.text('engine', 'sync_s', 1)} s, "
        f"{m.text('engine', 'calls_mean', 1)} calls each)",
    )


def _learns(m: Measured) -> Outcome:
    name, called = "score_sampled", "called_share"
    start, end = m.mean("masked", f"start/{name}"), m.mean("masked", name)
    return Outcome(
        start <= 0.35 and end >= 0.8 and m.mean("masked", called) >= 0.95,
        f"score {m.text('masked', f'start/{name}')} -> {m.text('masked', name)}, "
        f"episodes with a call {m.text('masked', f'start/{called}')} -> {m.text('masked', called)}",
    )


def _masks(m: Measured) -> Outcome:
    name = "score_sampled"
    gap = m.mean("masked", name) - m.mean("unmasked", name)
    return Outcome(gap >= 0.1, f"masked {m.text('masked', name)}, not masked {m.text('unmasked', name)}")


def _drift(m: Measured) -> Outcome:
    changed, own = min(m.values("tokens", "changed")), min(m.values("tokens", "own_share"))
    return Outcome(
        changed > 0 and own == 1,
        f"{m.text('tokens', 'changed', 0)} of 1000 change at the border alone, {m.text('tokens', 'changed_sampled', 0)} "
        f"where actions are sampled in other pieces; our own ids are kept in {own:.1%}",
    )


def _smollm2(m: Measured) -> Outcome:
    name = "score_sampled"
    gain = m.mean("smollm2", name) - m.mean("smollm2", f"start/{name}")
    return Outcome(gain >= 0.15, f"{m.text('smollm2', f'start/{name}')} -> {m.text('smollm2', name)}")


PAPER = Paper(
    id="2509.01055",
    claims=(
        Claim(
            text="Rollouts in which no trajectory waits for another take less time, the more so the more turns they have",
            paper="math, 2048 trajectories, 1.5B, 4 H100: 75 s against 127 s at 1 turn of tools (0.59), 94 against 194 at 3 (0.48)",
            how=f"{_TRAJECTORIES} trajectories, real Python tool made slow (log-normal waits, median 0.3 s), a simulated engine whose "
            "step takes 10 ms however many sequences run, turns of log-normal length (median 60 tokens); baseline: a "
            "barrier after each turn's sampling and each turn's tools; two draws of all times a seed",
            must="wall time at most 0.75 of the baseline's at 1 call, at most 0.6 at 3, and less at 3 than at 1",
            judge=_faster,
        ),
        Claim(
            text="Asynchrony changes nothing in what is said",
            paper="not in the card as a number",
            how=f"ids, masks and results of the trajectories above, and of {_TRAJECTORIES} held-out sums that the policy of the arm "
            "masked answers greedily in the embedded engine, calculator with the same waits (times on this CPU, whose step "
            "costs more the more sequences run, are reported and not judged)",
            must="all equal to those with the barrier; more than one tool at a time",
            judge=_same,
        ),
        Claim(
            text="GRPO over the rollouts teaches the use of a tool",
            paper="Qwen2.5-Math-7B: mean of six sets of math 37.2 -> 61.2",
            how=f"pass@1 on held-out sums, {tool_sums.SAMPLES} samples each, before RL and after it, observations masked",
            must="from at most 0.35 to at least 0.8, and a call in at least 0.95 of the episodes",
            judge=_learns,
        ),
        Claim(
            text="Training on observations harms",
            paper="said, not measured: observation tokens are off-policy",
            how="the same without the mask (rollout.mask_observations = false); their old log-probs are the learner's own",
            must="pass@1 lower by at least 0.10",
            judge=_masks,
        ),
        Claim(
            text="Encoding action and observation together changes tokens; appending ids does not",
            paper="said, not measured: tokens merge over the border",
            how="1000 pairs in the four formats of the paper's tools, tokenizer of SmolLM2: ids encoded apart and together; "
            "the same pairs through our rollout",
            must="some change together, none in ours",
            judge=_drift,
        ),
        Claim(
            text="The same with a pretrained model and Python",
            paper="Qwen2.5-Math-1.5B: 24.7 -> 55.5",
            how="SmolLM2-135M-Instruct, recipe arithmetic (--long): pass@1 after the warm start and after RL",
            must="higher by at least 0.15",
            judge=_smollm2,
        ),
    ),
    arms=_arms,
    long_arms=_long_arms,
    measure=_measure,
    studies={"speed": _speed, "engine": _real_engine, "tokens": _tokens},
    scales={
        "laptop": "sums in three turns with a calculator, a model from scratch, 45 steps of 16 prompts x 8 samples in 4 updates, 2 arms; "
        "64 trajectories with slow tools; 1000 pairs of action and observation",
        "gpu": "a model of 0.5B, 2000 traces of reasoning-gym arithmetic, GRPO 100 steps, 64 prompts x 8; 256 trajectories at 3 turns",
        "full": "the recipes of the card's table: math, search, SQL, images, deep search; 4 to 8 H100",
    },
)
