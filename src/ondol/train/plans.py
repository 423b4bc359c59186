"""What is rolled out in training, in numbers, so that every process makes the same plan of it."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ondol.cluster.scoring import ChildScorer, RewardWorkers, Scorer
from ondol.engines.torch import TorchEngine
from ondol.models.load import LoadedModel, load_model
from ondol.recipe import Recipe, to_table
from ondol.rollout.driver import Plan
from ondol.rollout.masking import Masking
from ondol.train.prompts import PHASES, problems


@dataclass(frozen=True)
class Asked:
    """One call for rollouts.

    Attributes:
        phase, step: as in trajectories' keys and random streams.
        count: problems, from number `begin` of the phase's on; `first` is the first one's number in keys.
        samples: of each problem;  temperature: None for the recipe's.
        examples: the warm start's worked conversations come before each question.
    """

    phase: str
    step: int
    begin: int
    count: int
    samples: int
    first: int = 0
    temperature: float | None = None
    examples: bool = False


def plan_of(recipe: Recipe, asked: Asked) -> Plan:
    """The same recipe and numbers always give the same plan."""
    r, warm = recipe, recipe.warm_start
    change = {} if asked.temperature is None else {"temperature": asked.temperature}
    return Plan(
        r.task,
        r.env,
        problems(r, asked.count, asked.begin, asked.phase),
        asked.samples,
        r.sampling.model_copy(update=change),
        seed=(r.seed, PHASES[asked.phase]),
        step=asked.step,
        first=asked.first,
        examples=warm.messages if asked.examples and warm is not None else (),
        timeout_s=r.rollout.timeout_s,
        overlap_tools=r.rollout.overlap_tools,
        turn_barrier=r.rollout.turn_barrier,
        max_response_tokens=r.rollout.max_response_tokens,
        masking=Masking() if asked.phase == "warm_start" else r.rollout,  # there the traces' own turns are imitated
    )


def load(recipe: Recipe) -> LoadedModel:
    """The model as the recipe sets it."""
    m = recipe.model
    return load_model(m.path, dtype=m.dtype, device=m.device, chat=m.chat, lora=m.lora, fused=m.fused)


def make_engine(recipe: Recipe, loaded: LoadedModel) -> TorchEngine:
    """The embedded engine as the recipe sets it."""
    r = recipe.rollout
    return TorchEngine(
        loaded.model,
        loaded.tokenizer,
        loaded.context_length,
        max_batch=r.max_batch,
        share_prefixes=r.share_prefixes,
        pack_weights=r.pack_weights,
        cuda_graphs=r.cuda_graphs,
    )


def reward_workers(
    recipe: Recipe, say: Callable[[str], None], make: Callable[[dict[str, Any]], Scorer] = ChildScorer
) -> RewardWorkers | None:
    """Those that the recipe sets (None: none); its task asks them until they are closed. `make` makes a scorer from the task's table."""
    r = recipe.rollout
    if not r.reward_workers:
        return None
    table = to_table(recipe)["task"]
    return RewardWorkers(recipe.task, lambda: make(table), r.reward_workers, r.reward_timeout_s, say)


def hit_share(before: Any, after: Any) -> float:
    """Of the prompt tokens between two readings of an engine's counters, the share that was copied instead of computed."""
    reused, new = after.reused_tokens - before.reused_tokens, after.prefilled_tokens - before.prefilled_tokens
    return reused / max(reused + new, 1)


def peak_mib() -> float:
    """The most memory this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if sys.platform != "darwin" else peak / 1024**2
