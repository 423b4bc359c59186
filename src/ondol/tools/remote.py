"""Tools behind a tool server, and the server's client.

A recipe says `{name = "remote", url = "http://127.0.0.1:8765"}` and has the server's tools as if they were here. Whatever
goes wrong on the way is what the model reads: a call that takes too long, a server that is full, gone or mad is a result
with `ok=False`; nothing raises into a trajectory. The token is read from $ONDOL_TOOLS_TOKEN.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from pydantic import Field

from ondol.errors import OndolError, nearest
from ondol.records import ToolCall, ToolResult
from ondol.tools import background
from ondol.tools.actions import printable
from ondol.tools.base import Tool, Toolset

_FINISH_S = 60.0  # for the request that closes a trajectory: nobody waits for it, and on a busy machine it stands in line behind calls
_PAUSE_S = 0.2  # before the first retry; doubled for each further one
_SLACK_S = 5.0  # beyond `timeout_s`, before a client that hangs itself is given up
_CONNECTIONS = 256  # at once, to one server


class ToolClient:
    """Talks to a tool server: ours, or VerlTool's (`observe` alone). Its methods may be awaited on any event loop.

    Args:
        url: of the server, e.g. "http://127.0.0.1:8765".
        token: what its requests must carry; default: $ONDOL_TOOLS_TOKEN.
        timeout_s: time for one request, retries and waiting for a full server included.
        retries: how often a request is sent again when the connection fails. One that times out is not: it may be at work.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout_s: float = 60.0, retries: int = 1) -> None:
        if not url.startswith(("http://", "https://")):
            raise OndolError(f"'{url}' is not the URL of a tool server", "give one such as http://127.0.0.1:8765")
        self.url, self.timeout_s, self.retries = url.rstrip("/"), timeout_s, retries
        self.name = uuid.uuid4().hex[:12]  # keeps our trajectories apart from those of other clients
        self._token = token if token is not None else os.environ.get("ONDOL_TOOLS_TOKEN")
        self._http: Any = None

    def tools(self) -> list[dict[str, Any]]:
        """The server's tools, as it describes them. Blocks; raises OndolError when there is no such server."""
        try:
            status, reply = background.wait(self._request("GET", "/tools", None, 10.0), 15.0)
        except (OSError, ValueError, TimeoutError) as e:
            raise OndolError(f"no tool server answers at {self.url} ({_why(e)})", "start one: ondol tools serve") from e
        if status == 401:
            raise OndolError(f"the tool server at {self.url} wants a token", "set ONDOL_TOOLS_TOKEN")
        if status != 200 or not isinstance(reply, dict) or not isinstance(reply.get("tools"), list):
            raise OndolError(f"what answers at {self.url} is no tool server of Ondol (status {status})")
        return reply["tools"]

    async def call(self, trajectory_id: str, call: ToolCall) -> ToolResult:
        """One call. Never raises: see the module."""
        body = {
            "trajectory_id": printable(trajectory_id),
            "tool": call.name,
            "arguments": _printable(call.arguments),
            "client": self.name,
            "call_id": uuid.uuid4().hex,
        }
        try:
            status, reply = await background.away(self._request("POST", "/call", body, self.timeout_s))
            if status == 200:
                return ToolResult(str(reply["text"]), bool(reply["ok"]), str(reply["kind"]), float(reply["seconds"]))
            return ToolResult(f"Tool server error: {_refusal(status, reply)}"[:500], False, "crashed")
        except TimeoutError:
            return ToolResult(f"Tool call timeout after {self.timeout_s:g} seconds.", False, "timeout")
        except Exception as e:
            return ToolResult(f"Tool server error: {_why(e)}"[:500], False, "crashed")

    async def observe(
        self,
        trajectory_ids: Sequence[str],
        actions: Sequence[str],
        extra_fields: Sequence[dict[str, Any]] | None = None,
        finish: Sequence[bool] | None = None,
        is_last_step: Sequence[bool] | None = None,
    ) -> list[tuple[str | dict[str, Any], bool, bool]]:
        """VerlTool's batch: (observation, done, valid) of each. On failure: a text that says so, True, False."""
        body: dict[str, Any] = {
            "trajectory_ids": [printable(t) for t in trajectory_ids],
            "actions": [printable(a) for a in actions],
        }
        for key, value in (("extra_fields", extra_fields), ("finish", finish), ("is_last_step", is_last_step)):
            if value is not None:
                body[key] = _printable(list(value))
        try:
            status, reply = await background.away(self._request("POST", "/get_observation", body, self.timeout_s))
            if status == 200:
                answers = list(zip(reply["observations"], reply["dones"], reply["valids"], strict=True))
                if len(answers) == len(body["actions"]):
                    return answers
                text = f"Tool server error: {len(answers)} answers to {len(body['actions'])} actions"
            else:
                text = f"Tool server error: {_refusal(status, reply)}"
        except TimeoutError:
            text = f"Tool call timeout after {self.timeout_s:g} seconds."
        except Exception as e:
            text = f"Tool server error: {_why(e)}"
        return [(text[:500], True, False)] * len(body["actions"])

    def finish(self, trajectory_id: str) -> None:
        """Tell the server that a trajectory is over. Nobody waits for it."""
        body = {"trajectory_ids": [printable(trajectory_id)], "client": self.name}
        background.submit(self._request("POST", "/finish", body, _FINISH_S)).add_done_callback(_seen)

    async def _request(self, method: str, path: str, body: Any, timeout_s: float) -> tuple[int, Any]:
        """(status, JSON). Runs in the background loop. Raises TimeoutError, OSError, ValueError."""
        httpx2 = _httpx2()
        if self._http is None:
            headers = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
            limits = httpx2.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=_CONNECTIONS)
            # No proxy from the environment: a tool server is reached where the recipe says.
            self._http = httpx2.AsyncClient(headers=headers, limits=limits, timeout=None, trust_env=False)
            background.at_exit(self._http.aclose)
        tries, pause = 0, _PAUSE_S
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    reply = await self._http.request(method, self.url + path, json=body)
                except httpx2.TransportError as e:
                    tries += 1
                    if tries > self.retries:
                        raise ConnectionError(_why(e)) from e
                    await asyncio.sleep(pause)
                    pause *= 2
                    continue
                if reply.status_code == 429:  # full; our own deadline bounds the waiting
                    await asyncio.sleep(_seconds(reply.headers.get("retry-after")))
                    continue
                return reply.status_code, reply.json()


