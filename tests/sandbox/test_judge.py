"""The code judge: five reasons, its queue, the HTTP API, the client that makes batches, and a small trial with hostile jobs."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import time

import pytest

from ondol.errors import OndolError
from ondol.sandbox import levels
from ondol.sandbox.judge import CLIP_CHARS, CodeJudge, CodeJudgeClient, Reason, Result, Submission
from ondol.sandbox.judge_http import HttpJudge
from ondol.sandbox.judge_trial import served, verdicts

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sandboxes need Linux")


def judged(*submissions, long: bool = False, **settings) -> list[Result]:
    async def go():
        async with CodeJudge(**{"workers": 2, **settings}) as judge:
            return await judge.run_batch(submissions, long)

    return asyncio.run(go())


def test_verdicts():
    cases = [
        (Submission("print(int(input()) + 1)", "41\n", "42"), (True, True, Reason.NONE)),
        (Submission("print(' 42 ')", expected_output="42\n"), (True, True, Reason.NONE)),
        (Submission("print(43)", expected_output="42"), (False, True, Reason.NONE)),
        (Submission("print(42); raise ValueError", expected_output="42"), (False, False, Reason.NONE)),
        (Submission("print(42); exit(0)", expected_output="42"), (True, True, Reason.NONE)),
        (Submission("exit(1)"), (False, False, Reason.NONE)),
        (Submission("import numpy; print(numpy.arange(3).sum())", expected_output="3"), (True, True, Reason.NONE)),
        (Submission("x = (1"), (False, False, Reason.NONE)),
        (Submission("while True: pass"), (False, False, Reason.WORKER_TIMEOUT)),
        (Submission("print(1)", type="cpp"), (False, False, Reason.INVALID_INPUT)),
        ({"type": "python"}, (False, False, Reason.INVALID_INPUT)),
        ({"type": "python", "solution": 5}, (False, False, Reason.INVALID_INPUT)),
        ("print(1)", (False, False, Reason.INVALID_INPUT)),
        (None, (False, False, Reason.INVALID_INPUT)),
        (Submission("open('left.txt', 'w').write('x')"), (True, True, Reason.NONE)),
        (
            Submission("import os; print(os.path.exists('left.txt'))", expected_output="False"),
            (True, True, Reason.NONE),
        ),
    ]
    results = judged(*(s for s, _ in cases), execution_s=2.0, queue_life_s=60.0)
    assert [(r.success, r.run_success, r.reason) for r in results] == [wanted for _, wanted in cases]
    assert [r.sub_id for r, (s, _) in zip(results, cases) if isinstance(s, Submission)] == [
        s.sub_id for s, _ in cases if isinstance(s, Submission)
    ]
    assert "ValueError" in (results[3].stderr or "") and "SyntaxError" in (results[7].stderr or "")
    assert "cpp" in (results[9].stderr or "") and 2.0 <= results[8].cost < 4.0


def test_long_outputs_are_clipped_after_they_were_compared():
    text = "x" * 5000
    (result,) = judged(
        Submission(f"import sys\nprint({text!r})\nprint('e' * 5000, file=sys.stderr)", expected_output=text)
    )
    assert result.success and len(result.stdout or "") == len(result.stderr or "") == CLIP_CHARS


def test_waiting_too_long_is_a_queue_timeout_unless_the_batch_is_long():
    jobs = [Submission("import time; time.sleep(0.7)"), *[Submission("print(1)")] * 3]
    results = judged(*jobs, workers=1, queue_life_s=0.3)
    assert [r.reason for r in results] == [Reason.NONE, *[Reason.QUEUE_TIMEOUT] * 3]
    assert all(r.is_fault and r.cost < 0.6 for r in results[1:]) and not results[0].is_fault
    assert all(r.success for r in judged(*jobs, workers=1, queue_life_s=0.3, long=True))


def test_a_closed_judge_leaves_nobody_waiting():
    async def go():
        judge = CodeJudge(workers=1)
        before = await judge.run(Submission("print(1)"))
        async with judge:
            waiting = [asyncio.ensure_future(judge.run(Submission("import time; time.sleep(30)"))) for _ in range(3)]
            await asyncio.sleep(0.5)
        return [before, *await asyncio.wait_for(asyncio.gather(*waiting), 5)]

    assert {r.reason for r in asyncio.run(go())} == {Reason.INTERNAL_ERROR}


def test_hostile_jobs_harm_nobody():
    """The mix of the trial with 80 jobs, 16 of them hostile, at the strongest level; 500 are judged for the paper's claim."""
    found = asyncio.run(verdicts(80, seed=1, execution_s=2.0, hostile=4))
    assert found["right_reasons"] == found["healthy_right"] == 1 and found["orphans"] == 0


@pytest.mark.parametrize("level", ["rlimits", "namespaces"])
def test_hostile_jobs_at_other_levels(level):
    if why := levels.try_level(level):
        pytest.skip(f"{level}: {why}")
    found = asyncio.run(verdicts(40, seed=2, execution_s=2.0, level=level, hostile=2))
    assert found["right_reasons"] == found["healthy_right"] == 1 and found["orphans"] == 0


# -- HTTP ----------------------------------------------------------------------------------------------------------------


