"""Our side of a work, on the very prompts (and observations) that the peer saw. Prints one JSON line.

`--peer FILE` is what the peer wrote: prompts, completions and log-probs. Prompts and lengths are taken from it, and our log-probs of its
completions are compared with its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import time
from pathlib import Path

import torch
from works import make

from ondol.engines.base import Request, Sampling
from ondol.engines.torch import TorchEngine
from ondol.envs.base import Env, StepResult
from ondol.methods.grpo import GRPO
from ondol.models.load import load_model
from ondol.recipe import OptimizerSettings
from ondol.records import Group, Message, Problem, StopReason, Trajectory, Turn
from ondol.rollout.driver import Plan, rollout
from ondol.train.learner import Learner
from ondol.train.logprobs import log_probs
from ondol.train.optimizer import Optimizer
from ondol.train.packing import Sequence_

p = argparse.ArgumentParser()
p.add_argument("work")
p.add_argument("--model", required=True)
p.add_argument("--peer")
p.add_argument("--threads", type=int, default=2)
args = p.parse_args()
torch.set_num_threads(args.threads)
work = make(args.work)
loaded = load_model(args.model, dtype="float32", device="cpu")
engine = TorchEngine(loaded.model, loaded.tokenizer, loaded.context_length, max_batch=64)
learner = Learner(loaded.model, Optimizer(loaded.model, OptimizerSettings(learning_rate=1e-5)))
peer = json.loads(Path(args.peer).read_text()) if args.peer else None
prompts = [loaded.tokenizer(t, add_special_tokens=False)["input_ids"] for t in work.prompts]
if peer:  # the peer shuffles its samples after generating them
    seen = list(dict.fromkeys(tuple(s["prompt"]) for s in peer))
    if work.tool_turns:
        prompts = [list(ids) for ids in seen]  # its template puts the tools into the prompt
    assert sorted(map(tuple, prompts)) == sorted(seen), "both sides must have the same prompts"


class Fixed:
    """A renderer that gives the peer's ids."""

    end_ids: frozenset[int] = frozenset()

    def __init__(self, observation: list[int]) -> None:
        self.observed = observation

    def prompt(self, messages, tools=()):
        return prompts[int(messages[0].content)]

    def observation(self, messages, ended):
        return self.observed


class Slow(Env):
    """As many tool turns as the work says, each with a tool that takes its time; then the end."""

    def episode(self, task, problem, trajectory_id, renderer, examples=()):
        return SlowEpisode(problem)


class SlowEpisode:
    def __init__(self, problem: Problem) -> None:
        self.problem, self.turns = problem, 0

    async def reset(self):
        return [Message("user", self.problem.question)]

    async def step(self, action, last_turn):
        if self.turns == work.tool_turns:
            return StepResult([], terminated=True)
        self.turns += 1
        await asyncio.sleep(work.tool_s)
        return StepResult([Message("user", work.observation)])

    async def close(self):
        pass


class FixedLength(TorchEngine):
    """Turns end after a length; what is sampled before does not matter to the measurement."""

    def _append(self, row, token, logp, truncated):
        finish = super()._append(row, token, logp, truncated)
        return finish if finish is None or finish.value != "length" else type(finish)("end")


def sample() -> list[Group]:
    if work.tool_turns:
        gaps = [i for i, s in enumerate(peer[0]["sampled"]) if not s] if peer else []
        first = gaps[: next((k for k in range(1, len(gaps)) if gaps[k] != gaps[k - 1] + 1), len(gaps))]
        observed = [peer[0]["completion"][i] for i in first]
        env = Slow(max_turns=work.tool_turns + 1)
        problems = [Problem(str(i), str(i), "") for i in range(len(prompts))]
        sampling = Sampling(max_tokens=work.lengths[0])
        return rollout(
            tooled, Fixed(observed), Plan(None, env, problems, work.samples, sampling, (0,), overlap_tools=True)
        )  # type: ignore[arg-type]
    out = {}
    for i in range(len(prompts) * work.samples):
        engine.submit(Request(f"{i:04d}", prompts[i // work.samples], Sampling(max_tokens=work.lengths[i]), (0, i)))
    while engine.busy:
        for done in engine.step():
            out[int(done.session)] = done
            engine.release(done.session)
    groups = []
    for g, ids in enumerate(prompts):
        made = []
        for s in range(work.samples):
            done, blank = out[g * work.samples + s], len(ids)
            n = len(done.ids)
            made.append(
                Trajectory(
                    (0, g, s), Problem(str(g), "", ""), ids + done.ids, blank, [False] * blank + [True] * n, [False] * blank + [True] * n,
                    [0.0] * blank + done.logp, [-1] * blank + [0] * n, [Turn(blank, blank + n, "", done.finish)], [], StopReason.ANSWERED,
                )
            )  # fmt: skip
        groups.append(Group(made[0].problem, made))
    return groups


tooled = FixedLength(loaded.model, loaded.tokenizer, loaded.context_length, max_batch=64) if work.tool_turns else engine
gap = None
if peer:  # the peer's tokens under our network, before anything changes
    worst = 0.0
    for s in peer[:: max(1, len(peer) // 8)]:
        n, blank = len(s["completion"]), len(s["prompt"])
        t = Trajectory(
            (0, 0, 0),
            Problem("", "", ""),
            s["prompt"] + s["completion"],
            blank,
            [False] * blank + s["sampled"],
            [False] * blank + s["sampled"],
            [0.0] * (blank + n),
            [-1] * (blank + n),
        )
        with torch.no_grad():
            ours = log_probs(loaded.model, learner.pack([Sequence_(t, 0, 0.0, 1.0)])[0])[0]
        theirs = torch.tensor([lp for lp, m in zip(s["logp"], s["sampled"]) if m])
        worst = max(worst, float((ours - theirs).abs().max()))
    gap = worst
started = time.perf_counter()
groups = sample()
sampled_s = time.perf_counter() - started
tooled.sync(0)
for g in groups:
    for i, t in enumerate(g.trajectories):
        t.reward = float(i % 2)
metrics = {} if work.name == "D" else learner.reinforce(groups, GRPO(kl_coef=0.0))
total = time.perf_counter() - started
all_ = [t for g in groups for t in g.trajectories]
print("RESULT " + json.dumps({
    "side": "ondol", "work": work.name, "step_s": total, "sample_s": sampled_s, "learn_s": total - sampled_s,
    "prompt_tokens": sum(t.prompt_length for t in all_), "new_tokens": sum(t.sampled_tokens for t in all_),
    "observation_tokens": sum(len(t.ids) - t.prompt_length - t.sampled_tokens for t in all_),
    "distinct_tokens": sum(g.trajectories[0].prompt_length + sum(len(t.ids) - t.prompt_length for t in g.trajectories) for g in groups),
    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "prefix_hit_share": tooled.stats.prefix_hit_share,
    "mismatch_max_abs": metrics.get("mismatch/max_abs"), "logp_gap_to_peer": gap, "parameters": sum(x.numel() for x in loaded.model.parameters()),
}))  # fmt: skip
