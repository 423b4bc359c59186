"""Mistakes through the command line: exit status 1, the place and the remedy named, no traceback, nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ondol.cli import main
from ondol.store import Run

GOOD = """
name = "bad"
[model]
path = "tiny:hidden=32,layers=1,context=128"
[task]
name = "toy:Toy"
[env]
max_turns = 1
[sampling]
max_tokens = 24
[method]
name = "grpo"
kl_coef = 0.0
[train]
steps = 2
prompts_per_step = 3
samples_per_prompt = 4
[evaluate]
problems = 2
"""


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A folder to be in, with a good recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ONDOL_RUNS", raising=False)
    (tmp_path / "good.toml").write_text(GOOD)
    return tmp_path


def fails(capsys, *argv: str) -> str:
    """The message of a command that must fail as a mistake does; no run is left behind."""
    runs = sorted(Path("runs").iterdir()) if Path("runs").exists() else []
    assert main(argv) == 1
    out = capsys.readouterr()
    assert out.err.startswith("error: ") and "Traceback" not in out.err + out.out
    assert (sorted(Path("runs").iterdir()) if Path("runs").exists() else []) == runs
    return out.err


WRONG_SETTINGS = {
    # unknown keys, at every level: the path, and the nearest right name
    "trian.steps=3": ["trian: there is no such key", "did you mean 'train'?"],
    "train.stepz=3": ["train.stepz: there is no such key", "did you mean 'steps'?"],
    "model.pth=tiny": ["model.pth", "did you mean 'path'?"],
    "model.lora.rnk=4": ["model.lora.rnk", "did you mean 'rank'?"],
    "task.sed=4": ["task.sed", "did you mean 'seed'?"],
    "env.max_turn=4": ["env.max_turn", "did you mean 'max_turns'?"],
    "method.clip_lo=0.1": ["method.clip_lo", "did you mean 'clip_low'?"],
    "warm_start.epoch=1": ["warm_start.epoch", "did you mean 'epochs'?"],
    'warm_start.examples=[{role="user",content="a",nme="b"}]': ["warm_start.examples.0.nme: there is no such key", "role"],
    'env={max_turns=2,tools=[{name="calculator",timeout=3}]}': ["env.tools.timeout", "did you mean 'timeout_s'?"],
    # wrong types and values
    "train.steps=many": ["train.steps", "integer", "got 'many'"],
    "train.steps=-1": ["train.steps", "greater than or equal to 0", "got -1"],
    "train.steps=1.5": ["train.steps", "integer", "got 1.5"],
    "train=5": ["train", "got 5"],
    "task=5": ["task", "a name, or a table with a name", "got 5"],
    'task={seed=1}': ["task: a table here needs a 'name'", "two-addends"],
    "model.dtype=float33": ["model.dtype", "'float32'", "got 'float33'"],
    "sampling.top_p=1.5": ["sampling.top_p", "less than or equal to 1", "got 1.5"],
    "sampling.temperature=nan": ["sampling.temperature", "got nan"],
    "optimizer.learning_rate=0": ["optimizer.learning_rate", "greater than 0"],
    "env.tools=calculator": ["env.tools", 'a list of tools, e.g. ["python"]'],
    'warm_start.examples=[{role="usr",content="a"}]': ["warm_start.examples.0.role", "'user'", "got 'usr'"],
    'warm_start.examples=[{role="user"}]': ["warm_start.examples.0.content: this key is required"],
    "name=": ["name", "at least 1 character"],
    # what cannot go together
    "train.samples_per_prompt=1": ["GRPO", "train.samples_per_prompt must be at least 2, not 1"],
    "sampling.temperature=0": ["sampling.temperature is 0", "nothing could be learned"],
    'env={tools=["calculator"],max_turns=1}': ["env: ", "max_turns must be at least 2"],
    'env={tools=["calculator","calculator"],max_turns=2}': ["two tools are called the same"],
    "method.minibatches=4": ["method.minibatches (4) cannot exceed train.prompts_per_step (3)"],
    "warm_start.gold_share=0.5": ["warm_start: gold_share is for demonstrations", "from_task"],
    'warm_start={from_task=true,trajectories="a.jsonl"}': ["warm_start: from_task and trajectories"],
    'warm_start={from_task=true,examples=[{role="user",content="a"}]}': ["warm_start: examples are for sampling"],
    "task.train=0": ["task", "no training problems"],
    # names
    "method=grppo": ["method: no method is called 'grppo'", "did you mean 'grpo'?"],
    "task=arithmetics": ["task: no task is called 'arithmetics'", "did you mean 'arithmetic'?"],
    "env.name=tol": ["env: no env is called 'tol'", "did you mean 'tool'?"],
    'env={max_turns=2,tools=["pyton"]}': ["env.tools: no tool is called 'pyton'", "did you mean 'python'?"],
    'task={name="jsonl",path="ok.jsonl",verifier="numerc"}': ["no verifier is called 'numerc'", "did you mean 'numeric'?"],
    # plug-ins
    "task=nowhere:Thing": ["task: 'nowhere:Thing' cannot be loaded", "PYTHONPATH"],
    "task=toy:Toyy": ["task: 'toy:Toyy' cannot be loaded", "Toyy"],
    "task=toy:NoTask": ["task: 'toy:NoTask' is no part"],
    "method=toy:Toy": ["method: toy:Toy is no method", "ondol.methods.base.Method"],
    "task=broken:Thing": ["task: 'broken:Thing' cannot be loaded: ZeroDivisionError"],
    "task=:": ["task: ':' cannot be loaded"],
    # models: `check` looks at no file, so only `train` finds these
    "model.path=tiny:hiden=3": ["has no size 'hiden'", "did you mean 'hidden'?"],
    "model.path=tiny:hidden=30": ["hidden = 30 does not split over 4 heads", "multiple of 8"],
    "model.path=smollm": ["there is no model 'smollm'", "smollm2-135m-instruct"],
    "model.path=./nothing": ["there is no model './nothing'"],
    "model.path=good.toml": ["good.toml is a file, not a folder"],
    "model.path=empty": ["empty has no config.json"],
    "model.path=cut": ["model.safetensors is damaged or cut short"],
    "model.device=cuda:77": ["device 'cuda:77'"],
    "model.chat=chatnl": ["no chat format is called 'chatnl'", "chatml"],
    # prompts
    f'task.question="{"x" * 300}{{}}"': ["a prompt of", "the context of tiny is 128", "shorten"],
    # --set itself
    "train.steps": ["--set train.steps: not of the form key=value"],
    "=3": ["not of the form key=value"],
    "train..steps=3": ["'train..steps' is not a key"],
    "seed.x=3": ["--set seed.x=3", "'seed' is not a table"],
}  # fmt: skip


@pytest.mark.parametrize("setting", WRONG_SETTINGS)
def test_a_wrong_setting(home, capsys, monkeypatch, setting) -> None:
    (home / "empty").mkdir()
    (home / "broken.py").write_text("1 / 0\n")
    (home / "ok.jsonl").write_text('{"question": "1+1?", "answer": 2}\n')
    if setting == "seed.x=3":
        (home / "good.toml").write_text("seed = 1\n" + GOOD)
    if setting == "model.path=cut":
        from ondol.models.load import load_model
        from ondol.models.save import save_model

        save_model(load_model("tiny:hidden=32,layers=1"), home / "cut")
        file = home / "cut" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    monkeypatch.syspath_prepend(home)
    text = fails(capsys, "train", "good.toml", "--set", setting)
    for part in WRONG_SETTINGS[setting]:
        assert part in text, text


@pytest.mark.parametrize(
    "setting",
    [s for s in WRONG_SETTINGS if not s.startswith(("model.path", "model.dev", "model.chat")) and "xxx" not in s],
)
def test_check_finds_it_too(home, capsys, monkeypatch, setting) -> None:
    """Without loading a model."""
    (home / "broken.py").write_text("1 / 0\n")
    (home / "ok.jsonl").write_text('{"question": "1+1?", "answer": 2}\n')
    if setting == "seed.x=3":
        (home / "good.toml").write_text("seed = 1\n" + GOOD)
    monkeypatch.syspath_prepend(home)
    monkeypatch.setattr("ondol.models.load.load_model", None)
    text = fails(capsys, "check", "good.toml", "--set", setting)
    assert all(part in text for part in WRONG_SETTINGS[setting]), text


def test_the_context_is_too_short(home, capsys) -> None:
    text = fails(capsys, "train", "good.toml", "--set", "sampling.max_tokens=500")
    assert "a prompt of" in text and "1 turn of 500 (sampling.max_tokens)" in text and "tiny is 128" in text
    assert "lower sampling.max_tokens" in text


def test_several_mistakes_at_once(home, capsys) -> None:
    text = fails(
        capsys, "check", "good.toml", "--set", "train.stepz=1", "--set", "evaluate.problems=x", "--set", "seeed=1"
    )
    for part in ("train.stepz: there", "did you mean 'steps'?", "evaluate.problems: ", "seeed: there", "'seed'"):
        assert part in text, text


FILES = {
    "broken.toml": ('name = "a"\n[train]\nsteps = = 3\n', ["broken.toml:3: not valid TOML", "steps = = 3"]),
    "open.toml": ('name = "a"\nsystem = "never closed\n', ["open.toml:2: not valid TOML", "never closed"]),
    "latin.toml": ('name = "é"'.encode("latin-1"), ["latin.toml cannot be read", "UTF-8"]),
    "empty.toml": ("", ["task: this key is required", "a task by name"]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_broken_recipe_file(home, capsys, name) -> None:
    content, parts = FILES[name]
    (home / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    text = fails(capsys, "check", name)
    assert all(part in text for part in parts), text
    assert text == fails(capsys, "train", name)


def test_no_such_recipe(home, capsys) -> None:
    text = fails(capsys, "train", "arithmetics")
    assert "there is no recipe 'arithmetics'" in text and "did you mean 'arithmetic'?" in text
    assert "there is no recipe 'nope.toml'" in fails(capsys, "check", "nope.toml")
    (home / "folder.toml").mkdir()
    assert "'folder.toml' is a folder" in fails(capsys, "train", "folder.toml")
    (home / "arithmetic").mkdir()  # a folder does not hide a recipe of that name
    assert main(["check", "arithmetic"]) == 0


JSONL = {
    "": ["t.jsonl: the file holds no problem"],
    '{"question": "1+1", "answer": 2}\n{"question": "1+2"}': ["t.jsonl:2: no field 'answer'"],
    '{"question": "1+1", "answer": 2}\n\n{"question": ': ["t.jsonl:3: not JSON", "column"],
    '["1+1", 2]': ["t.jsonl:1: a JSON object is needed, not list"],
    '{"question": " ", "answer": 2}': ["t.jsonl:1: field 'question' must be text that is not empty"],
    '{"question": "1+1", "answer": true}': ["t.jsonl:1: field 'answer' must be a number or text"],
    '{"question": "1+1", "answer": "two"}': ["t.jsonl:1: field 'answer'"],
    '{"question": "1+1", "answer": 2}\n{"question": "1+1", "answer": 2}': ["t.jsonl:2: the question of line 1 again"],
}


@pytest.mark.parametrize("content", JSONL)
def test_bad_lines_of_a_jsonl_task(home, capsys, content) -> None:
    (home / "t.jsonl").write_text(content)
    for command in ("check", "train"):
        text = fails(capsys, command, "good.toml", "--set", 'task={name="jsonl",path="t.jsonl"}')
        assert all(part in text for part in JSONL[content]), text
    assert "t.jsonx: No such file" in fails(capsys, "check", "good.toml", "--set", 'task={name="jsonl",path="t.jsonx"}')


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Folder of two runs: `one`, finished, and `one` again, rollout-only."""
    home = tmp_path_factory.mktemp("finished")
    (home / "good.toml").write_text(GOOD)
    for extra in ((), ("--rollout-only",)):
        assert main(["train", str(home / "good.toml"), "--runs", str(home / "runs"), "--json", *extra]) == 0
    return home


