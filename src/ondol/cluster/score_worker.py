"""A reward worker's process: python -m ondol.cluster.score_worker TASK, the task's table as JSON; questions as `ondol.sandbox.child` has them."""

from __future__ import annotations

import base64
import json
import pickle
import sys
from typing import Any

from ondol.cluster.scoring import score_with
from ondol.parts import make
from ondol.sandbox.child import end_with_the_parent, serve


def main(table: str) -> None:
    end_with_the_parent()
    score = score_with(make("tasks", json.loads(table), "task"))

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        return score(*pickle.loads(base64.b64decode(question["asked"])))

    serve(answer, fenced=False, memory_bytes=None)  # it is the task's own code: with its tools, files and connections


if __name__ == "__main__":
    main(sys.argv[1])
