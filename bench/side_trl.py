"""TRL's side: one GRPO step of a work, in its own environment. Prints one JSON line; writes what it did to --out for our side.

Its best fair settings: no gradient checkpointing, fused AdamW, micro-batch 16 x 4 (as large as is fastest here), beta 0, no logging of
completions. Lengths are forced with a logits processor on both ends of a sample, so that token counts are equal by construction.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from works import SYSTEM, make

p = argparse.ArgumentParser()
p.add_argument("work")
p.add_argument("--model", required=True)
p.add_argument("--out", required=True)
p.add_argument("--threads", type=int, default=2)
args = p.parse_args()
torch.set_num_threads(args.threads)
work = make(args.work)
rows = len(work.prompts) * work.samples
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(args.model)
end = tokenizer.convert_tokens_to_ids("<|im_end|>")
seen: dict = {"generate_s": 0.0, "calls": 0}


class Lengths(LogitsProcessor):
    """Row i ends with its length-th new token, and not before."""

    def __init__(self, start: int, lengths: list[int]) -> None:
        self.start, self.lengths = start, torch.tensor(lengths)

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        done = ids.shape[1] - self.start + 1
        scores[:, end] = -torch.inf
        scores[:, tokenizer.pad_token_id] = -torch.inf
        last = self.lengths == done
        scores[last] = -torch.inf
        scores[last, end] = 0.0
        return scores


plain_generate = model.generate


def generate(*a, **k):
    n, width = k["input_ids"].shape
    lengths = list(work.lengths[:n])
    config = k["generation_config"]
    config.max_new_tokens = max(lengths)
    k["logits_processor"] = LogitsProcessorList([Lengths(width, lengths)])
    started = time.perf_counter()
    out = plain_generate(*a, **k)
    seen["generate_s"] += time.perf_counter() - started
    seen["calls"] += 1
    return out


model.generate = generate


def reward(completions, **_):
    return [float(i % 2) for i in range(len(completions))]


class Clock(TrainerCallback):
    def on_step_begin(self, *a, **k):
        seen["begin"] = time.perf_counter()

    def on_step_end(self, *a, **k):
        seen["end"] = time.perf_counter()

    def on_pre_optimizer_step(self, *a, **k):
        seen["optimizer"] = time.perf_counter()


extra = {}
budget = max(work.lengths)
prompts = [{"prompt": t} for t in work.prompts]
if work.tool_turns:
    from importlib.resources import files

    from trl.trainer import grpo_trainer as module

    tokenizer.chat_template = (files("trl") / "chat_templates/qwen2_5.jinja").read_text()

    def look_up(expression: str) -> str:
        """Works out an expression.

        Args:
            expression: what to work out.
        """
        time.sleep(work.tool_s)
        return work.observation

    def parse(tokenizer_, ids, **_):
        call = {"type": "function", "function": {"name": "look_up", "arguments": {"expression": "1"}}}
        return {"role": "assistant", "content": "", "tool_calls": [call]}

    module.parse_response = parse  # the model need not know the format: every turn counts as a call
    extra = {"tools": [look_up]}
    budget = (work.tool_turns + 1) * (max(work.lengths) + 60)
    prompts = [
        {
            "prompt": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": t.split("user\n")[1].split("<|im_end|>")[0]},
            ]
        }
        for t in work.prompts
    ]
config = GRPOConfig(
    output_dir="/tmp/trl-bench",
    per_device_train_batch_size=16 if rows >= 64 else 8,
    gradient_accumulation_steps=4,
    num_generations=work.samples,
    max_completion_length=budget,
    learning_rate=1e-5,
    lr_scheduler_type="constant",
    beta=0.0,
    loss_type="grpo",
    temperature=1.0,
    max_steps=1,
    use_cpu=True,
    bf16=False,
    report_to=[],
    save_strategy="no",
    gradient_checkpointing=False,
    optim="adamw_torch_fused",
    shuffle_dataset=False,
    disable_tqdm=True,
    seed=0,
    **({"max_tool_calling_iterations": work.tool_turns} if work.tool_turns else {}),
)
trainer = GRPOTrainer(
    model=model,
    reward_funcs=reward,
    args=config,
    train_dataset=Dataset.from_list(prompts),
    processing_class=tokenizer,
    callbacks=[Clock()],
    **extra,
)
plain_loss = trainer._compute_loss
batches = []


def compute_loss(m, inputs):
    batches.append(
        {
            k: inputs[k].tolist()
            for k in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
            if k in inputs
        }
        | ({"tool_mask": inputs["tool_mask"].tolist()} if inputs.get("tool_mask") is not None else {})
    )
    return plain_loss(m, inputs)


trainer._compute_loss = compute_loss
plain_logps = trainer._get_per_token_logps_and_entropies
logps = []


def get_logps(*a, **k):
    out = plain_logps(*a, **k)
    logps.append(out[0].detach())
    return out


trainer._get_per_token_logps_and_entropies = get_logps
plain_score = trainer._generate_and_score_completions


def score(*a, **k):
    started = time.perf_counter()
    out = plain_score(*a, **k)
    seen["sample_s"] = time.perf_counter() - started
    return out


trainer._generate_and_score_completions = score
started = time.perf_counter()
trainer.train()
total = seen["end"] - seen["begin"]
sequences = []
for b, lp in zip(batches, logps[-len(batches) :]):
    for i in range(len(b["completion_ids"])):
        prompt_ids = [t for t, m in zip(b["prompt_ids"][i], b["prompt_mask"][i]) if m]
        n = sum(b["completion_mask"][i])
        mask = [bool(x) for x in b.get("tool_mask", b["completion_mask"])[i][:n]]
        sequences.append(
            {
                "prompt": prompt_ids,
                "completion": b["completion_ids"][i][:n],
                "sampled": mask,
                "logp": [round(float(x), 6) for x in lp[i][:n]],
            }
        )
Path(args.out).write_text(json.dumps(sequences))
print(
    "RESULT "
    + json.dumps(
        {
            "side": "trl",
            "work": work.name,
            "step_s": total,
            "sample_s": seen.get("sample_s"),
            "learn_s": total - seen.get("sample_s", 0.0),
            "generate_s": seen["generate_s"],
            "prompt_tokens": sum(len(s["prompt"]) for s in sequences),
            "new_tokens": sum(sum(s["sampled"]) for s in sequences),
            "observation_tokens": sum(len(s["sampled"]) - sum(s["sampled"]) for s in sequences),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
    )
)