@pytest.fixture
def after(home, finished) -> Path:
    shutil.copytree(finished / "runs", home / "runs")
    return home


def test_runs_that_are_not_there(home, capsys) -> None:
    for command in ("show", "resume"):
        assert "there is no run in runs" in fails(capsys, command, "last")
    assert "there is no run" in fails(capsys, "export", "last", "metrics", "-o", "m.jsonl")
    assert main(["runs"]) == 0
    assert "no runs in runs" in capsys.readouterr().out


def test_unknown_and_ambiguous_runs(after, capsys) -> None:
    names = sorted(p.name for p in (after / "runs").iterdir())
    for command in ("show", "resume"):
        assert "did you mean 'bad'?" in fails(capsys, command, "bed")
        text = fails(capsys, command, "bad")
        assert "'bad' means 2 runs" in text and all(name in text for name in names)
    assert "is finished" in (text := fails(capsys, "resume", names[0])) and f"ondol show {names[0]}" in text
    assert "no trajectories of phase 'rll'" in (text := fails(capsys, "show", names[0], "--phase", "rll"))
    assert "did you mean 'rl'?" in text
    assert "has no trained model" in fails(capsys, "export", names[1], "model", "-o", "m")
    (after / "m").mkdir()
    (after / "m" / "mine").touch()
    assert "m exists" in fails(capsys, "export", names[0], "model", "-o", "m")
    assert "cannot be written" in fails(capsys, "export", names[0], "metrics", "-o", "no/where.jsonl")


