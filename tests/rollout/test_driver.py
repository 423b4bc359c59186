"""The rollout driver: order, stop reasons, masks, concurrency, deadlines, cleaning up; over scripted engines."""

from __future__ import annotations

import asyncio
import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ondol.rollout.driver as driver
from ondol.engines.base import Sampling
from ondol.envs.base import Env, StepResult
from ondol.envs.tool import ToolEnv
from ondol.models.chat import renderer_for
from ondol.records import Finish, Message, StopReason, Trajectory
from ondol.rollout.driver import Plan, rollout
from ondol.rollout.statistics import statistics
from scripted import TOKENIZER, Echo, Probe, ScriptedEngine, encode

RENDERER = renderer_for(TOKENIZER)
CALL = "<probe>abc</probe>"


def run(script, *, tool=None, env=None, problems=1, samples=1, engine=None, max_turns=3, **plan):
    """(groups flattened, engine) of a rollout."""
    env = env or ToolEnv(tools=(tool or Probe(),), max_turns=max_turns, system="S")
    engine = engine or ScriptedEngine(script)
    task = Echo()
    groups = rollout(
        engine,
        RENDERER,
        Plan(
            task=task,
            env=env,
            problems=[task.problem(i) for i in range(problems)],
            samples=samples,
            sampling=Sampling(),
            seed=(5, 0),
            **plan,
        ),
    )
    assert [len(g.trajectories) for g in groups] == [samples] * problems
    return [t for g in groups for t in g.trajectories], engine


def one(script, **settings) -> Trajectory:
    return run(script, **settings)[0][0]


# -- order and streams --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_groups_and_samples_in_order(overlap):
    ts, engine = run(
        lambda p, s, t: f"<probe>{p}.{s}</probe>" if t < (p + s) % 3 else f"{p}/{s}$",
        problems=4,
        samples=3,
        step=9,
        first=20,
        overlap_tools=overlap,
    )
    assert [t.key for t in ts] == [(9, 20 + p, s) for p in range(4) for s in range(3)]
    assert [t.response for t in ts] == [f"{20 + p}/{s}" for p in range(4) for s in range(3)]
    assert [t.problem.id for t in ts] == [f"p{p}" for p in range(4) for _ in range(3)]
    assert {r.seed for r in engine.requests} == {(5, 0, *t.key, n) for t in ts for n in range(len(t.turns))}
    assert {r.session for r in engine.requests} <= set(engine.released) and not engine.busy


def test_progress_is_called_with_each():
    seen = []
    ts, _ = run(lambda p, s, t: "yes$", problems=3, samples=2, progress=seen.append)
    assert sorted(map(id, seen)) == sorted(map(id, ts))


def test_nothing_to_do():
    assert run(lambda p, s, t: "yes$", problems=0)[0] == []
    assert statistics([]) == {}


# -- stop reasons -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said, reason, score",
    [
        (["yes$"], StopReason.ANSWERED, 1.0),
        (["no$"], StopReason.ANSWERED, 0.0),
        ([CALL, "yes$"], StopReason.ANSWERED, 1.0),
        (["$"], StopReason.EMPTY, 0.0),
        ([" \n$"], StopReason.EMPTY, 0.0),
        ([CALL, CALL, CALL], StopReason.MAX_TURNS, 0.0),
        (["and so on"], StopReason.TURN_LENGTH, 0.0),
        ([CALL, ("yes", Finish.CONTEXT)], StopReason.CONTEXT, 0.0),
        ([CALL, ("ye", Finish.TIMEOUT)], StopReason.TIMEOUT, 0.0),
        ([("", Finish.TIMEOUT)], StopReason.TIMEOUT, 0.0),
        ([("", Finish.ERROR)], StopReason.ERROR, 0.0),
        (["<nothing>1</nothing>$"], StopReason.ANSWERED, 0.0),
    ],
)
def test_stop_reasons(said, reason, score):
    calls = []

    async def work(session, text):
        calls.append(text)
        return text

    tool = Probe(work=work)
    t = one(lambda p, s, turn: said[turn], tool=tool)
    assert (t.stop_reason, t.score, t.reward, len(t.turns)) == (reason, score, score, len(said))
    assert len(calls) == sum(CALL in s for s in said[:2])  # on the third turn, the last, the tool is not called
    assert len(tool.closed) == (1 if calls else 0)
    assert statistics([type("G", (), {"trajectories": [t]})()])[f"stop/{reason}"] == 1.0


