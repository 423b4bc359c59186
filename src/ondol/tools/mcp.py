"""Every tool of an MCP server as a tool: `{name = "mcp", command = ["mcp-server-time"]}` or `{name = "mcp", url = "..."}`.

A trajectory has a connection of its own, opened at its first call: over stdio that is a process of its own, so that what
the server remembers is that trajectory's alone (`shared = true` for a server that remembers nothing). `{folder}` in the
command, its environment and `cwd` stands for an empty folder that lives as long as the connection: for a server that keeps
its state in files. A server that dies harms the call it dies in; the next one starts it again and says so.

Connections live in the background loop, each in a task that opens and closes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from functools import cached_property
from importlib import metadata
from typing import Any, Self

from pydantic import Field, model_validator

from ondol.errors import OndolError, nearest
from ondol.records import Image, ToolResult
from ondol.sandbox.monty import clean
from ondol.tools import background
from ondol.tools.actions import printable
from ondol.tools.base import Tool, ToolSession, Toolset
from ondol.tools.image import decoded
from ondol.tools.remote import described_class

RESTARTED = "(the server was started again: what it remembered is gone)"
_CLOSE_S = 10.0  # for a server to end
_SLACK_S = 5.0  # beyond our own limits, before a call is given up from outside
_MOST_PAGES = 100  # of a server's list of tools
_STARTING = 2 * (os.cpu_count() or 1)  # servers that start at once; more would only wait for each other


def is_installed() -> bool:
    """Is the package there, and not of its first generation, which has another API?"""
    try:
        return metadata.version("mcp").startswith("2.")
    except metadata.PackageNotFoundError:
        return False


def check_installed() -> None:
    if not is_installed():
        raise OndolError("MCP needs the package 'mcp', version 2", "pip install 'ondol[mcp]'")


class McpTools(Toolset):
    """The tools of an MCP server, over stdio (`command`) or streamable HTTP (`url`)."""

    command: tuple[str, ...] = Field(
        default=(), description='program and arguments that start it, e.g. ["mcp-server-time"]'
    )
    url: str = Field(default="", description="or where it listens, e.g. http://127.0.0.1:8765/mcp")
    env: dict[str, str] = Field(default={}, description="environment variables of the command, beside a few basic ones")
    cwd: str | None = Field(default=None, description="folder that the command runs in")
    token_env: str | None = Field(default=None, description="environment variable that holds the token for `url`")
    only: tuple[str, ...] = Field(default=(), description="these of its tools; none: all")
    prefix: str = Field(default="", description="put before the tools' names, where two servers use the same")
    shared: bool = Field(default=False, description="one connection for all trajectories; for servers without memory")
    timeout_s: float = Field(default=30.0, gt=0, le=3600, description="time limit of one call")
    start_s: float = Field(default=60.0, gt=0, le=3600, description="time limit for the server to start")
    output_chars: int = Field(default=4096, ge=64, description="longer output is cut in the middle")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if bool(self.command) == bool(self.url):
            raise ValueError("give either command (a program that speaks MCP over stdio) or url")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"'{self.url}' is no URL, e.g. http://127.0.0.1:8765/mcp")
        return self

    def tools(self) -> tuple[Tool, ...]:
        return self._tools

    @property
    def label(self) -> str:
        """What to call the server in messages."""
        return self.url or " ".join(self.command)

    @cached_property
    def _hub(self) -> _Hub:
        return _Hub(self)

    @cached_property
    def _tools(self) -> tuple[Tool, ...]:
        check_installed()
        try:
            listed = background.wait(self._hub.list_tools(), self.start_s + _CLOSE_S + _SLACK_S)
        except TimeoutError as e:
            raise OndolError(f"the MCP server '{self.label}' did not start in {self.start_s:g} s", "set start_s") from e
        known = {t.name: t for t in listed}
        for name in self.only:
            if name not in known:
                raise OndolError(f"the MCP server '{self.label}' has no tool '{name}'", nearest(name, known))
        return tuple(self._tool(known[name]) for name in self.only or known)

    def _tool(self, listed: Any) -> Tool:
        parameters = {"type": "object", "properties": {}, **listed.input_schema}
        first = [*parameters.get("required", []), *parameters["properties"], "input"][0]
        named = described_class(McpTool, self.prefix + listed.name, parameters, first)
        description = (listed.description or listed.title or listed.name).strip()
        return named(server=self, remote_name=listed.name, description=description, timeout_s=self.timeout_s)


class McpTool(Tool):
    """One tool of an MCP server. `name`, `parameters` and `main_argument` are set where it is made."""

    server: McpTools = Field(exclude=True, repr=False, description="where it is")
    remote_name: str = Field(description="what the server calls it")

    @property
    def deadline_s(self) -> float:
        return self.timeout_s + self.server.start_s + _SLACK_S  # the connection keeps both

    def session(self, trajectory_id: str) -> McpSession:
        return McpSession(self.server, self.remote_name, trajectory_id)


class McpSession:
    """One tool in one trajectory; the tools of a server share the trajectory's connection."""

    def __init__(self, server: McpTools, tool: str, trajectory_id: str) -> None:
        self._server, self._tool = server, tool
        self._key = "" if server.shared else trajectory_id

    async def call(self, arguments: dict[str, Any]) -> ToolResult:
        return await background.away(self._server._hub.call(self._key, self, self._tool, arguments))

    async def close(self) -> None:
        await background.away(self._server._hub.leave(self._key, self))


