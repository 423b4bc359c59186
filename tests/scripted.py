"""An engine that gives the texts a test wants, and a task and tools for it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any, ClassVar

from pydantic import Field

from ondol.engines.base import Completion, EngineStats, Request
from ondol.errors import OndolError
from ondol.models.tiny import character_tokenizer
from ondol.records import Finish, Problem, ToolResult
from ondol.tasks.base import Task
from ondol.tools.base import Tool

TOKENIZER = character_tokenizer(context=4096)

#: (problem, sample, turn) -> text, where "$" ends the turn; or (text, finish); or None: it never comes back
Script = Callable[[int, int, int], str | tuple[str, Finish] | None]


def encode(text: str) -> list[int]:
    return [TOKENIZER.eos_token_id if c == "$" else TOKENIZER.convert_tokens_to_ids(c) for c in text]


class ScriptedEngine:
    """Answers some of what was asked, in an order of its own, each step. Everything it was told is in `log`."""

    def __init__(
        self, script: Script, *, context: int = 4096, per_step: int = 3, seed: int = 0, truncated: bool = False
    ):
        self.script, self.context, self.per_step, self.truncated = script, context, per_step, truncated
        self.version, self.stats = 4, EngineStats()
        self.random = random.Random(seed)
        self.open: dict[str, Request] = {}
        self.requests: list[Request] = []
        self.released: list[str] = []
        self.steps = 0

    @property
    def busy(self) -> bool:
        return bool(self.open)

    def submit(self, request: Request) -> None:
        if len(request.ids) >= self.context:
            raise OndolError("too long for the context", "shorten it")
        assert request.session not in self.open
        self.open[request.session] = request
        self.requests.append(
            Request(**{**vars(request), "ids": list(request.ids)})  # as it was when it was asked
        )

    def step(self) -> list[Completion]:
        self.steps += 1
        names = sorted(self.open)
        self.random.shuffle(names)
        done = [self._complete(self.open[n]) for n in names[: self.per_step]]
        for completion in filter(None, done):
            del self.open[completion.session]
        return [c for c in done if c is not None]

    def _complete(self, request: Request) -> Completion | None:
        said = self.script(*request.seed[-3:])
        if said is None:
            return None
        if isinstance(said, str):
            stops = [s for s in request.stop if s in said]
            said = (said, Finish.END if said.endswith("$") else Finish.STOP if stops else Finish.LENGTH)
        text, finish = said
        ids = encode(text)
        draw = random.Random(repr(request.seed))
        logp = [-draw.random() for _ in ids]
        cut = [value / 2 for value in logp] if self.truncated else []
        return Completion(request.session, ids, logp, cut, text.removesuffix("$"), finish, self.version, seconds=0.001)

    def release(self, session: str) -> None:
        self.open.pop(session, None)
        self.released.append(session)

    def sync(self, version: int) -> None:
        self.version = version


class Echo(Task):
    """The answer to each question is "yes"."""

    def problem(self, index: int, split: Any = "train") -> Problem:
        return Problem(f"p{index}", f"question {index}", "yes")

    def score(self, problem: Problem, response: str) -> float:
        return float(response == problem.answer)

    def near_misses(self, problem: Problem) -> list[str]:
        return ["no"]


class Probe(Tool):
    """A tool that does what a test's coroutine does: `work(trajectory_id, text)`."""

    name: ClassVar[str] = "probe"
    main_argument: ClassVar[str] = "text"
    parameters: ClassVar[dict[str, Any]] = {"type": "object", "properties": {"text": {"type": "string"}}}

    description: str = "Probes."
    work: Any = None
    closed: list[str] = Field(default_factory=list)

    def session(self, trajectory_id: str) -> _ProbeSession:
        return _ProbeSession(self, trajectory_id)


class _ProbeSession:
    def __init__(self, tool: Probe, trajectory_id: str) -> None:
        self.tool, self.id = tool, trajectory_id

    async def call(self, arguments: dict[str, Any]) -> ToolResult:
        if self.tool.work is None:
            await asyncio.sleep(0)
            return ToolResult(arguments["text"].upper())
        return ToolResult(str(await self.tool.work(self.id, arguments["text"])))

    async def close(self) -> None:
        self.tool.closed.append(self.id)
