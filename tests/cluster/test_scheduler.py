"""The scheduler: who goes where, and that it loses nobody; the pool of real engines; the simulation."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ondol.cluster.pool import EnginePool
from ondol.cluster.scheduler import POLICIES, Scheduler
from ondol.cluster.simulate import Workload, rollouts, simulate
from ondol.engines.base import Request, Sampling
from ondol.engines.torch import TorchEngine
from ondol.errors import OndolError

events = st.lists(
    st.tuples(st.sampled_from(["new", "grow", "finish", "dispatch"]), st.integers(0, 30), st.integers(1, 60)),
    max_size=80,
)


@settings(max_examples=200, deadline=None)
@given(policy=st.sampled_from(POLICIES), reserve=st.integers(0, 80), engines=st.integers(1, 4), events=events)
def test_nobody_is_lost_or_twice(policy, reserve, engines, events):
    s = Scheduler([100] * engines, policy, reserve=reserve, expected=31)
    tokens: dict[str, int] = {}
    for kind, number, amount in events:
        name = str(number)
        if kind == "new" and name not in tokens:
            s.submit(name, amount)
            tokens[name] = amount
        elif kind == "finish" and name in tokens:
            s.finish(name)
            del tokens[name]
        elif kind == "grow" and name in s.at:
            tokens[name] += amount
            s.grow(name, tokens[name])
            place = s.at[name]
            while (youngest := s.overflowing(place)) is not None:
                s.evict(youngest)
        elif kind == "dispatch":
            before = {n: dict(p.held) for n, p in enumerate(s.places)}
            started = s.dispatch()
            for name, place in started:
                assert s.at[name] == place and name not in before[place]
            if policy == "kv":  # a reservation is kept unless its engine was idle
                for n, p in enumerate(s.places):
                    assert len(p.held) == 1 or p.held == before[n] or p.reserved(reserve) <= 100
        waiting = [*s.queue, *(r for p in s.places for r in p.queue)]
        assert sorted([*waiting, *s.at]) == sorted(tokens) and set(waiting) == set(s.tokens)
        assert all(p.held.keys() == {r for r, at in s.at.items() if at == n} for n, p in enumerate(s.places))
    for _ in range(200):  # whoever is left comes to their turn, if each fits an engine alone
        s.dispatch()
        if not tokens:
            break
        small = [n for n in s.at]
        if not small:
            assert all(v > 100 for v in s.tokens.values())
            break
        s.finish(small[0])
        del tokens[small[0]]


def test_where_they_go():
    s = Scheduler([100, 100], "kv", reserve=40)
    for i in range(5):
        s.submit(str(i), 10)
    assert s.dispatch() == [("0", 0), ("1", 1), ("2", 0), ("3", 1)] and list(s.queue) == ["4"]
    s.finish("1")
    assert s.dispatch() == [("4", 1)]
    s = Scheduler([100, 100], "static", expected=4)
    for i in range(4):
        s.submit(str(i), 60)
    assert s.dispatch() == [("0", 0), ("2", 1)] and [list(p.queue) for p in s.places] == [["1"], ["3"]]
    s.grow("0", 90)
    assert s.overflowing(0) is None
    s = Scheduler([100, 100], "least-requests")
    for i in range(3):
        s.submit(str(i), 30)
    assert sorted(s.dispatch()) == [("0", 0), ("1", 1), ("2", 0)]
    s.grow("0", 90)
    assert s.overflowing(0) == "2"  # the youngest
    s.evict("2")
    assert s.evictions == 1 and list(s.places[0].queue) == ["2"] and s.dispatch() == []


def test_wrong_settings():
    for wrong in ({"policy": "fair"}, {"policy": "static"}, {"reserve": 200}):
        with pytest.raises(OndolError):
            Scheduler([100], **wrong)
    with pytest.raises(OndolError):
        Scheduler([])
    with pytest.raises(OndolError, match="no engine has room"):
        Scheduler([100]).submit("a", 101)


def test_a_pool_samples_what_one_engine_does(tiny_families):
    model, tokenizer = tiny_families["llama"]

    def run(engine):
        out, turns = {}, {}
        for i in range(10):
            engine.submit(Request(str(i), list(range(3, 9 + i)), Sampling(max_tokens=3 + i), (1, i)))
        while engine.busy:
            for done in engine.step():
                turns[done.session] = turns.get(done.session, 0) + 1
                out.setdefault(done.session, []).append((done.ids, done.logp))
                if turns[done.session] == 1:  # a second turn, where the first was
                    i = int(done.session)
                    ids = [*range(3, 9 + i), *done.ids, 5]
                    engine.submit(Request(done.session, ids, Sampling(max_tokens=4), (2, i)))
                else:
                    engine.release(done.session)
        return out

    def torch_engine(m):
        return TorchEngine(m, tokenizer, 128, max_batch=4)

    want = run(torch_engine(model))
    for policy in POLICIES:
        engines = [torch_engine(copy.deepcopy(model)) for _ in range(3)]
        pool = EnginePool(engines, 60, policy, reserve=20 if policy == "kv" else 0, expected=10, most=4)
        got = run(pool)
        assert got.keys() == want.keys() and not pool.scheduler.at and not pool.scheduler.tokens
        for key in want:
            assert [ids for ids, _ in got[key]] == [ids for ids, _ in want[key]]
            for (_, a), (_, b) in zip(got[key], want[key]):
                assert a == pytest.approx(b, abs=1e-4)
        assert all(e.stats.sampled_tokens for e in engines), "every engine has work"
        assert got["3"][1] and pool.stats.sampled_tokens == sum(len(ids) for turns in got.values() for ids, _ in turns)


def test_the_simulation_runs_everybody_to_the_end():
    work = Workload(engines=3, kv_tokens=4000, prompts=6, samples=8, median_tokens=300, longest=900)
    lengths = sum(r.left for r in rollouts(work, 0))
    for policy in POLICIES:
        found = simulate(work, policy, 0, reserve=500)
        assert 0 < found.utilisation <= 1
        # no policy is faster than all engines at work on their own share, nor slower than one row after the other
        assert lengths / 3 * work.row_s < found.makespan_s < lengths * (work.step_s + work.row_s) + 48 * 3 * work.tool_s
        assert found == simulate(work, policy, 0, reserve=500)
    alone = Workload(engines=1, kv_tokens=10_000, prompts=1, samples=1, turns=1)
    (row,) = rollouts(alone, 5)
    assert simulate(alone, "kv", 5, reserve=100).makespan_s == pytest.approx(row.left * (alone.step_s + alone.row_s))
