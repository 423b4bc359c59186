"""An environment of the package verifiers, as its users write them: sums, with tags around the answer, a tool, or scored by group."""

from __future__ import annotations

import re


def _rows(first: int, count: int):
    from datasets import Dataset

    return Dataset.from_list(
        [{"question": f"What is {a} + {a + 1}?", "answer": str(2 * a + 1)} for a in range(first, first + count)]
    )


def add(a: int, b: int) -> str:
    """Add two numbers.

    Args:
        a: one
        b: the other
    """
    return str(a + b)


def load_environment(kind: str = "tags", evaluated: bool = True):
    import verifiers as vf

    def right(completion, answer, **_):
        found = re.findall(r"<answer>(.*?)</answer>", completion[-1]["content"] or "", re.S)
        return 2.0 * (found == [answer])

    def tidy(completion, **_):
        return 1.0 if (completion[-1]["content"] or "").startswith("<answer>") else 0.0

    def ahead(completions, **_):
        return [1.0] * len(completions)

    def loose(completion, **_):
        if "crash" in completion[-1]["content"]:
            raise ValueError("the rubric fell over")
        return float("nan") if "nan" in completion[-1]["content"] else 1.0

    sets = {"dataset": _rows(0, 40), **({"eval_dataset": _rows(100, 8)} if evaluated else {})}
    rubric = vf.Rubric(funcs=[right, tidy], weights=[1.0, 0.5])
    if kind == "tool":
        return vf.ToolEnv(tools=[add], rubric=rubric, max_turns=4, system_prompt="Use the tool.", **sets)
    if kind == "groups":
        rubric = vf.Rubric(funcs=[ahead])
    if kind == "loose":
        rubric = vf.Rubric(funcs=[loose])
    if kind == "broken":
        raise RuntimeError("no key for the judge")
    return vf.SingleTurnEnv(rubric=rubric, system_prompt="Answer in tags.", **sets)