DUMPS = {
    "": "holds no trajectories",
    "not json": "d.jsonl:1: not a trajectory",
    "[1, 2]": "d.jsonl:1: not a trajectory (not a JSON object)",
    '{"a": 1}': "d.jsonl:1: not a trajectory (no 'turns')",
    "half": "d.jsonl:2: not a trajectory",
    "ids": "d.jsonl:1: not a trajectory ('logp' has",
    "types": "d.jsonl:1: not a trajectory ('ids' holds 'a')",
    "reason": "d.jsonl:1: not a trajectory ('tired' is not a valid StopReason)",
    "prompt": "d.jsonl:1: not a trajectory ('prompt_length'",
}


@pytest.mark.parametrize("kind", DUMPS)
def test_dumps_that_are_not_trajectories(after, capsys, kind) -> None:
    capsys.readouterr()
    assert main(["export", sorted(p.name for p in (after / "runs").iterdir())[1], "trajectories", "-o", "t.jsonl"]) == 0
    lines = [line for line in Path("t.jsonl").read_text().splitlines() if json.loads(line)["phase"] == "rl"]
    row = json.loads(lines[0])
    content = {
        "half": f"{lines[0]}\n{lines[1][:100]}",
        "ids": json.dumps({**row, "logp": row["logp"][1:]}),
        "types": json.dumps({**row, "ids": ["a", *row["ids"][1:]]}),
        "reason": json.dumps({**row, "stop_reason": "tired"}),
        "prompt": json.dumps({**row, "prompt_length": 10**6}),
    }.get(kind, kind)
    Path("d.jsonl").write_text(content)
    text = fails(capsys, "train", "good.toml", "--from-dump", "d.jsonl")
    assert DUMPS[kind] in text and "ondol export RUN trajectories" in text, text


