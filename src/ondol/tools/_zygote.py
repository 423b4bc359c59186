"""Forks a process for each trajectory of an isolated tool: python -m ondol.tools._zygote FD (see `ondol.tools.isolated`).

It has imported the tool's module, so that a fork costs milliseconds. Over FD, a socket, it is sent requests (a line of JSON,
and the socket that the new process shall talk over). It ends with its parent, and its children end with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
from typing import Any

from ondol.errors import OndolError
from ondol.parts import find, make
from ondol.records import ToolCall, ToolResult
from ondol.tools.base import Tool, call_tool

MAX_LINE = 64 << 20  # bytes of a call or a result
_MAX_REQUEST = 1 << 20
_PR_SET_PDEATHSIG = 1


def main() -> None:
    die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children: the kernel forgets them
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's matter: it lets calls end
    control = socket.socket(fileno=int(sys.argv[1]))
    with contextlib.suppress(Exception):  # if it cannot be imported, the child's answer says why
        find("tools", sys.argv[2])
    while True:
        data, fds, _, _ = socket.recv_fds(control, _MAX_REQUEST, 1)
        if not data or not fds:
            return
        if os.fork() == 0:
            control.close()
            die_with_parent()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            status = 1
            try:
                request = json.loads(data)
                asyncio.run(serve(socket.socket(fileno=fds[0]), request["tool"], request["trajectory_id"]))
                status = 0
            finally:
                os._exit(status)
        os.close(fds[0])


async def serve(sock: socket.socket, table: Any, trajectory_id: str) -> None:
    """One trajectory: answers calls, a line of JSON each, until the other side closes."""
    reader, writer = await asyncio.open_connection(sock=sock, limit=MAX_LINE)

    async def say(value: dict[str, Any]) -> None:
        writer.write(json.dumps(value).encode() + b"\n")
        await writer.drain()

    await say({"pid": os.getpid()})
    session = None
    try:
        tool: Tool = make("tools", table)
        while line := await reader.readline():
            call = json.loads(line)
            session = session or tool.session(trajectory_id)
            try:
                result = await call_tool(session, tool, ToolCall(tool.name, call["arguments"]))
            except OndolError as e:
                result = ToolResult(f"{tool.name} cannot work: {e}"[:500], False, "crashed")
            await say({"text": result.text, "ok": bool(result.ok), "kind": str(result.kind)})
    except Exception as e:
        await say({"text": f"the tool cannot work: {type(e).__name__}: {e}"[:500], "ok": False, "kind": "crashed"})
    finally:
        if session is not None:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(session.close(), 10)


def die_with_parent() -> None:
    """Linux: be killed when the parent ends. Elsewhere a closed socket ends us, unless the tool is stuck."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
