"""A policy that says what it was given: demonstrations of several turns, made in the real environment with its real tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ondol.engines.base import Completion, EngineStats, Request
from ondol.records import Finish


class ScriptEngine:
    """An engine without a model.

    Args:
        renderer: of the model that the texts are meant for.
        scripts: (problem, sample) -> its turns. A turn that ends with one of the request's stop strings ends so; any
            other gets the end-of-turn token. When the environment asks for more turns, that is an error.
    """

    def __init__(self, renderer: Any, scripts: Mapping[tuple[int, int], Sequence[str]]) -> None:
        self.renderer, self.scripts = renderer, scripts
        self.version, self.stats = -1, EngineStats()
        self.asked: dict[str, Request] = {}

    @property
    def busy(self) -> bool:
        return bool(self.asked)

    def submit(self, request: Request) -> None:
        self.asked[request.session] = request

    def step(self) -> list[Completion]:
        asked, self.asked = self.asked, {}
        return [self._turn(request) for request in asked.values()]

    def release(self, session: str) -> None:
        self.asked.pop(session, None)

    def sync(self, version: int) -> None:
        self.version = version

    def _turn(self, request: Request) -> Completion:
        problem, sample, turn = request.seed[-3:]
        texts = self.scripts[problem, sample]
        if turn >= len(texts):
            error = f"a demonstration of {len(texts)} turns is over, and the environment asks for another"
            return Completion(request.session, [], [], [], "", Finish.ERROR, self.version, error)
        text = texts[turn]
        stopped = text.endswith(request.stop) if request.stop else False
        ids = [*self.renderer.codec.text(text), *([] if stopped else [self.renderer.end_id])]
        finish = Finish.STOP if stopped else Finish.END
        return Completion(request.session, ids, [0.0] * len(ids), [], text, finish, self.version)
