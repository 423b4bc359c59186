"""A task whose scoring does what a judge may do: takes long, waits for others, dies, hangs, fails. Who scored what is written down."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from pydantic import Field

from ondol.errors import OndolError
from toy import Toy


class Judged(Toy):
    """As Toy; but for what a response says to do."""

    calls: bool = Field(default=False)
    log: str = Field(default="", description="folder in which each scoring leaves a file, named by process and number")

    def score(self, problem, response):
        if self.log:
            folder = Path(self.log)
            name = f"{os.getpid()}-{time.monotonic_ns()}"
            (folder / name).write_text(response)
            if response.startswith("together"):  # right only while another is scored as well
                until = time.monotonic() + 20
                while time.monotonic() < until and len(list(folder.iterdir())) < 2:
                    time.sleep(0.01)
                return float(len(list(folder.iterdir())) >= 2)
            if (response.startswith("die once") and len(list(folder.iterdir())) == 1) or response == "die":
                os.kill(os.getpid(), signal.SIGKILL)
        if response == "hang":
            time.sleep(600)
        if response == "refuse":
            raise OndolError("the judge has no key", "give it one")
        if response == "bug":
            raise ZeroDivisionError("of the judge")
        return super().score(problem, response)


def scorers(log) -> set[int]:
    """The processes that have scored."""
    return {int(f.name.split("-")[0]) for f in Path(log).iterdir()}
