"""UI-TARS-2's PPO for agents of many turns (Wang et al. 2025, arXiv 2509.02544, section on multi-turn RL).

VAPO's critic (value pretraining, decoupled and length-adaptive GAE) and its wider upper clip, over the action tokens of
all turns of an episode in one row; no KL, no imitation of right answers. Reward shaping is theirs in some domains; they
state no coefficients, ours are ours.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ondol.methods.vapo import DecoupledActorCritic
from ondol.records import Finish, Group, StopReason, Trajectory


class UITarsPPO(DecoupledActorCritic):
    """UI-TARS-2's PPO: decoupled, length-adaptive GAE with value pretraining, clip-higher, optional reward shaping."""

    mechanism: ClassVar[str] = "value pretraining, decoupled length-adaptive GAE, clip-higher, shaped reward"
    signal: ClassVar[str] = "verifier or outcome reward model, at the end of an episode"
    source: ClassVar[str] = "arXiv 2509.02544"

    shape_rewards: bool = Field(default=False, description="add the two penalties below; theirs in some domains only")
    format_penalty: float = Field(
        default=0.1,
        ge=0,
        description="taken off for a call that does not parse or a turn that is cut or empty; not stated",
    )
    length_penalty: float = Field(
        default=0.05,
        ge=0,
        description="taken off for every `turn_limit` turns beyond that number, in parts; not stated",
    )
    turn_limit: int = Field(default=10, ge=1, description="turns that cost nothing; not stated")

    def shaped_rewards(self, groups: list[Group]) -> list[list[float]]:
        if not self.shape_rewards:
            return super().shaped_rewards(groups)
        return [[self.shaped(t) for t in g.trajectories] for g in groups]

    def shaped(self, t: Trajectory) -> float:
        """r - format_penalty * [bad format] - length_penalty * max(0, turns - limit) / limit."""
        over = max(0, len(t.turns) - self.turn_limit) / self.turn_limit
        return t.reward - self.format_penalty * _bad_format(t) - self.length_penalty * over


def _bad_format(t: Trajectory) -> bool:
    broken = any(call.error is not None for turn in t.turns for call in turn.calls)
    cut = any(turn.finish in (Finish.LENGTH, Finish.CONTEXT) for turn in t.turns)
    return broken or cut or not t.turns or t.stop_reason is StopReason.EMPTY
