"""The tool server without a network: many trajectories, their sessions, deadlines and limits.

Calls of one trajectory to one tool run one after the other, in the order they came; everything else runs at once, up to
`Limits.running`. What waits beyond `Limits.waiting` is refused with `Busy`. Whatever a tool does wrong becomes the result
of its own call: it may raise, give rubbish, or not come back at all (then it is left behind at its deadline, even if it
ignores that it was cancelled, and the trajectory's next call finds a fresh session).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ondol.errors import OndolError
from ondol.records import ToolCall, ToolResult
from ondol.tools.actions import Action, printable
from ondol.tools.base import Tool, ToolSession, call_tool

T = TypeVar("T")
FINISH = "finish"  # the name under which VerlTool's clients know the end of a trajectory
_GRACE_S = 2.0  # for a cancelled tool to come back, before it is left behind
_CLOSE_S = 10.0  # for a session to close
_SWEEP_S = 60.0  # how often trajectories that nobody asks for any more are looked for


@dataclass(frozen=True)
class Limits:
    """How much a server takes on.

    Attributes:
        running: calls at work at once (VerlTool's max_concurrent_requests).
        waiting: calls that may wait for one of them; more are refused.
        trajectories: trajectories that may have state at once.
        idle_s: state of a trajectory that nobody has asked for so long is forgotten; clients die.
        request_s: time for a whole batch request; None: what its calls take.
    """

    running: int = 64
    waiting: int = 8192
    trajectories: int = 100_000
    idle_s: float = 3600.0
    request_s: float | None = None


class Busy(Exception):
    """The server does not take the call now. `retry_s`: when to ask again; None: never, it asks for too much."""

    def __init__(self, text: str, retry_s: float | None) -> None:
        super().__init__(text)
        self.retry_s = retry_s


@dataclass
class _Trajectory:
    id: str
    sessions: dict[str, ToolSession] = field(default_factory=dict)
    locks: dict[str, asyncio.Lock] = field(default_factory=dict)
    at_work: set[asyncio.Task[Any]] = field(default_factory=set)
    used: float = 0.0


@dataclass(frozen=True)
class Item:
    """One entry of a batch request."""

    trajectory_id: str
    action: str
    finish: bool = False


@dataclass(frozen=True)
class Answer:
    """What VerlTool's client gets for one entry: the observation, is the trajectory over, was the action valid."""

    observation: str | dict[str, Any]
    done: bool
    valid: bool
    waited_s: float = 0.0


class ToolServer:
    """Serves tools to trajectories. Use it on one event loop, and `close` it.

    Args:
        tools: in the order in which they are asked whether an action is theirs.
        limits: how much it takes on.
        done_if_invalid: an action that no tool understands ends its trajectory.

    Raises OndolError for tools that cannot be served together, and for one that requires more of this machine than it has.
    """

    def __init__(self, tools: Sequence[Tool], limits: Limits | None = None, *, done_if_invalid: bool = False) -> None:
        self.tools = {t.name: t for t in tools}
        if not self.tools or len(self.tools) < len(tools) or FINISH in self.tools:
            raise OndolError(
                f"these tools cannot be served: {', '.join(t.name for t in tools) or '(none)'}",
                f"at least one, no two of the same name, and none called '{FINISH}'",
            )
        found = {name: tool.facts() for name, tool in self.tools.items()}
        self.sandbox = {name: facts["sandbox"] for name, facts in found.items() if "sandbox" in facts}
        self.limits = limits or Limits()
        self.done_if_invalid = done_if_invalid
        self.started = time.monotonic()
        self.running = self.admitted = self.served = self.left_behind = 0
        self.draining = False
        self._trajectories: dict[tuple[str, str], _Trajectory] = {}
        self._slots = asyncio.Semaphore(self.limits.running)
        self._in_flight: dict[bytes, asyncio.Task[Any]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()  # nothing is admitted
        self._idle.set()
        self._swept = time.monotonic()

    # -- one call -------------------------------------------------------------------------------------------------

    async def call(self, trajectory_id: str, call: ToolCall, client: str = "") -> tuple[ToolResult, float]:
        """Carry out one call; (result, seconds it waited for its turn).

        `client` keeps apart clients whose trajectories have the same ids. Raises Busy when the server is full or closing.
        """
        with self._admitted(1):
            return await self._call(trajectory_id, call, client)

    async def finish(self, trajectory_id: str, client: str = "") -> bool:
        """Forget a trajectory: its calls at work are cancelled, its sessions closed. Was there one?"""
        trajectory = self._trajectories.pop((client, trajectory_id), None)
        if trajectory is None:
            return False
        await self._forget(trajectory)
        return True

    async def _call(self, trajectory_id: str, call: ToolCall, client: str) -> tuple[ToolResult, float]:
        tool = self.tools.get(call.name)
        if tool is None:
            known = ", ".join(self.tools)
            return ToolResult(f"Error: there is no tool '{call.name}'; known: {known}", False, "unknown_tool"), 0.0
        trajectory = self._trajectory(trajectory_id, client)
        started = time.monotonic()
        work = asyncio.create_task(self._in_turn(trajectory, tool, call))
        trajectory.at_work.add(work)
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError:
            work.cancel()
            raise
        finally:
            trajectory.at_work.discard(work)
            trajectory.used = time.monotonic()
        if work.cancelled():
            return ToolResult("Error: the trajectory was finished", False, "crashed"), time.monotonic() - started
        result, began = work.result()
        return result, began - started

    async def _in_turn(self, trajectory: _Trajectory, tool: Tool, call: ToolCall) -> tuple[ToolResult, float]:
        async with trajectory.locks.setdefault(tool.name, asyncio.Lock()), self._slots:
            began = time.monotonic()
            self.running += 1
            try:
                return await self._carry_out(trajectory, tool, call), began
            finally:
                self.running -= 1
                self.served += 1

    async def _carry_out(self, trajectory: _Trajectory, tool: Tool, call: ToolCall) -> ToolResult:
        try:
            if tool.name not in trajectory.sessions:
                trajectory.sessions[tool.name] = tool.session(trajectory.id)
        except Exception as e:
            return ToolResult(f"{tool.name} failed: {type(e).__name__}: {e}"[:500], False, "crashed")
        work = asyncio.create_task(_guarded(trajectory.sessions[tool.name], tool, call))
        try:
            await asyncio.wait({work}, timeout=tool.deadline_s + _GRACE_S)
            if work.done():
                result = work.result()
                return dataclasses.replace(result, text=printable(result.text))
        except asyncio.CancelledError:
            work.cancel()
            raise
        work.cancel()
        self.left_behind += 1
        self._close_later(trajectory.sessions.pop(tool.name))
        return ToolResult(f"TimeoutError: {tool.name} did not come back", False, "timeout", tool.deadline_s + _GRACE_S)

    # -- batches --------------------------------------------------------------------------------------------------

    async def observe(self, items: Sequence[Item]) -> list[Answer]:
        """VerlTool's batch: answers in the order of the items. Items of one trajectory run in order, others at once.

        Raises Busy when the server is full or closing, TimeoutError after `limits.request_s`.
        """
        by_trajectory: dict[str, list[int]] = {}
        for i, item in enumerate(items):
            by_trajectory.setdefault(item.trajectory_id, []).append(i)
        answers: dict[int, Answer] = {}
        refused: list[Busy] = []

        async def one(indices: list[int]) -> None:
            for i in indices:
                try:
                    answers[i] = await self._answer(items[i])
                except Busy as e:
                    refused.append(e)
                    return

        with self._admitted(sum(not item.finish for item in items)):
            async with asyncio.timeout(self.limits.request_s), asyncio.TaskGroup() as group:
                for indices in by_trajectory.values():
                    group.create_task(one(indices))
        if refused:
            raise refused[0]
        return [answers[i] for i in range(len(items))]

    async def once(self, key: bytes, work: Callable[[], Awaitable[T]]) -> T:
        """Do the work, or wait for it where the same is being done already (a client that asks again)."""
        digest = hashlib.blake2b(key, digest_size=16).digest()
        task = self._in_flight.get(digest)
        if task is None:
            task = asyncio.ensure_future(work())
            self._in_flight[digest] = task
            task.add_done_callback(lambda _: self._in_flight.pop(digest, None))
        return await asyncio.shield(task)

    async def _answer(self, item: Item) -> Answer:
        trajectory_id = printable(item.trajectory_id)
        if item.finish:
            await self.finish(trajectory_id)
            return Answer("", done=True, valid=True)
        action, tool = self._route(printable(item.action))
        if action is None:
            if tool is not None:  # the only one: what it cannot read is its own matter
                return Answer({"obs": "", "invalid_reason": f"No valid action. {usage(tool)}"}, False, False)
            said = {"obs": "", "invalid_reason": "No valid tool found for action", "available_tools": self.usage()}
            return Answer(said, self.done_if_invalid, False)
        result, waited = await self._call(trajectory_id, action.call, "")
        if result.kind == "crashed":  # the tool's own failure, not the model's
            name = action.call.name
            said = {"obs": "", "error": f"Tool processing failed: {result.text}", "tool_type": name}
            return Answer(said, True, False, waited)
        text = action.show(result.text)
        if result.kind in ("bad_arguments", "unknown_tool"):
            return Answer({"obs": text, "invalid_reason": result.text}, self.done_if_invalid, False, waited)
        return Answer(text, False, True, waited)

    def _route(self, text: str) -> tuple[Action | None, Tool | None]:
        """The action and its tool; (None, the tool) when there is only one, (None, None) when none understands it."""
        for tool in self.tools.values():
            try:
                action = tool.parse_action(text)
            except Exception:  # a tool that cannot even parse is not this action's
                action = None
            if action is not None:
                return action, tool
        return None, next(iter(self.tools.values())) if len(self.tools) == 1 else None

    def usage(self) -> str:
        """What an action may look like, one line for each tool."""
        return "\n".join(["Available tools:", *(f"{t.name}: {usage(t)}" for t in self.tools.values())])

    # -- the whole ------------------------------------------------------------------------------------------------

    def health(self) -> dict[str, Any]:
        """State in numbers, under VerlTool's names and ours."""
        return {
            "status": "draining" if self.draining else "healthy",
            "concurrent_requests": self.running,
            "waiting": self.admitted - self.running,
            "thread_pool_size": 0,
            "active_tasks": len(self._in_flight),
            "max_concurrent": self.limits.running,
            "tools": [*self.tools, FINISH],
            "uptime_seconds": time.monotonic() - self.started,
            "trajectories": len(self._trajectories),
            "sessions": sum(len(t.sessions) for t in self._trajectories.values()),
            "served": self.served,
            "left_behind": self.left_behind,
            "sandbox": self.sandbox,
        }

    async def drain(self, grace_s: float) -> bool:
        """Take no more calls and wait for those at work. Did all end in time?"""
        self.draining = True
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def hurry(self) -> None:
        """End `drain` now."""
        self._idle.set()

    async def close(self) -> None:
        """Cancel what is at work and close every session. May be called twice."""
        self.draining = True
        trajectories = list(self._trajectories.values())
        self._trajectories.clear()
        await asyncio.gather(*map(self._forget, trajectories))
        if self._closing:
            await asyncio.wait(self._closing, timeout=_CLOSE_S)

    @contextlib.contextmanager
    def _admitted(self, calls: int) -> Any:
        if self.draining and calls:
            raise Busy("the server is closing and takes no more calls; start another one, or ask that one", 5.0)
        most = self.limits.running + self.limits.waiting
        if calls > most:
            raise Busy(f"{calls} calls in one request are more than this server takes at once ({most}); split it", None)
        if self.admitted + calls > most:
            raise Busy(
                f"{self.admitted} calls are running or waiting, and this server takes {most}; ask again after the time in "
                "Retry-After, or send fewer at once",
                1.0,
            )
        self.admitted += calls
        self._idle.clear()
        try:
            yield
        finally:
            self.admitted -= calls
            if not self.admitted:
                self._idle.set()

    def _trajectory(self, trajectory_id: str, client: str) -> _Trajectory:
        now = time.monotonic()
        if now - self._swept > min(_SWEEP_S, self.limits.idle_s):
            self._swept = now
            for key, t in list(self._trajectories.items()):
                if now - t.used > self.limits.idle_s and not t.at_work:
                    self._close_later(*self._trajectories.pop(key).sessions.values())
        found = self._trajectories.get((client, trajectory_id))
        if found is None:
            if len(self._trajectories) >= self.limits.trajectories:
                raise Busy(f"{len(self._trajectories)} trajectories are open; finish some (finish: true)", 5.0)
            found = self._trajectories[client, trajectory_id] = _Trajectory(trajectory_id)
        found.used = now
        return found

    async def _forget(self, trajectory: _Trajectory) -> None:
        for work in trajectory.at_work:
            work.cancel()
        if trajectory.at_work:
            await asyncio.wait(trajectory.at_work, timeout=_GRACE_S)
        sessions = list(trajectory.sessions.values())
        trajectory.sessions.clear()
        await asyncio.gather(*map(_closed, sessions))

    def _close_later(self, *sessions: ToolSession) -> None:
        for session in sessions:
            task = asyncio.create_task(_closed(session))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


def usage(tool: Tool) -> str:
    """How to call a tool in text."""
    return f"{tool.description} To use it, write {tool.main_argument} between <{tool.name}> and </{tool.name}>."


async def _guarded(session: ToolSession, tool: Tool, call: ToolCall) -> ToolResult:
    try:
        return await call_tool(session, tool, call)
    except OndolError as e:  # it cannot work on this machine
        return ToolResult(f"{tool.name} cannot work: {e}"[:500], False, "crashed")
    except (SystemExit, KeyboardInterrupt) as e:  # leaving a task they would end the loop, and all other calls
        return ToolResult(f"{tool.name} failed: {type(e).__name__}", False, "crashed")


async def _closed(session: ToolSession) -> None:
    """Close it, whatever happens, and not for ever."""
    with contextlib.suppress(Exception):
        work = asyncio.ensure_future(session.close())
        await asyncio.wait({work}, timeout=_CLOSE_S)
        work.cancel()
        if work.done() and not work.cancelled():
            work.exception()  # seen
