"""Ours beside the peers, on the same work, in turn. Writes bench/results/<machine>.json and bench/results/<machine>.md.

    make bench                                   # everything, about 40 minutes on 2 cores; B and C once, A and D three times
    python bench/run.py --works A --rounds 1     # one work, once; what the files say of the others stays

Each side runs one step in a fresh process (loading is not timed), peer first, then ours on the prompts that the peer really had; rounds
alternate, and ratios are taken of medians. `floor_s` is what the machine's own matrix-product rate allows for the distinct tokens of the
work: 2 N FLOPs a token for sampling and 6 N for learning, each shared prompt once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TARGETS = {"A": 4.0, "B": 2.5, "C": 3.0, "D": 3.0, "D continuous": 1.0, "E": 3.5, "F in A": 1 / 0.6, "F in B": 1 / 0.6}


def side(python: str, script: str, *words: str, threads: int, limit_s: float) -> dict[str, Any]:
    """Run one side; its result, or {"failed": why}."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [python, str(HERE / script), *words, "--threads", str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=limit_s, cwd=HERE)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {limit_s:.0f} s"}
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    return {"failed": " ".join((done.stderr.strip().splitlines() or ["no output"])[-1:])[:300]}


def cpu() -> str:
    """Its name, and its vector unit where that makes another machine of it: virtual ones of one name differ there."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = next(line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name"))
        return f"{name} with AVX-512" if " avx512f " in text else name
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--works", default="A,B,C,D", help="of A, B, C and D; E is measured with A, F with A and B")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--long-rounds", type=int, default=1, help="of B and C, whose sides take minutes each")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--peer-python", default=str(HERE / ".venv/bin/python"), help="an environment with the peers")
    p.add_argument("--limit", type=float, default=1800, help="seconds that one side may take")
    args = p.parse_args()
    if unknown := set(args.works.split(",")) - set("ABCD"):
        p.error(
            f"--works: no work is called {', '.join(sorted(unknown))}; known: A, B, C, D (E is measured with A, F with A and B)"
        )
    from ondol.models.bundled import bundled_path

    model = str(bundled_path())

    def one(python: str, script: str, *words: str) -> dict[str, Any]:
        return side(python, script, *words, threads=args.threads, limit_s=args.limit)

    def machine() -> dict[str, Any]:
        return one(sys.executable, "machine.py")

    rates = [machine()]
    print(f"machine: {rates[0]}", flush=True)
    peer: dict[str, list] = {}
    ours: dict[str, list] = {}
    continuous: list[dict] = []
    for n in range(args.rounds):
        for work in args.works.split(","):
            if work in "BC" and n >= args.long_rounds:
                continue
            common = (work, "--model", model)
            with tempfile.TemporaryDirectory() as folder:
                shared = f"{folder}/peer.json"
                if work == "D":
                    theirs, words = one(args.peer_python, "side_transformers.py", *common), []
                    continuous.append(one(args.peer_python, "side_transformers.py", *common, "--how", "continuous"))
                    print(f"round {n + 1} {work} {continuous[-1]}", flush=True)
                else:
                    theirs = one(args.peer_python, "side_trl.py", *common, "--out", shared)
                    words = ["--peer", shared] if "failed" not in theirs else []
                mine = one(sys.executable, "side_ondol.py", *common, *words)
            print(f"round {n + 1} {work} {theirs}\n          {mine}", flush=True)
            peer.setdefault(work, []).append(theirs)
            ours.setdefault(work, []).append(mine)
            write(rates, ours, peer, continuous, args.threads)  # after each work: nothing is lost when stopped
        rates.append(machine())
        print(write(rates, ours, peer, continuous, args.threads), flush=True)


def write(rates: list[dict], ours: dict, peer: dict, continuous: list, threads: int) -> str:
    """Write the results so far; the table as text. The floor takes the best rate that the machine showed. What the files say of
    works that were not measured now stays, with the command, commit and rates that it was measured with."""
    gflops = [r.get("mm_gflops", 0) for r in rates]
    rows = table(ours, peer, continuous, max(gflops))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout.strip()
    command = re.sub(
        r" --peer-python[ =]\S+", "", "python bench/" + " ".join(["run.py", *sys.argv[1:]])
    )  # a path of this machine
    for row in rows:
        row |= {"commit": commit, "command": command, "gflops": [round(min(gflops)), round(max(gflops))]}
    name = f"{cpu()}-{threads}-threads".lower().replace(" ", "-").replace("(r)", "").replace("@", "")
    out, now = HERE / "results" / f"{name}.json", {row["work"] for row in rows}
    out.parent.mkdir(exist_ok=True)
    if out.exists():
        rows = sorted(
            [r for r in json.loads(out.read_text()) if r["work"] not in now] + rows,
            key=lambda r: [*TARGETS].index(r["work"]),
        )
    out.write_text(json.dumps(rows, indent=1) + "\n")
    raw_file = out.with_suffix(".raw.json")
    raw: dict[str, Any] = json.loads(raw_file.read_text()) if raw_file.exists() else {}
    for work in ours:
        raw[work] = {"command": command, "machine": rates, "ours": ours[work], "peer": peer[work]}
        if work == "D":
            raw[work]["continuous"] = continuous
    raw_file.write_text(json.dumps(raw, indent=1) + "\n")
    text = page(rows)
    out.with_suffix(".md").write_text(text)
    return text


def table(ours: dict, peer: dict, continuous: list, gflops: float) -> list[dict[str, Any]]:
    """Rows of the results file. A side that failed makes a row that says so."""
    rows: list[dict[str, Any]] = []

    def add(work: str, name: str, key: str, mine: list[dict], theirs: list[dict], floor: float | None) -> None:
        mine, good = [m for m in mine if "failed" not in m], [t for t in theirs if "failed" not in t]
        if mine:  # a side that did less work, or more, has failed
            good = [
                t
                for t in good
                if all(t[k] == mine[0][k] for k in ("prompt_tokens", "new_tokens", "observation_tokens"))
            ]
        if not mine or not good:
            rows.append(
                {"work": work, "peer": name, "failed": [t.get("failed", "another number of tokens") for t in theirs]}
            )
            return
        a, b = statistics.median(m[key] for m in mine), statistics.median(t[key] for t in good)
        tokens = {k: mine[0][k] for k in ("prompt_tokens", "new_tokens", "observation_tokens")}
        equal = all(t[k] == v for t in good for k, v in tokens.items())
        unit = "mib" if key == "peak_mib" else "s"
        rows.append(
            {
                "work": work, "peer": name, f"ours_{unit}": round(a, 2), f"peer_{unit}": round(b, 2), "ratio": round(b / a, 2),
                "floor_s": None if floor is None else round(floor, 2), "target": round(TARGETS[work], 2), "tokens": tokens, "tokens_equal": equal,
                "rounds": len(mine), "logp_gap": max((m["logp_gap_to_peer"] or 0.0 for m in mine), default=None) if "logp_gap_to_peer" in mine[0] else None,
            }
        )  # fmt: skip

    for work, mine in ours.items():
        good = [m for m in mine if "failed" not in m]
        sample = learn = None
        if good and gflops:
            flops = good[0]["parameters"] * good[0]["distinct_tokens"] / (gflops * 1e9)
            sample, learn = 2 * flops, 6 * flops
        if work == "D":
            add("D", "transformers generate", "sample_s", mine, peer[work], sample)
            add("D continuous", "transformers continuous batching", "sample_s", mine, continuous, sample)
            continue
        add(work, "TRL GRPOTrainer", "step_s", mine, peer[work], None if sample is None else sample + learn)
        if work == "A":
            add("E", "TRL's loss, backward and update on A's batch", "learn_s", mine, peer[work], learn)
        if work in "AB":
            add(f"F in {work}", "TRL, peak memory", "peak_mib", mine, peer[work], None)
    return rows


def page(rows: list[dict[str, Any]]) -> str:
    lines = [f"On {cpu()}:"]
    for command in dict.fromkeys(r["command"] for r in rows):
        mine = [r for r in rows if r["command"] == command]
        low, high = min(r["gflops"][0] for r in mine), max(r["gflops"][1] for r in mine)
        lines.append(
            f"- {', '.join(r['work'] for r in mine)}: `{command}`, medians of {max((r.get('rounds', 0) for r in mine), default=0)}, "
            f"matrix products at {low} to {high} GFLOP/s."
        )
    lines += ["", "| work | peer | ours | peer | ratio | target | floor |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        if "failed" in r:
            lines.append(f"| {r['work']} | {r['peer']} | | failed: {r['failed'][0]} | | | |")
            continue
        unit = "MiB" if "ours_mib" in r else "s"
        mine, theirs = r.get("ours_s", r.get("ours_mib")), r.get("peer_s", r.get("peer_mib"))
        floor = "" if r["floor_s"] is None else f"{r['floor_s']:.1f} s"
        lines.append(
            f"| {r['work']} | {r['peer']} | {mine:.1f} {unit} | {theirs:.1f} {unit} | {r['ratio']:.2f}x | {r['target']:.2f}x | {floor} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
