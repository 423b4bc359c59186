"""The critic: a value of every target, from the hidden state that predicts it."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from ondol.models import forward
from ondol.recipe import OptimizerSettings
from ondol.records import Batch
from ondol.train.logprobs import target_states
from ondol.train.optimizer import Optimizer
from ondol.train.shards import placed_like


class Critic(nn.Module):
    """A linear value head on a trunk of its own (a copy of the policy, `separate`) or on the policy's (`shared`).

    The head begins at zero, so that all values do, and is float32 or wider. Only the trunk's trainable parameters are
    trained: with adapters, the copy's adapters.
    """

    def __init__(self, model: nn.Module, kind: Literal["separate", "shared"]) -> None:
        super().__init__()
        weight = forward.head(model)
        self.trunk = forward.prepare(copy.deepcopy(model)) if kind == "separate" else None
        if self.trunk is not None:
            embedded = forward.causal_lm(self.trunk).get_input_embeddings().weight
            if forward.head(self.trunk) is not embedded:  # no value passes through the output layer
                forward.head(self.trunk).requires_grad_(False)
        self.head = nn.Linear(
            weight.shape[1], 1, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device
        )
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def shared(self) -> bool:
        return self.trunk is None

    def of_states(self, states: Tensor) -> Tensor:
        """Hidden states [T, width] -> values [T]."""
        return self.head(states.to(self.head.weight.dtype)).squeeze(-1)

    def values(self, policy: nn.Module, batch: Batch) -> Tensor:
        """Values [T] of a batch's targets; through the policy's trunk, without gradient for it, where that is shared."""
        if self.trunk is not None:
            return self.of_states(target_states(self.trunk, batch))
        with torch.no_grad():
            states = target_states(policy, batch)
        return self.of_states(states)

    def trainable(self) -> dict[str, Tensor]:
        """What a checkpoint must hold of it."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad}

    def load(self, state: dict[str, Tensor]) -> None:
        """Inverse of `trainable`."""
        with torch.no_grad():
            for name, parameter in self.trainable().items():
                parameter.copy_(placed_like(state[name], parameter))


class CriticLearner:
    """A critic with its optimiser: AdamW as the recipe sets it for the policy, with a learning rate of its own."""

    def __init__(
        self,
        model: nn.Module,
        kind: Literal["separate", "shared"],
        settings: OptimizerSettings,
        learning_rate: float,
    ) -> None:
        self.critic = Critic(model, kind)
        self.optimizer = Optimizer(self.critic, settings.model_copy(update={"learning_rate": learning_rate}))
