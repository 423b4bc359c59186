"""A tool server in a process of its own, for tests."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SRC = HERE.parents[1] / "src"
COMMAND = [sys.executable, "-m", "ondol", "tools", "serve"]


def environment(**more: str) -> dict[str, str]:
    """Ours, with this source and the tests' tools importable."""
    path = os.pathsep.join([str(SRC), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **more}


@contextlib.contextmanager
def serving(*words: str, stderr: Any = None, **env: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """(process, what it said at its start). Ended, however it went."""
    process = subprocess.Popen(
        [*COMMAND, "--json", *words],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=environment(**env),
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"the server ended with status {process.wait(10)}"
        yield process, json.loads(line)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)
        if process.stdout is not None:
            process.stdout.close()
