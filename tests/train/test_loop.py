"""The loop over a tiny random model: what it records, what it changes, and what happens when things go wrong."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ondol.errors import OndolError
from ondol.methods.grpo import GRPO
from ondol.models.load import load_model
from ondol.models.save import weights
from ondol.recipe import load_recipe, to_table
from ondol.store import Run, latest_checkpoint
from ondol.store.metrics import metric
from ondol.train import checkpoint, loop
from ondol.train.loop import Trainer
from ondol.train.report import Reporter

BASE = {
    "name": "toy",
    "model": {"path": "tiny:hidden=32,layers=1,context=128"},
    "task": {"name": "toy:Toy", "calls": False},
    "env": {"max_turns": 1},
    "sampling": {"max_tokens": 24},
    "method": {"name": "grpo", "kl_coef": 0.0},
    "optimizer": {"learning_rate": 1e-3},
    "train": {"steps": 2, "prompts_per_step": 3, "samples_per_prompt": 8},
    "evaluate": {"problems": 2},
}


class Heard(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.stages, self.warnings = [], []

    def stage(self, name, total):
        self.stages.append((name, total))

    def warn(self, text):
        self.warnings.append(text)


def go(root: Path, *changes: str, again: Run | None = None, reporter=None, **options) -> tuple[Run, dict]:
    """Train (or resume `again`); the run, closed, and the model's weights after it."""
    recipe = load_recipe({k: dict(v) if isinstance(v, dict) else v for k, v in BASE.items()}, changes)
    path = again.path if again else Run.create(root, recipe.name, to_table(recipe))
    if isinstance(path, Run):
        path.close()
        path = path.path
    m = recipe.model
    loaded = load_model(m.path, dtype=m.dtype, lora=m.lora)
    with Run.open(path, write=True) as run:
        Trainer(recipe, run, loaded, reporter=reporter, **options).train()
    return Run.open(path), {k: v.clone() for k, v in weights(loaded.model).items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def fresh() -> dict:
    return weights(load_model(BASE["model"]["path"]).model)


WARM = ("warm_start.from_task=true", "warm_start.problems=6", "warm_start.samples_per_problem=4")


def test_stages_and_metrics(tmp_path) -> None:
    heard = Heard()
    run, after = go(tmp_path, *WARM, "evaluate.every_steps=1", "train.steps=3", reporter=heard)
    assert heard.stages == [("before", 1), ("sft", 3), ("warm", 1), ("rl", 3), ("after", 1)]
    assert not heard.warnings
    assert not same(after, fresh())
    rows = run.db.metrics()
    for row in rows:
        metric(row.name)  # registered
        assert row.value > 0 or row.name != "gradient/norm"
    assert {r.phase for r in rows} == {"before", "sft", "warm", "rl", "after"}
    assert [r.step for r in rows if r.phase == "rl" and r.name == "eval/score_greedy"] == [1, 2]  # 3 is "after"
    for step in (1, 2, 3):
        names = {r.name: r.value for r in rows if r.phase == "rl" and r.step == step}
        assert {"score/mean", "reward/mean", "loss/policy", "gradient/norm", "groups/kept", "step/seconds"} <= set(
            names
        )
        assert sum(v for n, v in names.items() if n.startswith("stop/")) == pytest.approx(1)
        found = list(run.db.trajectories(phase="rl", step=step))
        assert [t.key for t in found] == [(step, p, s) for p in range(3) for s in range(8)]
        assert sum(t.score for t in found) / 24 == pytest.approx(names["score/mean"])
        # three SFT updates, then one for each step
        assert {v for t in found for v, own in zip(t.version, t.sampled) if own} == {3 + step - 1}
    assert {f.name for f in (run.path / "model").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}


def test_finite_task_epochs(tmp_path) -> None:
    """Six problems, three a step: each pass sees every one once, in another order."""
    run, _ = go(tmp_path, "train.steps=8", "evaluate.problems=0")
    asked = [t.problem.data["number"] for t in run.db.trajectories(phase="rl", sample=0)]
    passes = [tuple(asked[i : i + 6]) for i in range(0, 24, 6)]
    assert all(sorted(p) == list(range(6)) for p in passes)
    assert len(set(passes)) > 1


def test_jsonl_task(tmp_path) -> None:
    """A file of questions as the task: only its training questions are trained on."""
    lines = [json.dumps({"question": f"{i}+1?", "answer": i + 1}) for i in range(20)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    run, _ = go(tmp_path, 'task={name="jsonl"}', f'task.path="{tmp_path / "sums.jsonl"}"', "train.steps=4")
    trained = {t.problem.question for t in run.db.trajectories(phase="rl")}
    tested = {t.problem.question for t in run.db.trajectories(phase="after/greedy")}
    assert trained and tested and not trained & tested


def test_rollout_only_then_train_from_its_export(tmp_path) -> None:
    """Sampling first and learning later is the same update, to the bit, as doing both at once."""
    direct, expected = go(tmp_path / "a", "train.steps=1", "method.minibatches=3")
    sampled, untouched = go(tmp_path / "b", "train.steps=1", "method.minibatches=3", rollout_only=True)
    assert same(untouched, fresh())
    assert not (sampled.path / "model").exists() and not sampled.checkpoints.exists()
    sampled.export("trajectories", tmp_path / "t.jsonl")
    for source in (tmp_path / "t.jsonl", sampled.path):
        run, found = go(tmp_path / "c", "train.steps=1", "method.minibatches=3", dump=str(source))
        assert same(found, expected) and not same(found, fresh())
        values = {m.name: m.value for m in run.db.metrics(phase="rl")}
        assert values["gradient/norm"] > 0
        # the learner did not sample these itself, so it does not claim to have reproduced them
        assert not any(name.startswith("mismatch/") for name in values)
        one = {m.name: m.value for m in direct.db.metrics(phase="rl")}
        assert values["gradient/norm"] == one["gradient/norm"]


def test_rollout_only_changes_no_weight_even_with_a_warm_start(tmp_path) -> None:
    run, found = go(tmp_path, *WARM, rollout_only=True)
    assert same(found, fresh())
    assert {t.key[0] for t in run.db.trajectories(phase="rl")} == {1, 2}


def test_a_dump_without_the_step(tmp_path) -> None:
    run, _ = go(tmp_path / "a", "train.steps=1", rollout_only=True)
    with pytest.raises(OndolError, match=r"no trajectories of step 2\n.*train.steps=1"):
        go(tmp_path / "b", dump=str(run.path))


def test_a_dump_of_another_tokenizer(tmp_path) -> None:
    run, _ = go(tmp_path / "a", "train.steps=1", rollout_only=True)
    run.export("trajectories", tmp_path / "t.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    for row in rows:
        row["ids"] = [(i * 7 + 1) % 90 + 4 for i in row["ids"]]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(OndolError, match="another tokenizer"):
        go(tmp_path / "b", "train.steps=1", dump=str(tmp_path / "t.jsonl"))


def test_imitating_recorded_trajectories(tmp_path) -> None:
    """Recorded traces are imitated on the plain prompt; only those that the verifier accepted, never an evaluation's."""
    run, _ = go(tmp_path / "a", "train.steps=2", rollout_only=True)
    run.export("trajectories", tmp_path / "t.jsonl")
    heard = Heard()
    warm = f'warm_start.trajectories="{tmp_path / "t.jsonl"}"'
    made, found = go(tmp_path / "b", warm, "warm_start.traces_per_update=1", "train.steps=0", reporter=heard)
    good: dict[str, int] = {}
    for t in run.db.trajectories(phase="rl"):
        good[t.problem.id] = good.get(t.problem.id, 0) + int(t.score == 1)
    kept = sum(min(2, n) for n in good.values())
    assert ("sft", kept) in heard.stages
    assert not same(found, fresh())
    assert made.db.last_metrics()["warm_start/traces"] == kept


def test_demonstrations_are_the_tasks_own(tmp_path) -> None:
    """`from_task`: the asked share is right, no token counts as sampled, and the text is what the ids say."""
    from ondol.train.warm_start import demonstrations, plain_prompt

    recipe = load_recipe(
        {**BASE, "task": "two-addends", "warm_start": {"from_task": True, "gold_share": 0.5, "samples_per_problem": 40}}
    )
    loaded = load_model(BASE["model"]["path"])
    problems = [recipe.task.problem(i) for i in range(10)]
    made = demonstrations(recipe, loaded, problems)
    assert len(made) == 400
    assert 0.4 < sum(t.score for t in made) / 400 < 0.6
    assert len({t.response for t in made if t.score == 1 and t.key[1] == 0}) > 5  # many right answers, not one
    for t in made:
        assert t.score == recipe.task.score(t.problem, t.response)
        assert not any(t.sampled) and t.trained == [False] * t.prompt_length + [True] * (len(t.ids) - t.prompt_length)
        assert t.ids[: t.prompt_length] == plain_prompt(recipe, loaded, t.problem)[1]
        assert t.ids[-1] == loaded.renderer.end_id
        assert loaded.tokenizer.decode(t.ids[t.prompt_length : -1]) == t.response
    assert [t.ids for t in demonstrations(recipe, loaded, problems)] == [t.ids for t in made]


def test_lora_trains_adapters_only(tmp_path) -> None:
    """The base stays frozen; the saved model is merged, and plain transformers loads it with the live model's logits."""
    pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    recipe = load_recipe({**BASE, "model": {**BASE["model"], "lora": {"rank": 4}}}, ["optimizer.learning_rate=1e-2"])
    loaded = load_model(recipe.model.path, lora=recipe.model.lora)
    before = {k: v.clone() for k, v in loaded.model.state_dict().items()}
    with Run.create(tmp_path, "lora", to_table(recipe)) as run:
        Trainer(recipe, run, loaded).train()
    after = loaded.model.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed and all(".lora_" in k for k in changed)
    checkpoint = latest_checkpoint(run.checkpoints)
    assert checkpoint is not None
    assert all(".lora_" in k for k in load_file(checkpoint / "model.safetensors"))
    plain = AutoModelForCausalLM.from_pretrained(run.path / "model")
    assert not any("lora" in k for k in plain.state_dict())
    ids = torch.arange(4, 30)
    from ondol.models import forward
    from ondol.records import Segment
    from ondol.train.logprobs import SegmentAttention

    with torch.no_grad():
        attend = SegmentAttention([Segment(0, 26)], torch.device("cpu"))
        ours = forward.logits(loaded.model, forward.hidden(loaded.model, ids, torch.arange(26), attend))
        theirs = plain(ids.unsqueeze(0)).logits[0]
        base = load_model(recipe.model.path).model
        first = forward.logits(base, forward.hidden(forward.prepare(base), ids, torch.arange(26), attend))
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours - first).abs().max() > 1e-4


def test_gradient_checkpointing_changes_nothing(tmp_path) -> None:
    """It recomputes instead of remembering. In float64, where rounding does not hide a difference."""
    changes = ("model.dtype=float64", "train.steps=2", "model.path=tiny:hidden=32,layers=2,context=128")
    _, plain = go(tmp_path / "a", *changes)
    _, recomputed = go(tmp_path / "b", *changes, "train.gradient_checkpointing=true")
    assert plain.keys() == recomputed.keys()
    assert max(float((plain[k] - recomputed[k]).abs().max()) for k in plain) < 1e-12


def test_a_reference_is_the_start_of_rl_also_after_a_resume(tmp_path, monkeypatch) -> None:
    changes = (*WARM, "method.kl_coef=0.1", "train.steps=3", "train.checkpoint_every_steps=1", "evaluate.problems=0")
    whole, expected = go(tmp_path / "a", *changes)
    kl = [m.value for m in whole.db.metrics("policy/kl_k3")]
    assert kl[0] == pytest.approx(0, abs=1e-9) and kl[2] > 1e-6

    def die(*a, **k):
        raise RuntimeError("cut")

    with monkeypatch.context() as m:
        m.setattr(
            loop.Trainer,
            "_reinforce",
            lambda self, step, real=loop.Trainer._reinforce: real(self, step) if step < 3 else die(),
        )
        with pytest.raises(RuntimeError, match="cut"):
            go(tmp_path / "b", *changes)
    cut = Run.open(Run.find(tmp_path / "b", "last"))
    assert cut.state == "failed"
    resumed, found = go(tmp_path / "b", *changes, again=cut)
    assert same(found, expected)
    assert [m.value for m in resumed.db.metrics("policy/kl_k3")] == kl

    reference = load_file(resumed.path / "reference.safetensors")
    sft = [m for m in resumed.db.metrics("loss/sft")]
    assert len(sft) == 3 and not same(reference, fresh()) and not same(reference, found)


_STEPS_LEFT = [0]


class Nan(GRPO):
    """When no steps are left, the loss is not a number."""

    def token_loss(self, x):
        loss, reports = super().token_loss(x)
        return (loss * float("nan") if _STEPS_LEFT[0] <= 0 else loss), reports


def test_a_loss_that_is_not_finite(tmp_path, monkeypatch) -> None:
    """The step is named, its batch is put aside, and the last checkpoint is there to go on from."""
    import sys

    sys.modules.setdefault("test_loop", sys.modules[__name__])
    real = loop.Trainer._reinforce

    def reinforce(self, step):
        _STEPS_LEFT[0] = 3 - step
        return real(self, step)

    monkeypatch.setattr(loop.Trainer, "_reinforce", reinforce)
    changes = (
        *WARM,
        "method.name=test_loop:Nan",
        "train.steps=4",
        "train.checkpoint_every_steps=2",
        "train.tokens_per_microbatch=64",
    )
    with pytest.raises(
        OndolError, match=r"the loss is not finite at step 3 of 'rl' in .*-toy; the batch is in (.*)\n"
    ) as caught:
        go(tmp_path, *changes)
    run = Run.open(Run.find(tmp_path, "last"))
    assert run.state == "failed"
    dumped = load_file(run.path / "bad-batch-rl-000003.safetensors")
    assert str(run.path / "bad-batch-rl-000003.safetensors") in caught.value.what
    assert dumped["trained"].any() and len(dumped["ids"]) == len(dumped["positions"])
    checkpoint = latest_checkpoint(run.checkpoints)
    assert checkpoint is not None and checkpoint.name == "rl-000002"
    assert all(torch.isfinite(v).all() for v in load_file(checkpoint / "model.safetensors").values())

    monkeypatch.setattr(loop.Trainer, "_reinforce", real)
    _STEPS_LEFT[0] = 1
    done, found = go(tmp_path, *changes, again=run)
    assert done.state == "finished" and all(torch.isfinite(v).all() for v in found.values())


def test_a_full_disk_in_a_checkpoint(tmp_path, monkeypatch) -> None:
    """The one before is kept and said to be; with space again the run goes on and ends as if nothing had happened."""
    changes = ("train.steps=4", "train.checkpoint_every_steps=1", "evaluate.problems=0")
    _, expected = go(tmp_path / "a", *changes)
    real, count = checkpoint.save_tensors, [0]

    def write(tensors, path):
        count[0] += 1
        if count[0] == 6:  # the optimiser's file of the third
            path.write_bytes(b"half of a file")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    with monkeypatch.context() as m:
        m.setattr(checkpoint, "save_tensors", write)
        with pytest.raises(OndolError, match=r"'rl-000003' was not saved: the disk is full") as caught:
            go(tmp_path / "b", *changes)
    assert "then resume; the earlier ones are untouched" in str(caught.value)
    run = Run.open(Run.find(tmp_path / "b", "last"))
    assert run.state == "failed"
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["rl-000001", "rl-000002"]
    done, found = go(tmp_path / "b", *changes, again=run)
    assert done.state == "finished" and same(found, expected)


def test_a_damaged_checkpoint_is_passed_over(tmp_path, monkeypatch) -> None:
    changes = ("train.steps=4", "train.checkpoint_every_steps=1", "evaluate.problems=0")
    _, expected = go(tmp_path / "a", *changes)
    with monkeypatch.context() as m:
        m.setattr(loop, "save_model", lambda *a: (_ for _ in ()).throw(RuntimeError("cut")))
        with pytest.raises(RuntimeError, match="cut"):
            go(tmp_path / "b", *changes)
    run = Run.open(Run.find(tmp_path / "b", "last"))
    file = run.checkpoints / "rl-000004" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    heard = Heard()
    _, found = go(tmp_path / "b", *changes, again=run, reporter=heard)
    assert same(found, expected)
    assert any("rl-000004 is damaged" in w for w in heard.warnings)


def test_no_test_problems_is_said(tmp_path) -> None:
    heard = Heard()
    go(tmp_path, "task.test=0", "train.steps=1", reporter=heard)
    assert heard.stages == [("rl", 1)]
    assert any("no test problems" in w for w in heard.warnings)


def test_rollouts_that_fail_are_warned_of(tmp_path, monkeypatch) -> None:
    asked = []

    def broken(self, problem):
        asked.append(problem)
        if len(asked) > 1:  # what is tried before the run begins is still there
            raise RuntimeError("the pictures are not there")
        return ()

    monkeypatch.setattr("toy.Toy.images", broken)
    heard = Heard()
    go(tmp_path, "train.steps=1", reporter=heard)
    for where in ("evaluation 'before', greedy", "step 1"):
        assert any(w.startswith(where) and "the pictures are not there" in w for w in heard.warnings), heard.warnings


def test_a_mismatch_is_warned_of(tmp_path, monkeypatch) -> None:
    """Where learner and sampler disagree about log-probs, the run says so and goes on."""
    real = loop.Trainer._rollout

    def off(self, *args, **kwargs):
        groups = real(self, *args, **kwargs)
        for t in groups[0].trajectories:
            t.logp = [lp + 0.01 * own for lp, own in zip(t.logp, t.sampled)]
        return groups

    monkeypatch.setattr(loop.Trainer, "_rollout", off)
    heard = Heard()
    run, _ = go(tmp_path, "train.steps=4", "evaluate.problems=0", reporter=heard)
    assert any("differ by 0.01" in w for w in heard.warnings)
    assert run.db.events("mismatch")
