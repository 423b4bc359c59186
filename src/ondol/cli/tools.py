"""`ondol tools`: what tools there are, and a server for them."""

from __future__ import annotations

import asyncio
import os
import tomllib
from argparse import Namespace
from typing import Any

from rich.console import Console

from ondol.cli._common import print_json
from ondol.errors import OndolError
from ondol.parts import find, make, names
from ondol.tools.base import Tool, Toolset, unpack
from ondol.view.console import table

_DEFAULT = "python,calculator"


def run(args: Namespace) -> int:
    return _list(args) if args.action == "list" else _serve(args)


def _list(args: Namespace) -> int:
    rows = [_row(name) for name in names("tools")]
    if args.json:
        print_json(rows)
    else:
        Console().print(table(rows, ["name", "argument", "what"]))
    return 0


def _row(name: str) -> dict[str, Any]:
    try:
        cls = find("tools", name)
    except OndolError as e:  # an installed package's: its fault must not hide the others
        return {"name": name, "argument": "-", "what": e.what, "parameters": None}
    doc = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
    if issubclass(cls, Toolset):
        return {"name": name, "argument": "(several tools)", "what": doc, "parameters": None}
    default = cls.model_fields["description"].default
    what = default if isinstance(default, str) else doc
    return {"name": name, "argument": cls.main_argument, "what": what, "parameters": cls.parameters}


def _serve(args: Namespace) -> int:
    token = args.token if args.token is not None else os.environ.get("ONDOL_TOOLS_TOKEN")
    if token is not None and (not token or not token.isascii() or not token.isprintable() or " " in token):
        raise OndolError("this token cannot stand in a header", "use letters and digits, at least one")
    for name in ("max_running", "idle", "grace", "request_timeout"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise OndolError(f"--{name.replace('_', '-')} {value:g}: it must be above 0")
    tools = _tools(args)
    if args.stdio:
        return asyncio.run(_stdio(args, tools))
    return asyncio.run(_http(args, tools, token))


def _tools(args: Namespace) -> tuple[Tool, ...]:
    listed = args.tools if args.tools is not None or args.tool else _DEFAULT
    entries: list[Any] = [name.strip() for name in (listed or "").split(",") if name.strip()]
    for text in args.tool:
        if not text.lstrip().startswith("{"):
            entries.append(text.strip())
            continue
        try:
            entries.append(tomllib.loads(f"v = {text}")["v"])
        except tomllib.TOMLDecodeError as e:
            raise OndolError(
                f"--tool {text}: not a table in TOML ({e})", """for example --tool '{name = "python", timeout_s = 5}'"""
            ) from e
    if not args.in_process:
        entries = [_isolated(entry) for entry in entries]
    try:
        return unpack([make("tools", entry, "tools") for entry in entries])
    except ValueError as e:
        raise OndolError(str(e), "name each once, or give a prefix where the entry has one") from e


def _isolated(entry: Any) -> Any:
    """A tool of the user's own gets a process for each trajectory: we do not know that it never blocks or crashes."""
    name = entry if isinstance(entry, str) else entry.get("name", "") if isinstance(entry, dict) else ""
    return {"name": "isolated", "tool": entry} if ":" in str(name) else entry


def _server(args: Namespace, tools: tuple[Tool, ...]) -> Any:
    from ondol.tools.server.core import Limits, ToolServer

    limits = Limits(args.max_running, max(args.max_waiting, 0), idle_s=args.idle, request_s=args.request_timeout)
    return ToolServer(tools, limits, done_if_invalid=args.done_if_invalid)


async def _stdio(args: Namespace, tools: tuple[Tool, ...]) -> int:
    from ondol.tools.server.mcp import serve_stdio

    await serve_stdio(_server(args, tools), args.grace)
    return 0


async def _http(args: Namespace, tools: tuple[Tool, ...], token: str | None) -> int:
    from ondol.tools.mcp import is_installed
    from ondol.tools.server import http

    if token is None and not http.is_loopback(args.host):
        raise OndolError(
            f"'{args.host}' can be reached from other machines, and there is no token",
            "give --token (or $ONDOL_TOOLS_TOKEN), or listen at 127.0.0.1",
        )
    server = _server(args, tools)
    sock = http.listen(args.host, args.port)
    url, mcp = http.url_of(sock), not args.no_mcp and is_installed()

    def ready() -> None:
        if args.json:
            print(http.start_line(server, url, token, mcp), flush=True)
            return
        also = f", MCP at {url}/mcp" if mcp else "" if args.no_mcp else " (MCP: pip install 'ondol[mcp]')"
        print(f"serving {', '.join(server.tools)} at {url}{also}; stop with Ctrl-C", flush=True)

    await http.serve(server, sock, token=token, mcp=mcp, grace_s=args.grace, ready=ready)
    return 0
