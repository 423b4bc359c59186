"""A small MCP server for tests of what goes wrong: slow to start, dying in the middle of a call, hanging, failing.

python flaky_server.py [--slow SECONDS] [--die-at-start]
"""

from __future__ import annotations

import asyncio
import os
import sys
import time

calls = 0


async def main() -> None:
    import mcp_types as types
    from mcp.server.lowlevel import Server
    from mcp.server.stdio import stdio_server

    text = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}

    async def list_tools(ctx, params):
        names = ["echo", "count", "crash", "hang", "fail", "image"]
        return types.ListToolsResult(tools=[types.Tool(name=n, description=n, input_schema=text) for n in names])

    async def call_tool(ctx, params):
        global calls
        calls += 1
        said = (params.arguments or {}).get("text", "")
        if params.name == "crash":
            os._exit(3)
        if params.name == "hang":
            await asyncio.sleep(600)
        if params.name == "fail":
            return types.CallToolResult(content=[types.TextContent(type="text", text="it failed")], is_error=True)
        if params.name == "image":
            return types.CallToolResult(content=[types.ImageContent(type="image", data="AAAA", mime_type="image/png")])
        reply = str(calls) if params.name == "count" else said
        return types.CallToolResult(content=[types.TextContent(type="text", text=reply)])

    server = Server("flaky", on_list_tools=list_tools, on_call_tool=call_tool)
    async with stdio_server() as (reading, writing):
        await server.run(reading, writing, server.create_initialization_options())


if __name__ == "__main__":
    if "--die-at-start" in sys.argv:
        print("no database at /nowhere", file=sys.stderr)
        sys.exit(2)
    if "--slow" in sys.argv:
        time.sleep(float(sys.argv[sys.argv.index("--slow") + 1]))
    asyncio.run(main())