class _Hub:
    """The connections to one server, by trajectory. Everything here runs in the background loop."""

    def __init__(self, server: McpTools) -> None:
        self.server = server
        self.connections: dict[str, _Connection] = {}
        self.users: dict[str, set[ToolSession]] = {}
        self.spare: _Connection | None = None  # what listed the tools: the first trajectory's
        self.starting = asyncio.Semaphore(_STARTING)
        background.at_exit(self.close)

    async def list_tools(self) -> list[Any]:
        connection = _Connection(self.server, self.starting)
        try:
            client, found, cursor = await connection.client(), [], None
            async with asyncio.timeout(self.server.start_s):
                for _ in range(_MOST_PAGES):
                    page = await client.list_tools(cursor=cursor)
                    found += page.tools
                    cursor = page.next_cursor
                    if cursor is None:
                        break
            if self.server.command:  # a session over HTTP costs nothing, and might be gone when it is wanted
                self.spare = connection
            return found
        except (TimeoutError, OndolError):
            raise
        except Exception as e:
            raise connection.failure(e) from e
        finally:
            if self.spare is not connection:
                await connection.close()

    async def call(self, key: str, user: ToolSession, tool: str, arguments: dict[str, Any]) -> ToolResult:
        server = self.server
        self.users.setdefault(key, set()).add(user)
        connection = self.connections.get(key)
        if connection is None:
            connection, self.spare = self.spare or _Connection(server, self.starting), None
            self.connections[key] = connection
        try:
            client = await connection.client()
        except TimeoutError:
            return ToolResult(f"TimeoutError: the server did not start in {server.start_s:g} s", False, "timeout")
        except Exception as e:
            what = e.what if isinstance(e, OndolError) else _why(e)
            return ToolResult(f"Error: {what}"[:500], False, "crashed")
        note, connection.restarted = f"\n{RESTARTED}" if connection.restarted else "", False
        try:
            async with asyncio.timeout(server.timeout_s):
                result = await connection.during(client.call_tool(tool, arguments))
        except TimeoutError:
            return ToolResult(f"TimeoutError: ran longer than {server.timeout_s:g} s{note}", False, "timeout")
        except Exception as e:
            if connection.gone(e):
                connection.restarted = True  # at the next call
                await connection.close()
                return ToolResult(f"Error: the server ended during the call{note}", False, "crashed")
            return ToolResult(clean(printable(f"Error: {_why(e)}"), server.output_chars) + note, False, "error")
        kind = "error" if result.is_error else "ok"
        images = await asyncio.to_thread(_images, result)
        return ToolResult(clean(_text(result), server.output_chars) + note, kind == "ok", kind, images=images)

    async def leave(self, key: str, user: ToolSession) -> None:
        users = self.users.get(key, set())
        users.discard(user)
        if users:
            return
        self.users.pop(key, None)
        if key and (connection := self.connections.pop(key, None)) is not None:
            await connection.close()

    async def close(self) -> None:
        connections, self.connections = list(self.connections.values()), {}
        if self.spare is not None:
            connections.append(self.spare)
        await asyncio.gather(*(c.close() for c in connections))


