"""ProgramEnv: an agent that somebody wrote against OpenAI's API is the environment. What it asks is observed, and the policy's turns answer it.

The agent is not changed: it is given another base URL. Each episode has one of its own, so that we know whose request it is; a request that
goes on with the conversation adds its new messages, and any other begins a new context, as agents that rewrite their prompts have it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import json
import os
import secrets
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from pydantic import Field, model_validator

from ondol.engines import chat_api as api
from ondol.engines.base import Completion, Sampling
from ondol.engines.chat_api import Asked, BadRequest, Dialogue
from ondol.envs.base import Env, StepResult
from ondol.errors import OndolError
from ondol.records import Finish, Message, Problem
from ondol.tasks.base import Task
from ondol.tasks.programs import Played, ProgramTask
from ondol.tools.calls import CallStyle, Json
from ondol.tools.speaker import Speaker

_END_S = 5.0  # for a program to end when it is told to
_MOST_OUTPUT = 1 << 20
_STDERR = 400


class ProgramEnv(Env):
    """One run of a program an episode; what it returns, or prints, is the response that the task scores.

    `function` is called in a thread as f(question, base_url, api_key) and returns the response. `command` is started for each episode, with the
    question on its standard input and OPENAI_BASE_URL and OPENAI_API_KEY set, which OpenAI's clients read; its standard output is the
    response. With neither, the task brings the program and scores it itself (task `verifiers`). How tokens are drawn is the
    recipe's matter: what requests say of it is not heard, but for what they stop at.
    """

    capabilities: ClassVar[frozenset[str]] = frozenset({"black-box agents"})
    action_space: ClassVar[str] = "an answer of the chat API"

    function: str | None = Field(default=None, description="the agent as 'module:function'")
    command: tuple[str, ...] = Field(default=(), description="the agent as a command and its arguments")
    max_turns: int = Field(
        default=8, ge=1, description="most requests of one episode that are answered; further ones are refused"
    )
    stop: tuple[str, ...] = Field(
        default=(), description="strings that end a turn; those that the agent's requests stop at"
    )

    @model_validator(mode="after")
    def _one(self) -> ProgramEnv:
        if self.function and self.command:
            raise ValueError("give either function or command, or neither for a task that brings its program")
        if self.function:
            _function(self.function)
        return self

    def without_tools(self) -> Env:
        return self

    def call_style(self, renderer: Any) -> CallStyle | None:
        return _Calls(renderer, self.stop)

    def takes(self, task: Task) -> None:
        if not (self.function or self.command or isinstance(task, ProgramTask)):
            raise OndolError(
                f"the environment 'program' has no program for the task {type(task).__name__}",
                "set env.function or env.command, or task.name to verifiers",
            )

    def episode(
        self, task: Task, problem: Problem, trajectory_id: str, renderer: Any, examples: Sequence[Message] = ()
    ) -> _Episode:
        self.takes(task)
        return _Episode(self, task, problem, trajectory_id, renderer, examples)


class _Calls(Json):
    """Calls in the family's own JSON, and the agent's own stops."""

    def __init__(self, renderer: Any, stop: tuple[str, ...]) -> None:
        super().__init__(renderer)
        self.stop = (*stop, *self.stop)


class _Episode:
    def __init__(
        self,
        env: ProgramEnv,
        task: Task,
        problem: Problem,
        trajectory_id: str,
        renderer: Any,
        examples: Sequence[Message],
    ) -> None:
        self.env, self.task, self.problem, self.examples = env, task, problem, examples
        self.id, self.name = trajectory_id, secrets.token_urlsafe(12)
        self.speaker = Speaker(renderer, getattr(renderer, "tokenizer", None))
        self.dialogue = Dialogue()
        self.program: _Program | None = None
        self.asked: _Pending | None = None

    async def reset(self) -> list[Message]:
        endpoint = _endpoint()
        self.inbox: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(item: Any) -> None:
            loop.call_soon_threadsafe(self.inbox.put_nowait, item)

        endpoint.episodes[self.name] = deliver
        url = f"{endpoint.url}/{self.name}/v1"
        self.program = _Program(self.env, self.task, self.problem, url, endpoint.key, loop, self.inbox)
        await self.program.start()
        first = await self._next()
        if not isinstance(first, _Pending):
            raise OndolError(
                f"the agent ended without a request: {first.said or 'it printed nothing'}",
                "it must ask the model at the base URL that it is given",
            )
        return self._observe(first)[1]

    async def step(self, action: Message, last_turn: bool) -> StepResult:
        if self.asked is None:
            raise RuntimeError(f"episode {self.id} is over: reset a new one")
        answered, self.asked = self.asked, None
        text, stop = action.content, answered.asked.stop
        done = Completion(self.id, [], [], [], text, Finish.STOP if any(s in text for s in stop) else Finish.END, 0)
        said = self.speaker.said(done, answered.asked)
        self.dialogue.take([said.message()], anew=False)
        answered.reply(said)
        spent = f"the episode has had its {self.env.max_turns} turns"
        refused = False
        while True:
            more = await self._next()
            if not isinstance(more, _Pending):
                break
            if last_turn:
                more.refuse(BadRequest(spent, status=429))
                refused = True
                continue
            anew, messages = self._observe(more)
            return StepResult(messages, anew=anew)
        if more.failed:
            if refused:
                raise OndolError(f"{spent}, and at one more request the agent failed: {more.said}", "see env.max_turns")
            raise OndolError(f"the agent failed: {more.said}")
        played = more.played
        if played is None:
            score = await self.task.judged(self.problem, more.said)
            played = Played(more.said, score, score)
        return StepResult(
            [], reward=played.reward, terminated=True, score=played.score, info={"response": played.response}
        )

    def _observe(self, pending: _Pending) -> tuple[bool, list[Message]]:
        """What a request adds; whether it begins a new context."""
        self.asked = pending
        new = self.dialogue.added(pending.asked)
        if new is not None:
            self.dialogue.take(new, anew=False)
            return False, self.speaker.written(new, pending.asked)
        self.dialogue.take(pending.asked.messages, anew=True)
        messages = self.speaker.opening(pending.asked)
        head = 1 if messages[0].role == "system" else 0
        return True, [*messages[:head], *self.examples, *messages[head:]]

    async def _next(self) -> Any:
        return await self.inbox.get()

    async def close(self) -> None:
        _endpoint().episodes.pop(self.name, None)
        if self.asked is not None:
            self.asked.refuse(BadRequest("the episode is over", status=410))
        if self.program is not None:
            await self.program.close()
        while not getattr(self, "inbox", asyncio.Queue()).empty():
            if isinstance(item := self.inbox.get_nowait(), _Pending):
                item.refuse(BadRequest("the episode is over", status=410))


class _Ended:
    """The program's end: what it returned or printed, or why it failed."""

    def __init__(self, said: str, failed: bool = False, played: Played | None = None) -> None:
        self.said, self.failed, self.played = said, failed, played