def test_errors_of_tools_are_observations():
    async def work(session, text):
        raise ZeroDivisionError("oh")

    t = one(lambda p, s, turn: CALL if turn == 0 else "yes$", tool=Probe(work=work))
    assert (t.stop_reason, t.score) == (StopReason.ANSWERED, 1.0)
    (result,) = t.turns[0].results
    assert not result.ok and "ZeroDivisionError: oh" in result.text
    assert "ZeroDivisionError: oh" in t.messages[-2].content
    stats = statistics([type("G", (), {"trajectories": [t]})()])
    assert stats["tools/error_share"] == 1.0 and stats["tools/calls_per_trajectory"] == 1.0


def test_a_prompt_or_an_observation_that_does_not_fit():
    def script(p, s, turn):
        return CALL if p == 1 and turn == 0 else "yes$"

    long = len(one(script).ids)
    for context, reasons in (
        (long, [StopReason.ANSWERED, StopReason.CONTEXT, StopReason.ANSWERED]),
        (10, [StopReason.ERROR] * 3),
    ):
        ts, engine = run(script, problems=3, engine=ScriptedEngine(script, context=context))
        assert [t.stop_reason for t in ts] == reasons
        assert all("too long" in t.info["error"] for t in ts if t.stop_reason != StopReason.ANSWERED)
        assert not engine.busy
    assert ts[0].turns == [] and ts[0].prompt_length == len(ts[0].ids)


class Broken(Env):
    """An environment that fails, or hangs, at one place for problem 1."""

    max_turns: int = 2
    place: str = "step"
    hang: bool = False

    def episode(self, task, problem, trajectory_id, renderer, examples=()):
        if self.place == "episode" and problem.id == "p1":
            raise KeyError("episode")
        return _BrokenEpisode(self, problem)


class _BrokenEpisode:
    def __init__(self, env, problem):
        self.env, self.problem = env, problem

    async def at(self, place):
        if self.env.place == place and self.problem.id == "p1":
            if self.env.hang:
                await asyncio.sleep(3600)
            raise KeyError(place)

    async def reset(self):
        await self.at("reset")
        return [Message("user", "go")]

    async def step(self, action, last_turn):
        await self.at("step")
        return StepResult([], reward=1.0, terminated=True, score=1.0)

    async def close(self):
        await self.at("close")


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("place", ["episode", "reset", "step", "close"])
def test_a_broken_environment_harms_its_own_trajectory_only(place, overlap):
    ts, engine = run(
        lambda p, s, t: "yes$", env=Broken(place=place), problems=3, samples=2, timeout_s=20, overlap_tools=overlap
    )
    for t in ts:
        if t.problem.id == "p1" and place != "close":
            assert t.stop_reason is StopReason.ERROR and t.info["error"].startswith("KeyError")
        else:
            assert (t.stop_reason, t.score) == (StopReason.ANSWERED, 1.0)
            assert ("close_error" in t.info) == (t.problem.id == "p1")
    assert len(set(engine.released)) == 6


def test_an_environment_that_never_ends_by_itself():
    class Endless(Broken):
        def episode(self, task, problem, trajectory_id, renderer, examples=()):
            class Episode(_BrokenEpisode):
                async def step(self, action, last_turn):
                    return StepResult([Message("user", "go on")], reward=0.25)

            return Episode(self, problem)

    t = one(lambda p, s, turn: "yes$", env=Endless(max_turns=4))
    assert (t.stop_reason, len(t.turns), t.reward) == (StopReason.MAX_TURNS, 4, 1.0)


# -- what is recorded ---------------------------------------------------------------------------------------------

pieces = st.text("ab <>\n", max_size=8)
turns = st.one_of(
    pieces.map(lambda s: s + "$"),
    pieces.map(lambda s: s + CALL),
    pieces,
    st.tuples(pieces, st.sampled_from([Finish.CONTEXT, Finish.TIMEOUT, Finish.ERROR])),
)


