"""A run's trajectories in the forms that other trainers' datasets have.

trl    one row a trajectory: conversational prompt and completion, with `label` as KTO's unpaired preferences have it, score and reward
verl   one row a problem: data_source, prompt, ability, reward_model, extra_info, as its RLHFDataset reads them
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ondol.records import Message, Trajectory

if TYPE_CHECKING:
    from ondol.store.run import Run

TRAINING = ("warm_start", "rl")  # phases whose problems may be trained on


def trl_rows(run: Run) -> Iterator[dict[str, Any]]:
    for phase in TRAINING:
        for t in run.db.trajectories(phase=phase):
            prompt, completion = _split(t)
            if completion:
                yield {
                    "prompt": prompt,
                    "completion": completion,
                    "label": t.score >= 1,
                    "score": t.score,
                    "reward": t.reward,
                }


def verl_rows(run: Run) -> Iterator[dict[str, Any]]:
    source = str(run.recipe.get("task", {}).get("name") or run.recipe.get("name") or "ondol")
    seen: set[tuple[str, str]] = set()
    phases = dict.fromkeys(row.phase for row in run.db.trajectory_rows())
    for phase in phases:
        split = "train" if phase in TRAINING else "test"
        for t in run.db.trajectories(phase=phase):
            if (split, t.problem.id) in seen or not t.messages:
                continue
            seen.add((split, t.problem.id))
            yield {
                "data_source": source,
                "prompt": _split(t)[0],
                "ability": str(run.recipe.get("env", {}).get("name") or "tool"),
                "reward_model": {"style": "rule", "ground_truth": t.problem.answer},
                "extra_info": {
                    "split": split,
                    "index": len(seen) - 1,
                    "question": t.problem.question,
                    "id": t.problem.id,
                },
            }


def _split(t: Trajectory) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Messages before the policy's first turn, and from there on. Calls stay in the text, as they were sampled."""
    first = next((i for i, m in enumerate(t.messages) if m.role == "assistant"), len(t.messages))
    return [_plain(m) for m in t.messages[:first]], [_plain(m) for m in t.messages[first:]]


def _plain(m: Message) -> dict[str, str]:
    return {"role": m.role, "content": m.content}
