"""`ondol check`: a recipe, validated whole; nothing is loaded."""

from __future__ import annotations

from argparse import Namespace

from ondol.cli._common import print_json, told
from ondol.recipe import load_recipe, to_table


def run(args: Namespace) -> int:
    recipe = load_recipe(args.recipe, args.set)
    recipe.task.check(8)
    facts = recipe.env.facts()
    if args.json:
        print_json({"ok": True, "recipe": to_table(recipe), "tools": facts})
        return 0
    from ondol.store.toml import dump_toml

    print(dump_toml(to_table(recipe)))
    t = recipe.train
    print(
        f"# '{recipe.name}' is right: {t.steps} steps of {t.prompts_per_step} prompts x {t.samples_per_prompt} samples."
    )
    if recipe.task.has_gold:
        print("# The task's verifier accepts its own answers and rejects near misses (8 problems tried).")
    else:
        print(
            "# What a right response is, the task does not tell: problems were drawn, its verifier was not tried on them."
        )
    for line in told(facts):
        print(f"# {line}.")
    return 0
