"""transformers' side of work D: `generate` over all requests in one batch, or its continuous batching (`--how continuous`)."""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)
from works import make

p = argparse.ArgumentParser()
p.add_argument("work")
p.add_argument("--model", required=True)
p.add_argument("--how", choices=("batch", "continuous"), default="batch")
p.add_argument("--threads", type=int, default=2)
args = p.parse_args()
torch.set_num_threads(args.threads)
work = make(args.work)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(args.model)
prompts = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in work.prompts]
end, pad = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.pad_token_id


class Lengths(LogitsProcessor):
    """Row i ends with its length-th new token, and not before."""

    def __init__(self, start: int) -> None:
        self.start, self.lengths = start, torch.tensor(work.lengths)

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, end] = -torch.inf
        last = self.lengths == ids.shape[1] - self.start + 1
        scores[last] = -torch.inf
        scores[last, end] = 0.0
        return scores


def batch() -> int:
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(x)) + x for x in prompts])
    mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in prompts])
    config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=max(work.lengths), eos_token_id=end, pad_token_id=pad
    )
    with torch.inference_mode():
        model.generate(
            ids, attention_mask=mask, generation_config=config, logits_processor=LogitsProcessorList([Lengths(width)])
        )
    return sum(work.lengths)


def continuous() -> int:
    config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=max(work.lengths), eos_token_id=-1, pad_token_id=pad
    )
    page = ContinuousBatchingConfig().page_size
    pages = sum(-(-(len(x) + n) // page) for x, n in zip(prompts, work.lengths))  # room for everybody at once
    manager = model.init_continuous_batching(
        generation_config=config,
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=pages + 16, max_batch_tokens=2048),
    )
    manager.start()
    for ids, n in zip(prompts, work.lengths):
        manager.add_request(ids, max_new_tokens=n, eos_token_id=-1)
    made = done = 0
    while done < len(prompts):
        result = manager.get_result(timeout=300)
        if result is None:
            raise SystemExit("continuous batching gave nothing for 300 s")
        if result.error:
            raise SystemExit(f"continuous batching failed: {result.error}")
        if result.is_finished():
            done, made = done + 1, made + len(result.generated_tokens)
    manager.stop(block=True)
    return made


started = time.perf_counter()
new = batch() if args.how == "batch" else continuous()
seconds = time.perf_counter() - started
print("RESULT " + json.dumps({
    "side": f"transformers {args.how}", "work": work.name, "step_s": seconds, "sample_s": seconds, "new_tokens": new,
    "prompt_tokens": sum(map(len, prompts)), "observation_tokens": 0, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
}))  # fmt: skip