class _Connection:
    """A client that is opened when asked for and kept until it breaks or is closed."""

    def __init__(self, server: McpTools, starting: asyncio.Semaphore) -> None:
        self.server, self.starting = server, starting
        self.restarted = False
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._over = asyncio.Event()
        self._client: Any = None
        self._log: Any = None  # what the server says on stderr while it starts

    async def client(self) -> Any:
        """The open client. Raises OndolError, or TimeoutError after `start_s`."""
        async with self._lock:
            if self._client is not None and self._task is not None and not self._task.done():
                return self._client
            await self._end()
            async with self.starting:
                try:
                    async with asyncio.timeout(self.server.start_s):
                        self._client = await self._open("legacy")
                except Exception as e:
                    await self._end()
                    if isinstance(e, (TimeoutError, OndolError)):
                        raise
                    raise self.failure(e) from e
            return self._client

    async def during(self, work: Any) -> Any:
        """The work's result, or ConnectionError as soon as the connection is over."""
        doing = asyncio.ensure_future(work)
        assert self._task is not None
        try:
            await asyncio.wait({doing, self._task}, return_when=asyncio.FIRST_COMPLETED)
            if doing.done():
                return doing.result()
            raise ConnectionError("the connection is over")
        finally:
            doing.cancel()

    def gone(self, e: Exception) -> bool:
        """Does this error mean that the server is not there any more?"""
        import anyio
        from mcp_types import CONNECTION_CLOSED

        error = getattr(e, "error", None)
        if getattr(error, "code", None) == CONNECTION_CLOSED or getattr(error, "message", "") == "Session terminated":
            return True
        broken = (ConnectionError, anyio.ClosedResourceError, anyio.BrokenResourceError, anyio.EndOfStream)
        return isinstance(e, broken) or self._task is None or self._task.done()

    def failure(self, e: BaseException) -> OndolError:
        """Why there is no connection, with the last thing the server said."""
        said = ""
        if self._log is not None and not self._log.closed:
            self._log.seek(0, os.SEEK_END)
            self._log.seek(max(0, self._log.tell() - 2000))
            lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
            said = f"; it said: {lines[-1][:300]}" if lines else ""
        remedy = "run the command by hand to see what it says" if self.server.command else "is it there, and is it MCP?"
        return OndolError(f"the MCP server '{self.server.label}' cannot be used: {_why(e)}{said}", remedy)

    async def close(self) -> None:
        async with self._lock:
            await self._end()

    async def _open(self, mode: str) -> Any:
        from mcp.shared.exceptions import MCPError
        from mcp_types import UNSUPPORTED_PROTOCOL_VERSION

        opened: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._over = asyncio.Event()
        self._task = asyncio.create_task(self._live(mode, opened, self._over))
        try:
            return await asyncio.shield(opened)
        except MCPError as e:
            if (
                mode == "legacy" and e.code == UNSUPPORTED_PROTOCOL_VERSION
            ):  # a server of the sessionless protocol alone
                await self._end()
                return await self._open("auto")
            raise

    async def _live(self, mode: str, opened: asyncio.Future[Any], over: asyncio.Event) -> None:
        from mcp import Client

        try:
            async with self._transport() as transport, Client(transport, mode=mode) as client:
                opened.set_result(client)
                await over.wait()
        except BaseException as e:
            if not opened.done():
                opened.set_exception(_inner(e))
                opened.exception()  # seen, also when nobody waits any more
            elif not isinstance(e, Exception):
                raise

    @contextlib.asynccontextmanager
    async def _transport(self) -> AsyncIterator[Any]:
        server = self.server
        if server.url:
            import httpx2
            from mcp.client.streamable_http import streamable_http_client

            token = os.environ.get(server.token_env) if server.token_env else None
            if server.token_env and not token:
                raise OndolError(
                    f"the environment variable {server.token_env} is not set", "it holds the server's token"
                )
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            timeout = httpx2.Timeout(server.start_s, read=server.timeout_s + server.start_s)
            async with httpx2.AsyncClient(headers=headers, timeout=timeout, trust_env=False) as http:
                yield streamable_http_client(server.url, http_client=http)
            return
        from mcp.client.stdio import StdioServerParameters, stdio_client

        folder = tempfile.mkdtemp(prefix="ondol-mcp-")
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (it is read after a failure, and closed in `_end`)
        try:
            program, *arguments = [word.replace("{folder}", folder) for word in server.command]
            parameters = StdioServerParameters(
                command=program,
                args=arguments,
                env={k: v.replace("{folder}", folder) for k, v in server.env.items()},
                cwd=server.cwd.replace("{folder}", folder) if server.cwd else None,
                encoding_error_handler="replace",
            )
            yield stdio_client(parameters, errlog=self._log)
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # not in a thread: when the process ends there are none any more

    async def _end(self) -> None:
        task, self._task = self._task, None
        client, self._client = self._client, None
        self._over.set()
        if task is None:
            return
        if client is not None:
            await asyncio.wait({task}, timeout=_CLOSE_S)
        if not task.done():  # still opening, or it does not close
            task.cancel()
            await asyncio.wait({task}, timeout=_CLOSE_S)


def _text(result: Any) -> str:
    """What a model can read of a result."""
    parts = []
    for block in result.content:
        resource: Any = getattr(block, "resource", None)
        if isinstance(getattr(block, "text", None), str):
            parts.append(block.text)
        elif isinstance(text := getattr(resource, "text", None), str):
            parts.append(text)
        elif getattr(block, "uri", None) is not None:
            parts.append(f"[{block.type}: {block.uri}]")
        else:
            kind = getattr(block, "mime_type", None) or getattr(resource, "mime_type", None) or "unknown kind"
            parts.append(f"[{block.type}: {kind}]")
    if not parts and result.structured_content is not None:
        parts.append(json.dumps(result.structured_content))
    return printable("\n".join(parts))


def _images(result: Any) -> tuple[Image, ...]:
    """The pictures of a result that can be shown; of the others its text says that they were there."""
    found = []
    for block in result.content:
        if block.type == "image":
            with contextlib.suppress(ValueError):
                found.append(decoded(block.data))
    return tuple(found)


def _inner(e: BaseException) -> BaseException:
    """The first real error in groups of errors."""
    while isinstance(e, BaseExceptionGroup) and e.exceptions:
        e = e.exceptions[0]
    return e


def _why(e: BaseException) -> str:
    e = _inner(e)
    return f"{type(e).__name__}: {e}" if str(e) else type(e).__name__
