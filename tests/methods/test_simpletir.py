"""SimpleTIR: void turns, who counts, the loss, and the gradient formula it argues with."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ondol.errors import OndolError
from ondol.methods.base import Scored, TokenInputs
from ondol.methods.grpo import GRPO
from ondol.methods.simpletir import (
    SimpleTIR,
    classify_turn,
    has_void_turn,
    min_token_prob,
    token_gradient_norm,
    turn_statistics,
)
from ondol.parts import make
from ondol.records import Finish, Group, Problem, StopReason, ToolCall, ToolResult, Trajectory, Turn

WIDE = {"dtype": torch.float64}
PROBLEM = Problem("p", "q", "a")


@pytest.mark.parametrize(
    "text, code, answer, truncated",
    [
        ("```python\nprint(1)\n```", True, False, False),
        ("Let me see.\n```py\nx\n```\nand so", True, False, False),
        ("```\nx\n```", True, False, False),
        ("```python\nprint(1)", False, False, True),  # cut inside the fence
        ("```python\nx\n```\n```python\ny", True, False, False),  # cut after a complete one
        ("```js\nx\n```", False, False, False),
        ("```js\nx\n```\nthen\n```js\ny\n```", False, False, False),
        ("```js\nx\n```\n```python\ny\n```", True, False, False),
        ("so it is \\boxed{7}", False, True, False),
        ("\\boxed{7}\n```python\nx\n```", True, True, False),
        ("```python\nx\n```\n\\boxed{7}", True, False, False),  # after the block: not kept
        ("```python\nprint('\\boxed{7}')\n```", True, True, False),
        ("only words", False, False, False),
        ("", False, False, False),
    ],
)
def test_turns_of_the_paper_s_format(text, code, answer, truncated):
    kind = classify_turn(text)
    assert (kind.code, kind.answer, kind.truncated) == (code, answer, truncated)
    assert kind.void == (not code and not answer)


CALL = [ToolCall("calculator", {"expression": "1+1"})]


def turn(text: str, calls=(), finish=Finish.END, ok: bool | None = None) -> Turn:
    results = [] if ok is None else [ToolResult("2", ok, "ok" if ok else "error")]
    return Turn(1, 2, text, finish, list(calls), results)


def trajectory(*turns: Turn, score: float = 0.0, logp=(-1.0, -2.0), stop=StopReason.ANSWERED, sample=0) -> Trajectory:
    on = [False] + [True] * len(logp)
    t = Trajectory((0, 0, sample), PROBLEM, [1] * len(on), 1, on, list(on), [0.0, *logp], [0] * len(on), list(turns))
    t.score = t.reward = score
    t.stop_reason = stop
    return t


GOOD = (turn("call", CALL, Finish.STOP, ok=True), turn("2"))
CUT = (turn("call", CALL, Finish.STOP, ok=False), turn("I thi", finish=Finish.LENGTH))


@pytest.mark.parametrize(
    "turns, void",
    [
        (GOOD, False),
        (CUT, True),
        ((turn("7"),), False),
        ((turn(" "),), True),
        ((turn("call", CALL),), False),  # on the last turn: not carried out, but it acts
        ((turn("words"), turn("7")), True),  # words in the middle neither act nor answer
        ((turn("7", finish=Finish.STOP),), False),
        ((turn("7", finish=Finish.TIMEOUT),), True),
        ((), True),
    ],
)
def test_turns_with_calls(turns, void):
    assert has_void_turn(trajectory(*turns)) is void


def says_seven(t, turn):
    return "7" not in turn.text


def test_predicates():
    t = trajectory(turn("```python\nx\n```"), turn("\\boxed{7}"))
    assert SimpleTIR(void="fences").counted([Group(PROBLEM, [t])]) == [[True]]
    assert SimpleTIR().counted([Group(PROBLEM, [t])]) == [[False]]
    own = SimpleTIR(void=f"{__name__}:says_seven")
    assert own.counted([Group(PROBLEM, [t, trajectory(turn("7"))])]) == [[False, True]]
    for wrong in ("call", "nowhere:f", f"{__name__}:CALL"):
        with pytest.raises(OndolError):
            make("methods", {"name": "simpletir", "void": wrong}, "method")


@settings(max_examples=100, deadline=None)
@given(
    made=st.lists(st.tuples(st.integers(0, 1), st.booleans()), min_size=2, max_size=8),
    over=st.sampled_from(["all", "kept"]),
)
def test_advantages_over_all_or_those_kept(made, over):
    ts = [trajectory(*(CUT if void else GOOD), score=s, sample=i) for i, (s, void) in enumerate(made)]
    method = SimpleTIR(advantage_over=over)
    group = torch.full((len(ts),), 3)
    got = method.advantages(Scored(torch.tensor([t.reward for t in ts], **WIDE), group, ts)).tolist()
    pool = [s for s, void in made if over == "all" or not void]
    mean = sum(pool) / max(len(pool), 1)
    std = math.sqrt(sum((s - mean) ** 2 for s in pool) / max(len(pool) - 1, 1))
    for (s, void), a in zip(made, got):
        want = 0.0 if (void and over == "kept") or len(set(pool)) < 2 else (s - mean) / (std + method.eps)
        assert a == pytest.approx(want, abs=1e-12)
    (counted,) = method.counted([Group(PROBLEM, ts)])
    assert counted == [not void for _, void in made]
    assert SimpleTIR(filter="none").counted([Group(PROBLEM, ts)]) == [[True] * len(ts)]


def test_filters_of_groups():
    def group(scores, overlong=0):
        stops = [StopReason.TURN_LENGTH] * overlong + [StopReason.ANSWERED] * (len(scores) - overlong)
        return Group(PROBLEM, [trajectory(*GOOD, score=s, stop=w) for s, w in zip(scores, stops)])

    equal, rare, even, long = group([1] * 8), group([1] + [0] * 15), group([0, 1] * 4), group([0, 1] * 4, 5)
    groups = [equal, rare, even, long]
    assert SimpleTIR().keep(groups) == [rare, even, long]
    assert SimpleTIR(min_std=0).keep(groups) == groups
    assert SimpleTIR(accuracy=(0.1, 0.9)).keep(groups) == [even, long]
    strict = SimpleTIR(drop_overlong=True)
    assert strict.keep(groups) == [rare, even]
    assert strict.counted([long]) == [[False] * 5 + [True] * 3]
    assert SimpleTIR().max_resamples == 2


def test_low_probability_filter():
    ts = [
        trajectory(*GOOD, logp=lp) for lp in ((-1.0, -2.0), (-1.0, math.log(1e-3) - 0.01), (math.log(1e-3) + 0.01,), ())
    ]
    assert SimpleTIR(filter="low_prob").counted([Group(PROBLEM, ts)]) == [[True, False, True, True]]
    assert min_token_prob(ts[0]) == pytest.approx(math.exp(-2)) and min_token_prob(ts[3]) == 1


tokens = st.lists(st.tuples(st.floats(-3, 3), st.floats(-4, -0.1)), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(
    made=st.lists(st.tuples(tokens, st.floats(-2, 2)), min_size=1, max_size=5),
    kind=st.sampled_from(["void", "high_ratio"]),
)
def test_loss(made, kind):
    """Loops: mean over tokens of -min(r A, clip(r) A), for A < 0 at most -3 A; nothing where the highest ratio is above 3."""
    method = SimpleTIR(filter=kind)
    want, count = 0.0, sum(len(t) for t, _ in made)
    for pairs, a in made:
        if kind == "high_ratio" and max(d for d, _ in pairs) > math.log(3.0):
            continue
        for d, _ in pairs:
            r = math.exp(d)
            objective = min(r * a, min(max(r, 0.8), 1.28) * a)
            want -= (max(objective, 3.0 * a) if a < 0 else objective) / count
    rows = [(lp, lp - d, a, i) for i, (pairs, a) in enumerate(made) for d, lp in pairs]
    logp, old, advantage = (torch.tensor(c, **WIDE) for c in list(zip(*rows))[:3])
    sequence = torch.tensor([r[3] for r in rows])
    x = TokenInputs(logp, old, None, advantage, sequence, torch.zeros_like(sequence), advantage)
    loss, reports = method.token_loss(x)
    weights = method.token_weights(torch.tensor([len(p) for p, _ in made], **WIDE))
    assert (loss * weights[sequence]).sum().item() == pytest.approx(want, rel=1e-9, abs=1e-9)
    assert set(reports) == {"policy/clip_share", "policy/ratio_max"}


def test_parts_off_it_is_token_mean_grpo():
    generator = torch.Generator().manual_seed(0)
    old, advantage = -torch.rand(30, generator=generator, **WIDE), torch.randn(30, generator=generator, **WIDE)
    logp, index = old + torch.randn(30, generator=generator, **WIDE), torch.arange(30) // 5
    x = TokenInputs(logp, old, None, advantage, index, index, advantage)
    mine = SimpleTIR(clip_high=0.2, dual_clip=1e9, filter="none")
    torch.testing.assert_close(mine.token_loss(x)[0], GRPO(kl_coef=0).token_loss(x)[0])


def test_clip_share_is_where_no_gradient_is():
    generator = torch.Generator().manual_seed(1)
    old, advantage = -torch.rand(200, generator=generator, **WIDE), torch.randn(200, generator=generator, **WIDE)
    logp = (old + 2 * torch.randn(200, generator=generator, **WIDE)).requires_grad_()
    x = TokenInputs(logp, old, None, advantage, torch.arange(200), torch.arange(200), advantage)
    loss, reports = SimpleTIR().token_loss(x)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert torch.equal(gradient == 0, reports["policy/clip_share"].bool())


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocabulary=st.integers(2, 40),
    scale=st.floats(0.1, 8),
    a=st.floats(-3, 3),
    gap=st.floats(-1, 1),
)
def test_gradient_norm_formula(seed, vocabulary, scale, a, gap):
    """Against autograd through log-softmax and the ratio."""
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(5, vocabulary, generator=generator, **WIDE)).requires_grad_()
    chosen = torch.randint(0, vocabulary, (5,), generator=generator)
    logp = logits.log_softmax(-1).gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    r = torch.exp(logp - (logp.detach() - gap))
    (gradient,) = torch.autograd.grad((-r * a).sum(), logits)
    got = token_gradient_norm(logits.detach(), chosen, torch.full((5,), a, **WIDE), r.detach())
    torch.testing.assert_close(got, gradient.norm(dim=-1), rtol=1e-6, atol=1e-6)


def test_statistics():
    ts = [trajectory(*GOOD), trajectory(*CUT, logp=(-4.0,)), trajectory(turn("7"))]
    assert turn_statistics(ts) == pytest.approx(
        {
            "turns/void_share": 1 / 5,
            "turns/void_trajectory_share": 1 / 3,
            "turns/mean": 5 / 3,
            "turns/call_share": 2 / 3,
            "turns/valid_call_share": 1 / 2,
            "turns/min_token_prob": math.exp(-4),
        }
    )
    assert all(map(math.isfinite, turn_statistics([]).values()))
