"""What this machine can do: matrix products and copies, as torch does them. Prints one JSON line."""

from __future__ import annotations

import argparse
import json
import time

import torch

p = argparse.ArgumentParser()
p.add_argument("--threads", type=int, default=2)
args = p.parse_args()
torch.set_num_threads(args.threads)


def best(f, repeat: int) -> float:
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        f()
        times.append(time.perf_counter() - started)
    return min(times)


n = 2048
a, b = torch.randn(n, n), torch.randn(n, n)
mm = 2 * n**3 / best(lambda: a @ b, 8) / 1e9
x, w = torch.randn(64, 576), torch.randn(1536, 576)
small = 2 * 64 * 576 * 1536 / best(lambda: [torch.nn.functional.linear(x, w) for _ in range(50)], 5) * 50 / 1e9
big = torch.randn(1 << 26)
target = torch.empty_like(big)
copy = 2 * big.numel() * 4 / best(lambda: target.copy_(big), 5) / 1e9
print("RESULT " + json.dumps({"mm_gflops": mm, "linear_64_rows_gflops": small, "copy_gb_s": copy}))
