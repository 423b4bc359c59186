"""Fused norms and MLPs give what the plain ones give, forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import linear, silu

from ondol.models import forward
from ondol.models.fused import _GatedMLP, _RMSNorm, fuse
from ondol.records import Segment
from ondol.train.logprobs import SegmentAttention

IDS = torch.tensor([5, 9, 3, 7, 11, 2, 8])


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    attend = SegmentAttention([Segment(0, len(IDS))], IDS.device)
    states = forward.hidden(forward.prepare(model), IDS, torch.arange(len(IDS)), attend)
    return torch.log_softmax(forward.logits(model, states).float(), dim=-1)[:-1].gather(-1, IDS[1:, None]).sum()


def test_the_same_loss_and_gradients(tiny_families) -> None:
    for family, (model, _) in tiny_families.items():
        plain = copy.deepcopy(model).float()
        fast = copy.deepcopy(plain)
        found = fuse(fast)
        gemma = "gemma" in family
        assert found["norms"][0] == (0 if gemma else found["norms"][1]), family
        assert found["mlps"][0] == (0 if gemma else found["mlps"][1]), family
        a, b = loss_of(plain), loss_of(fast)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        a.backward()
        b.backward()
        for (name, x), y in zip(plain.named_parameters(), fast.parameters()):
            assert x.grad is not None and y.grad is not None, name
            scale = float(x.grad.abs().max()) + 1e-12
            torch.testing.assert_close(
                y.grad, x.grad, rtol=1e-4, atol=2e-6 * scale + 1e-8, msg=lambda m, n=f"{family} {name}": f"{n}: {m}"
            )


def test_a_copy_of_a_fused_model_is_its_own(tiny_families) -> None:
    model = copy.deepcopy(next(iter(tiny_families.values()))[0]).float()
    fuse(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert float(loss_of(twin).detach()) != float(loss_of(model).detach())


def test_float64_stays_plain(tiny_families) -> None:
    for model, _ in tiny_families.values():
        assert all(switched == 0 for switched, _ in fuse(copy.deepcopy(model).double()).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_against_float64(dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 16, generator=g).to(dtype).requires_grad_()
    w = torch.randn(16, generator=g).to(dtype).requires_grad_()
    out = torch.randn(3, 5, 16, generator=g).to(dtype)
    y = _RMSNorm.apply(x, w, 1e-6)
    y.backward(out)
    wide, weight = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    reference = weight * wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    reference.backward(out.double())
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 6e-2}
    for got, want in ((y, reference), (x.grad, wide.grad), (w.grad, weight.grad)):
        torch.testing.assert_close(got.double(), want, **near)


def test_mlp_gradients_by_finite_differences() -> None:
    g = torch.Generator().manual_seed(1)
    shapes = ((4, 6), (8, 6), (8, 6), (6, 8))
    x, gate, up, down = (torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes)
    assert torch.autograd.gradcheck(_GatedMLP.apply, (x, gate, up, down))
    torch.testing.assert_close(_GatedMLP.apply(x, gate, up, down), linear(silu(linear(x, gate)) * linear(x, up), down))


def test_frozen_weights_get_no_gradient() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    frozen = [torch.randn(s) for s in ((8, 6), (8, 6), (6, 8))]
    _GatedMLP.apply(x, *frozen).sum().backward()
    assert x.grad is not None and all(f.grad is None for f in frozen)
