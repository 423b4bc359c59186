"""AdamW: against torch's own, in half precision, and saved and restored to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ondol.recipe import OptimizerSettings
from ondol.train.optimizer import Optimizer


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def gradients(model: nn.Module, step: int, scale: float = 1.0) -> None:
    """Accumulate some gradient of its own for each step."""
    dtype = next(model.parameters()).dtype
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
    (scale * model(x).square().sum()).backward()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("scale", [1e-3, 30.0])  # below and above the clipping norm
@pytest.mark.parametrize("decay, warmup", [(0.0, 0), (0.1, 4)])
def test_equals_adamw_with_clipping(scale, decay, warmup):
    settings = OptimizerSettings(
        learning_rate=3e-3, weight_decay=decay, warmup_steps=warmup, beta1=0.8, beta2=0.97, eps=1e-6, max_gradient_norm=0.7
    )  # fmt: skip
    ours, theirs = network(), network()
    optimizer = Optimizer(ours, settings)
    adamw = torch.optim.AdamW(theirs.parameters(), betas=(0.8, 0.97), eps=1e-6, weight_decay=decay)
    for step in range(8):
        gradients(ours, step, scale), gradients(theirs, step, scale)
        rate = 3e-3 * (min(1.0, (step + 1) / warmup) if warmup else 1.0)
        assert optimizer.learning_rate == pytest.approx(rate, rel=1e-12)
        norm = optimizer.gradient_norm()
        reference = nn.utils.clip_grad_norm_(theirs.parameters(), 0.7)
        torch.testing.assert_close(norm, reference, rtol=1e-6, atol=0)
        adamw.param_groups[0]["lr"] = rate
        optimizer.step(norm), adamw.step(), adamw.zero_grad()
        for a, b in zip(weights(ours), weights(theirs)):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)
    assert all(p.grad is None for p in ours.parameters())


def test_frozen_and_untouched_parameters_stay():
    model = network()
    model[0].weight.requires_grad_(False)
    before = weights(model)
    optimizer = Optimizer(model, OptimizerSettings(learning_rate=0.1, weight_decay=0.5))
    model[2](torch.ones(1, 8)).sum().backward()  # the first layer's bias gets no gradient
    optimizer.step(optimizer.gradient_norm())
    changed = [not torch.equal(a, b) for a, b in zip(before, weights(model))]
    assert changed == [False, False, True, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tiny_updates_accumulate_in_half_precision(dtype):
    """Each update is far below half precision's step; 300 of them are not."""
    model = network(dtype)
    reference = copy.deepcopy(model).float()
    plain = copy.deepcopy(model)
    settings = OptimizerSettings(learning_rate=1e-5)
    optimizer, wide = Optimizer(model, settings), Optimizer(reference, settings)
    naive = torch.optim.AdamW(plain.parameters(), lr=1e-5, weight_decay=0.0)
    start = weights(model)
    for _ in range(300):
        for m in (model, reference, plain):
            for p in m.parameters():
                p.grad = torch.full_like(p, 1e-3)
        optimizer.step(optimizer.gradient_norm()), wide.step(wide.gradient_norm()), naive.step()
    moved = [(a - b).abs().mean().item() for a, b in zip(start, weights(model))]
    assert all(2e-3 < m < 4e-3 for m in moved)
    stuck = (plain[0].weight == start[0]).float().mean()
    assert stuck > 0.3 if dtype == torch.bfloat16 else stuck < 1
    for p, q in zip(model.parameters(), reference.parameters()):
        assert torch.equal(p, q.to(dtype))  # the float32 copies took the very same way


def test_gradients_are_summed_in_float32():
    model = network(torch.bfloat16)
    optimizer = Optimizer(model, OptimizerSettings())
    parts = [1.0] + [2**-9] * 256  # in bfloat16 the sum would stay 1
    for part in parts:
        for p in model.parameters():
            p.grad = torch.full_like(p, part)
        optimizer.collect()
    count = sum(p.numel() for p in model.parameters())
    assert float(optimizer.gradient_norm()) == pytest.approx(1.5 * count**0.5, rel=1e-6)
    assert optimizer.gradient_norm().dtype == torch.float32
    optimizer.zero()
    assert float(optimizer.gradient_norm()) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_state_round_trip_is_exact(dtype):
    settings = OptimizerSettings(learning_rate=1e-2, warmup_steps=5, weight_decay=0.01)
    model = network(dtype)
    optimizer = Optimizer(model, settings)

    def train(m: nn.Module, o: Optimizer, steps: range) -> None:
        for step in steps:
            gradients(m, step)
            o.step(o.gradient_norm())

    train(model, optimizer, range(3))
    saved = {k: v.clone() for k, v in optimizer.state().items()}
    other = copy.deepcopy(model)  # weights as a checkpoint has them
    resumed = Optimizer(other, settings)
    train(other, resumed, range(50, 52))  # whatever it held is replaced
    other.load_state_dict(model.state_dict())
    resumed.load_state(saved)
    again = resumed.state()
    assert again.keys() == saved.keys() and all(torch.equal(again[k], saved[k]) for k in saved)
    train(model, optimizer, range(3, 7)), train(other, resumed, range(3, 7))
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(other)))
    assert all(torch.equal(v, resumed.state()[k]) for k, v in optimizer.state().items())


def test_a_fresh_state_empties_an_old_one():
    fresh, used = Optimizer(network(), OptimizerSettings()), network()
    optimizer = Optimizer(used, OptimizerSettings())
    empty = {k: v.clone() for k, v in fresh.state().items()}
    gradients(used, 0)
    optimizer.step(optimizer.gradient_norm())
    optimizer.load_state(empty)
    assert optimizer.state().keys() == {"updates"} and optimizer.updates == 0
