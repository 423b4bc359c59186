"""How often the passage that answers a question is among the first three that a search for the question finds.

    python results/search.py                          # about two minutes on 2 cores
    python results/search.py --dense-python           # also embeds all of Python's documentation: some minutes more, once

Held-out and training questions of `search-qa`, without any model that answers. Writes results/search.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from pathlib import Path

from ondol.tasks.search_qa import SearchQuestions
from ondol.tools.corpus import load
from ondol.tools.search import Search

HERE = Path(__file__).parent
QUESTIONS = 100


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dense-python", action="store_true")
    args = p.parse_args()
    rows = []
    for corpus in ("archive", "python"):
        for method in ("fts5", "bm25s", "dense"):
            if (corpus, method) == ("python", "dense") and not args.dense_python:
                continue
            task, tool = SearchQuestions(corpus=corpus), Search(corpus=corpus, method=method, results=3)
            started = time.perf_counter()
            tool.find("warm up")
            made = time.perf_counter() - started
            count = min(QUESTIONS, task.size("train"))
            problems = [task.problem(i) for i in range(count)]
            started = time.perf_counter()
            found = sum(any(p.answer in x.text for x in tool.find(p.question)) for p in problems)
            row = {
                "corpus": corpus,
                "passages": len(load(corpus, tool.words)),
                "method": method,
                "questions": count,
                "found_in_3": found / count,
                "index_s": round(made, 2),
                "search_ms": round(1000 * (time.perf_counter() - started) / count, 2),
            }
            rows.append(row)
            print(row, flush=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout.strip()
    out = {
        "command": "python results/search.py" + " --dense-python" * args.dense_python,
        "commit": commit,
        "python": platform.python_version(),
        "rows": rows,
    }
    (HERE / "search.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
