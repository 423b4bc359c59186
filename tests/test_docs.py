"""What the documents say is run: the worked examples, the recipes, the commands."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

from ondol.cli import main, parser
from ondol.recipe import load_recipe

ROOT = Path(__file__).parent.parent
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BASE = {
    "name": "example",
    "model": {"path": "tiny:hidden=32,layers=1"},
    "task": {"name": "two-addends"},
    "sampling": {"max_tokens": 6},
    "train": {"steps": 1, "prompts_per_step": 2, "samples_per_prompt": 2},
    "evaluate": {"problems": 2},
}


def blocks(kind: str, label: str) -> dict[str, str]:
    """Fenced blocks ```kind label=NAME of CONTRIBUTING.md, by name."""
    return dict(re.findall(rf"```{kind} {label}=(\S+)\n(.*?)```", CONTRIBUTING, re.S))


@pytest.mark.parametrize("name", blocks("toml", "recipe"))
def test_worked_example_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / f"{name}.py").write_text(blocks("python", "file")[f"{name}.py"])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, name, raising=False)
    table = BASE | tomllib.loads(blocks("toml", "recipe")[name])
    from ondol.store.toml import dump_toml

    (tmp_path / "recipe.toml").write_text(dump_toml(table))
    assert main(["train", str(tmp_path / "recipe.toml"), "--runs", str(tmp_path / "runs")]) == 0
    assert "after RL" in capsys.readouterr().out


def test_every_example_has_code_and_recipe() -> None:
    assert {f"{n}.py" for n in blocks("toml", "recipe")} == set(blocks("python", "file"))


@pytest.mark.parametrize("path", sorted((ROOT / "src/ondol/recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_built_in_recipe_is_right(path: Path) -> None:
    recipe = load_recipe(path.stem)
    assert recipe.name == path.stem
    recipe.task.check(4)


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:sh|bash|console)\n(.*?)```", page.read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = line.split("#")[0].strip()
                if words.startswith(("ondol ", ".venv/bin/ondol ")):
                    found.append((page.name, words))
    return found


@pytest.mark.parametrize(("page", "line"), commands())
def test_documented_command_parses(page: str, line: str) -> None:
    parser().parse_args(shlex.split(line)[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_reference_is_up_to_date() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs/make_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    said = (ROOT / "docs/recipe-reference.md").read_text()
    assert said == module.page(), "run: python docs/make_reference.py"
