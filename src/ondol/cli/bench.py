"""`ondol bench`: how fast a model samples and learns here, beside what the machine can do."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from rich.console import Console

from ondol.cli._common import find_model, load, print_json
from ondol.errors import OndolError
from ondol.view.console import table


def run(args: Namespace) -> int:
    for name in ("prompt", "new", "batch"):
        if getattr(args, name) < (2 if name == "new" else 1):
            raise OndolError(
                f"--{name} {getattr(args, name)}: too small", "for example --prompt 96 --new 32 --batch 64"
            )
    import torch

    from ondol.train.speed import measure

    recipe, path, _ = find_model(args)
    console = Console(stderr=True)
    say = (lambda line: None) if args.json else (lambda line: console.print(f"[dim]{line} ...[/dim]"))
    if args.threads:
        torch.set_num_threads(args.threads)
    loaded = load(recipe, path, say)
    if args.prompt + args.new > loaded.context_length:
        raise OndolError(
            f"{args.prompt} + {args.new} tokens do not fit {loaded.name}'s context of {loaded.context_length}",
            "lower --prompt or --new",
        )
    batches = tuple(sorted({1, min(8, args.batch), args.batch}))
    size = recipe.train.tokens_per_microbatch
    found = measure(loaded, prompt=args.prompt, new=args.new, batches=batches, tokens_per_microbatch=size, say=say)
    if args.json:
        print_json(found)
        return 0
    out = Console()
    rates = found["machine"]
    out.print(
        f"{found['model']}, {found['parameters'] / 1e6:.0f} M parameters, {found['dtype']} on {found['device']}, {found['threads']} threads; "
        f"the machine: {rates['gflops']:.0f} GFLOP/s, {rates['gb_per_s']:.0f} GB/s"
    )
    rows: list[dict[str, Any]] = [
        {
            "work": f"decode, {d['batch']} row{'s' if d['batch'] > 1 else ''}" + ", CUDA graphs" * d["cuda_graphs"],
            "tokens/s": f"{d['tokens_per_s']:.0f}",
            "of the limit": f"{d['roofline_share']:.0%} ({d['limit']})",
        }
        for d in found["decoding"]
    ]
    learn = found["learning"]
    rows.append(
        {
            "work": "learn",
            "tokens/s": f"{learn['tokens_per_s']:.0f}",
            "of the limit": f"{learn['mfu']:.0%} (arithmetic)",
        }
    )
    out.print(table(rows, ["work", "tokens/s", "of the limit"]))
    out.print(
        f"peak memory {found['memory']['peak_mib']:.0f} MiB, of which weights {found['memory']['weights_mib']:.0f}"
    )
    for line in found["advice"]:
        out.print(f"- {line}")
    return 0
