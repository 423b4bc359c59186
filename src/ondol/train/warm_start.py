"""What a warm start imitates: the model's own accepted traces, recorded ones, or demonstrations made by the task."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any

from ondol.errors import OndolError
from ondol.models.load import LoadedModel
from ondol.recipe import Recipe, WarmStart
from ondol.records import Finish, Message, Problem, StopReason, Trajectory, Turn
from ondol.rollout.driver import Plan, rollout
from ondol.rollout.scripted import ScriptEngine
from ondol.train.dump import read_trajectories
from ondol.train.prompts import problems


def plain_prompt(recipe: Recipe, loaded: LoadedModel, problem: Problem) -> tuple[list[Message], list[int]]:
    """The conversation that a problem opens with, without worked examples: messages and token ids."""
    return prompt(recipe, loaded, problem, ())


def prompt(
    recipe: Recipe, loaded: LoadedModel, problem: Problem, examples: Sequence[Message]
) -> tuple[list[Message], list[int]]:
    """The same, with worked examples before the question."""

    async def first() -> list[Message]:
        episode = recipe.env.episode(recipe.task, problem, "prompt", loaded.renderer, examples)
        try:
            return await episode.reset()
        finally:
            await episode.close()

    messages = asyncio.run(first())
    return messages, loaded.renderer.prompt(messages, recipe.env.schemas(loaded.renderer))


def accepted(trajectories: Iterable[Trajectory], keep_per_problem: int) -> list[Trajectory]:
    """The first `keep_per_problem` trajectories of each problem that the verifier accepted, in order."""
    kept: dict[str, list[Trajectory]] = {}
    for t in trajectories:
        mine = kept.setdefault(t.problem.id, [])
        if t.score >= 1.0 and len(mine) < keep_per_problem:
            mine.append(t)
    return [t for group in kept.values() for t in group]


def replant(recipe: Recipe, loaded: LoadedModel, t: Trajectory) -> Trajectory:
    """The same sampled turns and observations, as ids, after the plain prompt (no examples)."""
    messages, ids = plain_prompt(recipe, loaded, t.problem)
    n, blank = t.prompt_length, len(ids)
    moved = copy.copy(t)
    moved.ids, moved.prompt_length = ids + t.ids[n:], blank
    moved.sampled, moved.trained = [False] * blank + t.sampled[n:], [False] * blank + t.trained[n:]
    moved.logp, moved.version = [0.0] * blank + t.logp[n:], [-1] * blank + t.version[n:]
    moved.logp_truncated = [0.0] * blank + t.logp_truncated[n:] if t.logp_truncated else []
    moved.restarts = [r - n + blank for r in t.restarts]
    moved.messages = messages + t.messages[len(t.messages) - 2 * len(t.turns) + 1 :]
    moved.turns = copy.deepcopy(t.turns)
    for turn in moved.turns:
        turn.start, turn.end = turn.start - n + blank, turn.end - n + blank
    return moved


def demonstrations(recipe: Recipe, loaded: LoadedModel, problems: Sequence[Problem]) -> list[Trajectory]:
    """What the task itself shows, on the plain prompt: `samples_per_problem` to each problem.

    This is demonstration data of the task, not the model's own, and the only way up for a model that never answers (one
    from scratch). A share `gold_share` of it is right, the rest wrong in the task's own ways, so that it shows the
    form of an answer and leaves the right one for reinforcement to find. A text is an answer, a single turn; a list of
    texts are turns that are played in the recipe's environment. No token counts as sampled.
    """
    w = _settings(recipe)
    answers: list[Trajectory] = []
    scripts: dict[tuple[int, int], list[str]] = {}
    for number, problem in enumerate(problems):
        messages, ids = plain_prompt(recipe, loaded, problem)
        for sample in range(w.samples_per_problem):
            random = Random(f"{recipe.seed}/demonstration/{number}/{sample}")
            made = recipe.task.demonstration(problem, random, right=random.random() < w.gold_share)
            if isinstance(made, str):
                answers.append(_answer(recipe, loaded, problem, (0, number, sample), messages, ids, made))
            else:
                scripts[number, sample] = list(made)
    if not scripts:
        return answers
    if answers:
        raise OndolError("the task demonstrates now an answer, now a list of turns", "give one or the other")
    return _played(recipe, loaded, problems, scripts)


def _answer(
    recipe: Recipe,
    loaded: LoadedModel,
    problem: Problem,
    key: tuple[int, int, int],
    messages: list[Message],
    ids: list[int],
    text: str,
) -> Trajectory:
    answer = [*loaded.renderer.codec.text(text), loaded.renderer.end_id]
    n, m = len(ids), len(answer)
    score = recipe.task.score(problem, text)
    return Trajectory(
        key=key,
        problem=problem,
        ids=ids + answer,
        prompt_length=n,
        sampled=[False] * (n + m),
        trained=[False] * n + [True] * m,
        logp=[0.0] * (n + m),
        version=[-1] * (n + m),
        turns=[Turn(n, n + m, text, Finish.END)],
        messages=[*messages, Message("assistant", text)],
        stop_reason=StopReason.ANSWERED,
        score=score,
        reward=score,
        info={"demonstration": True},
    )


def _played(
    recipe: Recipe, loaded: LoadedModel, problems: Sequence[Problem], scripts: dict[tuple[int, int], list[str]]
) -> list[Trajectory]:
    """The scripts' episodes. Raises OndolError for one that the environment does not end, or the context does not hold."""
    plan = Plan(recipe.task, recipe.env, problems, _settings(recipe).samples_per_problem, recipe.sampling, seed=())
    out = [t for g in rollout(ScriptEngine(loaded.renderer, scripts), loaded.renderer, plan) for t in g.trajectories]
    for t in out:
        if t.stop_reason in (StopReason.ERROR, StopReason.TIMEOUT):
            raise OndolError(
                f"a demonstration of {t.problem.question!r:.80} failed: {t.info.get('error', t.stop_reason)}",
                "its turns are those of the task's `demonstration`",
            )
        longest = max(end - start for start, end in t.contexts)
        if longest > loaded.context_length:
            raise OndolError(
                f"a demonstration has {longest} tokens; the context of {loaded.name} is {loaded.context_length}",
                "take a model with a longer context, or fewer turns",
            )
        t.trained, t.sampled = t.sampled, [False] * len(t.ids)
        t.version = [-1] * len(t.ids)
        t.info["demonstration"] = True
    return out


