"""How fast a model samples and learns on this machine, beside what the machine can do at most.

Rooflines: a matrix product of large square matrices gives the arithmetic rate, a large copy the memory bandwidth; both are measured
here, in the model's own dtype and with the same threads. A decoding step must read every weight once and do two operations a weight
for each row, whichever takes longer; a learning step does six operations a weight for each token (four where weights are frozen are not
told apart: LoRA's share is overstated).
"""

from __future__ import annotations

import random
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from ondol.engines.base import Request, Sampling
from ondol.engines.torch import TorchEngine
from ondol.methods.grpo import GRPO
from ondol.models import forward
from ondol.models.load import LoadedModel
from ondol.recipe import OptimizerSettings
from ondol.records import Finish, Group, Problem, StopReason, Trajectory, Turn
from ondol.train.flex import use_flex
from ondol.train.learner import Learner
from ondol.train.optimizer import Optimizer

_RATE_S = 1.0  # for each rate: a shorter look may meet a moment in which the neighbours of a virtual machine rest


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], Any], device: torch.device, least_s: float = 0.0, least: int = 1) -> float:
    """Median seconds of as many runs as take `least_s`, and at least `least`."""
    times: list[float] = []
    while len(times) < least or sum(times) < least_s:
        _synchronize(device)
        started = time.perf_counter()
        work()
        _synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def machine_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """{"gflops": of a large matrix product, "gb_per_s": of a large copy, read and write counted}."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(1 << (28 if device.type == "cuda" else 26), dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    with torch.inference_mode():
        product = seconds_of(lambda: a @ b, device, _RATE_S, 6)
        copy = seconds_of(lambda: target.copy_(source), device, _RATE_S, 6)
    return {"gflops": 2 * n**3 / product / 1e9, "gb_per_s": 2 * source.numel() * 4 / copy / 1e9}


def sampling(
    loaded: LoadedModel, batch: int, prompt: int, new: int, *, same_prompt: bool = True, cuda_graphs: bool = False
) -> dict[str, Any]:
    """Sample `new` tokens in each of `batch` rows after `prompt` tokens; seconds, tokens per second of decoding alone."""
    r = random.Random(0)
    most = len(loaded.tokenizer) - 1
    prompts = [[r.randint(0, most) for _ in range(prompt)] for _ in range(1 if same_prompt else batch)]
    engine = TorchEngine(
        loaded.model, loaded.tokenizer, loaded.context_length, max_batch=batch, cuda_graphs=cuda_graphs
    )

    def run(length: int) -> list[float]:
        """Seconds of each step; the last `length - 1` decode every row."""
        engine.sync(0)
        for i in range(batch):
            engine.submit(Request(f"{i}", prompts[i % len(prompts)], Sampling(max_tokens=length), (0, i)))
        times = []
        while engine.busy:
            started = time.perf_counter()
            for done in engine.step():
                engine.release(done.session)
            _synchronize(forward.head(loaded.model).device)
            times.append(time.perf_counter() - started)
        return times

    run(new if cuda_graphs else 2)  # they are captured at the first steps of their shape
    times = run(new)
    step = statistics.median(times[-(new - 1) :])  # a step that another process held up does not count
    return {
        "batch": batch,
        "cuda_graphs": cuda_graphs,
        "seconds": sum(times),
        "tokens_per_s": batch / step,
        "step_ms": 1000 * step,
        "prefix_hit_share": engine.stats.prefix_hit_share,
    }


def learning(
    loaded: LoadedModel,
    groups: int,
    samples: int,
    prompt: int,
    new: int,
    tokens_per_microbatch: int,
    share: bool = True,
) -> dict[str, float]:
    """One GRPO update as in the middle of a run: the median of three after two others, in which the optimiser's state is made and memory is touched
    for the first time. The model is changed by a hair."""
    r = random.Random(1)
    most = len(loaded.tokenizer) - 1
    made = []
    for g in range(groups):
        ids = [r.randint(0, most) for _ in range(prompt)]
        members = []
        for s in range(samples):
            tail = [r.randint(0, most) for _ in range(new)]
            off, on = [False] * prompt, [True] * new
            members.append(
                Trajectory(
                    (0, g, s),
                    Problem(str(g), "", ""),
                    ids + tail,
                    prompt,
                    off + on,
                    off + on,
                    [0.0] * prompt + [-5.0] * new,
                    [-1] * prompt + [0] * new,
                    [Turn(prompt, prompt + new, "", Finish.END)],
                    [],
                    StopReason.ANSWERED,
                    0.0,
                    float(s % 2),
                )
            )
        made.append(Group(members[0].problem, members))
    settings = OptimizerSettings(learning_rate=1e-12)
    learner = Learner(
        loaded.model,
        Optimizer(loaded.model, settings),
        tokens_per_microbatch=tokens_per_microbatch,
        share_prompts=share,
    )
    learner.version = -2  # these log-probs are nobody's: nothing is compared
    method = GRPO(kl_coef=0.0)
    for _ in range(2):
        metrics = learner.reinforce(made, method)
    seconds = seconds_of(lambda: learner.reinforce(made, method), forward.head(loaded.model).device, least=3)
    distinct = groups * (prompt + samples * new)
    return {
        "seconds": seconds,
        "computed_tokens": metrics["learner/tokens"],
        "distinct_tokens": distinct,
        "sequence_tokens": groups * samples * (prompt + new),
        "tokens_per_s": distinct / seconds,
        "targets": groups * samples * new,
    }


def measure(
    loaded: LoadedModel,
    *,
    prompt: int = 96,
    new: int = 32,
    batches: tuple[int, ...] = (1, 8, 64),
    groups: int = 4,
    samples: int = 8,
    tokens_per_microbatch: int = 1024,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Everything `ondol bench` shows, as plain data."""
    weight = forward.head(loaded.model)
    device, dtype = weight.device, weight.dtype
    say("the machine")
    # again after each part: a part is held against what was there before and after it
    rates = machine_rates(device, dtype)
    parameters = sum(p.numel() for p in loaded.model.parameters())
    head = weight.numel()
    body = parameters - head  # the head is met by targets only; an embedding of its own is looked up, not multiplied
    if not getattr(forward.causal_lm(loaded.model).config.get_text_config(), "tie_word_embeddings", True):
        body -= head
    bytes_ = (body + head) * weight.element_size()
    decoding = []
    ways = [(batch, graphs) for batch in batches for graphs in ((False, True) if device.type == "cuda" else (False,))]
    for batch, graphs in ways:
        say(f"sampling, batch {batch}" + ", CUDA graphs" * graphs)
        decoding.append(sampling(loaded, batch, prompt, new, cuda_graphs=graphs))
    then = machine_rates(device, dtype)
    for row in decoding:
        read = 1000 * bytes_ / _mean(rates, then, "gb_per_s") / 1e9
        compute = 1000 * 2 * (body + head) * row["batch"] / _mean(rates, then, "gflops") / 1e9
        row["limit"] = "memory" if read > compute else "arithmetic"
        row["roofline_share"] = max(read, compute) / row["step_ms"]
    say("learning")
    learn = learning(loaded, groups, samples, prompt, new, tokens_per_microbatch)
    last = machine_rates(device, dtype)
    flops = 6 * (body * learn["computed_tokens"] + head * learn["targets"])
    learn["mfu"] = flops / learn["seconds"] / _mean(then, last, "gflops") / 1e9
    if device.type == "cuda":
        say("learning, FlexAttention")
        use_flex(loaded.model)
        learn["flex_seconds"] = learning(loaded, groups, samples, prompt, new, tokens_per_microbatch)["seconds"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
    memory = {"peak_mib": peak, "weights_mib": parameters * weight.element_size() / 2**20}
    if device.type == "cuda":
        memory["gpu_peak_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    found = {
        "model": loaded.name,
        "parameters": parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "machine": {name: statistics.mean(r[name] for r in (rates, then, last)) for name in rates},
        "decoding": decoding,
        "learning": learn,
        "memory": memory,
    }
    found["advice"] = advice(found)
    return found


def _mean(a: dict[str, float], b: dict[str, float], name: str) -> float:
    return (a[name] + b[name]) / 2


def advice(found: dict[str, Any]) -> list[str]:
    """What would be faster here, from the figures alone."""
    out = []
    rows = [row for row in found["decoding"] if not row["cuda_graphs"]]
    if len(rows) > 1 and rows[-1]["tokens_per_s"] > 1.3 * rows[-2]["tokens_per_s"]:
        out.append(
            f"more rows at once: {rows[-1]['batch']} rows give {rows[-1]['tokens_per_s'] / rows[-2]['tokens_per_s']:.1f} times the tokens "
            f"of {rows[-2]['batch']} (rollout.max_batch, train.samples_per_prompt)"
        )
    replayed = [row for row in found["decoding"] if row["cuda_graphs"]]
    if replayed and (gain := replayed[-1]["tokens_per_s"] / rows[-1]["tokens_per_s"]) > 1.05:
        out.append(f"CUDA graphs decode {gain:.1f} times as many tokens here: rollout.cuda_graphs")
    learn = found["learning"]
    if (gain := learn["seconds"] / learn.get("flex_seconds", learn["seconds"])) > 1.05:
        out.append(f"FlexAttention learns {gain:.1f} times as fast here: train.flex_attention")
    shared = learn["sequence_tokens"] / learn["computed_tokens"]
    if shared > 1.05:
        out.append(
            f"shared prompts save {1 - 1 / shared:.0%} of the learner's tokens here: keep train.share_prompts on"
        )
    if learn["mfu"] < 0.5:
        out.append(
            f"the learner reaches {learn['mfu']:.0%} of the machine's matrix products: another busy process, or a model too small "
            "for its matrices; a larger train.tokens_per_microbatch may help, if memory allows"
        )
    if found["device"] == "cpu" and found["dtype"] == "float32" and _has_bf16():
        out.append(
            "this CPU multiplies bfloat16: model.dtype=bfloat16 about doubles matrix products, at some precision"
        )
    return out


def _has_bf16() -> bool:
    try:
        with open("/proc/cpuinfo") as f:
            return "avx512_bf16" in (text := f.read()) or "amx_bf16" in text
    except OSError:
        return False
