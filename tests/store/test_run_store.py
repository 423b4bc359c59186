"""The run store: what is written is read back, in whole steps, by others at the same time, after kills too."""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import struct
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ondol.errors import OndolError
from ondol.records import Finish, Message, Problem, StopReason, ToolCall, ToolResult, Trajectory, Turn
from ondol.store import METRICS, Database, Metric, Run, metric, register
from ondol.store.environment import clean_command, environment, git_state
from ondol.store.toml import dump_toml


def trajectory(step: int = 0, problem: int = 0, sample: int = 0, **changes) -> Trajectory:
    call = ToolCall("calculator", {"expression": "1+2"})
    result = ToolResult("3", seconds=0.1)
    values = dict(
        key=(step, problem, sample),
        problem=Problem(f"p{problem}", "What is 1+2?", "3", {"kind": [1, 2.5, None]}),
        ids=[1, 2, 3, 4, 5],
        prompt_length=2,
        sampled=[False, False, True, True, False],
        trained=[False, False, True, True, False],
        logp=[0.0, 0.0, -0.1, -1e-300, 0.0],
        version=[-1, -1, 0, 0, -1],
        turns=[Turn(2, 4, "call\x1b[31m \udc80 한글", Finish.STOP, [call], [result])],
        messages=[
            Message("user", "What is 1+2?"),
            Message("assistant", "call", (call,)),
            Message("tool", "3", name="x"),
        ],
        stop_reason=StopReason.ANSWERED,
        score=1.0,
        reward=0.5,
        info={"note": "ü"},
    )
    return Trajectory(**{**values, **changes})


# Metric registry


def test_every_registered_metric_resolves_and_says_what_it_is():
    for name, entry in METRICS.items():
        assert entry.name == name and entry.help
        if not name.endswith("*"):
            assert metric(name) is entry
    assert len(METRICS) >= 35


def test_families_resolve_members_but_not_themselves():
    member = metric("stop/answered")
    assert member.name == "stop/answered" and member.unit == "share"
    for wrong in ("stop/*", "stop/", "stop", "stopanswered"):
        with pytest.raises(OndolError):
            metric(wrong)


def test_unknown_metric_names_the_nearest():
    with pytest.raises(OndolError, match="did you mean 'reward/mean'"):
        metric("reward/men")


def test_register_refuses_a_second_meaning(monkeypatch):
    monkeypatch.setattr("ondol.store.metrics.METRICS", {})
    mine = Metric("mine/x", "s", "down", "mine")
    assert register(mine) is register(mine) is metric("mine/x")
    with pytest.raises(OndolError, match="registered already"):
        register(Metric("mine/x", "s", "up", "other"))


# Database


def test_metrics_come_back_bit_for_bit_with_nan_and_infinity(tmp_path):
    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.floats(width=64), min_size=1, max_size=8))
    def check(values):
        db.forget_after("rl", -1)
        for step, value in enumerate(values):
            db.add_metrics("rl", step, {"score/mean": value})
        back = [row.value for row in db.metrics("score/mean", "rl")]
        for given_, got in zip(values, back, strict=True):
            if math.isnan(given_):
                assert math.isnan(got)
            else:
                assert struct.pack("d", given_ + 0.0) == struct.pack("d", got + 0.0)  # SQLite drops the sign of -0.0

    db = Database(tmp_path / "run.sqlite")
    check()


def test_metrics_are_validated_replaced_filtered_and_ordered(tmp_path):
    db = Database(tmp_path / "run.sqlite")
    with pytest.raises(OndolError, match="score/mean"):
        db.add_metrics("rl", 0, {"score/maen": 1.0})
    with pytest.raises(OndolError, match="not a number"):
        db.add_metrics("rl", 0, {"score/mean": "good"})  # type: ignore[dict-item]
    assert db.metrics() == []
    db.add_metrics("before", 0, {"eval/score_greedy": 0.1})
    db.add_metrics("rl", 1, {"score/mean": 0.2, "stop/answered": 1, "stop/timeout": 0})
    db.add_metrics("rl", 1, {"score/mean": 0.3})
    assert [(r.phase, r.name, r.value) for r in db.metrics()] == [
        ("before", "eval/score_greedy", 0.1),
        ("rl", "score/mean", 0.3),
        ("rl", "stop/answered", 1.0),
        ("rl", "stop/timeout", 0.0),
    ]
    assert {r.name for r in db.metrics("stop/*")} == {"stop/answered", "stop/timeout"}
    assert db.metrics("score/mean", "before") == []
    assert db.last_metrics()["score/mean"] == 0.3
    assert list(db.marks().items()) == [("before", 0), ("rl", 1)]