class _Program:
    """The agent at work, in a thread or a process."""

    def __init__(
        self,
        env: ProgramEnv,
        task: Task,
        problem: Problem,
        url: str,
        key: str,
        loop: asyncio.AbstractEventLoop,
        inbox: asyncio.Queue[Any],
    ) -> None:
        self.env, self.task, self.problem = env, task, problem
        self.url, self.key, self.loop, self.inbox = url, key, loop, inbox
        self.process: asyncio.subprocess.Process | None = None
        self.waiter: asyncio.Task[None] | None = None

    async def start(self) -> None:
        if not self.env.command:
            threading.Thread(target=self._call, name="ondol-agent", daemon=True).start()
            return
        environment = os.environ | {"OPENAI_BASE_URL": self.url, "OPENAI_API_KEY": self.key}
        try:
            self.process = await asyncio.create_subprocess_exec(
                *self.env.command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=environment,
                start_new_session=True,
            )
        except OSError as e:
            raise OndolError(
                f"the agent's command does not start: {e}", "env.command is a program and its arguments"
            ) from e
        self.waiter = asyncio.create_task(self._wait(self.process))

    async def close(self) -> None:
        """A thread cannot be ended: its next request is refused, which ends most."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        if self.waiter is not None:
            await asyncio.wait({self.waiter}, timeout=_END_S)

    def _call(self) -> None:
        try:
            if self.env.function:
                out = _function(self.env.function)(self.problem.question, self.url, self.key)
                out = asyncio.run(out) if inspect.iscoroutine(out) else out
                ended = (
                    _Ended(out)
                    if isinstance(out, str)
                    else _Ended(f"it returned {type(out).__name__}, not a text", True)
                )
            else:
                assert isinstance(self.task, ProgramTask)  # the environment has seen to it
                played = self.task.play(self.problem, self.url, self.key)
                ended = _Ended(played.response, played=played)
        except OndolError as e:
            ended = _Ended(str(e)[:_STDERR], True)
        except BaseException as e:
            ended = _Ended(f"{type(e).__name__}: {e}"[:_STDERR], True)
        with contextlib.suppress(RuntimeError):  # the loop has ended, and the episode with it
            self.loop.call_soon_threadsafe(self.inbox.put_nowait, ended)

    async def _wait(self, process: asyncio.subprocess.Process) -> None:
        out, error = await process.communicate(self.problem.question.encode("utf-8", "replace"))
        text = out[:_MOST_OUTPUT].decode("utf-8", "replace").strip()
        if process.returncode:
            last = error.decode("utf-8", "replace").strip().splitlines()[-1:] or [""]
            self.inbox.put_nowait(_Ended(f"exit {process.returncode}: {last[0]}"[:_STDERR], True))
        else:
            self.inbox.put_nowait(_Ended(text))


class _Pending:
    """A request that waits for its answer, on the endpoint's loop."""

    def __init__(self, asked: Asked, loop: asyncio.AbstractEventLoop) -> None:
        self.asked, self.loop = asked, loop
        self.future: asyncio.Future[Any] = loop.create_future()

    def reply(self, said: api.Said) -> None:
        self.loop.call_soon_threadsafe(lambda: self.future.done() or self.future.set_result(said))

    def refuse(self, problem: BadRequest) -> None:
        self.loop.call_soon_threadsafe(lambda: self.future.done() or self.future.set_exception(problem))


