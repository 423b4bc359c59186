"""Filters that leave too little, trajectories that do not count, and what a method remembers."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from test_critic import metrics_of
from test_every_method import learner_of, rollouts
from test_loop import Heard, Run, fresh, go, same

from ondol.errors import OndolError
from ondol.methods.base import TokenInputs
from ondol.methods.dapo import DAPO
from ondol.methods.grpo import GRPO
from ondol.store import latest_checkpoint
from ondol.train import checkpoint, loop
from ondol.train.filters import filtered, is_hopeless


class First(GRPO):
    """Keeps the first so many groups of each batch, and asks for more."""

    kl_coef: float = 0.0
    kept: int = 1
    again: int = 2

    @property
    def max_resamples(self) -> int:
        return self.again

    def keep(self, groups):
        return groups[: self.kept]


class Even(First):
    """Keeps groups of even numbers."""

    def keep(self, groups):
        return [g for g in groups if g.trajectories[0].key[1] % 2 == 0]


class Void(GRPO):
    """Counts no trajectory of problems with an even number."""

    kl_coef: float = 0.0

    def counted(self, groups):
        return [[g.problem.data.get("number", 1) % 2 == 1] * len(g.trajectories) for g in groups]


class Remembers(GRPO):
    """Advantages that depend on how often a problem was seen."""

    kl_coef: float = 0.0

    def advantages(self, x):
        seen = torch.ones_like(x.rewards)
        for i, t in enumerate(x.trajectories):
            if t.key[2] == 0:
                x.memory[t.problem.id] = x.memory.get(t.problem.id, 0) + 1
            seen[i] = x.memory[t.problem.id]
        return super().advantages(x) * seen


class Whole(GRPO):
    """Needs groups whole, and a number of the whole update."""

    kl_coef: float = 0.0
    whole_groups = True
    needs_constant = True

    def constant(self, x: TokenInputs):
        return x.logp.sum() * 0 + len(x.logp)

    def token_loss(self, x):
        for g in x.group.unique():
            _TOKENS.setdefault(int(g), []).append(int((x.group == g).sum()))
        _CONSTANTS.append(float(x.constant))
        return super().token_loss(x)

    @property
    def skip_zero_advantage(self):
        return False


_TOKENS: dict[int, list[int]] = {}
_CONSTANTS: list[float] = []


# -- sampling more --------------------------------------------------------------------------------------------------------


def test_more_is_asked_for_until_there_is_enough():
    groups, asked = rollouts(prompts=3), []

    def more(again):
        asked.append(again)
        return rollouts(seed=50 + again, prompts=3)

    found = filtered(First(kept=1, again=5), groups, 3, more)
    assert asked == [1, 2] and len(found.kept) == 3 and found.resampled == 6 and len(found.sampled) == 9
    assert len(groups) == 3  # the caller's list is as it was
    asked.clear()
    assert len(filtered(First(kept=2, again=5), groups, 3, more).kept) == 3 and asked == [1]  # cut to what was wanted
    asked.clear()
    assert len(filtered(First(kept=1, again=1), groups, 3, more).kept) == 2 and asked == [1]
    assert len(filtered(First(kept=1, again=9), groups, 3, None).kept) == 1  # recorded groups: no more can be had


@pytest.mark.parametrize(
    "kept, steps, resamples, hopeless, all_right",
    [
        ([5] + [0] * 10, 20, False, False, True),  # everything is right by now
        ([5, 0], 20, True, False, True),
        ([0] * 10, 20, False, True, True),  # and was so from the start: there is nothing to learn
        ([0], 20, True, True, True),
        ([0], 20, True, True, False),
        ([0], 20, False, False, False),
        ([5, 0], 2, False, False, False),
        ([0], 1, False, True, False),
        ([0, 0], 2, False, True, False),
        ([0] * 9, 20, False, False, False),
        ([0] * 10, 20, False, True, False),
        ([5] + [0] * 10, 20, False, True, False),
        ([0] * 9 + [1] + [0] * 9, 40, False, False, False),
    ],
)
def test_when_a_run_gives_up(kept, steps, resamples, hopeless, all_right):
    assert is_hopeless(First(), kept, steps, resamples, all_right) is hopeless


MORE = (
    "method={name='test_filters_memory:First', kept=1, again=3}",
    "train.prompts_per_step=2",
    "train.steps=3",
    "train.checkpoint_every_steps=1",
    "evaluate.problems=0",
)


def test_a_resampling_run_and_its_resume(tmp_path, monkeypatch) -> None:
    even = (*MORE, "method.name='test_filters_memory:Even'")
    whole, expected = go(tmp_path / "a", *even)
    for name, value in {"groups/kept": 2, "groups/resampled": 2}.items():
        assert [m.value for m in whole.db.metrics(name)] == [value] * 3
    rows = whole.db.trajectory_rows(phase="rl", step=1)
    assert sorted({r.problem for r in rows}) == [0, 1, 2, 3]
    real = loop.Trainer._reinforce

    def once(self, step):
        if step == 3:
            raise RuntimeError("cut")
        real(self, step)

    with monkeypatch.context() as m:
        m.setattr(loop.Trainer, "_reinforce", once)
        with pytest.raises(RuntimeError, match="cut"):
            go(tmp_path / "b", *even)
    resumed, found = go(tmp_path / "b", *even, again=Run.open(Run.find(tmp_path / "b", "last")))
    assert same(found, expected) and metrics_of(resumed) == metrics_of(whole)
    # and from its record, where no more can be sampled
    _, again = go(tmp_path / "c", *even, dump=str(whole.path))
    assert same(again, expected)


def test_nothing_left_after_sampling_more_is_an_error(tmp_path) -> None:
    with pytest.raises(OndolError, match=r"step 1: .* none of 8 groups \(.*all wrong.*all right.*6 of them sampled"):
        go(tmp_path, *MORE, "method.kept=0")


def test_an_empty_step_is_left_out(tmp_path) -> None:
    """Without further sampling a run goes on; where nothing ever came of it, that is an error at its end."""
    heard = Heard()
    with pytest.raises(OndolError, match=r"step 3: .* none of 2 groups"):
        go(tmp_path, *MORE, "method.kept=0", "method.again=0", reporter=heard)
    assert len(heard.warnings) == 2 and all("nothing was updated" in w for w in heard.warnings)
    run = Run.open(Run.find(tmp_path, "last"))
    assert len(run.db.events("empty_step")) == 3
    assert same(fresh(), {k: v for k, v in fresh().items()})


# -- who counts -----------------------------------------------------------------------------------------------------------


def test_who_does_not_count_has_no_gradient_but_a_say_in_the_statistics():
    groups = rollouts()
    for g in groups:
        g.problem.data["number"] = int(g.problem.id)
    void = {t.key for g in groups if int(g.problem.id) % 2 == 0 for t in g.trajectories}
    learner = learner_of(Void(), 300)
    packed = []
    real = learner.pack

    def pack(sequences, **more):
        packed.extend(s.trajectory.key for s in sequences)
        return real(sequences, **more)

    learner.pack = pack
    metrics = learner.reinforce(groups, Void())
    assert packed and not set(packed) & void
    assert metrics["groups/counted_share"] == pytest.approx(1 - len(void) / sum(len(g.trajectories) for g in groups))
    assert metrics["groups/response_utilisation"] <= metrics["groups/counted_share"]


def test_an_update_where_nobody_counts_is_left_out(tmp_path) -> None:
    class Nobody(GRPO):
        def counted(self, groups):
            return [[False] * len(g.trajectories) for g in groups]

    groups = rollouts()
    learner = learner_of(Nobody(kl_coef=0), 300)
    before = {k: v.clone() for k, v in learner.model.state_dict().items()}
    metrics = learner.reinforce(groups, Nobody(kl_coef=0, minibatches=3))
    assert metrics["updates/skipped"] == 3 and learner.updates == 0
    assert same(before, dict(learner.model.state_dict()))
    heard = Heard()
    run, _ = go(tmp_path, "method={name='test_filters_memory:Void', minibatches=3}", reporter=heard)
    assert any("no response counted" in w for w in heard.warnings) and run.db.events("skipped_updates")


# -- whole groups, and a number of the whole update -----------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 200, 10**6])
def test_groups_stay_whole_and_the_constant_is_the_updates(budget):
    _TOKENS.clear()
    _CONSTANTS.clear()
    groups = rollouts()
    learner_of(Whole(), budget).reinforce(groups, Whole())
    tokens = [sum(sum(t.trained) for t in g.trajectories) for g in groups]
    assert {i: [n] for i, n in enumerate(tokens)} == _TOKENS
    assert set(_CONSTANTS) == {float(sum(tokens))}


# -- memory ---------------------------------------------------------------------------------------------------------------

REMEMBERS = (
    "method='test_filters_memory:Remembers'",
    "train.steps=5",
    "train.checkpoint_every_steps=2",
    "evaluate.problems=0",
)


def test_memory_travels_with_the_checkpoint(tmp_path, monkeypatch) -> None:
    whole, expected = go(tmp_path / "a", *REMEMBERS)
    real = loop.Trainer._reinforce

    def once(self, step):
        real(self, step)
        if step == 3:  # after the last checkpoint: what is remembered of it must be forgotten
            raise RuntimeError("cut")

    with monkeypatch.context() as m:
        m.setattr(loop.Trainer, "_reinforce", once)
        with pytest.raises(RuntimeError, match="cut"):
            go(tmp_path / "b", *REMEMBERS)
    heard = Heard()
    cut = Run.open(Run.find(tmp_path / "b", "last"))
    resumed, found = go(tmp_path / "b", *REMEMBERS, again=cut, reporter=heard)
    assert same(found, expected) and metrics_of(resumed) == metrics_of(whole) and not heard.warnings
    states = [
        json.loads((latest_checkpoint(r.checkpoints, print) / "state.json").read_text()) for r in (whole, resumed)
    ]
    assert states[0] == states[1] and sum(states[0]["memory"].values()) == 15


def test_a_memory_that_is_gone_is_said(tmp_path, monkeypatch) -> None:
    real = loop.Trainer._reinforce

    def once(self, step):
        if step == 4:
            raise RuntimeError("cut")
        real(self, step)

    with monkeypatch.context() as m:
        m.setattr(loop.Trainer, "_reinforce", once)
        with pytest.raises(RuntimeError, match="cut"):
            go(tmp_path, *REMEMBERS)
    cut = Run.open(Run.find(tmp_path, "last"))
    latest = checkpoint.latest

    def bare(run, warn):
        path, position = latest(run, warn)
        return path, dataclasses.replace(position, memory={})

    monkeypatch.setattr(checkpoint, "latest", bare)  # as an older version wrote it
    heard = Heard()
    go(tmp_path, *REMEMBERS, again=cut, reporter=heard)
    assert any("memory" in w for w in heard.warnings)


def test_memory_must_be_plain():
    class Hoards(GRPO):
        def advantages(self, x):
            x.memory["tensor"] = x.rewards
            return super().advantages(x)

    with pytest.raises(OndolError, match="Hoards keeps what is not plain JSON"):
        learner_of(Hoards(kl_coef=0), 300).reinforce(rollouts(), Hoards(kl_coef=0))


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"advantages": lambda self, x: x.rewards * float("nan")}, "advantages that are not finite"),
        ({"advantages": lambda self, x: x.rewards[1:]}, "gave 17 numbers for 18"),
        ({"counted": lambda self, groups: [[True]]}, "counted gave 1 numbers for 18"),
        ({"shaped_rewards": lambda self, groups: [g.rewards[1:] for g in groups]}, "shaped_rewards gave 15"),
        ({"shaped_rewards": lambda self, groups: [[float("inf")] * 6] * 3}, "rewards are not finite"),
    ],
)
def test_wrong_answers_of_a_method_are_refused(wrong, said):
    method = type("Wrong", (GRPO,), {"__annotations__": {}, "__module__": __name__, **wrong})(kl_coef=0)
    with pytest.raises(OndolError, match=said):
        learner_of(method, 300).reinforce(rollouts(), method)


def test_dapo_keeps_what_is_mixed_and_is_used_whole():
    """The method's filter and the learner's counts agree."""
    groups = rollouts()
    for t in groups[0].trajectories:
        t.score = t.reward = 1.0
    metrics = learner_of(DAPO(), 300).reinforce(groups, DAPO())
    assert metrics["groups/kept"] == 2 and metrics["groups/response_utilisation"] == pytest.approx(12 / 18)