def test_trajectories_come_back_equal_and_filtered(tmp_path):
    db = Database(tmp_path / "run.sqlite")
    # More than a page, not in order of their keys.
    all_ = [
        trajectory(1, p, s, score=float(s), logp=[0.0, 0.0, -math.inf, -0.1, 0.0]) for s in (1, 0) for p in range(70)
    ]
    db.add_trajectories("rl", 1, all_)
    db.add_trajectories("rl", 0, [trajectory(0, stop_reason=StopReason.TIMEOUT)])
    db.add_trajectories("a later phase", 0, [trajectory(0)])
    back = list(db.trajectories())
    assert [t.key for t in back] == [(0, 0, 0), *((1, p, s) for p in range(70) for s in (0, 1)), (0, 0, 0)]
    assert sorted(back[1:-1], key=lambda t: t.key) == sorted(all_, key=lambda t: t.key)
    assert [t.key for t in db.trajectories(problem=3)] == [(1, 3, 0), (1, 3, 1)]
    assert {t.score for t in db.trajectories(step=1, score_max=0.5)} == {0.0}
    assert len(list(db.trajectories(limit=5))) == 5
    (row,) = db.trajectory_rows(stop_reason="timeout")
    assert row.phase == "rl" and row.step == 0 and row.tokens == 5 and row.problem_id == "p0"
    assert next(db.trajectories(stop_reason="timeout")).stop_reason is StopReason.TIMEOUT


def test_trajectory_with_what_json_cannot_carry_is_refused_with_its_key(tmp_path):
    db = Database(tmp_path / "run.sqlite")
    with pytest.raises(OndolError, match=r"\(0, 0, 0\).*object"):
        db.add_trajectories("rl", 0, [trajectory(info={"x": object()})])


def test_a_step_is_whole_or_absent_and_other_readers_see_it_only_then(tmp_path):
    db = Database(tmp_path / "run.sqlite")
    reader = Database(tmp_path / "run.sqlite", write=False)
    with pytest.raises(ZeroDivisionError), db.step():
        db.add_metrics("rl", 0, {"score/mean": 1.0})
        db.add_trajectories("rl", 0, [trajectory()])
        _ = 1 / 0
    assert db.metrics() == [] and not list(db.trajectories())
    with db.step():
        db.add_metrics("rl", 0, {"score/mean": 1.0})
        db.add_trajectories("rl", 0, [trajectory()])
        assert reader.metrics() == []
    assert len(reader.metrics()) == 1 and len(list(reader.trajectories())) == 1
    with pytest.raises(OndolError, match="reading only"):
        reader.add_metrics("rl", 1, {"score/mean": 1.0})
    with pytest.raises(OSError, match="not the database's"), db.step():
        raise OSError("not the database's")


def test_forget_and_rewind_delete_exactly_the_later_steps(tmp_path):
    db = Database(tmp_path / "run.sqlite")
    for phase in ("warm start", "rl", "after"):
        for step in range(4):
            with db.step():
                db.add_metrics(phase, step, {"score/mean": step})
                db.add_trajectories(phase, step, [trajectory(step)])
    assert db.forget_after("rl", 2) == 2
    assert db.rewind({"warm start": 3, "rl": 0}) == 4 + 8
    assert db.marks() == {"warm start": 3, "rl": 0}
    assert [t.key[0] for t in db.trajectories(phase="rl")] == [0]
    assert [e.kind for e in db.events()] == ["rewound"]
    assert db.rewind({"warm start": 3, "rl": 0}) == 0 and len(db.events()) == 1


