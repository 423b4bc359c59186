"""What would become of a conversation's tokens if it were encoded anew, and that our record keeps them."""

from __future__ import annotations

from random import Random
from typing import Any

from ondol.engines.base import Completion, Request, Sampling
from ondol.envs.tool import ToolEnv
from ondol.models.bundled import bundled_path
from ondol.models.chat import renderer_for
from ondol.papers.tool_sums import ToolSums
from ondol.records import Finish, Message, Trajectory
from ondol.rollout.driver import Plan, rollout
from ondol.rollout.scripted import ScriptEngine
from ondol.tools.python import Python

PAIRS = 1000
_WORDS = ("river", "length", "capital", "author", "novel", "year", "city", "population", "height", "tower", "film")


def pair(random: Random, number: int) -> tuple[str, str]:
    """An action and the observation that answers it, in one of the formats of the paper's tools: Python in tags, Python in
    a fence, web search, SQL."""
    a, b = random.randrange(10, 10_000), random.randrange(10, 10_000)
    words = " ".join(random.sample(_WORDS, 4))
    return (
        (f"Let me compute it.\n<python>\nprint({a} * {b})\n</python>", f"\n<result>\n{a * b}\n</result>\n"),
        (f"I check it with code.\n```python\nprint({a} + {b})\n```output", f"\n{a + b}\n```\n"),
        (f"I must look it up. <search>{words}</search>", f"<result>Search results for '{words}':\n\nResult 1</result>"),
        (f"<sql>SELECT x FROM t WHERE y > {a};</sql>", f"\n\n<observation>[({b},)]</observation>\n\n"),
    )[number % 4]


def count(seed: int, pairs: int = PAIRS) -> dict[str, float]:
    """Of so many pairs: "changed" have other ids when encoded together; "changed_sampled" when the action's ids are cut in
    other places than the tokenizer would, as sampled ones are at times; "own_share" are in our record as they were sampled.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundled_path())
    renderer = renderer_for(tokenizer)
    text, random = renderer.codec.text, Random(f"{seed}/pairs")
    made = [pair(random, i) for i in range(pairs)]
    sampled = [_pieces(text, action, random) for action, _ in made]
    out = {f"changed_{kind}": 0.0 for kind in ("python", "fence", "search", "sql")}
    out |= {"changed": 0.0, "changed_sampled": 0.0}
    for i, (action, observation) in enumerate(made):
        together, apart = text(action + observation), text(observation)
        changed = together != text(action) + apart
        out[f"changed_{('python', 'fence', 'search', 'sql')[i % 4]}"] += changed
        out["changed"] += changed
        out["changed_sampled"] += together != sampled[i] + apart
    return out | {"own_share": _own_share(renderer, sampled, [o for _, o in made])}


def _pieces(text: Any, action: str, random: Random) -> list[int]:
    at = random.randrange(1, len(action))
    return [*text(action[:at]), *text(action[at:])]


class _Sampler(ScriptEngine):
    """Says an action in given ids, then an answer; remembers what each request began with."""

    def __init__(self, renderer: Any, actions: list[list[int]]) -> None:
        super().__init__(renderer, {(i, 0): ["", "done"] for i in range(len(actions))})
        self.actions, self.asked_with = actions, {}

    def _turn(self, request: Request) -> Completion:
        problem, _, turn = request.seed[-3:]
        self.asked_with[problem, turn] = list(request.ids)
        if turn == 1:
            return super()._turn(request)
        ids = self.actions[problem]
        text = "<python>call</python>"  # for the environment; the record has the ids
        return Completion(request.session, list(ids), [0.0] * len(ids), [], text, Finish.STOP, self.version)


def _own_share(renderer: Any, actions: list[list[int]], observations: list[str]) -> float:
    """Share of trajectories in which prompt, action and observation are the very ids that were rendered and sampled."""
    engine, task, size = _Sampler(renderer, actions), ToolSums(), len(actions)
    env = ToolEnv(tools=(_Says(observations=tuple(observations)),), max_turns=2, system="")
    plan = Plan(task, env, [task.problem(i) for i in range(size)], 1, Sampling(), (0,))
    kept = 0
    for i, group in enumerate(rollout(engine, renderer, plan)):
        t: Trajectory = group.trajectories[0]
        prompt = renderer.prompt([Message("user", t.problem.question)])
        result = f"<result>{observations[i]}</result>"
        seen = renderer.observation([Message("user", result)], ended=False)
        expected = [*prompt, *actions[i], *seen]
        kept += t.ids[: len(expected)] == expected == engine.asked_with[i, 1] and len(t.turns) == 2
    return kept / size


class _Says(Python):
    """Answers with the observation that belongs to the trajectory."""

    observations: tuple[str, ...] = ()

    def session(self, trajectory_id: str) -> Any:
        from ondol.records import ToolResult

        said = self.observations[int(trajectory_id.split("/")[-2])]

        class Session:
            async def call(self, arguments: dict[str, Any]) -> ToolResult:
                return ToolResult(said)

            async def close(self) -> None:
                pass

        return Session()
