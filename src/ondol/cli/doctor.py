"""`ondol doctor`: what this machine and installation can do."""

from __future__ import annotations

import asyncio
import os
import platform
from argparse import Namespace
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from rich.console import Console

from ondol.cli._common import print_json
from ondol.errors import OndolError
from ondol.view.console import table


def run(args: Namespace) -> int:
    rows: list[dict[str, Any]] = [{"what": "python", "state": "ok", "detail": platform.python_version()}]
    rows += _torch()
    rows += [_model(), _sandbox(), *_levels(), _browser(), *_extras()]
    bad = [r for r in rows if r["state"] == "failed"]
    if args.json:
        print_json({"ok": not bad, "checks": rows})
    else:
        Console().print(table(rows, ["what", "state", "detail"]))
    return 1 if bad else 0


def _torch() -> list[dict[str, Any]]:
    import torch

    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    rows = [{"what": "torch", "state": "ok", "detail": f"{torch.__version__}, {threads}"}]
    if torch.cuda.is_available():
        rows.append({"what": "gpu", "state": "ok", "detail": torch.cuda.get_device_name(0)})
    else:
        rows.append({"what": "gpu", "state": "absent", "detail": "training runs on the CPU"})
    return rows


def _model() -> dict[str, Any]:
    from ondol.models import bundled

    folder = bundled.cache_root()
    made = sorted(p.name for p in folder.glob("**/config.json")) if folder.exists() else []
    detail = str(folder) if made else "fetched and converted at first use"
    return {"what": f"model {bundled.NAME}", "state": "ok" if made else "absent", "detail": detail}


def _sandbox() -> dict[str, Any]:
    from ondol.records import ToolCall
    from ondol.tools.base import call_tool
    from ondol.tools.python import Python

    async def probe() -> str:
        tool = Python()
        session = tool.session("doctor")
        try:
            return (await call_tool(session, tool, ToolCall("python", {"code": "6 * 7"}))).text
        finally:
            await session.close()

    try:
        answer = asyncio.run(probe())
    except OndolError as e:
        return {"what": "python sandbox", "state": "failed", "detail": str(e)}
    state = "ok" if answer.strip() == "42" else "failed"
    return {"what": "python sandbox", "state": state, "detail": f"Monty, separate process; 6 * 7 gave {answer.strip()}"}


def _levels() -> list[dict[str, Any]]:
    """The level of real sandboxes that works here, and for each stronger one why it does not."""
    from ondol.sandbox.levels import reached

    found = reached()
    rows = [{"what": "real sandbox", "state": "ok" if found.level else "failed", "detail": _reached(found)}]
    for level, why in found.why.items():
        rows.append({"what": f"sandbox level {level}", "state": "absent", "detail": why})
    return rows


def _reached(found: Any) -> str:
    if found.level is None:
        return "cpython, shell and files do not work here"
    return f"{found.level}: {found.walls}; for cpython, shell, files and the code judge"


def _browser() -> dict[str, Any]:
    from ondol.tools.chromium import find_chromium, missing

    reason = missing()
    return {"what": "browser", "state": "absent" if reason else "ok", "detail": reason or str(find_chromium())}


def _extras() -> list[dict[str, Any]]:
    """The optional packages, as the installed Ondol asks for them; one of another version is as good as none."""
    rows = []
    try:
        extras, wants = metadata.metadata("ondol").get_all("Provides-Extra") or [], metadata.requires("ondol") or []
    except metadata.PackageNotFoundError:  # run from its source
        return [
            {
                "what": "ondol",
                "state": "absent",
                "detail": "not installed, so its extras are not known: pip install -e .",
            }
        ]
    for extra in extras:
        for wanted in map(Requirement, wants):
            if extra == "dev" or wanted.marker is None or not wanted.marker.evaluate({"extra": extra}):
                continue
            try:
                version = metadata.version(wanted.name)
            except metadata.PackageNotFoundError:
                version = None
            good = version is not None and wanted.specifier.contains(version, prereleases=True)
            remedy = f"pip install 'ondol[{extra}]'"
            if version is not None:
                remedy = f"{version} is installed, {wanted.specifier} is needed: {remedy}"
            rows.append(
                {"what": wanted.name, "state": "ok" if good else "absent", "detail": version if good else remedy}
            )
    return rows