class _Endpoint:
    """The chat API at loopback, for the agents of this process."""

    def __init__(self) -> None:
        try:
            import uvicorn
            from starlette.applications import Starlette
            from starlette.routing import Route
        except ImportError as e:
            raise OndolError(
                f"the environment 'program' needs more packages ({e})", "pip install 'ondol[server]'"
            ) from e
        from ondol.tools.server.http import Gate, listen, url_of

        self.key = secrets.token_urlsafe(24)
        self.episodes: dict[str, Callable[[Any], None]] = {}
        sock = listen("127.0.0.1", 0)
        self.url = url_of(sock)
        app = Gate(
            Starlette(routes=[Route("/{episode}/v1/chat/completions", self._chat, methods=["POST"])]), self.key, True
        )
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, lifespan="off"))

        def run() -> None:
            asyncio.run(server.serve([sock]))

        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]  # not in the main thread
        threading.Thread(target=run, name="ondol-agents", daemon=True).start()

    async def _chat(self, http: Any) -> Any:
        from starlette.responses import JSONResponse, Response

        try:
            try:
                body = json.loads(await http.body())
            except (ValueError, RecursionError) as e:
                raise BadRequest(f"the body is not JSON: {e}") from e
            asked = api.parse(body, Sampling())
            if asked.choices > 1:
                raise BadRequest("an episode has one line of tokens: n must be 1", "n")
            deliver = self.episodes.get(http.path_params["episode"])
            if deliver is None:
                raise BadRequest("the episode is over", status=410)
            pending = _Pending(asked, asyncio.get_running_loop())
            try:
                deliver(pending)
            except RuntimeError as e:  # its loop has ended
                raise BadRequest("the episode is over", status=410) from e
            said = await pending.future
        except BadRequest as e:
            return JSONResponse(e.body(), e.status)
        if not asked.stream:
            return JSONResponse(api.completion("policy", asked, [], [said]))
        chunks = api.Chunks("policy", asked)
        events = [chunks.first(), chunks.text(said.content), *chunks.last(said, 0)]
        return Response("".join(events), media_type="text/event-stream")


_lock = threading.Lock()
_running: _Endpoint | None = None


def _endpoint() -> _Endpoint:
    global _running
    with _lock:
        if _running is None:
            _running = _Endpoint()
        return _running


def _function(reference: str) -> Callable[..., Any]:
    module, _, name = reference.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as e:
        raise ValueError(
            f"'{reference}' cannot be loaded ({e}): check that the module is on PYTHONPATH and defines it"
        ) from e
    if not callable(found):
        raise ValueError(f"'{reference}' is not a function")
    return found
