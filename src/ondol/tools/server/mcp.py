"""The same tools over MCP: streamable HTTP (mounted by `http`) and stdio.

Whose state a call meets: the trajectory named in the request's `_meta` under `TRAJECTORY`; else the MCP session (legacy
handshake over HTTP) or the one connection (stdio); else, in the sessionless protocol of 2026-07-28, a fresh one that is
forgotten after the call.
"""

from __future__ import annotations

import contextlib
import uuid
from typing import Any

import ondol
from ondol.records import ToolCall
from ondol.tools.mcp import check_installed
from ondol.tools.server.core import Busy, ToolServer

TRAJECTORY = "ondol/trajectory_id"
SESSION_HEADER = "mcp-session-id"
CLIENT = "mcp"  # apart from the trajectories of other clients


def mcp_server(server: ToolServer, only: str | None = None) -> Any:
    """A low-level MCP server over `server`. `only`: the one trajectory of all calls (stdio)."""
    check_installed()
    import mcp_types as types
    from mcp.server.lowlevel import Server

    async def list_tools(ctx: Any, params: Any) -> Any:
        tools = [
            types.Tool(name=t.name, description=t.description, input_schema=t.parameters) for t in server.tools.values()
        ]
        return types.ListToolsResult(tools=tools)

    async def call_tool(ctx: Any, params: Any) -> Any:
        trajectory_id, passing = _trajectory(ctx, only)
        try:
            result, _ = await server.call(trajectory_id, ToolCall(params.name, params.arguments or {}), CLIENT)
            text, failed = result.text, not result.ok
        except Busy as e:
            text, failed = f"Error: {e}", True
        finally:
            if passing:
                await server.finish(trajectory_id, CLIENT)
        return types.CallToolResult(content=[types.TextContent(type="text", text=text)], is_error=failed)

    def schema(name: str) -> Any:
        tool = server.tools.get(name)
        return tool.parameters if tool is not None else None

    return Server(
        "ondol",
        version=ondol.__version__,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
        get_tool_input_schema=schema,
    )


def _trajectory(ctx: Any, only: str | None) -> tuple[str, bool]:
    """(trajectory of this request, is it over after the call)."""
    named = (ctx.meta or {}).get(TRAJECTORY)
    if isinstance(named, str) and named:
        return f"named:{named[:512]}", False
    if only is not None:
        return only, False
    session = ctx.request.headers.get(SESSION_HEADER) if ctx.request is not None else None
    return (f"session:{session}", False) if session else (f"once:{uuid.uuid4().hex}", True)


async def forget_session(server: ToolServer, session: str) -> None:
    """A client has ended its MCP session."""
    await server.finish(f"session:{session}", CLIENT)


async def serve_stdio(server: ToolServer, grace_s: float) -> None:
    """Serve one client over stdin and stdout until it closes them."""
    made = mcp_server(server, only="stdio")
    from mcp.server.stdio import stdio_server

    try:
        async with stdio_server() as (reading, writing):
            await made.run(reading, writing, made.create_initialization_options())
    finally:
        with contextlib.suppress(Exception):
            await server.drain(grace_s)
        await server.close()