class RemoteTools(Toolset):
    """The tools of a tool server (`ondol tools serve`), as if they were here."""

    url: str = Field(description="of the server, e.g. http://127.0.0.1:8765; its token: $ONDOL_TOOLS_TOKEN")
    only: tuple[str, ...] = Field(default=(), description="these of its tools; none: all")
    timeout_s: float = Field(default=60.0, gt=0, le=3600, description="time limit of one call, waiting included")

    def tools(self) -> tuple[Tool, ...]:
        return self._tools

    @cached_property
    def _tools(self) -> tuple[Tool, ...]:
        client = ToolClient(self.url, timeout_s=self.timeout_s)
        known = {t["name"]: t for t in client.tools()}
        for name in self.only:
            if name not in known:
                raise OndolError(f"the server at {self.url} has no tool '{name}'", nearest(name, known))
        return tuple(remote_tool(client, known[name]) for name in self.only or known)


class RemoteTool(Tool):
    """One tool of a server. `name`, `parameters` and `main_argument` are set by `remote_tool`."""

    client: Any = Field(exclude=True, repr=False, description="the server's client")

    @property
    def deadline_s(self) -> float:
        return self.timeout_s + _SLACK_S  # the client keeps `timeout_s`

    def session(self, trajectory_id: str) -> RemoteSession:
        return RemoteSession(self.client, self.name, trajectory_id)


def remote_tool(client: ToolClient, described: dict[str, Any]) -> Tool:
    """The tool that an entry of the server's /tools describes."""
    named = described_class(RemoteTool, described["name"], described["parameters"], described["main_argument"])
    return named(client=client, description=described["description"], timeout_s=client.timeout_s)


def described_class(base: type[Any], name: str, parameters: dict[str, Any], main_argument: str) -> type[Any]:
    """A class of tools known only at run time: a tool's name and schema belong to its class."""
    words: dict[str, Any] = {"name": name, "parameters": parameters, "main_argument": main_argument}
    return type(base.__name__, (base,), {**words, "__module__": base.__module__, "__doc__": base.__doc__})


class RemoteSession:
    """One trajectory at the server."""

    def __init__(self, client: ToolClient, tool: str, trajectory_id: str) -> None:
        self._client, self._tool, self._id, self._used = client, tool, trajectory_id, False

    async def call(self, arguments: dict[str, Any]) -> ToolResult:
        self._used = True
        return await self._client.call(self._id, ToolCall(self._tool, arguments))

    async def close(self) -> None:
        if self._used:
            self._used = False
            self._client.finish(self._id)


def _httpx2() -> Any:
    try:
        import httpx2
    except ImportError as e:
        raise OndolError("a tool server's client needs the package 'httpx2'", "pip install 'ondol[server]'") from e
    return httpx2


def _printable(value: Any) -> Any:
    """The value with every text in it made printable."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(str(k)): _printable(v) for k, v in value.items()}
    return [_printable(v) for v in value] if isinstance(value, (list, tuple)) else value


def _refusal(status: int, reply: Any) -> str:
    detail = reply.get("detail", "") if isinstance(reply, dict) else ""
    return f"it refused the call (status {status}): {detail}"


def _why(e: BaseException) -> str:
    return f"{type(e).__name__}: {e}" if str(e) else type(e).__name__


def _seconds(retry_after: str | None) -> float:
    try:
        return min(max(float(retry_after or 1), 0.05), 30.0)
    except ValueError:
        return 1.0


def _seen(future: Any) -> None:
    """A closing request that failed is no news: the server forgets the trajectory by itself."""
    if not future.cancelled():
        future.exception()
