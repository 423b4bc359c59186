"""Methods of the survey's table (arXiv 2509.02547, its algorithm table) that are described here and not implemented.

They have the columns of a `Method`, so that the whole map is visible; a recipe that names one is refused. What the table
does not tell is None: nothing is guessed.
"""

from __future__ import annotations

from typing import NamedTuple

from ondol.errors import OndolError


class Documented(NamedTuple):
    """One row of the survey's table."""

    name: str
    family: str
    objective: str
    mechanism: str
    signal: str
    clip: bool | None = None
    kl: str | None = None
    source: str = "arXiv 2509.02547 (survey)"


#: by the name a recipe would use
DOCUMENTED: dict[str, Documented] = {
    row.name: row
    for row in (
        Documented(
            "pf-ppo", "PPO", "clipped ratio", "samples filtered by how reliable the reward model's rank is", "reward model", True
        ),
        Documented(
            "vineppo", "PPO", "clipped ratio", "value by Monte-Carlo rollouts (K = 9) from step boundaries", "verifiable reward", True
        ),
        Documented("psgpo", "PPO", "process supervision", "dense rewards of steps", "process reward"),
        Documented(
            "beta-dpo", "DPO", "log-sigmoid of the margin", "beta adapted per batch from the mean margin; outliers filtered", "preference pairs", False, "reference in the loss"
        ),
        Documented(
            "step-dpo", "DPO", "log-sigmoid of the margin", "the first wrong step against a right one, after the correct prefix", "step preference pairs", False, "reference in the loss"
        ),
        Documented("lcpo", "DPO", "preference", "preference on length with little data", "preference on length"),
        Documented(
            "prorl", "GRPO", "clipped ratio", "long training: KL, and periodic resets of reference and optimiser", "verifiable reward", True, "yes"
        ),
        Documented(
            "luffy", "GRPO", "mixed-policy ratio", "expert traces in the group, shaped by p / (p + 0.1)", "verifiable reward, expert traces"
        ),
        Documented(
            "chord", "GRPO", "RL and SFT", "annealed weight of SFT on expert traces, token weight p (1 - p)", "verifiable reward, expert traces"
        ),
        Documented(
            "posterior-grpo", "GRPO", "clipped ratio", "process reward only where the outcome is right", "verifiable and process reward", True
        ),
        Documented("step-grpo", "GRPO", "clipped ratio", "rule rewards of steps", "step rewards", True),
        Documented(
            "srpo", "GRPO", "clipped ratio", "two stages; informative prompts are resampled from history", "verifiable reward", True
        ),
        Documented(
            "greso", "GRPO", "clipped ratio", "prompts foreseen to be uninformative are skipped before rollout", "verifiable reward", True
        ),
        Documented(
            "starpo", "GRPO", "clipped ratio", "whole trajectories of thinking and acting turns; prompts filtered by variance", "verifiable reward", True
        ),
        Documented(
            "ghpo", "GRPO", "clipped ratio", "hints of the reference solution where all samples fail", "verifiable reward, solutions", True
        ),
        Documented(
            "edge-grpo", "GRPO", "clipped ratio", "advantage over normalised entropy; guided error correction", "verifiable reward", True
        ),
        Documented(
            "arpo", "GRPO", "clipped ratio", "branches at turns of high entropy after tool calls; shared-prefix advantage", "verifiable reward", True
        ),
        Documented("treepo", "GRPO", "clipped ratio", "tree rollouts with shared prefixes", "verifiable reward", True),
        Documented("dars", "GRPO", "clipped ratio", "more rollouts for hard prompts", "verifiable reward", True),
        Documented(
            "papo", "GRPO", "clipped ratio and perception loss", "KL between outputs with the full and the masked image", "verifiable reward", True
        ),
        Documented(
            "ktae", "GRPO", "clipped ratio", "advantage of a token from its association with right answers", "verifiable reward", True
        ),
        Documented(
            "aspo", "GRPO", "clipped ratio", "clipped bias on the advantage for early tool use", "verifiable reward", True
        ),
    )
}  # fmt: skip


def refuse(name: str) -> None:
    """Raise OndolError when `name` is one of these: it is never replaced by something that runs."""
    row = DOCUMENTED.get(name.lower().replace("_", "-"))
    if row is not None:
        from ondol.parts import names

        raise OndolError(
            f"method: '{name}' is only documented, not implemented ({row.mechanism})",
            f"implemented: {', '.join(names('methods'))}; your own is one file, see CONTRIBUTING",
        )
