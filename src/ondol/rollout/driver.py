"""Many episodes at once over one engine: each trajectory goes at its own pace, nobody waits for a batch of turns.

A turn is a request to the engine; while rows decode, other episodes' tools run. With `overlap_tools` off (the default)
the engine takes its next step when every tool call that is under way has come back, so which tokens are computed
together, and with it the last bit of every number, does not depend on the clock. With `turn_barrier` on, tools wait for
the turns as well: everybody's turn is sampled, then everybody's tools run, then the next turn begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ondol.engines.base import Completion, Engine, Request, Sampling
from ondol.envs.base import Env, Episode
from ondol.errors import OndolError
from ondol.records import Finish, Group, Message, Problem, StopReason, ToolCall, Trajectory, Turn
from ondol.rollout.masking import Masking
from ondol.tasks.base import Task

_T = TypeVar("_T")
_POLL_S = 0.5  # how often we ask whether to stop while only tools are at work
_CLOSE_S = 10.0  # for an environment to tidy up
_GRACE_S = 60.0  # beyond a trajectory's time: an engine that finishes nothing for so long is given up

#: what a turn that was cut short makes of its trajectory
STOP_REASONS = {
    Finish.LENGTH: StopReason.TURN_LENGTH,
    Finish.CONTEXT: StopReason.CONTEXT,
    Finish.TIMEOUT: StopReason.TIMEOUT,
    Finish.ERROR: StopReason.ERROR,
}


@dataclass
class Plan:
    """What to roll out: every problem `samples` times.

    Attributes:
        seed: first numbers of every random stream, e.g. (run seed, phase); (step, problem, sample, turn) follow.
        step: which update this is for; part of keys and streams.
        first: number of the first problem, for keys and streams.
        examples: worked conversations put before each question.
        timeout_s: most time for one trajectory, its sampling and its environment; waiting for a place does not count.
        overlap_tools: let the engine go on while tools run.
        turn_barrier: run no tool before all turns are sampled (and, as ever without overlap, sample none while one runs).
        max_response_tokens: most tokens after the prompt, observations included; None: as the model's context allows.
        masking: what of a trajectory is trained on.
        recorded: trajectories by key that were begun elsewhere: their turns are not sampled again but played to a fresh episode, which then
            goes on. Its environment must repeat itself; where it does not, the trajectory ends with an error.
        saved: called with each trajectory when a turn of it was sampled, before the environment hears of it.
        progress: called with each finished trajectory.
        stop: called between engine steps and while tools run; raise in it to give up (everything is cleaned up).
    """

    task: Task
    env: Env
    problems: Sequence[Problem]
    samples: int
    sampling: Sampling
    seed: tuple[int, ...]
    step: int = 0
    first: int = 0
    examples: Sequence[Message] = ()
    timeout_s: float = 600.0
    overlap_tools: bool = False
    turn_barrier: bool = False
    max_response_tokens: int | None = None
    masking: Masking = field(default_factory=Masking)
    recorded: Mapping[tuple[int, int, int], Trajectory] = field(default_factory=dict)
    saved: Callable[[Trajectory], None] = field(default=lambda t: None)
    progress: Callable[[Trajectory], None] = field(default=lambda t: None)
    stop: Callable[[], None] = field(default=lambda: None)

    @property
    def keys(self) -> list[tuple[int, int]]:
        """(problem, sample) of every trajectory, in order."""
        return [(self.first + p, s) for p in range(len(self.problems)) for s in range(self.samples)]

    def grouped(self, done: Sequence[Trajectory]) -> list[Group]:
        """The trajectories of `keys` as groups, one a problem."""
        size = self.samples
        return [Group(p, list(done[i * size : (i + 1) * size])) for i, p in enumerate(self.problems)]


def rollout(engine: Engine, renderer: Any, plan: Plan) -> list[Group]:
    """Run the plan; one group a problem, in order, each with `samples` trajectories in order.

    A tool or an environment that fails makes a trajectory with that stop reason, never an exception here.
    """
    work = Rollout(engine, renderer, plan).run
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work())
    with ThreadPoolExecutor(1) as pool:  # called from a notebook, whose thread has a loop of its own
        return pool.submit(lambda: asyncio.run(work())).result()


class Rollout:
    def __init__(self, engine: Engine, renderer: Any, plan: Plan) -> None:
        self.engine, self.renderer, self.plan = engine, renderer, plan
        self.style = plan.env.call_style(renderer)
        self.schemas = plan.env.schemas(renderer)
        self.asked: dict[str, tuple[Request, asyncio.Future[Completion]]] = {}  # to be submitted
        self.sampling: dict[str, asyncio.Future[Completion]] = {}  # being sampled
        self.held: list[Completion] = []  # turns that wait for the others' before their tools run
        self.away = 0  # episodes not waiting for the engine
        self.changed = asyncio.Event()

    async def run(self) -> list[Group]:
        plan = self.plan
        keys = plan.keys
        self.away = len(keys)
        tasks = [asyncio.create_task(self._episode(plan.problems[p - plan.first], p, s)) for p, s in keys]
        try:
            await self._drive(lambda: all(t.done() for t in tasks))
            done = [t.result() for t in tasks]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for p, s in keys:
                self.engine.release(self._id(p, s))
        return plan.grouped(done)

    async def _drive(self, over: Callable[[], bool]) -> None:
        """Step the engine until it is `over`: all episodes are done, say."""
        heard = time.monotonic()
        while not over():
            self.plan.stop()
            if self.away and not (self.plan.overlap_tools and (self.asked or self.engine.busy)):
                self.changed.clear()
                with contextlib.suppress(TimeoutError):  # now and then, to ask whether to stop
                    await asyncio.wait_for(self.changed.wait(), _POLL_S)
                heard = time.monotonic()
                continue
            for session in sorted(self.asked):  # the order of submission must not depend on which tool was faster
                request, self.sampling[session] = self.asked.pop(session)
                try:
                    self.engine.submit(request)
                except OndolError as e:  # it does not fit the context
                    self._answer(session, e)
            completions = self.engine.step()
            if completions or not self.sampling:
                heard = time.monotonic()
            self.held += completions
            if not (self.plan.turn_barrier and self.engine.busy):
                for completion in self.held:
                    self._answer(completion.session, completion)
                self.held = []
            if (silent := time.monotonic() - heard) > self.plan.timeout_s + _GRACE_S:
                for session in sorted(self.sampling.keys() - {c.session for c in self.held}):
                    self.engine.release(session)
                    error = f"the engine finished nothing for {silent:.0f} s"
                    nothing = Completion(session, [], [], [], "", Finish.TIMEOUT, self.engine.version, error)
                    self._answer(session, nothing)
            await asyncio.sleep(0)

    async def _sample(self, request: Request) -> Completion:
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self.asked[request.session] = (request, future)
        self._leave()
        return await future

    def _answer(self, session: str, answer: Completion | OndolError) -> None:
        """Hand an episode what it waits for."""
        future = self.sampling.pop(session, None)
        if future is None or future.done():
            return
        self.away += 1
        if isinstance(answer, OndolError):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    def _leave(self) -> None:
        self.away -= 1
        self.changed.set()

    def _id(self, problem: int, sample: int) -> str:
        return f"{'.'.join(map(str, self.plan.seed))}/{self.plan.step:06d}/{problem:06d}/{sample:04d}"

    async def _episode(self, problem: Problem, number: int, sample: int) -> Trajectory:
        plan, session = self.plan, self._id(number, sample)
        t = Trajectory(
            (plan.step, number, sample), problem, [], 0, [], [], [], [], temperature=plan.sampling.temperature
        )
        episode: Episode | None = None
        try:
            episode = plan.env.episode(plan.task, problem, session, self.renderer, plan.examples)
            await self._turns(t, episode, session)
        except OndolError as e:
            t.stop_reason, t.info["error"] = StopReason.ERROR, str(e)
        except Exception as e:  # an environment's bug harms its own trajectory only
            t.stop_reason, t.info["error"] = StopReason.ERROR, f"{type(e).__name__}: {e}"
        finally:
            try:
                if episode is not None:
                    async with asyncio.timeout(_CLOSE_S):
                        await episode.close()
            except Exception as e:
                t.info["close_error"] = f"{type(e).__name__}: {e}"
            self.engine.release(session)
            self._leave()
        plan.masking.apply(t)
        plan.progress(t)
        return t

    async def _turns(self, t: Trajectory, episode: Episode, session: str) -> None:
        plan, clock = self.plan, _Clock(self.plan.timeout_s)
        t.messages = await clock.run(episode.reset()) or []
        if clock.expired:
            t.stop_reason = StopReason.TIMEOUT
            return
        t.observe(self.renderer.prompt(t.messages, self.schemas))
        t.prompt_length, seen = len(t.ids), 0
        for turn in range(plan.env.max_turns):
            sampling, room = plan.sampling, self._room(t)
            if room <= 0:
                t.stop_reason = StopReason.RESPONSE_LENGTH
                return
            if room < sampling.max_tokens:
                sampling = sampling.model_copy(update={"max_tokens": int(room)})
            request = Request(
                session=session,
                ids=t.ids[t.restarts[-1] :] if t.restarts else t.ids,
                sampling=sampling,
                seed=(*plan.seed, *t.key, turn),
                stop=self.style.stop if self.style else (),
                end_ids=self.renderer.end_ids,
                messages=t.messages[seen:],
                timeout_s=clock.left_s,
            )
            done = _said_before(plan.recorded.get(t.key), t, session)
            try:
                anew = done is None
                done = done or await self._sample(request)
            except OndolError as e:
                if turn == 0:
                    raise
                t.stop_reason, t.info["error"] = StopReason.CONTEXT, str(e)
                return
            clock.left_s = max(0.0, clock.left_s - done.seconds)
            action = self._record(t, done)
            if anew:
                plan.saved(t)
            if done.finish in STOP_REASONS:
                t.stop_reason = STOP_REASONS[done.finish]
                if done.finish is Finish.LENGTH and self._room(t) <= 0:
                    t.stop_reason = StopReason.RESPONSE_LENGTH
                if done.error:
                    t.info["error"] = done.error
                return
            result = await clock.run(episode.step(action, turn == plan.env.max_turns - 1))
            if result is None:
                t.stop_reason = StopReason.TIMEOUT
                return
            t.turns[-1].results = result.results
            if not math.isfinite(result.reward):
                raise OndolError(f"sample {session}: the environment gave a reward of {result.reward}")
            t.reward += result.reward
            if result.terminated or result.truncated:
                t.score = result.score
                t.stop_reason = _why_over(result.truncated, action)
                return
            if result.anew:
                self.engine.release(session)
                t.restarts.append(len(t.ids))
                seen, observation = len(t.messages), self.renderer.prompt(result.messages, self.schemas)
            else:
                observation = self.renderer.observation(result.messages, ended=done.finish is Finish.END)
            t.messages += result.messages
            t.observe(observation[: int(min(self._room(t), len(observation)))])
            if clock.expired:
                t.stop_reason = StopReason.TIMEOUT
                return
        t.stop_reason = StopReason.MAX_TURNS  # for environments that leave it to us to end after the last turn

    def _room(self, t: Trajectory) -> float:
        """How many tokens may still be added."""
        most = self.plan.max_response_tokens
        return math.inf if most is None else most - (len(t.ids) - t.prompt_length)

    def _record(self, t: Trajectory, done: Completion) -> Message:
        """Append a sampled turn; the assistant message it amounts to."""
        calls: list[ToolCall] = self.style.parse(done.text) if self.style else []
        turn = Turn(len(t.ids), len(t.ids) + len(done.ids), done.text, done.finish, calls)
        t.act(turn, done.ids, done.logp, done.logp_truncated, done.token_versions)
        return t.messages[-1]


class _Clock:
    """The time a trajectory has left: the engine's work on it and its environment's count, waiting for others does not."""

    def __init__(self, seconds: float) -> None:
        self.left_s = seconds

    @property
    def expired(self) -> bool:
        return self.left_s <= 0

    async def run(self, work: Coroutine[Any, Any, _T]) -> _T | None:
        """What `work` gives; None, with the clock expired, when it takes too long."""
        started, limit = time.monotonic(), asyncio.timeout(self.left_s)
        try:
            async with limit:
                return await work
        except TimeoutError:
            if not limit.expired():  # the environment's own
                raise
            self.left_s = 0.0
            return None
        finally:
            self.left_s = max(0.0, self.left_s - (time.monotonic() - started))


def _said_before(recorded: Trajectory | None, t: Trajectory, session: str) -> Completion | None:
    """The turn that comes next in a trajectory that was begun elsewhere; None when it has to be sampled."""
    number = len(t.turns)
    if recorded is None or number >= len(recorded.turns):
        return None
    turn = recorded.turns[number]
    span = slice(turn.start, turn.end)
    if t.ids != recorded.ids[: turn.start]:
        raise OndolError(
            f"the episode {session} cannot go on elsewhere: its environment said something else than the first time",
            "only environments that repeat themselves can be resumed",
        )
    truncated = recorded.logp_truncated[span] if recorded.logp_truncated else []
    versions = recorded.version[span]
    return Completion(
        session,
        recorded.ids[span],
        recorded.logp[span],
        truncated,
        turn.text,
        turn.finish,
        version=versions[0] if versions else 0,
        versions=versions,
    )


def _why_over(truncated: bool, action: Message) -> StopReason:
    if truncated:
        return StopReason.MAX_TURNS
    if action.calls:
        return StopReason.ENV_DONE
    return StopReason.ANSWERED if action.content.strip() else StopReason.EMPTY