@settings(max_examples=120, deadline=None)
@given(
    scripts=st.lists(st.lists(turns, min_size=4, max_size=4), min_size=1, max_size=5),
    max_turns=st.integers(2, 4),
    per_step=st.integers(1, 4),
    overlap=st.booleans(),
    truncated=st.booleans(),
)
def test_masks_follow_the_turns(scripts, max_turns, per_step, overlap, truncated):
    engine = ScriptedEngine(lambda p, s, t: scripts[p][t], per_step=per_step, truncated=truncated)
    ts, _ = run(None, engine=engine, problems=len(scripts), max_turns=max_turns, overlap_tools=overlap)
    for t, script in zip(ts, scripts):
        n = len(t.ids)
        assert n == len(t.sampled) == len(t.trained) == len(t.logp) == len(t.version)
        assert t.sampled == t.trained
        inside = {i for turn in t.turns for i in range(turn.start, turn.end)}
        assert [i in inside for i in range(n)] == t.sampled
        assert all(v == (4 if s else -1) for v, s in zip(t.version, t.sampled))
        assert all((lp < 0) == s for lp, s in zip(t.logp, t.sampled))
        if truncated and inside:
            assert t.logp_truncated == [lp / 2 for lp in t.logp]
        else:
            assert t.logp_truncated == []
        # the ids are the prompt, then what was said and what the renderer makes of the answers, piece by piece
        ids = RENDERER.prompt([Message("system", "S"), Message("user", t.problem.question)])
        assert t.prompt_length == len(ids)
        for i, turn in enumerate(t.turns):
            said = script[i] if isinstance(script[i], str) else script[i][0]
            assert turn.start == len(ids) and turn.text == said.removesuffix("$")
            ids = ids + encode(said)
            assert turn.end == len(ids)
            if turn.results:
                text = "\n".join(f"<result>{r.text}</result>" for r in turn.results)
                ids = ids + RENDERER.observation([Message("user", text)], ended=turn.finish is Finish.END)
        assert t.ids == ids
        asked = [r for r in engine.requests if r.seed[-3] == t.key[1]]
        assert [r.ids for r in asked] == [t.ids[: turn.start] for turn in t.turns]
        assert Trajectory.from_dict(t.to_dict()) == t


def test_observations_are_never_trained():
    t = one(lambda p, s, turn: CALL if turn < 2 else "yes$")
    text = TOKENIZER.decode([i for i, s in zip(t.ids, t.trained) if not s])
    assert text.count("<result>ABC</result>") == 2
    assert TOKENIZER.decode([i for i, s in zip(t.ids, t.trained) if s]) == f"{CALL}{CALL}yes<|im_end|>"


# -- tools at the same time ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_tools_run_at_the_same_time(overlap):
    barrier = []

    async def work(session, text):
        if not barrier:
            barrier.append(asyncio.Barrier(8))
        await asyncio.wait_for(barrier[0].wait(), 20)  # nobody goes on before all eight are here
        return "ok"

    def script(p, s, turn):
        return CALL * 2 if turn == 0 else "yes$"

    ts, _ = run(
        script,
        engine=ScriptedEngine(script, per_step=99),
        tool=Probe(work=work, timeout_s=30),
        problems=2,
        samples=2,
        overlap_tools=overlap,
    )
    assert all(t.score == 1 and [r.text for r in t.turns[0].results] == ["ok", "ok"] for t in ts)


def test_the_engine_goes_on_while_tools_run_only_if_told_to():
    for overlap in (True, False):
        state = {"tool": False, "seen": False}

        async def work(session, text, state=state):
            state["tool"] = True
            for _ in range(200):
                await asyncio.sleep(0)
            state["tool"] = False
            return "ok"

        def script(p, s, turn, state=state):
            state["seen"] |= state["tool"]
            return CALL if p == 0 and turn == 0 else "a$"

        # problem 0 is answered first, the others one a step
        engine = ScriptedEngine(script, per_step=1)
        engine.random.shuffle = lambda names: names.sort()
        run(script, engine=engine, tool=Probe(work=work), problems=6, overlap_tools=overlap)
        assert state["seen"] == overlap


@pytest.mark.parametrize("overlap", [False, True])
def test_the_order_in_which_tools_come_back_changes_nothing(overlap):
    def results(seed):
        rng = random.Random(seed)

        async def work(session, text):
            await asyncio.sleep(rng.random() / 100)
            return session[-4:] + text

        ts, engine = run(
            lambda p, s, turn: f"<probe>{p}{s}{turn}</probe>" if turn < 2 else "yes$",
            tool=Probe(work=work),
            problems=3,
            samples=3,
            overlap_tools=overlap,
        )
        for t in ts:
            for turn in t.turns:
                turn.results = [dataclasses.replace(r, seconds=0.0) for r in turn.results]
        return [t.to_dict() for t in ts], [r.seed for r in engine.requests]

    first, second = results(1), results(2)
    assert first[0] == second[0]
    if not overlap:
        assert first[1] == second[1]  # even the order in which the engine was asked