def test_dumps_that_are_not_there(after, capsys) -> None:
    assert "there is no file x.jsonl" in fails(capsys, "train", "good.toml", "--from-dump", "x.jsonl")
    assert "no run in runs is called 'nothing'" in fails(capsys, "train", "good.toml", "--from-dump", "nothing")
    assert "give one of them" in fails(capsys, "train", "good.toml", "--from-dump", "last", "--rollout-only")


def test_errors_as_json(after, capsys) -> None:
    """A script finds one JSON document on stdout, also when something is wrong."""
    for argv in (
        ["check", "good.toml", "--set", "train.stepz=1"],
        ["train", "good.toml", "--set", "model.path=tiny:hiden=3"],
        ["resume", "nothing"],
        ["show", "bad"],
        ["export", "nothing", "metrics", "-o", "m.jsonl"],
    ):
        assert main([*argv, "--json"]) == 1
        out = capsys.readouterr()
        found = json.loads(out.out)
        assert found["error"] and found["remedy"] and found["error"].splitlines()[0] in out.err


def test_a_read_only_place_for_runs(home, capsys) -> None:
    (home / "file").touch()
    text = fails(capsys, "train", "good.toml", "--runs", "file/runs")
    assert "no run folder can be made in file/runs" in text
    assert Run.list(home / "runs") == []