def traces(
    recipe: Recipe, loaded: LoadedModel, sampled: Iterable[Trajectory], note: Callable[[str], None]
) -> list[Trajectory]:
    """What the warm start imitates, on the plain prompt: the task's own answers, recorded trajectories, or the accepted
    ones of `sampled`. Raises OndolError where the verifier accepted none of them."""
    w = _settings(recipe)
    if w.from_task:
        made = demonstrations(recipe, loaded, problems(recipe, w.problems, 0, "warm_start"))
        note(f"{len(made)} answers of the task itself to imitate, {sum(t.score >= 1.0 for t in made)} of them right")
        return made
    if w.trajectories is not None:
        own = read_trajectories(w.trajectories)
        check_tokens(loaded, own, w.trajectories)
    else:
        own = list(sampled)
    kept = accepted(own, w.keep_per_problem)
    if not kept:
        raise OndolError(
            f"warm_start.trajectories: none of {len(own)} trajectories was accepted by a verifier (score 1)",
            "record better ones, or leave the key out to sample with warm_start.examples",
        )
    return [replant(recipe, loaded, t) for t in kept]


def check_tokens(loaded: LoadedModel, trajectories: Sequence[Trajectory], source: str) -> None:
    """Refuse trajectories whose ids are not of this model's tokenizer: trained on, they would be noise."""
    size = len(loaded.tokenizer)
    for t in trajectories:
        wrong = not all(0 <= i < size for i in t.ids)
        for turn in t.turns[:1]:
            ids = [i for i in t.ids[turn.start : turn.end] if i not in loaded.renderer.end_ids]
            # a stop string may end the text before the last token does
            wrong = wrong or not loaded.tokenizer.decode(ids, skip_special_tokens=False).startswith(turn.text)
        if wrong:
            raise OndolError(
                f"{source}: trajectory {t.key} was recorded with another tokenizer than that of {loaded.name}",
                "use trajectories of the same model family, or set model.path to the model that made them",
            )


def _settings(recipe: Recipe) -> WarmStart:
    assert recipe.warm_start is not None
    return recipe.warm_start


def updates(recipe: Recipe, traces: Sequence[Any]) -> int:
    """How many SFT updates the traces make."""
    w = _settings(recipe)
    return w.epochs * -(-len(traces) // w.traces_per_update)


def check_prompts(recipe: Recipe, loaded: LoadedModel) -> None:
    """Fail now, and clearly, when the prompts cannot fit."""
    _, ids = prompt(
        recipe, loaded, recipe.task.problem(0, "train"), recipe.warm_start.messages if recipe.warm_start else ()
    )
    turns, tokens = recipe.env.turns_in_context, recipe.sampling.max_tokens
    need = len(ids) + turns * tokens
    if need > loaded.context_length:
        raise OndolError(
            f"a prompt of {len(ids)} tokens and {turns} turn{'s' if turns > 1 else ''} of {tokens} (sampling.max_tokens) "
            f"may need {need} tokens; the context of {loaded.name} is {loaded.context_length}",
            "lower sampling.max_tokens or env.max_turns, shorten the system message or examples, or take another model",
        )
