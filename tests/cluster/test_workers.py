"""Episodes over several processes: the same as in one, whatever dies; none lost, none twice."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ondol.cluster.ledger import Ledger
from ondol.cluster.workers import load_job, run_job
from ondol.errors import OndolError
from ondol.records import Group, Problem, Trajectory
from ondol.rollout.driver import rollout

pytestmark = pytest.mark.timeout(180)
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def content(groups: list[Group]) -> list[tuple]:
    return [
        (
            t.key,
            t.ids,
            t.sampled,
            t.trained,
            t.logp,
            t.version,
            [(r.text, r.kind) for turn in t.turns for r in turn.results],
            t.stop_reason,
            t.score,
        )
        for g in groups
        for t in g.trajectories
    ]


def alone(job: str) -> list[tuple]:
    return content(rollout(*load_job(job)))


def blank(key: tuple[int, int, int] = (0, 0, 0), turns: int = 0) -> Trajectory:
    return Trajectory(key, Problem("", "", ""), [turns], 0, [False], [False], [0.0], [-1])


def test_a_killed_and_a_frozen_worker_lose_nothing(tmp_path):
    job = 'jobs:steady?{"count": 24, "step_s": 0.01}'
    said, done = [], {"killed": False, "frozen": None}

    def watch(processes):
        ledger = Ledger(tmp_path / "episodes.sqlite", "watcher")
        held = ledger.holders()
        ledger.close()
        if len(held) == 3 and not done["killed"]:  # all are at work: one dies, one freezes, the third has to do
            os.kill(processes[0].pid, signal.SIGKILL)
            os.kill(processes[1].pid, signal.SIGSTOP)
            done["killed"], done["frozen"] = True, processes[1]

    found = run_job(job, workers=3, at_once=3, lease_s=1.5, folder=tmp_path, say=said.append, watch=watch)
    assert done["killed"] and done["frozen"] is not None and found.lost == 1 and found.again >= 2
    assert any("signal 9" in line for line in said)
    assert content(found.groups) == alone(job)


def test_a_job_goes_on_from_its_ledger(tmp_path):
    job = "jobs:steady"
    with pytest.raises(OndolError, match="episodes done"):
        run_job(job, workers=1, at_once=2, folder=tmp_path, timeout_s=4.0)
    ledger = Ledger(tmp_path / "episodes.sqlite", "me")
    begun = [c.begun for c in ledger.claim(99, now=time.time() + 60) if c.begun is not None]
    ledger.release("me")
    ledger.close()
    found = run_job(job, workers=1, folder=tmp_path)
    assert content(found.groups) == alone(job)
    assert all(t.turns for t in begun)


def test_a_job_that_cannot_run_says_why():
    said = []
    with pytest.raises(OndolError, match="workers were lost"):
        run_job("jobs:broken", workers=1, replacements=0, say=said.append)
    assert any("no memory left" in line for line in said)
    with pytest.raises(OndolError, match="not JSON"):
        load_job("jobs:steady?{")
    with pytest.raises(OndolError):
        load_job("jobs:nothing")


events = st.lists(
    st.tuples(
        st.sampled_from(["claim", "save", "finish", "renew", "wait", "release"]), st.integers(0, 2), st.integers(0, 5)
    ),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(events=events)
def test_an_episode_has_one_holder_and_is_done_once(tmp_path_factory, events):
    path = tmp_path_factory.mktemp("ledger") / "x.sqlite"
    ledgers = [Ledger(path, f"w{i}", lease_s=10.0) for i in range(3)]
    ledgers[0].add((0, s) for s in range(6))
    ledgers[1].add((0, s) for s in range(6))  # again: nothing changes
    now, holder, lease, done = 1000.0, {}, {}, {}
    for kind, who, number in events:
        ledger, key = ledgers[who], (0, number)
        if kind == "wait":
            now += 4.0
        elif kind == "claim":
            for claimed in ledger.claim(2, now=now):
                assert claimed.key not in done
                assert holder.get(claimed.key) is None or lease[claimed.key] < now
                holder[claimed.key], lease[claimed.key] = who, now + 10.0
        elif kind == "renew":
            ledger.renew(now=now)
            lease |= {k: now + 10.0 for k, w in holder.items() if w == who}
        elif kind == "save":
            assert ledger.save(key, blank((0, 0, number), 1)) == (holder.get(key) == who)
        elif kind == "finish":
            ours = holder.get(key) == who
            assert ledger.finish(key, blank((0, 0, number), who)) == ours
            if ours:
                done[key] = who
                del holder[key]
        elif kind == "release":
            ledgers[0].release(f"w{who}")
            holder = {k: w for k, w in holder.items() if w != who}
    assert {k: t.ids[0] for k, t in ledgers[2].results().items()} == done
    assert ledgers[0].counts() == {"waiting": 6 - len(done) - len(holder), "at work": len(holder), "done": len(done)}
    for ledger in ledgers:
        ledger.close()


@pytest.mark.parametrize("what", ["add", "save", "finish"])
def test_a_full_disk_is_said_and_loses_nothing(tmp_path, what):
    """What is in the ledger stays; the error names the file and what to do."""
    ledger = Ledger(tmp_path / "episodes.sqlite", "me")
    ledger.add([(0, 0), (0, 1)])
    (taken, *_) = ledger.claim(2)
    ledger._db.execute("pragma wal_checkpoint(truncate)")
    (pages,) = ledger._db.execute("pragma page_count").fetchone()
    ledger._db.execute(f"pragma max_page_count = {pages}")
    long = Trajectory((0, 0, 0), Problem("p", "q" * 100_000, "a"), [1], 1, [False], [False], [0.0], [-1])
    with pytest.raises(OndolError, match="full") as told:
        if what == "add":
            ledger.add((i, 0) for i in range(1, 100_000))
        else:
            getattr(ledger, what)(taken.key, long)
    assert "episodes.sqlite" in told.value.what and told.value.remedy
    assert ledger.counts() == {"waiting": 0, "at work": 2, "done": 0}
    ledger.close()
