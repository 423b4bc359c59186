"""Keye-VL-1.5 (arXiv 2509.01563), of which this is the reinforcement learning: GSPO, and progressive hints.

A model from scratch reads no advice, so a hint is the beginning of a right answer, which the model goes on with; the
whole answer is left out. A group of 8 answers that are all wrong teaches nothing; with the weakest hint under which one is
right, it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ondol.compare.arms import Arm
from ondol.compare.comparison import Comparison
from ondol.errors import OndolError
from ondol.papers.base import Claim, Measured, Outcome, Paper
from ondol.papers.pilot import arms, measure
from ondol.records import Problem
from ondol.tasks.hints import HintLadder, answer_prefixes

_GROUP = 8
_LEVELS = 5


def _arms() -> Sequence[Arm]:
    return arms("gspo", "grpo")


def _hints(comparison: Comparison, seed: int, folder: Path) -> dict[str, float]:
    """The model before RL on all training numbers: groups that are all wrong, and what the ladder makes of them."""
    job = comparison.jobs["gspo", seed]
    model = job.start.finished if job.start else None
    if model is None:
        raise OndolError(f"the warm start of seed {seed} is not finished", "run the arms first")
    recipe = comparison.arms[0].recipe(seed)
    solve = _solver(str(model / "model"), recipe)
    problems = [recipe.task.problem(i, "train") for i in range(recipe.task.size("train") or 64)]
    hard = [p for p in problems if solve(p, "") == 0]
    out = {"problems": float(len(problems)), "all_wrong": len(hard) / len(problems)}
    if hard:
        full = answer_prefixes(recipe.task.gold, _LEVELS)
        ladder = HintLadder(full.levels[:-1])  # the whole answer leaves nothing to do
        levels = {p.id: ladder.lowest_success(solve, p) for p in hard}
        mixed = [p for p in hard if (n := levels[p.id]) and 0 < solve(p, ladder.levels[n - 1](p)) < 1]
        found = [n for n in levels.values() if n]
        out |= {"mixed": len(mixed) / len(hard), "helped": len(found) / len(hard)}
        if found:
            out["level"] = sum(found) / len(found)
    return out


def _solver(path: str, recipe):  # type: ignore[no-untyped-def]
    """(problem, hint) -> share of right answers among 8 that begin with the hint; the same question, the same answers."""
    from ondol.engines.base import Request
    from ondol.models.load import load_model
    from ondol.train.plans import make_engine
    from ondol.train.warm_start import plain_prompt

    loaded = load_model(path, dtype=recipe.model.dtype, device=recipe.model.device)
    engine, known = make_engine(recipe, loaded), {}

    def solve(problem: Problem, hint: str) -> float:
        key = (problem.id, hint)
        if key not in known:
            ids = plain_prompt(recipe, loaded, problem)[1] + loaded.renderer.codec.text(hint)
            for i in range(_GROUP):
                # a stream of its own for each number, hint and answer
                stream = (recipe.seed, 101, int(problem.id, 16), len(hint), i)
                engine.submit(Request(f"{i}", ids, recipe.sampling, seed=stream, end_ids=loaded.renderer.end_ids))
            texts = []
            while engine.busy:
                for done in engine.step():
                    texts.append(hint + done.text)
                    engine.release(done.session)
            known[key] = sum(recipe.task.score(problem, text) for text in texts) / _GROUP
        return known[key]

    return solve


def _rises(m: Measured) -> Outcome:
    name = "score_sampled"
    gain = m.mean("gspo", name) - m.mean("gspo", f"start/{name}")
    return Outcome(
        gain >= 0.3, f"{m.text('gspo', f'start/{name}')} -> {m.text('gspo', name)} (GRPO: {m.text('grpo', name)})"
    )


def _ladder(m: Measured) -> Outcome:
    return Outcome(
        m.mean("hints", "mixed") >= 0.3,
        f"{m.text('hints', 'mixed')} of the all-wrong groups, which are {m.text('hints', 'all_wrong')} of all; "
        f"lowest level that helps: {m.text('hints', 'level', 1)} of {_LEVELS}",
    )


PAPER = Paper(
    id="2509.01563",
    claims=(
        Claim(
            text="GSPO raises the solve rate",
            paper="no number of its own for GSPO; 8B model, OpenCompass 79.5 after all stages",
            how="pass@1 on held-out numbers, 32 samples each, against that of the warm start",
            must="rises by at least 0.3",
            judge=_rises,
        ),
        Claim(
            text="the hint ladder turns all-wrong prompts into mixed groups",
            paper="questions wrong in all rollouts are trained on with the lowest of 5 hint levels that helps; no number",
            how="training numbers whose 8 answers are all wrong before RL; 8 answers with the weakest hint that helps",
            must="at least 30 % of them become mixed",
            judge=_ladder,
        ),
    ),
    arms=_arms,
    measure=measure,
    studies={"hints": _hints},
    scales={
        "laptop": "tiny-addends, 150 steps of GSPO and of GRPO; the ladder on the model before RL",
        "gpu": "a timm SigLIP/ViT with 2-D RoPE and context extension (the vision part, not made yet); one GPU",
        "full": "Keye-VL-1.5-8B, GSPO and alignment RL on about 25,000 prompts; a cluster",
    },
)
