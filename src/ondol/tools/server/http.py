"""The tool server over HTTP: VerlTool's `/get_observation`, our own `/call`, and MCP at `/mcp`.

Every request passes one gate: with a token set it must carry it; without one the server answers only to loopback names,
so that no web page can reach it through the reader's browser.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ondol.errors import OndolError
from ondol.records import ToolCall
from ondol.tools.actions import printable
from ondol.tools.server import wire
from ondol.tools.server.core import Busy, Item, ToolServer

try:
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ImportError as e:
    raise OndolError(f"the tool server needs more packages ({e})", "pip install 'ondol[server]'") from e

MAX_BODY = 64 << 20  # bytes of a request
M = TypeVar("M", bound=BaseModel)


def is_loopback(host: str) -> bool:
    """Does this name stay on the machine?"""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def build_app(server: ToolServer, *, token: str | None = None, loopback: bool = True, mcp: bool = True) -> Any:
    """The ASGI application. Its lifespan closes `server`.

    Args:
        token: what requests must carry as `Authorization: Bearer ...`; None: nothing.
        loopback: it is reached under loopback names only.
        mcp: also serve MCP at /mcp.
    """
    manager = _mcp_manager(server) if mcp else None
    document = wire.openapi(token is not None)

    async def get_observation(request: Request) -> Response:
        raw, body = await _read(request, wire.ObservationRequest)
        return await server.once(b"get_observation" + raw, lambda: _observe(server, body))

    async def call(request: Request) -> Response:
        raw, body = await _read(request, wire.CallRequest)
        return await server.once(b"call" + raw, lambda: _call(server, body))

    async def finish(request: Request) -> Response:
        _, body = await _read(request, wire.FinishRequest)
        gone = await asyncio.gather(*(server.finish(printable(t), body.client) for t in body.trajectory_ids))
        return _reply(wire.FinishReply(finished=sum(gone)))

    async def tools(request: Request) -> Response:
        return _reply(wire.ToolsReply(tools=describe(server)))

    async def health(request: Request) -> Response:
        return _reply(wire.HealthReply(**server.health()))

    async def schema(request: Request) -> Response:
        return JSONResponse(document)

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(server.close)
            if manager is not None:
                await stack.enter_async_context(manager.run())
            yield

    routes = [
        Route("/get_observation", _refusing(server, get_observation), methods=["POST"]),
        Route("/call", _refusing(server, call), methods=["POST"]),
        Route("/finish", _refusing(server, finish), methods=["POST"]),
        Route("/tools", tools, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/openapi.json", schema, methods=["GET"]),
    ]
    app = Starlette(routes=routes, lifespan=lifespan)
    app.state.streams = set()  # open MCP event streams: they would keep a closing server waiting
    if manager is not None:
        app.router.routes.append(Route("/mcp", _Mcp(server, manager, app.state.streams)))
    return Gate(app, token, loopback)


def describe(server: ToolServer) -> list[wire.ToolDescription]:
    return [
        wire.ToolDescription(
            name=t.name,
            description=t.description,
            parameters=t.parameters,
            main_argument=t.main_argument,
            timeout_s=t.timeout_s,
            deadline_s=t.deadline_s,
        )
        for t in server.tools.values()
    ]


async def _observe(server: ToolServer, body: wire.ObservationRequest) -> Response:
    started = time.perf_counter()
    n = len(body.trajectory_ids)
    extra = body.extra_fields or [{}] * n
    # The lists beside the batch count where the extra fields do not say it themselves, as VerlTool has it.
    finish = [bool(e.get("finish", f)) for e, f in zip(extra, body.finish or [False] * n)]
    items = [Item(t, a, f) for t, a, f in zip(body.trajectory_ids, body.actions, finish)]
    try:
        answers = await server.observe(items)
    except TimeoutError:
        limit = server.limits.request_s
        return _problem(408, f"the request took longer than {limit} s", "send fewer actions at once")
    waited = max(a.waited_s for a in answers)
    return _reply(
        wire.ObservationReply(
            observations=[a.observation for a in answers],
            dones=[a.done for a in answers],
            valids=[a.valid for a in answers],
            processing_time_ms=max(0.0, time.perf_counter() - started - waited) * 1000,
            queue_time_ms=waited * 1000,
        )
    )


async def _call(server: ToolServer, body: wire.CallRequest) -> Response:
    call = ToolCall(printable(body.tool), body.arguments)
    result, waited = await server.call(printable(body.trajectory_id), call, body.client)
    return _reply(
        wire.CallReply(text=result.text, ok=result.ok, kind=result.kind, seconds=result.seconds, waited_s=waited)
    )


async def _read(request: Request, model: type[M]) -> tuple[bytes, M]:
    """The body as bytes and checked. Raises _Refused."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise _Refused(415, f"the body is '{kind[:80]}'", "send Content-Type: application/json")
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MAX_BODY:
            raise _Refused(413, f"the body is larger than {MAX_BODY >> 20} MiB", "send fewer actions at once")
    try:
        return bytes(raw), model.model_validate_json(bytes(raw))
    except ValidationError as e:
        errors = e.errors(include_url=False, include_context=False, include_input=False)
        if errors[0]["type"] == "json_invalid":
            raise _Refused(400, str(errors[0]["msg"]), "the body is one JSON object, see /openapi.json") from e
        detail = [{"loc": ["body", *(str(p) for p in x["loc"])], "msg": x["msg"], "type": x["type"]} for x in errors]
        raise _Refused(422, detail[:20], "see /openapi.json") from e


class _Refused(Exception):
    def __init__(self, status: int, detail: Any, remedy: str) -> None:
        super().__init__(status, detail, remedy)