WRITER = """
import sys
from pathlib import Path
from ondol.store import Database
db = Database(Path(sys.argv[1]))
print("go", flush=True)
step = db.marks().get("rl", -1) + 1
while True:
    with db.step():
        for i in range(20):
            db.add_metrics("rl", step, {f"stop/r{i}": step})
    step += 1
"""


def test_kill_9_leaves_whole_steps_and_readers_read_meanwhile(tmp_path):
    path = tmp_path / "run.sqlite"
    for round_ in range(3):
        child = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None and child.stdout.readline() == "go\n"
        end = time.monotonic() + 0.15 + 0.03 * round_
        reader = Database(path, write=False)
        while time.monotonic() < end:
            reader.metrics("stop/r0")
        reader.close()
        child.kill()
        child.wait()
        reader = Database(path, write=False)  # a log left by a killed writer is read too
        rows = reader.metrics()
        steps = {row.step for row in rows}
        assert rows and len(rows) == 20 * len(steps) and steps == set(range(len(steps)))
        reader.close()


def test_full_disk_is_named_and_earlier_steps_stay(tmp_path):
    db = Database(tmp_path / "run.sqlite")
    db.add_trajectories("rl", 0, [trajectory()])
    pages = db._db.execute("PRAGMA page_count").fetchone()[0]
    db._db.execute(f"PRAGMA max_page_count = {pages + 2}")  # SQLite then answers as on a full disk
    with pytest.raises(OndolError, match="disk is full") as caught, db.step():
        db.add_trajectories("rl", 1, [trajectory(1, problem=p) for p in range(50)])
    assert "free some space" in str(caught.value)
    assert db.marks() == {"rl": 0}
    db._db.execute("PRAGMA max_page_count = 1000000")
    db.add_trajectories("rl", 1, [trajectory(1)])
    assert db.marks() == {"rl": 1}


def test_damaged_or_foreign_files_are_named(tmp_path):
    (tmp_path / "run.sqlite").write_text("no database at all, but long enough to be looked at " * 40)
    for write in (True, False):
        with pytest.raises(OndolError, match="not an SQLite file"):
            Database(tmp_path / "run.sqlite", write=write)
    with pytest.raises(OndolError, match="no such run"):
        Database(tmp_path / "none.sqlite", write=False)
    with pytest.raises(OndolError, match="cannot be opened"):
        Database(tmp_path / "no" / "folder.sqlite")
    newer = sqlite3.connect(tmp_path / "newer.sqlite")
    newer.execute("PRAGMA user_version = 99")
    newer.close()
    with pytest.raises(OndolError, match="99"):
        Database(tmp_path / "newer.sqlite")


# Recipes as TOML

_KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_VALUES = st.recursive(
    st.text(st.characters(exclude_categories=["Cs"]))
    | st.text('\n\r\t"\\\x00\x7f a\u2028')
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=12,
)


def typed(value):
    """Equality that tells 1 from 1.0 from True."""
    if isinstance(value, dict):
        return {k: typed(v) for k, v in value.items()}
    if isinstance(value, list):
        return [typed(v) for v in value]
    return type(value), repr(value)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(_KEYS, _VALUES, max_size=5))
def test_toml_reads_back_the_same(recipe):
    assert typed(tomllib.loads(dump_toml(recipe))) == typed(recipe)


def test_toml_of_nan_and_what_it_cannot_say():
    assert math.isnan(tomllib.loads(dump_toml({"x": math.nan}))["x"])
    for wrong, place in (({"a": {"b": None}}, r"a\.b"), ({"a": [1, object()]}, r"a\.1"), ({"a": "\udc80"}, "a")):
        with pytest.raises(OndolError, match=place):
            dump_toml(wrong)


# Runs

RECIPE = {"seed": 3, "method": {"name": "grpo", "clip_low": 0.2}, "tools": [{"name": "calculator"}]}


