"""UI-TARS-2 (arXiv 2509.02544), of which this is the reinforcement learning: PPO for agents of many turns.

Arms, on interfaces made at random where success is told at the end only: the full recipe (value pretraining, decoupled
and length-adaptive GAE, a wider upper clip); the same without value pretraining; the same with one lambda of 0.95 for
policy and critic; GRPO. All have the same episodes of RL; those on which values are pretrained come before, and are
counted as well where that is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ondol.compare.arms import Arm, parse_arm
from ondol.compare.comparison import Comparison, outcome
from ondol.compare.statistics import paired
from ondol.errors import OndolError
from ondol.papers.base import Claim, Measured, Outcome, Paper
from ondol.papers.measure import known, last_quarter, mean, series
from ondol.recipe import read_table
from ondol.store import Run

_TOKENS = 200  # of the long episode
_EXPLAINED = "value/explained_variance"


def _arms() -> Sequence[Arm]:
    table = read_table("tiny-widgets")
    own = table["method"]
    critic = ",".join(f"{k}={own[k]}" for k in ("critic_learning_rate", "value_pretraining_steps"))
    texts = (
        "full=ui-tars-ppo",
        "no-pretraining=ui-tars-ppo:value_pretraining_steps=0",
        # PPO's own lambda of 0.95 for both, all else as in the full recipe
        f"one-lambda=ppo:lam=0.95,clip_high=0.28,{critic}",
        "grpo=grpo:kl_coef=0,clip_high=0.28",
    )
    return [parse_arm(text, table) for text in texts]


def _measure(run: Run, arm: str) -> dict[str, float]:
    """Evaluations at the start and the end; the area under the curve of success in training, over the steps of RL and
    over as many steps in all, pretraining counted; how well values foresaw the returns of episodes they had not learned
    from; entropy."""
    rl, before = series(run, "score/mean"), series(run, "score/mean", "value")
    explained = series(run, _EXPLAINED, "value")
    return outcome(run, arm) | known(
        area=mean(rl),
        area_all_episodes=mean([*before, *rl][: len(rl)]),
        score_last_quarter=last_quarter(run, "score/mean"),
        **{"start/explained_variance": explained[0] if explained else None},
        explained_variance=last_quarter(run, _EXPLAINED, "value"),
        explained_variance_first_step=next(iter(series(run, _EXPLAINED)), None),
        explained_variance_last_quarter=last_quarter(run, _EXPLAINED),
        **{"start/entropy": next(iter(series(run, "policy/entropy")), None)},
        entropy_last_quarter=last_quarter(run, "policy/entropy"),
        errors_last_quarter=last_quarter(run, "tools/error_share"),
        turns_last_quarter=last_quarter(run, "rollout/turns"),
    )


def _long_episode(comparison: Comparison, seed: int, folder: Path) -> dict[str, float]:
    """What a critic without knowledge (V = 0) is told of the first token, when a reward of 1 follows the last. Exact."""
    import torch

    from ondol.methods.gae import decoupled_gae

    rewards = torch.zeros(_TOKENS, dtype=torch.float64)
    rewards[-1] = 1.0
    out = {}
    for name, lam in (("start/target_095", 0.95), ("target_1", 1.0)):
        out[name] = float(decoupled_gae(rewards, torch.zeros_like(rewards), lam_critic=lam)[1][0])
    return out


def _entropy(comparison: Comparison, seed: int, folder: Path) -> dict[str, float]:
    """Draws the policy's entropy by step, a line a seed, to `2509.02544-entropy.png`; the full recipe's first and last."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
    ax = figure.subplots()
    found = {}
    for i, arm in enumerate(comparison.arms):
        curves = comparison.curves(arm.label, "policy/entropy")
        for number, (own, points) in enumerate(curves.items()):
            label = arm.label if number == 0 else None
            if points:  # a run whose groups were all equal has none
                ax.plot(*zip(*points, strict=True), color=f"C{i}", lw=1.2, label=label)
            if own == seed:
                found[arm.label] = points
    ax.set_title("entropy of the policy, nats a token", loc="left", fontsize=11)
    ax.set_xlabel("step of RL")
    ax.legend(frameon=False)
    path = folder / "2509.02544-entropy.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as e:
        raise OndolError(f"{path} cannot be written: {e}", "choose another folder, or free space") from e
    points = found.get("full", [])
    return {"start/full": points[0][1], "full": points[-1][1]} if points else {}


def _explained(m: Measured) -> Outcome:
    before, after = m.mean("full", "start/explained_variance"), m.mean("full", "explained_variance")
    return Outcome(
        after >= 0.4 and before <= 0.05,
        f"{m.text('full', 'start/explained_variance')} -> {m.text('full', 'explained_variance')}",
    )