def _refusing(
    server: ToolServer, handler: Callable[[Request], Coroutine[Any, Any, Response]]
) -> Callable[[Request], Any]:
    """The handler, with what it raises turned into replies."""

    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except _Refused as e:
            return _problem(*e.args)
        except Busy as e:
            if e.retry_s is None:
                return _problem(413, str(e), "split the request")
            reply = _problem(503 if server.draining else 429, str(e), f"ask again in {e.retry_s:g} s")
            reply.headers["Retry-After"] = f"{max(1, round(e.retry_s))}"
            return reply
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it

    return handle


def _reply(model: BaseModel) -> Response:
    return Response(model.model_dump_json(), media_type="application/json")


def _problem(status: int, detail: Any, remedy: str) -> Response:
    return JSONResponse({"detail": detail, "remedy": remedy}, status)


class Gate:
    """Lets through what may ask: the right token, or without one, loopback names and no foreign web page."""

    def __init__(self, app: Any, token: str | None, loopback: bool) -> None:
        self.app, self.loopback = app, loopback
        self.token = None if token is None else token.encode()

    @property
    def state(self) -> Any:
        return self.app.state

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers: dict[bytes, bytes] = dict(scope["headers"])
            refusal = self._refusal(headers)
            if refusal is not None:
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _refusal(self, headers: dict[bytes, bytes]) -> Response | None:
        if self.token is not None:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self.token):
                return None
            reply = _problem(401, "the token is missing or wrong", "send Authorization: Bearer TOKEN")
            reply.headers["WWW-Authenticate"] = "Bearer"
            return reply
        if self.loopback:
            host = _name(headers.get(b"host", b""))
            origin = headers.get(b"origin")
            if not is_loopback(host) or (origin is not None and not is_loopback(_name(origin.partition(b"//")[2]))):
                return _problem(403, "this server answers to loopback names only", "serve it with --token for more")
        return None


def _name(host: bytes) -> str:
    """The host of `host:port`."""
    text = host.decode("latin-1")
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]


class _Mcp:
    """The MCP endpoint. Event streams are counted, and an ended session's state forgotten."""

    def __init__(self, server: ToolServer, manager: Any, streams: set[asyncio.Task[Any]]) -> None:
        self.server, self.manager, self.streams = server, manager, streams

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from ondol.tools.server.mcp import SESSION_HEADER, forget_session

        work = asyncio.ensure_future(self.manager.handle_request(scope, receive, send))
        if scope["method"] == "GET":
            self.streams.add(work)
            work.add_done_callback(self.streams.discard)
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError:
            work.cancel()
            raise
        if work.cancelled():
            return  # we are closing
        work.result()
        session = dict(scope["headers"]).get(SESSION_HEADER.encode())
        if scope["method"] == "DELETE" and session is not None:
            await forget_session(self.server, session.decode("latin-1"))


def _mcp_manager(server: ToolServer) -> Any:
    from ondol.tools.server.mcp import mcp_server

    serving = mcp_server(server)
    from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

    # Host and origin are the gate's matter. Plain JSON replies: a call has one answer and nothing to stream.
    return StreamableHTTPSessionManager(serving, json_response=True)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket (port 0: a free one)."""
    if not 0 <= port <= 65535:
        raise OndolError(f"cannot listen at port {port}", "choose a --port up to 65535 (0: any free one)")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except (OSError, OverflowError) as e:
        raise OndolError(f"cannot listen at {host}:{port}: {e}", "choose another --port (0: any free one)") from e
    return sock


def url_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(
    server: ToolServer, sock: socket.socket, *, token: str | None, mcp: bool, grace_s: float, ready: Callable[[], None]
) -> None:
    """Serve until SIGTERM or SIGINT; then take no more calls, let those at work end for up to `grace_s`, and close.

    `ready` is called once requests are answered. A second signal ends it at once.
    """
    app = build_app(server, token=token, loopback=is_loopback(sock.getsockname()[0]), mcp=mcp)

    async def drain(at_once: bool) -> None:
        # While it drains it still answers: health says so, and further calls hear why they are refused.
        await server.drain(0 if at_once else grace_s)
        for stream in list(app.state.streams):
            stream.cancel()

    await serve_app(app, sock, ready, drain, server.hurry)


async def serve_app(
    app: Any,
    sock: socket.socket,
    ready: Callable[[], None],
    drain: Callable[[bool], Awaitable[None]] | None = None,
    hurry: Callable[[], None] | None = None,
) -> None:
    """Serve an ASGI app until SIGTERM or SIGINT; a second one ends it at once.

    Args:
        ready: called once requests are answered.
        drain: awaited before connections are closed; told whether to be at once.
        hurry: called at the second signal.
    """
    import uvicorn

    class Uvicorn(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Any:  # ours are below; uvicorn would raise them again at the end
            yield

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            ready()

        async def shutdown(self, sockets: Any = None) -> None:
            if drain is not None:
                await drain(self.force_exit)
            await super().shutdown(sockets)

    running = Uvicorn(
        uvicorn.Config(app, log_level="error", access_log=False, lifespan="on", timeout_graceful_shutdown=5)
    )

    def stop() -> None:
        if running.should_exit:
            running.force_exit = True
            logging.getLogger("uvicorn.error").disabled = True  # it would tell what is cut off as an error
            if hurry is not None:
                hurry()
        running.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # not in the main thread
            loop.add_signal_handler(number, stop)
    await running.serve([sock])


def start_line(server: ToolServer, url: str, token: str | None, mcp: bool) -> str:
    """One line of JSON for scripts that start the server."""
    return json.dumps(
        {"url": url, "token": token is not None, "tools": list(server.tools), "mcp": f"{url}/mcp" if mcp else None}
    )
