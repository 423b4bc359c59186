"""An OpenAI-compatible endpoint over the embedded engine; with a recorder, also under `/episodes/NAME/v1`.

`POST /v1/chat/completions`, `GET /v1/models`, `GET /health`. Recording: an agent whose base URL is `.../episodes/NAME/v1` is one
episode; `POST /episodes/NAME/score` with `{"score": 1.0}` ends it; `GET /groups?first=0` gives finished groups to a trainer elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeGuard

from ondol.engines import chat_api as api
from ondol.engines.base import Completion, Request, Sampling
from ondol.engines.chat_api import Asked, BadRequest, Said
from ondol.errors import OndolError
from ondol.records import Finish
from ondol.serve.record import Episode, Recorder, check_episode
from ondol.serve.worker import Busy, Worker
from ondol.tools.server.http import Gate, is_loopback, serve_app
from ondol.tools.speaker import Speaker

try:
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect
    from starlette.requests import Request as Http
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError as e:
    raise OndolError(f"the endpoint needs more packages ({e})", "pip install 'ondol[server]'") from e

_MAX_BODY = 16 << 20


class Endpoint:
    """What the routes share.

    Args:
        name: the model's, as clients see it; requests may name any.
        sampling: for what a request leaves open.
        context_length: of the model; answers are cut to fit it.
        timeout_s: of one turn.
        group_size: episodes of one problem that make a finished group.
    """

    def __init__(
        self,
        worker: Worker,
        speaker: Speaker,
        *,
        name: str,
        sampling: Sampling,
        context_length: int,
        timeout_s: float = 600.0,
        recorder: Recorder | None = None,
        group_size: int = 8,
    ) -> None:
        self.group_size = group_size
        self.worker, self.speaker, self.name, self.sampling = worker, speaker, name, sampling
        self.context_length, self.timeout_s, self.recorder = context_length, timeout_s, recorder
        self.started, self._count = time.time(), itertools.count()

    # -- turns ----------------------------------------------------------------------------------------------------

    def request(self, session: str, ids: Sequence[int], asked: Asked, seed: tuple[int, ...]) -> Request:
        room = self.context_length - len(ids)
        if room < 1:
            raise BadRequest(
                f"the conversation has {len(ids)} tokens; this model's context is {self.context_length}",
                "messages",
                code="context_length_exceeded",
            )
        sampling = asked.sampling.model_copy(update={"max_tokens": min(asked.sampling.max_tokens, room)})
        style = self.speaker.style(asked)
        stop = (*asked.stop, *(style.stop if style else ()))
        return Request(session, ids, sampling, seed, stop, self.speaker.renderer.end_ids, (), self.timeout_s)

    async def turn(self, request: Request, listener: Any = None) -> Completion:
        try:
            done = await self.worker.sample(request, listener)
        except Busy as e:
            raise BadRequest(f"{e}; ask again later", status=429, code="rate_limit_exceeded") from e
        except OndolError as e:
            fault = self.worker.failure is not None
            raise BadRequest(str(e), None if fault else "messages", status=500 if fault else 400) from e
        if done.finish is Finish.ERROR:
            raise BadRequest(done.error or "sampling failed", status=500)
        return done

    async def complete(self, asked: Asked) -> dict[str, Any]:
        ids, _ = self.speaker.first(asked)
        number = next(self._count)
        base = self._seed(asked)
        requests = [self.request(f"chat/{number}/{i}", ids, asked, (*base, i)) for i in range(asked.choices)]
        done = await _all([self.turn(r) for r in requests])
        return api.completion(self.name, asked, ids, [self.speaker.said(d, asked) for d in done], done[0].cached_tokens)

    async def complete_in(self, episode: Episode, asked: Asked) -> tuple[list[int], Said, Completion]:
        """One turn of an episode that is recorded; its lock is held by the caller."""
        if asked.choices > 1:
            raise BadRequest("an episode has one line of tokens: n must be 1", "n")
        t, seen = episode.trajectory, list(episode.dialogue.messages)
        before = (len(t.ids), len(t.restarts), len(t.messages), seen)
        if episode.hear(asked, self.speaker):
            self.worker.release(f"episode/{episode.name}")
        t.temperature = asked.sampling.temperature
        try:
            ids = episode.context()
            request = self.request(f"episode/{episode.name}", ids, asked, (*self._seed(asked), len(t.turns)))
            done = await self.turn(request)
        except BaseException:
            episode.unhear(*before)
            raise
        said = self.speaker.said(done, asked)
        episode.answer(done, said)
        episode.used = time.monotonic()
        return ids, said, done

    async def stream(self, asked: Asked) -> AsyncIterator[str]:
        """Events of one answer. What may still turn out to be a call, or a stop string, is held back."""
        ids, _ = self.speaker.first(asked)
        request = self.request(f"chat/{next(self._count)}/0", ids, asked, (*self._seed(asked), 0))
        heard: asyncio.Queue[tuple[Sequence[int], Sequence[float]] | None] = asyncio.Queue()
        chunks = api.Chunks(self.name, asked)
        turn = asyncio.ensure_future(self.turn(request, lambda new, logp: heard.put_nowait((new, logp))))
        turn.add_done_callback(lambda _: heard.put_nowait(None))
        sent = _Sent(self.speaker, asked)
        try:
            yield chunks.first()
            while (more := await heard.get()) is not None:
                if piece := sent.more(*more):
                    yield chunks.text(*piece)
            try:
                done = await turn
            except BadRequest as e:
                yield chunks.error(e)
                return
            said = self.speaker.said(done, asked)
            if piece := sent.rest(said):
                yield chunks.text(*piece)
            for event in chunks.last(said, len(ids), done.cached_tokens):
                yield event
        finally:
            turn.cancel()

    def _seed(self, asked: Asked) -> tuple[int, ...]:
        return (asked.seed,) if asked.seed is not None else (secrets.randbits(62),)


class _Sent:
    """How much of a turn a stream has sent."""

    def __init__(self, speaker: Speaker, asked: Asked) -> None:
        self.speaker, self.asked = speaker, asked
        style = speaker.style(asked)
        self.whole = style is not None  # a turn that may be a call is sent when it is complete
        self.hold = max((len(s) for s in asked.stop), default=1) - 1
        self.text, self.tokens = "", 0

    def more(self, ids: Sequence[int], logp: Sequence[float]) -> tuple[str, Sequence[tuple[str, float]]] | None:
        if self.whole:
            return None
        ids = [i for i in ids if i not in self.speaker.renderer.end_ids]
        text = self.speaker.tokenizer.decode(ids, skip_special_tokens=False)
        text = text[: len(text) - self.hold] if self.hold else text
        if text.endswith("\ufffd") or not text.startswith(self.text) or len(text) <= len(self.text):
            return None  # a character is not complete yet
        piece, self.text = text[len(self.text) :], text
        first, self.tokens = self.tokens, len(ids)
        tokens = self.speaker._pieces(ids[first:], list(logp)[first : len(ids)]) if self.asked.logprobs else ()
        return piece, tokens

    def rest(self, said: Said) -> tuple[str, Sequence[tuple[str, float]]] | None:
        piece = said.content[len(self.text) :] if said.content.startswith(self.text) else ""
        tokens = said.tokens[self.tokens :] if self.asked.logprobs else ()
        return (piece, tokens) if piece or tokens else None


async def _all(work: list[Awaitable[Completion]]) -> list[Completion]:
    tasks = [asyncio.ensure_future(w) for w in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


# -- routes -----------------------------------------------------------------------------------------------------------------


def build_app(endpoint: Endpoint, *, token: str | None = None, loopback: bool = True) -> Any:
    """The ASGI application. With a token every request must carry it; without, it answers to loopback names only."""
    recorder = endpoint.recorder

    async def models(http: Http) -> Response:
        model = {"id": endpoint.name, "object": "model", "created": int(endpoint.started), "owned_by": "ondol"}
        return JSONResponse({"object": "list", "data": [{**model, "max_model_len": endpoint.context_length}]})

    async def health(http: Http) -> Response:
        worker = endpoint.worker
        state = {
            "status": "healthy" if worker.failure is None else "failed",
            "turns_under_way": worker.waiting,
            "turns": worker.served,
        }
        if recorder is not None:
            state |= {
                "episodes_under_way": len(recorder.open),
                "episodes": recorder.written,
                "dropped": recorder.dropped,
            }
        return JSONResponse(state, 200 if worker.failure is None else 500)

    async def chat(http: Http) -> Response:
        asked = api.parse(await _body(http), endpoint.sampling)
        if asked.stream:
            endpoint.request(
                "", endpoint.speaker.first(asked)[0], asked, (0,)
            )  # what is wrong is said before the stream begins
            return StreamingResponse(endpoint.stream(asked), media_type="text/event-stream")
        return JSONResponse(await _unless_gone(http, endpoint.complete(asked)))

    async def chat_in(http: Http) -> Response:
        asked = api.parse(await _body(http), endpoint.sampling)
        assert recorder is not None
        episode = recorder.episode(check_episode(http.path_params["episode"]))
        async with episode.lock:
            ids, said, done = await _unless_gone(http, endpoint.complete_in(episode, asked))
        if not asked.stream:
            return JSONResponse(api.completion(endpoint.name, asked, ids, [said], done.cached_tokens))
        chunks = api.Chunks(endpoint.name, asked)
        events = [
            chunks.first(),
            chunks.text(said.content, said.tokens),
            *chunks.last(said, len(ids), done.cached_tokens),
        ]
        return Response("".join(events), media_type="text/event-stream")

    async def score(http: Http) -> Response:
        body = await _body(http)
        assert recorder is not None
        given, reward, problem = (
            (body.get(k) for k in ("score", "reward", "problem")) if isinstance(body, dict) else (None,) * 3
        )
        if not _finite(given) or not 0 <= given <= 1:
            raise BadRequest("score is a number from 0 to 1", "score")
        if reward is not None and not _finite(reward):
            raise BadRequest("reward is a number", "reward")
        if problem is not None and (not isinstance(problem, str) or not problem):
            raise BadRequest("problem is a text: episodes of the same one are compared", "problem")
        name = check_episode(http.path_params["episode"])
        out = recorder.score(name, float(given), None if reward is None else float(reward), problem)
        endpoint.worker.release(f"episode/{name}")
        return JSONResponse(out)

    async def groups(http: Http) -> Response:
        assert recorder is not None
        numbers = [http.query_params.get("first", "0"), http.query_params.get("size", str(endpoint.group_size))]
        if not all(n.isdecimal() and len(n) < 10 for n in numbers) or int(numbers[1]) < 1:
            raise BadRequest("first is a problem's number, size the episodes of a group: whole numbers", "first")
        return JSONResponse(recorder.groups(*map(int, numbers)))

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield
        if recorder is not None:
            recorder.close()
        await asyncio.to_thread(endpoint.worker.close)

    routes = [
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/chat/completions", _refusing(chat), methods=["POST"]),
        Route("/health", health, methods=["GET"]),
    ]
    if recorder is not None:
        routes += [
            Route("/episodes/{episode}/v1/models", models, methods=["GET"]),
            Route("/episodes/{episode}/v1/chat/completions", _refusing(chat_in), methods=["POST"]),
            Route("/episodes/{episode}/score", _refusing(score), methods=["POST"]),
            Route("/groups", _refusing(groups), methods=["GET"]),
        ]
    return Gate(Starlette(routes=routes, lifespan=lifespan), token, loopback)


def _finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


async def _body(http: Http) -> Any:
    kind = http.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":  # what a web page's form cannot send
        raise BadRequest(f"the body is '{kind[:80]}': send Content-Type: application/json", status=415)
    raw = bytearray()
    async for chunk in http.stream():
        raw += chunk
        if len(raw) > _MAX_BODY:
            raise BadRequest(f"the body is larger than {_MAX_BODY >> 20} MiB", status=413)
    try:
        return json.loads(bytes(raw))
    except (ValueError, RecursionError) as e:
        raise BadRequest(f"the body is not JSON: {e}") from e


async def _unless_gone(http: Http, work: Any) -> Any:
    """Do the work, unless the client hangs up: then nobody waits for it."""
    task = asyncio.ensure_future(work)

    async def watch() -> None:
        while not await http.is_disconnected():
            await asyncio.sleep(0.2)

    watcher = asyncio.ensure_future(watch())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for t in (task, watcher):
            t.cancel()
        await asyncio.wait({task, watcher})


def _refusing(handler: Callable[[Http], Awaitable[Response]]) -> Callable[[Http], Awaitable[Response]]:
    async def handle(http: Http) -> Response:
        try:
            return await handler(http)
        except BadRequest as e:
            return JSONResponse(e.body(), e.status)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it

    return handle


async def serve(endpoint: Endpoint, sock: socket.socket, *, token: str | None, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT. `ready` is called once requests are answered."""
    await serve_app(build_app(endpoint, token=token, loopback=is_loopback(sock.getsockname()[0])), sock, ready)