def test_http_is_the_same_judge():
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    import httpx2 as httpx

    async def go():
        jobs = [Submission("print(1)", expected_output="1"), Submission("print(2)", expected_output="1")]
        async with served(CodeJudge(workers=2), token="t0ken") as url, HttpJudge(url, "t0ken") as judge:
            batch, long = await judge.run_batch(jobs), await judge.run_batch(jobs, long=True)
            one = await judge.run(jobs[0])
            async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=30) as http:
                auth = {"authorization": "Bearer t0ken"}
                body = {
                    "type": "batch",
                    "sub_id": "b",
                    "submissions": [dataclasses.asdict(jobs[0]), {"type": "math"}, 5],
                }
                mixed = (await http.post("/judge/batch", json=body, headers=auth)).json()
                codes = [
                    (await http.get("/ping")).status_code,
                    (await http.get("/status")).status_code,
                    (await http.post("/run", json={}, headers={"authorization": "Bearer x"})).status_code,
                    (await http.post("/run", content=b"{", headers=auth)).status_code,
                    (await http.post("/run", content=b"[" * 100_000, headers=auth)).status_code,
                    (await http.post("/run/batch", json={"submissions": []}, headers=auth)).status_code,
                    (await http.post("/run/batch", json=[1], headers=auth)).status_code,
                    (await http.post("/run", json=[1], headers=auth)).status_code,
                ]
                status = (await http.get("/status", headers=auth)).json()
            with pytest.raises(OndolError, match="401"):
                async with HttpJudge(url) as stranger:
                    await stranger.run(jobs[0])
            return batch, long, one, mixed, codes, status

    batch, long, one, mixed, codes, status = asyncio.run(go())
    assert [r.success for r in batch] == [r.success for r in long] == [True, False] and one.success
    assert batch[0].stdout == "1\n"
    assert [(r["success"], r["reason"]) for r in mixed["results"]] == [
        (True, ""),
        (False, "invalid_input"),
        (False, "invalid_input"),
    ]
    assert mixed["sub_id"] == "b" and "stdout" not in mixed["results"][0]
    assert codes == [200, 401, 401, 422, 422, 422, 422, 200] and status == {"queue": 0, "num_workers": 2}


# -- the client ----------------------------------------------------------------------------------------------------------


class Scripted:
    """A judge that gives each submission the reasons in its `input`, one a try, and remembers the batches."""

    def __init__(self, delay_s: float = 0.01, broken: int = 0) -> None:
        self.sizes: list[int] = []
        self.tries: dict[str, list[float]] = {}
        self.delay_s, self.broken, self.under_way, self.most = delay_s, broken, 0, 0

    async def run_batch(self, submissions, long=False):
        self.sizes.append(len(submissions))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(self.delay_s)
        self.under_way -= 1
        if len(self.sizes) <= self.broken:
            raise ConnectionError("gone")
        out = []
        for s in submissions:
            times = self.tries.setdefault(s.sub_id, [])
            reasons = (s.input or "").split(",")
            reason = Reason(reasons[min(len(times), len(reasons) - 1)])
            times.append(time.monotonic())
            out.append(Result(s.sub_id, not reason, not reason, 0.0, reason=reason))
        return out


def through(judge, submissions, **settings):
    async def go():
        async with CodeJudgeClient(judge, **settings) as client:
            return await asyncio.gather(*(client.judge(s) for s in submissions), return_exceptions=True)

    return asyncio.run(go())


def test_the_client_makes_batches():
    judge = Scripted(delay_s=0.05)
    work = [Submission("", sub_id=str(i)) for i in range(200)]
    results = through(judge, work, batch_size=32, concurrency=3)
    assert [r.sub_id for r in results] == [s.sub_id for s in work]
    assert sorted(judge.sizes) == [8, 32, 32, 32, 32, 32, 32] and judge.most == 3


def test_only_a_full_queue_is_asked_again():
    judge = Scripted()
    work = [
        Submission("", "queue_timeout,queue_timeout,", sub_id="third time"),
        Submission("", "queue_timeout", sub_id="never"),
        Submission("", "internal_error", sub_id="fault"),
        Submission("", "worker_timeout", sub_id="slow"),
    ]
    results = through(judge, work, backoff_s=0.05)
    assert [r.reason for r in results] == [
        Reason.NONE,
        Reason.QUEUE_TIMEOUT,
        Reason.INTERNAL_ERROR,
        Reason.WORKER_TIMEOUT,
    ]
    assert {k: len(v) for k, v in judge.tries.items()} == {"third time": 3, "never": 4, "fault": 1, "slow": 1}
    waits = [b - a for a, b in zip(judge.tries["never"], judge.tries["never"][1:])]
    assert all(w >= 0.05 * 2**k for k, w in enumerate(waits))


def test_a_batch_that_fails_fails_for_each_of_its_callers():
    work = [Submission("", sub_id=str(i)) for i in range(6)]
    results = through(Scripted(broken=1), work, batch_size=4, concurrency=1)
    assert [type(r) for r in results] == [ConnectionError] * 4 + [Result] * 2
    results = through(Scripted(delay_s=5), work, timeout_s=0.1)
    assert {type(r) for r in results} == {TimeoutError}

    class Short(Scripted):
        async def run_batch(self, submissions, long=False):
            return (await super().run_batch(submissions))[:-1]

    assert {type(r) for r in through(Short(), work)} == {OndolError}
    with pytest.raises(OndolError, match="not open"):
        asyncio.run(CodeJudgeClient(Scripted()).judge(work[0]))
