"""Every data set of reasoning-gym in its step form: a wrong answer brings feedback, the gold answer after it ends the episode.

    python results/step_forms.py            # about two minutes on 2 cores

No model. For each data set, three problems in the environment `feedback`: first "I do not know", then the first half of the gold
answer, then the whole of it. Writes results/step-forms.json: what was told after each, and data sets that give no gold answer.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

from reasoning_gym.factory import DATASETS

from ondol.envs.feedback import FeedbackEnv
from ondol.errors import OndolError
from ondol.records import Message
from ondol.tasks.reasoning_gym import ReasoningGym

PROBLEMS = 3


async def play(task: ReasoningGym, problem) -> dict:
    gold = task.gold(problem)
    episode = FeedbackEnv(max_turns=3).episode(task, problem, "t", None)
    await episode.reset()
    told = []
    for text in ("I do not know", f"<answer>{gold[: len(gold) // 2]}</answer>", f"<answer>{gold}</answer>"):
        result = await episode.step(Message("assistant", text), len(told) == 2)
        if result.terminated:
            return {"told": told, "score": result.score, "tries": len(told) + 1}
        told.append(result.messages[0].content)
    raise AssertionError("unreachable")


def main() -> None:
    rows, started = {}, time.time()
    for name in sorted(DATASETS):
        try:
            task = ReasoningGym(dataset=name, timeout_s=20)
            episodes = [asyncio.run(play(task, task.problem(i))) for i in range(PROBLEMS)]
            rows[name] = {"ok": all(e["score"] == 1 for e in episodes), "episodes": episodes}
        except (OndolError, ValueError) as e:
            rows[name] = {"ok": False, "error": str(e).split("\n")[0]}
        if not rows[name]["ok"]:
            print(name, rows[name], flush=True)
    good = sum(r["ok"] for r in rows.values())
    out = {"command": "python results/step_forms.py", "datasets": len(rows), "ok": good, "rows": rows}
    Path(__file__).with_name("step-forms.json").write_text(json.dumps(out, indent=1) + "\n")
    print(f"{good} of {len(rows)} data sets, {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