def _targets(m: Measured) -> Outcome:
    short, long = m.mean("long-episode", "start/target_095"), m.mean("long-episode", "target_1")
    return Outcome(short < 0.05 and long >= 0.95, f"{short:.1e} of the reward with 0.95, {long:.3f} with 1")


def _gain(m: Measured) -> Outcome:
    name = "score_sampled"
    gains = {label: m.mean(label, name) - m.mean(label, f"start/{name}") for label in ("full", "grpo")}
    return Outcome(
        gains["full"] >= 0.25,
        f"{m.text('full', f'start/{name}')} -> {m.text('full', name)} (GRPO: {m.text('grpo', name)}); entropy "
        f"{m.text('entropy', 'start/full')} -> {m.text('entropy', 'full')}",
    )


def _better_than(other: str) -> Callable[[Measured], Outcome]:
    def judge(m: Measured) -> Outcome:
        said, held = [], m.mean("full", "area") >= m.mean(other, "area")
        for name, what in (("area", ""), ("area_all_episodes", "; with pretraining counted: ")):
            ours, theirs = (dict(enumerate(m.values(label, name))) for label in ("full", other))
            d = paired(ours, theirs)
            interval = "" if d["low"] is None else f" [{d['low']:+.3f}, {d['high']:+.3f}]"
            noise = "" if d["low"] is None or d["high"] is None or d["low"] * d["high"] > 0 else ", within noise"
            said.append(f"{what}{m.text('full', name)} and {m.text(other, name)}, {d['mean']:+.3f}{interval}{noise}")
        return Outcome(held, "".join(said))

    return judge


PAPER = Paper(
    id="2509.02544",
    claims=(
        Claim(
            text="Value pretraining makes a critic that foresees success",
            paper="values are trained on returns of the SFT policy until loss and explained variance are flat; no number",
            how="explained variance over tokens of episodes that the critic had not learned from: at the start of "
            "pretraining, and over its last quarter",
            must="at most 0.05 at the start, at least 0.4 after",
            judge=_explained,
        ),
        Claim(
            text="With a lambda below 1 the value targets of a long episode forget its reward",
            paper="the reward at the end decays over long sequences, so lambda is 1 for the critic",
            how=f"value target at the first of {_TOKENS} tokens, V = 0, a reward of 1 after the last; exact",
            must="below 0.05 with 0.95; 1 with 1",
            judge=_targets,
        ),
        Claim(
            text="The full recipe learns to operate interfaces from success at the end alone",
            paper="OSWorld 42.5 -> 47.5, 15 web games at 59.8 % of human level; over the whole system",
            how="pass@1 on held-out interfaces, 8 episodes each, against that of the warm start",
            must="rises by at least 25 points",
            judge=_gain,
        ),
        Claim(
            text="Value pretraining gives higher success throughout",
            paper="value-pretrained runs have higher reward throughout (figure, no number)",
            how="mean success over the steps of RL; paired difference over seeds with its 95 % interval",
            must="not below that without pretraining, on the mean of seeds",
            judge=_better_than("no-pretraining"),
        ),
        Claim(
            text="Decoupled, length-adaptive GAE is better than one lambda for policy and critic",
            paper="named as an ingredient, after VAPO; no number",
            how="mean success over the steps of RL; paired difference over seeds with its 95 % interval",
            must="not below that of lambda 0.95 for both, on the mean of seeds",
            judge=_better_than("one-lambda"),
        ),
        Claim(
            text="The data flywheel raises the share of accepted trajectories in every cycle",
            paper="P(V(s) = 1) grows with the cycles",
            how="not run: the flywheel comes with a later issue",
            must="3 cycles, each at least 5 points more",
        ),
        Claim(
            text="Specialists that share their SFT start can be merged by interpolation",
            paper="domain specialists are merged into one model",
            how="not run: merging comes with a later issue",
            must="a half-half merge keeps at least 80 % of each one's gain",
        ),
        Claim(
            text="An asynchronous pool of rollouts is faster than waiting for the slowest",
            paper="fully asynchronous server-based rollouts",
            how="not run: the asynchronous pool comes with a later issue",
            must="at least 1.8 times the throughput, within the bound on staleness",
        ),
        Claim(
            text="The same recipe works on real pages",
            paper="Online-Mind2Web 88.2, OSWorld 47.5, WindowsAgentArena 50.6, AndroidWorld 73.3",
            how="not run: a browser as an environment comes with a later issue",
            must="optional at laptop scale: three click tasks of MiniWoB",
        ),
    ),
    arms=_arms,
    measure=_measure,
    studies={"long-episode": _long_episode, "entropy": _entropy},
    scales={
        "laptop": "tiny-widgets: made-up interfaces in text, 40 steps of 8 interfaces x 8 episodes, 4 arms",
        "gpu": "MiniWoB pages as small images or as text, SmolLM2-135M, PPO for 10 minutes; one GPU",
        "full": "thousands of virtual machines, a mixture-of-experts model with 23B active parameters, and vision",
    },
)
