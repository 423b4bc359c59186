"""The code judge over HTTP: an ASGI app to mount or serve, and the client's side of it. Paths and JSON are the service's own.

POST /run, /run/batch, /run/long-batch; the same under /judge without stdout and stderr; GET /ping, /status.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from ondol.errors import OndolError
from ondol.sandbox.judge import CodeJudge, Result, Submission

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

_MOST_BYTES = 64 << 20
_MOST_SUBMISSIONS = 10_000
_LONG_S = 4000.0  # for a long batch, whose calls may wait an hour for a worker


def judge_app(judge: CodeJudge, token: str | None = None) -> Starlette:
    """The app; it opens the judge when it starts, unless it is open. Without a `token` serve it on loopback only.

    With a token each request but /ping needs `Authorization: Bearer TOKEN`.
    """
    try:
        from starlette.applications import Starlette
        from starlette.responses import JSONResponse
        from starlette.routing import Route
    except ImportError as e:
        raise OndolError("the judge's server needs starlette", "pip install 'ondol[server]'") from e

    def plain(result: Result, outputs: bool) -> dict[str, Any]:
        data = dataclasses.asdict(result)
        return data if outputs else {k: v for k, v in data.items() if k not in ("stdout", "stderr")}

    def endpoint(work: Callable[[Any], Awaitable[Any]]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            if not _allowed(request, token):
                return JSONResponse({"detail": "a token is needed: Authorization: Bearer ..."}, 401)
            body = bytearray()
            async for piece in request.stream():
                body += piece
                if len(body) > _MOST_BYTES:
                    return JSONResponse({"detail": f"more than {_MOST_BYTES >> 20} MiB"}, 413)
            try:
                return JSONResponse(await work(json.loads(body)))
            except (ValueError, RecursionError) as e:
                return JSONResponse({"detail": str(e)[:500]}, 422)

        return answer

    def single(outputs: bool) -> Callable[[Any], Awaitable[Any]]:
        async def work(data: Any) -> Any:
            return plain(await judge.run(data), outputs)

        return work

    def batch(outputs: bool, long: bool) -> Callable[[Any], Awaitable[Any]]:
        async def work(data: Any) -> Any:
            submissions = data.get("submissions") if isinstance(data, dict) else None
            if not isinstance(submissions, list) or not 1 <= len(submissions) <= _MOST_SUBMISSIONS:
                raise ValueError(f"'submissions' must be a list of 1 to {_MOST_SUBMISSIONS}")
            results = await judge.run_batch(submissions, long)
            return {"sub_id": str(data.get("sub_id") or ""), "results": [plain(r, outputs) for r in results]}

        return work

    async def ping(request: Request) -> Response:
        return JSONResponse("pong")

    async def status(request: Request) -> Response:
        if not _allowed(request, token):
            return JSONResponse({"detail": "a token is needed: Authorization: Bearer ..."}, 401)
        return JSONResponse(judge.status())

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            if not judge.status()["num_workers"]:
                await stack.enter_async_context(judge)
            yield

    routes = [Route("/ping", ping), Route("/status", status)]
    for prefix, outputs in (("/run", True), ("/judge", False)):
        routes.append(Route(prefix, endpoint(single(outputs)), methods=["POST"]))
        routes.append(Route(f"{prefix}/batch", endpoint(batch(outputs, False)), methods=["POST"]))
        routes.append(Route(f"{prefix}/long-batch", endpoint(batch(outputs, True)), methods=["POST"]))
    return Starlette(routes=routes, lifespan=lifespan)


def _allowed(request: Request, token: str | None) -> bool:
    given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
    return token is None or hmac.compare_digest(given.encode(), token.encode())


class HttpJudge:
    """A judge behind HTTP, with the methods of `CodeJudge`. Use as a context, in one event loop."""

    def __init__(self, url: str, token: str | None = None, timeout_s: float = 60.0) -> None:
        self.url, self.timeout_s = url.rstrip("/"), timeout_s
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        self._http: Any = None

    async def __aenter__(self) -> HttpJudge:
        try:
            import httpx2 as httpx
        except ImportError as e:
            raise OndolError("a judge behind HTTP needs httpx2", "pip install httpx2") from e
        self._http = httpx.AsyncClient(
            base_url=self.url, headers=self._headers, timeout=self.timeout_s, trust_env=False
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def run(self, submission: Submission) -> Result:
        """Judge one. Raises OndolError when the service does not answer as it should."""
        return Result.parse(await self._post("/run", dataclasses.asdict(submission)))

    async def run_batch(self, submissions: Sequence[Submission], long: bool = False) -> list[Result]:
        """Judge several; results in their order. Raises as `run`."""
        body = {"type": "batch", "submissions": [dataclasses.asdict(s) for s in submissions]}
        answer = await self._post("/run/long-batch" if long else "/run/batch", body, _LONG_S if long else None)
        return [Result.parse(r) for r in answer["results"]]

    async def _post(self, path: str, body: dict[str, Any], timeout_s: float | None = None) -> Any:
        try:
            answer = await self._http.post(path, json=body, timeout=timeout_s or self.timeout_s)
            if answer.status_code == 200:
                return answer.json()
            why = f"{answer.status_code}: {answer.text[:300]}"
        except Exception as e:  # of transport, or no JSON
            why = f"{type(e).__name__}: {e}"
        raise OndolError(f"the code judge at {self.url}{path} failed: {why}", "is it running? GET /ping")
