"""One table of equalities: where one method is a special case of another, both give the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from token_sequences import WIDE, Answer, loss_and_gradient, tame

from ondol.methods.base import Method, Scored
from ondol.methods.cispo import CISPO
from ondol.methods.dapo import DAPO
from ondol.methods.dcpo import DCPO
from ondol.methods.dr_grpo import DrGRPO
from ondol.methods.gmpo import GMPO
from ondol.methods.grpo import GRPO
from ondol.methods.gspo import GSPO
from ondol.methods.pacs import PACS
from ondol.methods.pass_at_k import PassAtK
from ondol.methods.primitives import group_std
from ondol.methods.reinforce import REINFORCE
from ondol.methods.reinforce_pp import ReinforcePP
from ondol.methods.rloo import RLOO

SIZE = 6


def rewards(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Five groups of six zeros and ones, one of them all equal."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2, (5 * SIZE,), generator=generator).to(torch.float64)
    values[:SIZE] = 1.0
    return values, torch.arange(5).repeat_interleave(SIZE)


plain = GRPO(kl_coef=0, eps=0)

#: name -> (method, the other, what the other's advantages are multiplied by)
ADVANTAGES: dict[str, tuple[Method, Method, Callable[[torch.Tensor, torch.Tensor], object]]] = {
    "RLOO = G/(G-1) x Dr.GRPO": (RLOO(), DrGRPO(), lambda r, g: SIZE / (SIZE - 1)),
    "Dr.GRPO = GRPO x (std + eps)": (DrGRPO(), GRPO(eps=0.1), lambda r, g: group_std(r, g) + 0.1),
    "REINFORCE with group baseline = Dr.GRPO": (REINFORCE(baseline="group"), DrGRPO(), lambda r, g: 1),
    "DAPO = GRPO": (DAPO(), GRPO(), lambda r, g: 1),
    "GSPO = GRPO": (GSPO(), GRPO(), lambda r, g: 1),
    "GMPO = GRPO": (GMPO(), GRPO(), lambda r, g: 1),
    "CISPO = GRPO": (CISPO(), GRPO(), lambda r, g: 1),
    "DCPO, all parts off = GRPO": (DCPO(dac=False, sas=False, otm=False), plain, lambda r, g: 1),
    "DCPO, first visit = GRPO": (DCPO(), plain, lambda r, g: 1),
    "DCPO, first visit, no std = Dr.GRPO": (DCPO(norm_by_std=False), DrGRPO(), lambda r, g: 1),
    # the paper of pass@k divides by the population's std, GRPO here by the sample's
    "pass@1 = GRPO": (PassAtK(k=1), plain, lambda r, g: math.sqrt(SIZE / (SIZE - 1))),
    "PACS reports RLOO's": (PACS(), RLOO(), lambda r, g: 1),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages(name, seed):
    method, other, factor = ADVANTAGES[name]
    r, g = rewards(seed)
    torch.testing.assert_close(
        method.advantages(Scored(r, g)), factor(r, g) * other.advantages(Scored(r, g)), rtol=1e-12, atol=1e-12
    )


def test_one_group_alone_makes_batch_and_group_the_same():
    r, g = rewards(1)
    one = Scored(r[SIZE : 2 * SIZE], g[SIZE : 2 * SIZE])
    for a, b in (
        (ReinforcePP(eps=0), plain),
        (ReinforcePP(eps=0, baseline=True), plain),
        (REINFORCE(baseline="batch"), DrGRPO()),
    ):
        torch.testing.assert_close(a.advantages(one), b.advantages(one), rtol=1e-12, atol=1e-12)


def single(seed: int) -> list[Answer]:
    return tame(seed, length=1)


def fresh(seed: int) -> list[Answer]:
    return tame(seed, spread=0.0)


def same_length(seed: int) -> list[Answer]:
    out = tame(seed)
    for a in out:
        a.logp, a.old, a.ref = ([v[0]] * 3 for v in (a.logp, a.old, a.ref))
    return out


wide = dict(clip_low=0.3, clip_high=0.5)
log_clip = dict(clip_low=1 - math.exp(-0.4), clip_high=math.exp(0.4) - 1)

#: name -> (method, the other, updates on which both have the same loss and the same gradient)
LOSSES: dict[str, tuple[Method, Method, Callable[[int], list[Answer]]]] = {
    "GSPO, one token = GRPO": (GSPO(**wide), GRPO(kl_coef=0, **wide), single),
    "GSPO, one token, KL = GRPO": (GSPO(kl_coef=0.1, **wide), GRPO(kl_coef=0.1, **wide), single),
    "GMPO, one token = GRPO clipped at e^+-0.4": (GMPO(), GRPO(kl_coef=0, **log_clip), single),
    "GMPO, no clip in reach = GSPO": (
        GMPO(clip_log=50),
        GSPO(clip_low=1 - 1e-12, clip_high=1e12),
        lambda seed: tame(seed, spread=1.0),
    ),
    "DAPO, symmetric, equal lengths = GRPO": (DAPO(clip_high=0.2), GRPO(kl_coef=0), same_length),
    "DCPO, all parts off = GRPO": (DCPO(dac=False, sas=False, otm=False), GRPO(kl_coef=0), tame),
    "DCPO, all parts off, KL = GRPO": (DCPO(dac=False, sas=False, otm=False, kl_coef=0.1), GRPO(kl_coef=0.1), tame),
    "DCPO, OTM alone at its default scale = GRPO": (DCPO(dac=False, sas=False), GRPO(kl_coef=0), tame),
    "Dr.GRPO, all as long as its constant = GRPO": (DrGRPO(max_length=3), GRPO(kl_coef=0), same_length),
    "REINFORCE++, no KL = GRPO": (ReinforcePP(kl_coef=0), GRPO(kl_coef=0), tame),
    "RLOO, no KL = REINFORCE": (RLOO(kl_coef=0), REINFORCE(), tame),
    "pass@k = GRPO": (PassAtK(), GRPO(kl_coef=0), tame),
    "RLOO, reference where sampling was = REINFORCE": (
        RLOO(),
        REINFORCE(),
        lambda seed: [replace(a, ref=a.old) for a in tame(seed)],
    ),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, seed):
    method, other, make = LOSSES[name]
    update = make(seed)
    got, want = loss_and_gradient(method, update), loss_and_gradient(other, update)
    assert got[0] == pytest.approx(want[0], rel=1e-9, abs=1e-12)
    for a, b in zip(got[1], want[1], strict=True):
        assert a == pytest.approx(b, rel=1e-9, abs=1e-12)


def token_mean_grpo(update: list[Answer]) -> list[Answer]:
    return [
        replace(a, logp=[p], old=[o], ref=[r]) for a in update for p, o, r in zip(a.logp, a.old, a.ref, strict=True)
    ]


#: name -> (method, the other, updates, what the other's gradient is multiplied by): equal gradients, not equal losses
GRADIENTS: dict[str, tuple[Method, Method, Callable[[int], list[Answer]], float]] = {
    "CISPO, equal weights = REINFORCE / tokens": (CISPO(), REINFORCE(), lambda s: token_mean_grpo(fresh(s)), 1.0),
    "GRPO, equal weights, one token = REINFORCE": (GRPO(kl_coef=0), REINFORCE(), lambda s: tame(s, spread=0, length=1), 1.0),
    "CISPO, equal weights = DAPO": (CISPO(), DAPO(), fresh, 1.0),
    "Dr.GRPO, equal weights = REINFORCE / length": (DrGRPO(max_length=4), REINFORCE(), fresh, 1 / 4),
    "GSPO, equal weights = GRPO": (GSPO(), GRPO(kl_coef=0), fresh, 1.0),
    "GMPO, equal weights = GRPO": (GMPO(), GRPO(kl_coef=0), fresh, 1.0),
    "DCPO, equal weights = GRPO": (DCPO(), GRPO(kl_coef=0), fresh, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name, seed):
    method, other, make, factor = GRADIENTS[name]
    update = make(seed)
    for a, b in zip(loss_and_gradient(method, update)[1], loss_and_gradient(other, update)[1], strict=True):
        assert a == pytest.approx([factor * v for v in b], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_dapo_is_grpo_over_tokens(seed):
    """Every token an answer of its own: GRPO's mean over answers is then DAPO's mean over tokens."""
    update = tame(seed)
    dapo = loss_and_gradient(DAPO(clip_high=0.2, dynamic_sampling=False, overlong_penalty=0), update)
    grpo = loss_and_gradient(GRPO(kl_coef=0), token_mean_grpo(update))
    assert dapo[0] == pytest.approx(grpo[0], rel=1e-12)
    assert [v for g in dapo[1] for v in g] == pytest.approx([v for g in grpo[1] for v in g], rel=1e-12)


@pytest.mark.parametrize("beta", [0.5, 1.0])
@pytest.mark.parametrize("weight", ["none", "question"])
@pytest.mark.parametrize("seed", range(3))
def test_pacs_at_equal_weights_is_rloo(seed, weight, beta):
    """All psi are 0; with w = 1 (balanced classes have it) the gradient is beta times RLOO's."""
    update = tame(seed, spread=0.0, size=4)  # two right and two wrong in each group
    reward = torch.tensor([a.reward for a in update], **WIDE)
    group = torch.tensor([a.group for a in update])
    advantages = RLOO().advantages(Scored(reward, group)).tolist()
    want = loss_and_gradient(
        RLOO(kl_coef=0), [replace(a, advantage=v) for a, v in zip(update, advantages, strict=True)]
    )
    got = loss_and_gradient(PACS(weight=weight, beta=beta), update)
    for a, b in zip(got[1], want[1], strict=True):
        assert a == pytest.approx([beta * v for v in b], rel=1e-9)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_pacs_of_one_right_and_one_wrong_is_dpo(seed, beta):
    """-log sigma(beta (D_w - D_l)), D = log pi - log pi_old: DPO with the sampling policy as reference."""
    update = tame(seed, groups=1, size=2)
    right, wrong = sorted(update, key=lambda a: -a.reward)
    assert (right.reward, wrong.reward) == (1, 0)
    margin = beta * (sum(right.log_ratios) - sum(wrong.log_ratios))
    slope = -beta / (1 + math.exp(margin))
    loss, gradient = loss_and_gradient(PACS(beta=beta), update)
    assert loss == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-12)
    for a, g in zip(update, gradient, strict=True):
        assert g == pytest.approx([slope if a is right else -slope] * len(g), rel=1e-9)
