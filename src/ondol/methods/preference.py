"""What preference methods share: pairs out of groups, and a loss that belongs to a pair instead of a token.

On-policy by default: a group's answers are ranked by score, the best is chosen and the worst rejected. Recorded
trajectories (`ondol train --dump`) become pairs in the same way, which is the offline use of these methods.

A pair's loss L appears at each of its tokens, with the token weights 1 / (N * length) of N trajectories: each of the two
then adds L / N, and the sum is the mean of L over pairs. Reports are means over tokens, so long pairs count more there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ondol.errors import OndolError
from ondol.methods.base import Method, Scored, TokenInputs
from ondol.methods.primitives import first_of, group_centre, group_index, group_sum, sequence_mean, sequence_sum
from ondol.records import Group

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Sequences of a micro-batch and the groups (pairs) they belong to; S sequences, P pairs.

    Attributes:
        sign: [S] +1 chosen, -1 rejected.
        length: [S] trained tokens.
        pair: [S] index of the sequence's pair.
        of_token: [T] index of the token's sequence.
        count: P.
    """

    sign: Tensor
    length: Tensor
    pair: Tensor
    of_token: Tensor
    count: int

    def difference(self, values: Tensor) -> Tensor:
        """Chosen minus rejected [P] of values [S]; differentiable."""
        return group_sum(self.sign * values, self.pair, self.count)

    def chosen(self, values: Tensor) -> Tensor:
        """Values [S] of the chosen ones [P]; differentiable."""
        return group_sum((self.sign > 0) * values, self.pair, self.count)

    def spread(self, values: Tensor) -> Tensor:
        """Values [P] at each token [T]; differentiable."""
        return values[self.pair][self.of_token]


class PreferenceMethod(Method):
    """Base of the methods that learn from (chosen, rejected) pairs; a subclass defines `pair_loss`."""

    family: ClassVar[str] = "DPO"
    clip: ClassVar[bool] = False
    signal: ClassVar[str] = "preference pairs"
    min_samples: ClassVar[int] = 2
    whole_groups: ClassVar[bool] = True

    pairs_per_group: int = Field(
        default=1, ge=1, description="most pairs made of one problem's answers: best and worst, second best and ..."
    )

    @property
    def skip_zero_advantage(self) -> bool:
        return False

    def keep(self, groups: list[Group]) -> list[Group]:
        """Pairs [chosen, rejected], each a group of its own. Raises OndolError where there are none at all."""
        pairs = [p for g in groups for p in pairs_of(g, self.pairs_per_group)]
        if groups and not pairs:
            raise OndolError(
                f"{type(self).__name__} learns from pairs, and this data is unpaired: none of {len(groups)} groups holds "
                "a better and a worse answer",
                "sample more answers per prompt or take other problems; the method 'kto' learns from unpaired answers",
            )
        return pairs

    def shaped_rewards(self, groups: list[Group]) -> list[list[float]]:
        return [g.scores for g in groups]

    def advantages(self, x: Scored) -> Tensor:
        """+1 for the chosen, -1 for the rejected."""
        return group_centre(x.rewards, x.group).sign()

    def token_weights(self, lengths: Tensor) -> Tensor:
        return sequence_mean(lengths)

    def token_loss(self, x: TokenInputs) -> tuple[Tensor, dict[str, Tensor]]:
        logp, length, of_token = sequence_sum(x.logp, x.sequence)
        reference = None if x.reference_logp is None else sequence_sum(x.reference_logp, x.sequence)[0]
        pair, count = group_index(first_of(x.group, of_token, len(length)))
        pairs = Pairs(first_of(x.advantage, of_token, len(length)).sign(), length, pair, of_token, count)
        loss, margin = self.pair_loss(pairs, logp, reference)
        at_token = pairs.spread(margin.detach())
        return pairs.spread(loss), {
            "preference/margin": at_token,
            "preference/accuracy": (at_token > 0).to(at_token.dtype),
        }

    def pair_loss(self, pairs: Pairs, logp: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sums of log-probabilities [S], under the policy and (where asked for) the reference -> the loss of each pair
        [P], and by how much the implicit reward of its chosen answer is the higher one [P]."""
        raise NotImplementedError(f"{type(self).__name__} must define pair_loss()")


def pairs_of(group: Group, most: int) -> list[Group]:
    """Disjoint pairs [chosen, rejected] of a group: k-th best and k-th worst score, while they differ.

    Of equal scores the earlier sample is taken first on both sides. Answers without a trained token make no pair.
    """
    able = [t for t in group.trajectories if any(t.trained)]
    best = sorted(able, key=lambda t: -t.score)  # sorts are stable: nothing here is left to chance
    worst = sorted(able, key=lambda t: t.score)
    pairs = zip(best[: min(most, len(able) // 2)], worst)
    return [Group(group.problem, [b, w]) for b, w in pairs if b.score > w.score]