def test_create_open_and_list(tmp_path):
    with Run.create(tmp_path, "my run/1", RECIPE) as run:
        assert run.name.endswith("-my-run-1") and run.state == "created"
        run.state = "running"
        assert run.state == "running"
        run.db.add_metrics("rl", 7, {"score/mean": 0.5})
        reader = Run.open(run.path)
        assert reader.recipe == RECIPE and reader.state == "running"
        (summary,) = Run.list(tmp_path)
        assert summary.state == "running" and summary.steps == {"rl": 7} and summary.last == {"score/mean": 0.5}
        assert abs(summary.created - time.time()) < 60
        with pytest.raises(OndolError, match="known: created"):
            run.state = "asleep"
    assert reader.state == "died"  # closed without a word
    reader.close()
    again = Run.open(run.path, write=True)
    again.state = "finished"
    assert [e.kind for e in again.db.events()] == ["opened"]
    again.close()
    assert Run.list(tmp_path)[0].state == "finished"
    assert Run.list(tmp_path / "nowhere") == []
    with pytest.raises(OndolError, match="not the folder of a run"):
        Run.open(tmp_path)


def test_same_second_and_name_give_different_folders(tmp_path, monkeypatch):
    monkeypatch.setattr("ondol.store.run.time.strftime", lambda form: "20250102-030405")
    names = []
    for _ in range(3):
        with Run.create(tmp_path, "x", {}) as run:
            names.append(run.name)
    assert names == ["20250102-030405-x", "20250102-030405.2-x", "20250102-030405.3-x"]
    assert [s.name for s in Run.list(tmp_path)] == names
    assert Run.find(tmp_path, "last").name == names[-1]


def test_a_recipe_that_cannot_be_written_leaves_no_folder(tmp_path):
    with pytest.raises(OndolError, match="no form"):
        Run.create(tmp_path / "runs", "x", {"a": None})
    assert not (tmp_path / "runs").exists()


def test_find(tmp_path, monkeypatch):
    stamps = iter(["20250101-000000", "20250102-000000", "20250103-000000"])
    monkeypatch.setattr("ondol.store.run.time.strftime", lambda form: next(stamps))
    for name in ("mine", "not-mine", "other"):
        Run.create(tmp_path, name, {}).close()
    a, b, c = (s.path for s in Run.list(tmp_path))
    assert Run.find(tmp_path, str(b)) == b and Run.find(tmp_path, b.name) == b
    assert Run.find(tmp_path, "mine") == a  # the whole label wins over an ending
    assert Run.find(tmp_path, "20250103") == c and Run.find(tmp_path, "ther") == c
    assert Run.find(tmp_path, "last") == c
    with pytest.raises(OndolError, match="means 3 runs"):
        Run.find(tmp_path, "2025")
    with pytest.raises(OndolError, match="did you mean 'other'"):
        Run.find(tmp_path, "othr")
    for nothing in ("", "."):
        with pytest.raises(OndolError):
            Run.find(tmp_path, nothing)
    with pytest.raises(OndolError, match="no run in"):
        Run.find(tmp_path / "none", "last")


