"""Recorded trajectories come back exactly, from a file or a run, and only those meant for training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.errors import OndolError
from ondol.records import Finish, Message, Problem, StopReason, ToolCall, ToolResult, Trajectory, Turn
from ondol.store import Run
from ondol.train.dump import read_trajectories


def made(key: tuple[int, int, int] = (1, 0, 0), logp: float = -0.1, text: str = "7") -> Trajectory:
    call = ToolCall("calculator", {"expression": "3+4"})
    return Trajectory(
        key=key,
        problem=Problem("p", "3+4?", "7", {"n": 1}),
        ids=[5, 6, 7, 8, 9],
        prompt_length=2,
        sampled=[False, False, True, False, True],
        trained=[False, False, True, False, False],
        logp=[0.0, 0.0, logp, 0.0, -0.5],
        version=[-1, -1, 3, -1, 3],
        turns=[Turn(2, 3, "<c>", Finish.STOP, [call], [ToolResult("7", seconds=0.1)]), Turn(4, 5, text, Finish.END)],
        messages=[Message("user", "3+4?"), Message("assistant", "<c>", (call,)), Message("tool", "7", name="c")],
        stop_reason=StopReason.ANSWERED,
        score=1.0,
        reward=0.75,
        logp_truncated=[0.0, 0.0, -0.05, 0.0, -0.4],
        temperature=0.7,
        info={"note": [1, 2]},
    )


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@given(logp=st.floats(max_value=0, allow_nan=False, allow_infinity=False), text=st.text())
def test_every_bit_comes_back(tmp_path_factory, logp, text) -> None:
    t = made(logp=logp, text=text.encode("utf-8", "replace").decode())
    path = write(tmp_path_factory.mktemp("d") / "t.jsonl", t.to_dict(), {"phase": "rl", **made((2, 1, 3)).to_dict()})
    found = read_trajectories(path)
    assert found == [t, made((2, 1, 3))]
    assert math.copysign(1, found[0].logp[2]) == math.copysign(1, logp)


def test_evaluations_are_left_out(tmp_path) -> None:
    """Held-out problems must not become training data, whether from an export or from the run itself."""
    with Run.create(tmp_path, "a", {}) as run:
        for number, phase in enumerate(
            ("before/greedy", "warm_start", "rl", "rl/greedy", "rl/sampled", "after/sampled")
        ):
            run.db.add_trajectories(phase, 1, [made((1, number, 0))])
        run.export("trajectories", tmp_path / "t.jsonl")
    for source in (tmp_path / "t.jsonl", run.path):
        assert [t.key[1] for t in read_trajectories(source)] == [1, 2]


def test_a_run_without_any(tmp_path) -> None:
    with Run.create(tmp_path, "a", {}) as run:
        run.db.add_trajectories("before/greedy", 0, [made()])
    with pytest.raises(OndolError, match="no trajectories to train on"):
        read_trajectories(run.path)


def test_the_line_is_named(tmp_path) -> None:
    path = write(tmp_path / "t.jsonl", made().to_dict(), {**made().to_dict(), "version": [1]})
    with pytest.raises(OndolError, match=r"t.jsonl:2: not a trajectory \('version' has 1 entries for 5 ids\)"):
        read_trajectories(path)
    with pytest.raises(OndolError, match="cannot be read"):
        read_trajectories(tmp_path / "nothing.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OndolError, match="cannot be read"):
        read_trajectories(tmp_path / "binary")
