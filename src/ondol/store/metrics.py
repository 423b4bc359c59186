"""Every number that a run records: its name, unit, which way is better, and what it means.

A name ending in "*" is a family: "stop/*" stands for "stop/answered", "stop/timeout" and so on.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from ondol.errors import OndolError, nearest


@dataclass(frozen=True)
class Metric:
    """One recorded quantity. `unit` is "" for plain numbers, "share" for fractions in [0, 1]."""

    name: str
    unit: str
    direction: Literal["up", "down", "none"]
    help: str


METRICS: dict[str, Metric] = {}


def register(metric: Metric) -> Metric:
    """Add a metric. The same one twice is fine; a different one under a known name is refused."""
    known = METRICS.get(metric.name)
    if known is not None and known != metric:
        raise OndolError(f"the metric '{metric.name}' is registered already, as: {known.help}", "choose another name")
    METRICS[metric.name] = metric
    return metric


def metric(name: str) -> Metric:
    """What `name` means; a member of a family gets the family's entry under its own name.

    Raises:
        OndolError: unknown name; the remedy lists the nearest ones.
    """
    if name in METRICS and not name.endswith("*"):
        return METRICS[name]
    for family in METRICS.values():
        stem = family.name[:-1]
        if family.name.endswith("*") and name.startswith(stem) and name != stem and not name.endswith("*"):
            return dataclasses.replace(family, name=name)
    raise OndolError(f"no metric is called '{name}'", nearest(name, METRICS) + "; or register(Metric(...)) your own")


for _entry in (
    Metric("score/mean", "share", "up", "mean task success of the step's trajectories"),
    Metric("reward/mean", "", "up", "mean reward, what the method learns from"),
    Metric("reward/std", "", "none", "standard deviation of the step's rewards"),
    Metric("eval/score_greedy", "share", "up", "mean score on held-out problems, most likely token each time"),
    Metric("eval/score_sampled", "share", "up", "mean score on held-out problems, sampled at the run's temperature"),
    Metric("eval/score_no_tool", "share", "up", "mean score on held-out problems without any tool, greedy"),
    Metric("eval/error_*", "share", "down", "standard error of the score of the same name, over problems"),
    Metric("eval/pass@*", "share", "up", "chance that one of so many sampled answers is right, unbiased, held out"),
    Metric("eval/distinct_right", "", "up", "mean kinds of right answers among the samples of a held-out problem"),
    Metric("stop/*", "share", "none", "share of trajectories that ended for this reason"),
    Metric("tools/calls_per_trajectory", "calls", "none", "mean tool calls of a trajectory"),
    Metric("tools/error_share", "share", "down", "share of tool calls that failed, whatever the kind"),
    Metric("rollout/tokens_per_s", "tokens/s", "up", "sampled tokens by second of rollout"),
    Metric(
        "rollout/seconds",
        "s",
        "down",
        "wall time of the step's rollouts; of those begun before it, what was still waited for",
    ),
    Metric(
        "rollout/staleness",
        "updates",
        "none",
        "mean number of updates since the weights that sampled a trajectory's oldest token",
    ),
    Metric("rollout/switched_share", "share", "none", "trajectories that more than one version of the weights sampled"),
    Metric("off_policy/stale_share", "share", "none", "trained tokens that older weights sampled"),
    Metric("off_policy/weight", "", "none", "mean weight of those, present weights over those that sampled, capped"),
    Metric("off_policy/capped_share", "share", "down", "how many of those weights were capped"),
    Metric(
        "off_policy/kl",
        "nats",
        "none",
        "k1 estimate of the divergence of the weights that sampled from the present ones",
    ),
    Metric("rollout/sampled_tokens", "tokens", "none", "tokens the policy sampled in this step"),
    Metric("rollout/turns", "turns", "none", "mean sampled turns of a trajectory"),
    Metric("rollout/response_tokens", "tokens", "none", "mean sampled tokens of a trajectory"),
    Metric("learner/tokens_per_s", "tokens/s", "up", "tokens through the learner by second"),
    Metric("learner/waited_seconds", "s", "down", "how long the learner waited for the step's rollouts"),
    Metric("learner/seconds", "s", "down", "wall time of the step's learning"),
    Metric("learner/tokens", "tokens", "none", "tokens that went through the learner, context included"),
    Metric("loss/policy", "", "none", "policy loss; its size says little, its jumps do"),
    Metric("loss/kl", "", "none", "penalty for moving away from the reference model, as added to the loss"),
    Metric("loss/sft", "nats", "down", "mean negative log-likelihood of the trained tokens"),
    Metric("policy/entropy", "nats", "none", "mean entropy of the policy at sampled tokens"),
    Metric("policy/clip_share", "share", "none", "share of trained tokens whose ratio was clipped"),
    Metric("policy/kl_k3", "nats", "none", "k3 estimate of the divergence from the reference, where a method has one"),
    Metric("policy/kl_old_k3", "nats", "none", "k3 estimate of the divergence from the policy that sampled"),
    Metric("policy/ratio_max", "", "none", "largest probability ratio of a trained token, new over sampling policy"),
    Metric("gradient/norm", "", "none", "norm of the whole gradient before clipping"),
    Metric("policy/*", "", "none", "reported by the method's loss, a mean over trained tokens"),
    Metric("preference/*", "", "none", "reported by the loss of a preference method, a mean over trained tokens"),
    Metric("method/*", "", "none", "the method's own, a mean over trained tokens"),
    Metric("gradient/norm_max", "", "none", "largest gradient norm of the step's updates, before clipping"),
    Metric("updates/skipped", "updates", "down", "updates that were left out, no response counting in them"),
    Metric("mismatch/max_abs", "nats", "down", "largest |learner - sampling| log-probability with equal weights"),
    Metric("mismatch/mean_abs", "nats", "down", "mean |learner - sampling| log-probability with equal weights"),
    Metric("groups/zero_advantage_share", "share", "down", "share of groups whose rewards are all equal: no signal"),
    Metric("groups/kept", "groups", "up", "groups left after the filters"),
    Metric("groups/resampled", "groups", "none", "groups sampled anew because the filters had left too few"),
    Metric("groups/counted_share", "share", "up", "share of the kept responses that count in the loss"),
    Metric("groups/response_utilisation", "share", "up", "share of sampled responses that have an advantage and count"),
    Metric("reward/shaped", "", "up", "mean reward as the method sees it"),
    Metric("value/*", "", "none", "reported by the critic's loss"),
    Metric("value/loss", "", "down", "the critic's loss, a mean over trained tokens"),
    Metric("value/explained_variance", "share", "up", "share of the returns' variance that the critic foresaw"),
    Metric("value/gradient_norm", "", "none", "norm of the critic's gradient before clipping"),
    Metric("pacs/*", "", "none", "reported by PACS's loss, a mean over trained tokens"),
    Metric("diversity/*", "", "none", "how different a group's answers are, by the method's scorer"),
    Metric("turns/*", "", "none", "reported by the method about the turns of the step's trajectories"),
    Metric("rollout/void_share", "share", "down", "share of turns with neither a tool call nor an answer"),
    Metric("tools/error_share_in_positives", "share", "down", "share of failed tool calls inside right trajectories"),
    Metric(
        "tools/error_share_right",
        "share",
        "down",
        "the same among right trajectories, failures of the sandbox left out",
    ),
    Metric("answers/distinct_right", "", "up", "mean kinds of right answers among the samples of a problem"),
    Metric("answers/pass@*", "share", "up", "chance that one of so many samples of a problem is right, unbiased"),
    Metric("warm_start/accepted_share", "share", "up", "share of sampled traces good enough to imitate"),
    Metric("warm_start/traces", "traces", "up", "traces in the imitation set"),
    Metric("learning_rate", "", "none", "learning rate of the optimiser step"),
    Metric("step/seconds", "s", "down", "wall time of the whole step"),
    Metric("engine/prefix_hit_share", "share", "up", "share of prompt tokens served from the engine's prefix cache"),
    Metric("memory/peak_mib", "MiB", "down", "peak memory of the process (of the device, on one)"),
):
    register(_entry)