HOLDER = """
import os, sys, time
from pathlib import Path
from ondol.store import Run
run = Run.open(Path(sys.argv[1]), write=True)
run.state = "running"
if sys.argv[2] == "fork" and os.fork() == 0:
    time.sleep(60)
print("held", os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("mode", ["plain", "fork"])
def test_one_writer_only_and_the_lock_dies_with_it(tmp_path, mode):
    with Run.create(tmp_path, "x", {}) as run:
        path = run.path
    command = [sys.executable, "-c", HOLDER, str(path), mode]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == f"held {child.pid}\n"
        with pytest.raises(OndolError, match=f"pid {child.pid}"):
            Run.open(path, write=True)
        with Run.open(path) as reader:
            assert reader.state == "running"
            child.kill()
            child.wait()
            assert reader.state == "died"  # in mode "fork" a child of the writer is still alive
        with Run.open(path, write=True) as run:
            run.state = "stopped"
    finally:
        os.killpg(child.pid, signal.SIGKILL) if mode == "fork" or child.poll() is None else None
        child.wait()


def test_readers_do_not_keep_a_writer_out(tmp_path):
    with Run.create(tmp_path, "x", {}) as run:
        run.state = "running"
    asker = "import sys\nfrom pathlib import Path\nfrom ondol.store import Run\nr = Run.open(Path(sys.argv[1]))\n"
    asker += "print('go', flush=True)\nwhile True: r.state"
    child = subprocess.Popen([sys.executable, "-c", asker, str(run.path)], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline()
        for _ in range(30):
            Run.open(run.path, write=True).close()
    finally:
        child.kill()
        child.wait()


def test_damaged_database_is_listed_as_such(tmp_path):
    with Run.create(tmp_path, "x", {}) as run:
        pass
    (run.path / "run.sqlite").write_bytes(b"x" * 5000)
    assert [s.state for s in Run.list(tmp_path)] == ["damaged"]


def test_export(tmp_path):
    with Run.create(tmp_path, "x", {}) as run:
        run.db.add_metrics("rl", 0, {"score/mean": math.nan, "loss/policy": -math.inf, "reward/mean": 0.1})
        run.db.add_trajectories("rl", 0, [trajectory(0, p) for p in range(3)])
        run.db.event("note", text="ü\u2028")

        def lines(what) -> list[dict]:
            count = run.export(what, tmp_path / "out.jsonl")
            text = (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
            assert len(text) == count
            return [json.loads(line) for line in text]

        assert [row["value"] for row in lines("metrics")] == ["nan", "-inf", 0.1]
        assert lines("events")[0]["data"] == {"text": "ü\u2028"}
        rows = lines("trajectories")
        assert {row.pop("phase") for row in rows} == {"rl"}
        assert [Trajectory.from_dict(row) for row in rows] == list(run.db.trajectories())
        with pytest.raises(OndolError, match="did you mean 'metrics'"):
            run.export("metric", tmp_path / "x")  # type: ignore[arg-type]
        with pytest.raises(OndolError, match="cannot be written"):
            run.export("metrics", tmp_path / "no" / "x")
    assert sorted(p.name for p in tmp_path.glob("out*")) == ["out.jsonl"]


# Environment


def test_environment_is_plain_and_hides_secrets(tmp_path, monkeypatch):
    home = str(Path.home())
    words = ["/opt/x/ondol", "train", f"{home}/recipes/a.toml", "--api-key", "abc", "--hub-token=def", "steps=3"]
    words += ["https://me:pw@example.org/v1", "model.api_key=ghi", "hf_abcdefghijk"]
    monkeypatch.setattr(sys, "argv", words)
    facts = environment(tmp_path)
    assert facts["git"] is None and facts["packages"]["ondol"]
    assert facts["command"] == [
        "ondol",
        "train",
        "~/recipes/a.toml",
        "--api-key",
        "***",
        "--hub-token=***",
        "steps=3",
        "https://***@example.org/v1",
        "model.api_key=***",
        "***",
    ]
    assert json.loads(json.dumps(facts)) == facts
    assert clean_command([]) == []


def test_git_state(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    assert git_state(tmp_path) == {"commit": None, "dirty": False}
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "one")
    clean = git_state(tmp_path)
    assert clean is not None and len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == {"commit": clean["commit"], "dirty": True}


# Other trainers' datasets


def test_datasets_of_other_trainers(tmp_path):
    with Run.create(tmp_path, "x", {"name": "x", "task": {"name": "sums"}}) as run:
        run.db.add_trajectories("rl", 1, [trajectory(1, 0, s, score=float(s)) for s in range(2)])
        run.db.add_trajectories("after/greedy", 0, [trajectory(0, 1, 0)])
        assert run.export("trl", tmp_path / "trl.jsonl") == 2 and run.export("verl", tmp_path / "verl.jsonl") == 2
        with pytest.raises(OndolError, match="JSON lines"):
            run.export("metrics", tmp_path / "m.parquet")
    rows = [json.loads(line) for line in (tmp_path / "trl.jsonl").read_text().splitlines()]
    assert [r["label"] for r in rows] == [False, True] and rows[0]["prompt"] == [
        {"role": "user", "content": "What is 1+2?"}
    ]
    assert [m["role"] for m in rows[0]["completion"]] == ["assistant", "tool"]
    train, test = (json.loads(line) for line in (tmp_path / "verl.jsonl").read_text().splitlines())
    assert train["data_source"] == "sums" and train["reward_model"] == {"style": "rule", "ground_truth": "3"}
    assert (train["extra_info"]["split"], test["extra_info"]["split"]) == (
        "train",
        "test",
    )  # held-out problems stay held out
