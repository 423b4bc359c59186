"""Recipes: what is written is what is read, and what is read says all."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ondol.recipe
from ondol.errors import OndolError
from ondol.models.lora import LoraSettings
from ondol.parts import Part
from ondol.recipe import Recipe, load_recipe, override, to_table
from ondol.store.toml import dump_toml

BUILT_IN = sorted(p.stem for p in (Path(__file__).parents[1] / "src/ondol/recipes").glob("*.toml"))


def test_a_recipe_is_known_by_its_task_as_well() -> None:
    assert load_recipe("two-addends") == load_recipe("tiny-addends")
    assert load_recipe("widgets") == load_recipe("tiny-widgets")


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_resolved_recipe_is_the_recipe(name) -> None:
    """Resolving, writing and reading again changes nothing: this is how a run is resumed."""
    if name == "letter-counting":
        pytest.importorskip("reasoning_gym")
    table = to_table(load_recipe(name))
    again = tomllib.loads(dump_toml(table))
    assert again == table
    assert to_table(load_recipe(again)) == table
    for key in ("model", "task", "env", "sampling", "method", "optimizer", "train", "evaluate"):
        assert table[key], key


@given(
    steps=st.integers(0, 10**6),
    rate=st.floats(1e-12, 1e3),
    seed=st.integers(0, 2**62),
    name=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30),
    clip=st.floats(1e-6, 0.999),
    tools=st.lists(st.sampled_from(["python", "calculator"]), unique=True),
    content=st.text(st.characters(exclude_categories=["Cs"]), max_size=50),
)
def test_any_recipe_survives_its_file(steps, rate, seed, name, clip, tools, content) -> None:
    recipe = load_recipe(
        {
            "name": name,
            "seed": seed,
            "task": {"name": "two-addends", "seed": seed},
            "env": {"tools": tools, "system": content},
            "method": {"name": "grpo", "clip_low": clip},
            "optimizer": {"learning_rate": rate},
            "train": {"steps": steps},
            "warm_start": {"examples": [{"role": "user", "content": content}]},
        }
    )
    table = to_table(recipe)
    again = load_recipe(tomllib.loads(dump_toml(table)))
    assert to_table(again) == table
    assert (again.seed, again.name, again.optimizer.learning_rate, again.method.clip_low) == (seed, name, rate, clip)
    assert [t.name for t in again.env.tools] == tools and again.env.system == content
    assert again.warm_start is not None and again.warm_start.examples[0].content == content


def test_defaults_are_written_too() -> None:
    table = to_table(load_recipe({"task": "arithmetic"}))
    assert (
        table["train"]["samples_per_prompt"] == 8
        and table["method"]["name"] == "grpo"
        and table["env"]["name"] == "tool"
    )
    assert table["task"]["forms"] == ["a * b + c"]


@pytest.mark.parametrize(
    "part", [c for c in vars(ondol.recipe).values() if isinstance(c, type) and issubclass(c, Part)]
)
def test_every_setting_is_described(part) -> None:
    """An error about a key shows its description."""
    for key, field in part.model_fields.items():
        table = key in Recipe.model_fields and part is Recipe
        assert field.description or table or part is LoraSettings, (part, key)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("train.steps=3", {"train": {"steps": 3}}),
        (" train . steps = 3", {"train": {"steps": 3}}),
        ("method=dcpo", {"method": "dcpo"}),
        ('env.tools=["python"]', {"env": {"tools": ["python"]}}),
        ("task.seed=2", {"task": {"name": "arithmetic", "seed": 2}}),
        ("name=a=b", {"name": "a=b"}),
        ("optimizer.learning_rate=1e-4", {"optimizer": {"learning_rate": 1e-4}}),
        ("model.path=tiny:hidden=32,layers=1", {"model": {"path": "tiny:hidden=32,layers=1"}}),
        ("evaluate.without_tools=true", {"evaluate": {"without_tools": True}}),
        ("name=true story", {"name": "true story"}),
    ],
)
def test_overrides(text, expected) -> None:
    table = {"task": "arithmetic"}
    override(table, text)
    assert table == {"task": "arithmetic", **expected}


def test_overrides_come_in_order_and_leave_the_table_alone() -> None:
    table = {"task": "arithmetic", "train": {"steps": 1}}
    assert load_recipe(table, ["train.steps=2", "train.steps=3"]).train.steps == 3
    assert table == {"task": "arithmetic", "train": {"steps": 1}}


def test_paths_are_absolute_in_a_run(tmp_path, monkeypatch) -> None:
    """So that it can be resumed from any folder."""
    (tmp_path / "t.jsonl").write_text("\n".join(f'{{"question": "{i}+1", "answer": {i + 1}}}' for i in range(20)))
    monkeypatch.chdir(tmp_path)
    table = to_table(load_recipe({"task": {"name": "jsonl", "path": "t.jsonl"}}))
    monkeypatch.chdir("/")
    assert load_recipe(table).task.size("train") > 0


def test_objects_instead_of_names() -> None:
    """From Python a part can be given as it is."""
    from ondol.envs.tool import ToolEnv
    from ondol.methods.grpo import GRPO
    from toy import Toy

    recipe = Recipe(task=Toy(seed=3), env=ToolEnv(max_turns=1), method=GRPO(kl_coef=0.0))
    assert recipe.task.seed == 3
    assert to_table(load_recipe(to_table(recipe))) == to_table(recipe)


def test_zero_steps_needs_no_group() -> None:
    """What concerns training alone does not stand in the way of a recipe that only evaluates."""
    recipe = load_recipe(
        {"task": "arithmetic"}, ["train.steps=0", "train.samples_per_prompt=1", "sampling.temperature=0"]
    )
    assert recipe.train.steps == 0
    with pytest.raises(OndolError, match="samples_per_prompt"):
        load_recipe({"task": "arithmetic"}, ["train.steps=1", "train.samples_per_prompt=1"])
