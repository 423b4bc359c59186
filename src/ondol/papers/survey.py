"""The survey of agentic RL (arXiv 2509.02547): its algorithm table as runs. Every implemented row trains the same model."""

from __future__ import annotations

from collections.abc import Sequence

from ondol.compare.arms import Arm
from ondol.papers import pilot, tool_sums
from ondol.papers.base import Claim, Measured, Outcome, Paper
from ondol.recipe import override, read_table
from ondol.store import Run

#: rows that follow the policy gradient of a reward, with what a task of few tokens needs
GRADIENT = (
    "grpo",
    # one update of a batch where others make four, of four times the answers: twice the learning rate
    "reinforce:baseline=group,optimizer.learning_rate=2e-3",
    "rloo:optimizer.learning_rate=2e-3",
    "reinforce++",
    "ppo:critic_learning_rate=1e-3",  # the policy's; the default is for pretrained models
    "vapo:alpha=1,critic_learning_rate=2e-3,value_pretraining_steps=10",  # answers of 5 tokens, a model from scratch
    "dr-grpo:max_length=8",  # the most an answer has
    "dapo:max_response=8,overlong_cache=2",
    "gspo",
    "gmpo",
    "cispo",
    "pass-at-k",
    "dcpo",
    "pacs",
    "darling",
)
#: rows that learn from pairs; theirs are the best and the worst answer of a group. The first three unlearn the task at the others' rate (seed 100: dpo 0.09 ->
#: 0.02 at 1e-3 and 0.17 at 1e-4, kto 0.00 and 0.25)
_SLOW = "optimizer.learning_rate=1e-4"
PREFERENCE = (f"dpo:{_SLOW}", f"ipo:{_SLOW}", f"kto:{_SLOW}", "simpo", "orpo")
_CHANCE = 0.1  # of recall: one digit


def _label(text: str) -> str:
    return text.partition(":")[0]


def _arms() -> Sequence[Arm]:
    table = pilot.arms(*(f"{_label(t)}={t}" for t in (*GRADIENT, *PREFERENCE)))
    # the same sums, the same number of demonstrations and of episodes; what differs is the tool and the turns for it
    agentic = ("optimizer.learning_rate=5e-4",)
    at_once = ("task.in_head=true", "env.tools=[]", "env.max_turns=1", *agentic)
    return [
        *table,
        *tool_sums.arms("multi-turn=grpo", settings=agentic),
        *tool_sums.arms("one-shot=grpo", settings=at_once),
        # without the memory a demonstration can only guess
        _recall("memory"),
        _recall("no-memory", "env.tools=[]", "task.demonstrate=guess", "warm_start.gold_share=1.0"),
    ]


def _recall(label: str, *settings: str) -> Arm:
    table = read_table("tiny-recall")
    for setting in settings:
        override(table, setting)
    return Arm(label, table)


def _measure(run: Run, arm: str) -> dict[str, float]:
    found = pilot.measure(run, arm)
    if arm in ("memory", "no-memory"):
        episodes = list(run.db.trajectories(phase="after/greedy"))
        found["longest_context_tokens"] = max(b - a for t in episodes for a, b in t.contexts)
        found["shortest_episode_tokens"] = min(len(t.ids) for t in episodes)
    return found


def _gradient(m: Measured) -> Outcome:
    name = "score_sampled"
    gains = {_label(t): m.mean(_label(t), name) - m.mean(_label(t), f"start/{name}") for t in GRADIENT}
    short = {label: gain for label, gain in gains.items() if not gain >= 0.3}
    said = f"{len(gains) - len(short)} of {len(gains)} rows gain at least 0.3"
    if short:
        said += "; not: " + ", ".join(f"{label} {gain:+.2f}" for label, gain in short.items())
    else:
        least = min(gains, key=lambda label: gains[label])
        said += f"; the least: {least} {gains[least]:+.2f}"
    return Outcome(not short, said)


def _preference(m: Measured) -> Outcome:
    name = "preference_accuracy_last_quarter"
    means = {label: m.mean(label, name) for label in map(_label, PREFERENCE)}
    said = ", ".join(f"{label} {m.text(label, name)}" for label in means)
    return Outcome(all(v >= 0.9 for v in means.values()), said)


def _turns(m: Measured) -> Outcome:
    name = "score_sampled"
    many, one = m.mean("multi-turn", name), m.mean("one-shot", name)
    starts = [m.text(label, f"start/{name}") for label in ("multi-turn", "one-shot")]
    return Outcome(
        many - one >= 0.2,
        f"multi-turn {m.text('multi-turn', name)} (before RL {starts[0]}), one-shot {m.text('one-shot', name)} ({starts[1]})",
    )


def _memory(m: Measured) -> Outcome:
    name = "score_greedy"
    with_, without = m.mean("memory", name), max(m.mean("no-memory", n) for n in (name, "score_sampled"))
    context, episode = (
        max(m.values("memory", "longest_context_tokens")),
        min(m.values("memory", "shortest_episode_tokens")),
    )
    return Outcome(
        with_ >= 0.9 and without <= _CHANCE + 0.1 and context < episode,
        f"with the memory action {m.text('memory', name)}, without {m.text('no-memory', name)} (chance {_CHANCE}); "
        f"contexts of at most {context:.0f} tokens, episodes of at least {episode:.0f}",
    )


PAPER = Paper(
    id="2509.02547",
    claims=(
        Claim(
            text="table run: every implemented policy-gradient row trains the same small model",
            paper="no experiments of its own; the table of 40 algorithms",
            how="pass@1 on held-out numbers, 32 samples each, against that of the warm start",
            must="every row at least 0.3 more than at the start",
            judge=_gradient,
        ),
        Claim(
            text="table run: every preference row learns to tell right from wrong",
            paper="no experiments of its own",
            how="share of pairs in which the chosen answer has the greater margin, last quarter of the steps",
            must="every row at least 0.9",
            judge=_preference,
        ),
        Claim(
            text="an agent of several turns with a tool does better than one answer at once, on the same task",
            paper="no experiments of its own; the difference between a POMDP and one prompt with one response",
            how=f"sums of three numbers, with a calculator in 5 turns at most, or in the head: pass@1 on held-out sums "
            f"after the same GRPO, {tool_sums.SAMPLES} samples each",
            must="at least 20 points more",
            judge=_turns,
        ),
        Claim(
            text="partial observability matters: a task longer than the context is solved with a memory action, and at chance without",
            paper="no experiments of its own; memory as a capability of agents",
            how="recall of one of four pairs that went by in contexts of their own, the same demonstrations and steps: greedy score",
            must="at least 0.9 with the memory action; at most chance + 0.1 without",
            judge=_memory,
        ),
    ),
    arms=_arms,
    measure=_measure,
    scales={
        "laptop": f"tiny-addends, 150 steps, {len(GRADIENT)} policy-gradient and {len(PREFERENCE)} preference rows; sums in several turns and in one; recall with a memory and without",
        "gpu": "SmolLM2-135M-Instruct on reasoning-gym and miniwob, 5 algorithms x 2 environments; one GPU",
        "full": "runs of verl's size on the benchmarks that the survey lists",
    },
)
