"""`ondol compare`: the same work for all arms, done once, whatever happens in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ondol
from ondol.cli import main
from ondol.compare.arms import parse_arm, parse_arms
from ondol.compare.comparison import Comparison, Watch, outcome
from ondol.compare.jobs import Share, execute, plan
from ondol.errors import OndolError
from ondol.recipe import load_recipe
from ondol.store import Run

TABLE = {
    "name": "small",
    "model": {"path": "tiny:hidden=32,layers=1,context=64"},
    "task": {"name": "two-addends"},
    "env": {"max_turns": 1},
    "sampling": {"max_tokens": 8},
    "warm_start": {
        "from_task": True,
        "gold_share": 0.5,
        "problems": 8,
        "samples_per_problem": 20,
        "traces_per_update": 40,
        "epochs": 2,
        "learning_rate": 1e-2,
    },
    "method": {"name": "grpo", "kl_coef": 0.0, "minibatches": 2},
    "optimizer": {"learning_rate": 1e-2},
    "train": {"steps": 3, "prompts_per_step": 4, "samples_per_prompt": 4, "checkpoint_every_steps": 1},
    "evaluate": {"samples": 4, "problems": 3},
}
CLOCKS = ("seconds", "tokens_per_s", "peak_mib", "prefix_hit_share")


def numbers(path: Path, *phases: str) -> list[tuple]:
    """Everything recorded in these phases that does not depend on the clock."""
    with Run.open(path) as run:
        rows = [m for m in run.db.metrics() if m.phase in phases and not m.name.endswith(CLOCKS)]
        texts = [(t.key, t.ids, t.logp) for p in phases for t in run.db.trajectories(phase=p)]
        return [*((m.phase, m.step, m.name, m.value) for m in rows), *texts]


# -- arms -----------------------------------------------------------------------------------------------------------------


def test_an_arm_is_a_method_with_settings() -> None:
    plain = parse_arm("grpo", TABLE)
    assert plain.table["method"] == TABLE["method"], "the recipe's own method keeps the recipe's settings"
    wide = parse_arm("wide=grpo:clip_high=0.28,clip_low=0.1", TABLE)
    assert wide.label == "wide" and wide.recipe(0).method.clip_high == 0.28 and wide.recipe(0).method.clip_low == 0.1
    other = parse_arm("gspo", TABLE)
    assert other.table["method"] == {"name": "gspo", "minibatches": 2}, (
        "others have their defaults, and the same updates"
    )
    rate = parse_arm("grpo:optimizer.learning_rate=5e-4,minibatches=1", TABLE).recipe(0)
    assert rate.optimizer.learning_rate == 5e-4 and rate.method.minibatches == 1
    own = parse_arm("ondol.methods.grpo:GRPO:clip_low=0.1", TABLE)
    assert own.recipe(0).method.clip_low == 0.1 and own.table["method"]["name"] == "ondol.methods.grpo:GRPO"
    assert TABLE["method"]["name"] == "grpo" and "seed" not in TABLE, "the recipe is left alone"


def test_methods_without_a_ratio_make_one_update() -> None:
    for name in ("reinforce", "rloo"):
        assert parse_arm(name, TABLE).recipe(0).method.minibatches == 1
        with pytest.raises(OndolError, match=r"(?s)arm 'twice'.*no ratio.*one update"):
            parse_arm(f"twice={name}:minibatches=2", TABLE).recipe(0)


def test_labels_are_short_where_they_can_be() -> None:
    labels = [a.label for a in parse_arms(["grpo", "gspo:clip_high=0.1"], TABLE)]
    assert labels == ["grpo", "gspo"]
    labels = [a.label for a in parse_arms(["grpo", "grpo:clip_high=0.1", "x=grpo"], TABLE)]
    assert labels == ["grpo", "grpo:clip_high=0.1", "x"]


@pytest.mark.parametrize(
    ("arms", "what"),
    [
        (["grop"], "did you mean 'grpo'"),
        (["grpo", "grpo"], "two arms are called 'grpo'"),
        (["grpo:clip_hihg=1"], "clip_hihg"),
        (["vineppo"], "only documented"),
        (["=grpo"], "=grpo"),
        (["x=:a=1"], "not of the form"),
    ],
)
def test_a_wrong_arm_is_told_before_anything_runs(arms, what) -> None:
    with pytest.raises(OndolError, match=what):
        parse_arms(arms, TABLE)


# -- what is shared -------------------------------------------------------------------------------------------------------


def test_a_shared_start_is_the_whole_run(tmp_path) -> None:
    """RL from the model of a warm start of its own: sampled tokens, metrics and evaluations to the last bit."""
    whole = ondol.run(TABLE, "seed=5", "task.seed=5", runs=tmp_path / "whole")
    whole.close()
    start, arm = plan(parse_arm("grpo", TABLE).recipe(5), 5, tmp_path)
    execute(start)
    path = execute(arm)
    assert numbers(path, "rl", "rl", "after") != []
    for phase in ("rl", "after", "after/greedy", "after/sampled"):
        left, right = numbers(path, phase), numbers(whole.path, phase)
        # weights have other version numbers; everything else is the same
        assert left == right
    # what the whole run calls "warm" is the arm's "before"
    rename = [("warm", *row[1:]) if row[0] == "before" else row for row in numbers(path, "before")]
    assert rename == numbers(whole.path, "warm")
    with Run.open(path) as a, Run.open(whole.path) as b:
        assert outcome(a) == outcome(b)


def test_the_warm_start_does_not_depend_on_what_comes_after(tmp_path) -> None:
    seeds = {}
    for text in ("grpo", "gspo", "grpo:optimizer.learning_rate=1e-4,train.steps=9,evaluate.samples=2"):
        for seed in (0, 1):
            start, job = plan(parse_arm(text, TABLE).recipe(seed), seed, tmp_path)
            seeds.setdefault(seed, set()).add(start.key)
            assert job.key not in seeds[seed]
    assert [len(keys) for keys in seeds.values()] == [1, 1] and seeds[0] != seeds[1]
    other = plan(parse_arm("grpo:warm_start.epochs=1", TABLE).recipe(0), 0, tmp_path)[0]
    assert other.key not in seeds[0]
    assert len(plan(load_recipe(TABLE | {"warm_start": None}), 0, tmp_path)) == 1


def test_a_changed_method_file_is_another_run(tmp_path, monkeypatch) -> None:
    code = "from ondol.methods.grpo import GRPO\nclass Mine(GRPO):\n    pass\n"
    monkeypatch.syspath_prepend(str(tmp_path))
    keys = []
    for name, extra in (("mine_a", ""), ("mine_a", "# another idea\n")):
        (tmp_path / f"{name}.py").write_text(code + extra)
        sys.modules.pop(name, None)
        import importlib
        import linecache

        importlib.invalidate_caches()
        linecache.clearcache()
        keys.append(plan(parse_arm(f"{name}:Mine", TABLE).recipe(0), 0, tmp_path)[-1].key)
    assert keys[0] != keys[1]


# -- running --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Comparison:
    """Two arms, two seeds, in this process."""
    made = Comparison(parse_arms(["grpo", "gspo"], TABLE), [0, 1], tmp_path_factory.mktemp("compare"))
    made.run()
    return made


class Counting(Watch):
    def __init__(self) -> None:
        self.left, self.cached, self.ends, self.shares = -1, -1, [], []

    def begin(self, left, cached):
        self.left, self.cached = left, cached

    def advance(self, done, total, values):
        self.shares.append(done / total)

    def ended(self, job, error, seconds):
        self.ends.append(job.folder.name)


def test_what_is_done_is_not_done_again(done) -> None:
    watch = Counting()
    Comparison(done.arms, done.seeds, done.folder).run(watch=watch)
    assert (watch.left, watch.cached, watch.ends) == (0, 4, [])
    again = Counting()
    more = Comparison(parse_arms(["gspo", "reinforce"], TABLE), [1], done.folder)
    more.run(watch=again)
    assert (again.left, again.cached) == (1, 1), "the warm start and the first arm are those of the other comparison"
    assert again.shares == sorted(again.shares) and again.shares[-1] == 1.0


def test_results_are_those_of_the_runs(done) -> None:
    found = done.results()
    assert list(found["arms"]) == ["grpo", "gspo"] and found["seeds"] == [0, 1]
    for label, arm in found["arms"].items():
        assert [r["seed"] for r in arm["runs"]] == [0, 1]
        values = []
        for row in arm["runs"]:
            with Run.open(Path(row["run"])) as run:
                assert run.recipe["seed"] == run.recipe["task"]["seed"] == row["seed"]
                assert run.recipe["method"]["name"] == label and run.recipe["method"]["minibatches"] == 2
                values += [m.value for m in run.db.metrics("eval/score_sampled", "after")]
        assert [r["measured"]["score_sampled"] for r in arm["runs"]] == values
        assert arm["mean"]["score_sampled"] == pytest.approx(sum(values) / 2)
        assert {"pass@1", "pass@2", "pass@4", "distinct_right", "start/pass@4"} <= set(arm["mean"])
        assert arm["mean"]["pass@1"] == pytest.approx(arm["mean"]["score_sampled"])
    starts = [[r["measured"]["start/score_sampled"] for r in arm["runs"]] for arm in found["arms"].values()]
    assert starts[0] == starts[1], "all arms of a seed start from one model"
    assert "difference" not in found["arms"]["grpo"] and "difference" in found["arms"]["gspo"]
    assert set(done.curves("grpo")) == {0, 1} and [s for s, _ in done.curves("grpo")[0]] == [1, 2, 3]


def test_processes_give_the_same_numbers(done, tmp_path) -> None:
    together = Comparison(done.arms, [0], tmp_path)
    watch = Counting()
    together.run(2, watch)
    assert together.failures == {} and len(watch.ends) == watch.left == 3
    for arm in together.arms:
        assert numbers(together.runs(arm.label)[0], "rl", "after") == numbers(done.runs(arm.label)[0], "rl", "after")


def test_killed_in_the_middle_it_goes_on(done, tmp_path) -> None:
    """SIGKILL to the process of one run: the next call finishes it from its checkpoint, with the same numbers."""
    job = Comparison(done.arms, [0], tmp_path).jobs["grpo", 0]
    code = (
        "import json, sys, os, signal\n"
        "from pathlib import Path\n"
        "from ondol.compare.jobs import from_json, execute\n"
        "job = from_json(json.loads(sys.stdin.read()))\n"
        "execute(job.start)\n"
        "count = [0]\n"
        "def tell(part, values):\n"
        "    count[0] += 'loss/policy' in values\n"
        "    if count[0] == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "execute(job, tell)\n"
    )
    from ondol.compare.jobs import to_json

    killed = subprocess.run([sys.executable, "-c", code], input=json.dumps(to_json(job)), text=True, timeout=200)
    assert killed.returncode == -signal.SIGKILL and job.finished is None and job.run is not None
    again = Comparison(done.arms, [0], tmp_path)
    watch = Counting()
    again.run(watch=watch)
    assert watch.left == 2, "the interrupted run and the other arm"
    assert numbers(again.runs("grpo")[0], "rl", "after") == numbers(done.runs("grpo")[0], "rl", "after")


def test_ctrl_c_saves_and_the_next_call_goes_on(done, tmp_path) -> None:
    from ondol.store.toml import dump_toml

    slow = {**TABLE, "train": {**TABLE["train"], "steps": 2000}, "evaluate": {"problems": 0}}
    (tmp_path / "r.toml").write_text(dump_toml(slow))
    words = ["compare", "grpo", "gspo", "--recipe", "r.toml", "--seeds", "1", "--jobs", "2", "--folder", "out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ondol", *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    comparison = Comparison(parse_arms(["grpo", "gspo"], slow), [0], tmp_path / "out")
    until = time.monotonic() + 120

    def steps(label: str) -> int:
        path = comparison.jobs[label, 0].run
        if path is None:
            return 0
        with Run.open(path) as run:
            return run.db.marks().get("rl", 0)

    while time.monotonic() < until and not (steps("grpo") > 2 and steps("gspo") > 2):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "stopped and saved" in said, said
    for label in ("grpo", "gspo"):
        path = comparison.jobs[label, 0].run
        assert path is not None
        with Run.open(path) as run:
            assert run.state == "stopped" and run.db.marks()["rl"] > 2


def test_one_failing_arm_does_not_stop_the_others(tmp_path, monkeypatch, capsys) -> None:
    code = (
        "from ondol.methods.grpo import GRPO\nfrom ondol.errors import OndolError\n"
        "class Broken(GRPO):\n    def keep(self, groups):\n        raise OndolError('it broke', 'mend it')\n"
    )
    (tmp_path / "broken_method.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    from ondol.store.toml import dump_toml

    (tmp_path / "r.toml").write_text(dump_toml(TABLE))
    words = ["compare", "broken_method:Broken", "grpo", "--recipe", "r.toml", "--seeds", "1", "--folder", "out"]
    assert main([*words, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["arms"]["broken_method:Broken"]["failed"]["0"].count("it broke") == 1
    assert len(found["arms"]["grpo"]["runs"]) == 1
    assert Path(found["plot"]).stat().st_size > 1000 and (tmp_path / "out" / "results.json").exists()


def test_the_command_line(done, tmp_path, monkeypatch, capsys) -> None:
    """Everything is done already: it only draws."""
    from ondol.store.toml import dump_toml

    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text(dump_toml(TABLE))
    words = ["compare", "grpo", "gspo", "--recipe", "r.toml", "--seeds", "2", "--folder", str(done.folder)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "vs grpo" in said and "±" in said and "4 finished runs found" in said
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["arms"]["gspo"]["difference"]["score_sampled"]["n"] == 2


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["grpo", "--recipe", "tiny-addends", "--seeds", "0"], "--seeds 0"),
        (["grpo", "--recipe", "tiny-addends", "--jobs", "0"], "--jobs 0"),
        (["grpo", "--recipe", "tiny-adends"], "tiny-addends"),
        (["treepo", "--recipe", "tiny-addends"], "only documented"),
        (["grpo", "--recipe", "tiny-addends", "--set", "train.stesp=1"], "stesp"),
    ],
)
def test_wrong_use(words, what, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *words]) == 1
    assert what in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [], "nothing was begun"


def test_shares_of_a_run_rise_to_one() -> None:
    heard = []
    share = Share(lambda part, values: heard.append(part))
    share.plan([("before", 1.0), ("sft", 2.0), ("rl", 7.0)])
    for name, total in (("before", 1), ("sft", 4), ("rl", 3)):
        share.stage(name, total)
        for _ in range(total):
            for _ in range(5):
                share.advance(0.3, {})
            share.advance(1.0, {})
    assert heard == sorted(heard) and heard[-1] == pytest.approx(1.0) and heard[0] > 0


def test_from_python(done) -> None:
    """The call behind the command: everything is found, nothing is done again."""
    found = ondol.comparison(["grpo", "gspo"], TABLE, seeds=2, folder=done.folder)
    assert found.results() == done.results()
    with pytest.raises(OndolError, match="0 seeds"):
        ondol.comparison(["grpo"], TABLE, seeds=0, folder=done.folder)
