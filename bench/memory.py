"""Peak memory of one learner update over batch, length, micro-batch and vocabulary. Writes bench/results/memory.json and docs/memory.png.

    python bench/memory.py          # about 5 minutes

Each point is a process of its own: its peak resident memory less what it had before the update (with weights, and their gradients and
optimiser state counted apart, since those follow the model). A model of 12 layers of width 256 from scratch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def point(prompts: int, new: int, tokens: int, vocabulary: int) -> None:
    """One measurement, printed."""
    import resource

    import torch
    import transformers as tf

    from ondol.methods.grpo import GRPO
    from ondol.models.fused import fuse
    from ondol.models.memory import keep_memory
    from ondol.recipe import OptimizerSettings
    from ondol.records import Finish, Group, Problem, StopReason, Trajectory, Turn
    from ondol.train.learner import Learner
    from ondol.train.optimizer import Optimizer

    keep_memory()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=vocabulary, hidden_size=256, intermediate_size=768, num_hidden_layers=12, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=8192, tie_word_embeddings=True,
        )
    )  # fmt: skip
    fuse(model)
    groups = []
    for g in range(prompts):
        ids = torch.randint(vocabulary, (64,)).tolist()
        members = []
        for s in range(8):
            tail, off = torch.randint(vocabulary, (new,)).tolist(), [False] * 64
            mask, turn = off + [True] * new, Turn(64, 64 + new, "", Finish.END)
            logp, version = [0.0] * 64 + [-5.0] * new, [-1] * 64 + [0] * new
            members.append(
                Trajectory((0, g, s), Problem(str(g), "", ""), ids + tail, 64, mask, mask, logp, version, [turn], [], StopReason.ANSWERED, 0.0, float(s % 2))
            )  # fmt: skip
        groups.append(Group(members[0].problem, members))
    learner = Learner(model, Optimizer(model, OptimizerSettings(learning_rate=1e-12)), tokens_per_microbatch=tokens)
    before = int(next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x).split()[1]) / 1024
    learner.reinforce(groups, GRPO(kl_coef=0.0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    state = 3 * sum(p.numel() for p in model.parameters()) * 4 / 2**20
    print("RESULT " + json.dumps({"update_mib": peak - before, "of_the_model_mib": state}))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--point", nargs=4, type=int, metavar=("PROMPTS", "NEW", "TOKENS", "VOCABULARY"))
    args = p.parse_args()
    if args.point:
        return point(*args.point)
    plain = {"prompts": 8, "new": 64, "tokens": 1024, "vocabulary": 16384}
    sweeps = {
        "prompts": [2, 4, 8, 16, 32],
        "new": [16, 32, 64, 128],
        "tokens": [600, 1024, 2048, 4096],
        "vocabulary": [4096, 16384, 49152, 98304, 196608],
    }
    found = []
    for axis, values in sweeps.items():
        for value in values:
            at = plain | {axis: value}
            command = [
                sys.executable,
                __file__,
                "--point",
                *(str(at[k]) for k in ("prompts", "new", "tokens", "vocabulary")),
            ]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
            if line is None:
                raise SystemExit(f"{at} failed:\n{done.stderr[-2000:]}")
            row = {"axis": axis, **at, **json.loads(line.removeprefix("RESULT "))}
            row["beside_the_model_mib"] = row["update_mib"] - row["of_the_model_mib"]
            found.append(row)
            print({k: round(v) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results/memory.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, HERE.parent / "docs/memory.png")


def draw(found: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    titles = {
        "prompts": "prompts in the batch (8 samples each)",
        "new": "tokens of a response",
        "tokens": "tokens of a micro-batch",
        "vocabulary": "vocabulary",
    }
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    axes = figure.subplots(1, 4, sharey=True)
    for ax, (axis, title) in zip(axes, titles.items()):
        rows = [r for r in found if r["axis"] == axis]
        ax.plot([r[axis] for r in rows], [r["beside_the_model_mib"] for r in rows], "o-", color="#b5542b")
        ax.set_xscale("log", base=2)
        ax.set_xticks([r[axis] for r in rows], [f"{r[axis]}" for r in rows], fontsize=7, rotation=30)
        ax.set_xlabel(title, fontsize=9)
        ax.grid(alpha=0.3)
    axes[0].set_ylim(bottom=0)  # shared, and so set when all is drawn
    axes[0].set_ylabel("MiB of one update,\nbeside the model's state", fontsize=9)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
