"""The pieces of work that both sides do. Pure data: prompts as text, new tokens of each sample, tool latency."""

from __future__ import annotations

import random
from dataclasses import dataclass

SYSTEM = (
    "You can run Python: write code between <python> and </python>. What it prints comes back between <result> and </result>. "
    "Then answer with the number. Work step by step, and write no more than is needed."
)


@dataclass(frozen=True)
class Work:
    """`lengths[i]` new tokens for sample i (in each turn); samples of one prompt stand together."""

    name: str
    title: str
    prompts: tuple[str, ...]
    samples: int
    lengths: tuple[int, ...]
    tool_turns: int = 0
    tool_s: float = 0.0
    observation: str = ""


def prompt(question: str) -> str:
    """As the bundled model's chat template renders it."""
    return f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def question(r: random.Random) -> str:
    return f"What is {r.randint(12, 98)} * {r.randint(12, 98)} + {r.randint(12, 98)}? Show the sum that you work out, then the result."


def make(name: str) -> Work:
    """Work "A", "B", "C" or "D"."""
    r = random.Random(name)
    if name == "A":
        prompts = tuple(prompt(question(r)) for _ in range(8))
        return Work("A", "GRPO step, single turn: 8 prompts x 8 samples, 28 new tokens", prompts, 8, (28,) * 64)
    if name == "B":
        prompts = tuple(prompt(question(r)) for _ in range(4))
        lengths = [r.randint(16, 256) for _ in range(31)] + [256]
        r.shuffle(lengths)
        return Work(
            "B", "GRPO step, long answers: 4 prompts x 8 samples, up to 256 new tokens", prompts, 8, tuple(lengths)
        )
    if name == "C":
        prompts = tuple(prompt(question(r)) for _ in range(8))
        text = "The interpreter gave 3601 after 0.2 s."
        return Work(
            "C", "GRPO step with tools: as A, 3 tool turns, each call takes 0.2 s", prompts, 8, (28,) * 64, 3, 0.2, text
        )
    if name == "D":
        own = [prompt(" ".join(question(r) for _ in range(r.randint(1, 4)))) for _ in range(32)]
        shared = [prompt(question(r)) for _ in range(4)]
        prompts = tuple(own + [shared[i // 8] for i in range(32)])
        return Work(
            "D",
            "sampling: 64 requests of mixed length, half of them sharing prompts",
            prompts,
            1,
            tuple(r.randint(8, 96) for _ in prompts),
        )
    raise ValueError(f"no work is called {name}")
