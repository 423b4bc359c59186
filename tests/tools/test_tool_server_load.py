"""A small form of bench/tool_server.py: 100 trajectories at once, with faults and a killed worker."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="pip install 'ondol[server]'")
pytest.importorskip("httpx2", reason="pip install 'ondol[server]'")

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(150)
def test_every_answer_is_right_and_in_place(tmp_path: Path):
    output = tmp_path / "result.json"
    command = [
        sys.executable,
        ROOT / "bench/tool_server.py",
        "--trajectories",
        "100",
        "--seed",
        "1",
        "--output",
        output,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert output.exists(), done.stderr[-2000:]
    result = json.loads(output.read_text())
    assert result["held"] and done.returncode == 0, result
    assert (result["raise"], result["hang"], result["killed"]) == (3, 3, ["isolated", "sandbox"])