# -- deadlines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_a_tool_that_hangs_is_an_observation(overlap):
    async def work(session, text):
        await asyncio.sleep(3600 if "/000001/" in session else 0)

    ts, _ = run(
        lambda p, s, turn: CALL if turn == 0 else "yes$",
        tool=Probe(work=work, timeout_s=0.05),
        problems=3,
        overlap_tools=overlap,
    )
    assert [t.turns[0].results[0].kind for t in ts] == ["ok", "timeout", "ok"]
    assert [t.score for t in ts] == [1.0] * 3


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("place", ["reset", "step", "close"])
def test_an_environment_that_hangs_times_out(place, overlap, monkeypatch):
    monkeypatch.setattr(driver, "_CLOSE_S", 0.05)
    ts, engine = run(
        lambda p, s, turn: "yes$",
        env=Broken(place=place, hang=True),
        problems=3,
        timeout_s=0.3,
        overlap_tools=overlap,
    )
    middle = StopReason.ANSWERED if place == "close" else StopReason.TIMEOUT
    assert [t.stop_reason for t in ts] == [StopReason.ANSWERED, middle, StopReason.ANSWERED]
    assert not engine.busy


def test_a_tool_slower_than_the_trajectory_may_last():
    async def work(session, text):
        await asyncio.sleep(3600)

    tool = Probe(work=work, timeout_s=3000)
    t = one(lambda p, s, turn: CALL, tool=tool, timeout_s=0.1)
    assert t.stop_reason is StopReason.TIMEOUT and t.turns[0].results == []
    assert len(tool.closed) == 1


def test_an_engine_that_hangs_times_out(monkeypatch):
    monkeypatch.setattr(driver, "_GRACE_S", 0.05)
    ts, engine = run(lambda p, s, turn: None if p == 1 else "yes$", problems=3, timeout_s=0.05)
    assert [t.stop_reason for t in ts] == [StopReason.ANSWERED, StopReason.TIMEOUT, StopReason.ANSWERED]
    assert "finished nothing" in ts[1].info["error"]
    assert not engine.busy


def test_time_is_used_up_by_turns_and_tools_but_not_by_waiting():
    async def work(session, text):
        await asyncio.sleep(0.2 if "/000000/000000/" in session else 0)

    _, engine = run(lambda p, s, turn: CALL if turn == 0 else "yes$", tool=Probe(work=work), problems=2, timeout_s=50.0)
    left = {r.seed[-3:]: r.timeout_s for r in engine.requests}
    assert left[0, 0, 0] > 49.9 and left[0, 0, 1] < 49.85
    assert left[1, 0, 1] > 49.9  # it waited for the other's tool, on nobody's clock


# -- giving up ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("while_tools_run", [False, True])
def test_stop_cleans_up(overlap, while_tools_run):
    class Enough(Exception):
        pass

    running, polls = [], [0]

    async def work(session, text):
        running.append(session)
        try:
            await asyncio.sleep(3600)
        finally:
            running.remove(session)

    tool = Probe(work=work, timeout_s=3000)

    def stop():
        polls[0] += 1
        if running if while_tools_run else polls[0] > 3:
            raise Enough

    engine = ScriptedEngine(lambda p, s, turn: CALL if while_tools_run else "no</probe>", per_step=1)
    with pytest.raises(Enough):
        run(None, engine=engine, tool=tool, problems=6, stop=stop, overlap_tools=overlap)
    assert not running and not engine.busy
    assert {r.session for r in engine.requests} <= set(engine.released)
    assert len(tool.closed) == len(set(tool.closed)) and (tool.closed or not while_tools_run)


def test_an_engine_that_breaks_ends_the_rollout_cleanly():
    def script(p, s, turn):
        if p == 2:
            raise MemoryError("the accelerator is full")
        return CALL

    engine = ScriptedEngine(script, per_step=1)
    with pytest.raises(MemoryError):
        run(None, engine=engine, problems=4)
    assert not engine.busy


def test_inside_a_running_loop():
    """As in a notebook."""

    async def cell():
        return one(lambda p, s, turn: "yes$")

    assert asyncio.run(cell()).score == 1.0
