"""What a run ran on: source commit, versions, machine kind, command line. No user names, host names or secrets."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_SECRET_OPTION = re.compile(r"key|token|secret|passw|credential|auth", re.I)
_SECRET_VALUE = re.compile(r"\b(sk-|hf_|gh[pousr]_|xox[abp]-|AKIA)[A-Za-z0-9_-]{8,}")
_URL_LOGIN = re.compile(r"//[^/@\s]+@")


def environment(folder: Path | None = None) -> dict[str, Any]:
    """Facts needed to run again what was run. `folder`: where to look for a git tree (default: the working folder)."""
    packages = {}
    for name in ("ondol", "torch", "transformers"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "git": git_state(folder or Path.cwd()),
        "python": platform.python_version(),
        "packages": packages,
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "command": clean_command(sys.argv),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """{"commit": hash or None, "dirty": bool} of the git tree around `folder`; None outside one or without git."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(folder), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("rev-parse", "--is-inside-work-tree") != "true":
        return None
    # Optional locks off: looking must not disturb a git command at work in the same tree.
    changes = git("--no-optional-locks", "status", "--porcelain")
    return {"commit": git("rev-parse", "HEAD"), "dirty": changes != ""}


def clean_command(arguments: list[str]) -> list[str]:
    """The command line without the program's folder, the home folder, and what looks like a secret."""
    home = str(Path.home())
    out: list[str] = []
    hide_next = False
    for i, argument in enumerate(arguments):
        if i == 0:
            out.append(Path(argument).name)
            continue
        option, equals, _ = argument.partition("=")
        named_secret = bool(_SECRET_OPTION.search(option)) and (equals or argument.startswith("-"))
        if hide_next and not argument.startswith("--"):
            out.append("***")
        elif named_secret and equals:
            out.append(f"{option}=***")
        else:
            text = argument.replace(home, "~") if len(home) > 1 else argument
            out.append(_URL_LOGIN.sub("//***@", _SECRET_VALUE.sub("***", text)))
        hide_next = bool(named_secret and not equals)
    return out
