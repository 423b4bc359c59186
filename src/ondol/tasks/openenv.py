"""Environments behind an OpenEnv server (github.com/meta-pytorch/OpenEnv), played turn by turn; play them with `env.name = "game"`.

The server is reached through OpenEnv's own generic client: actions and observations are JSON objects, and nothing of the
environment's package runs here.
"""

from __future__ import annotations

import contextlib
import json
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from pydantic import Field, model_validator

from ondol.errors import OndolError
from ondol.records import Problem
from ondol.tasks.base import Split, question_id, shuffled, split_of
from ondol.tasks.games import GameTask, Told

_SEEDS = 1_000_000


class OpenEnv(GameTask):
    """Episodes of one server. The score is that of the rewards' sum against `won`.

    With `file`, the problems are its lines, each a JSON object with `reset` (what the server's reset takes) and `actions`
    (replies that win, one a turn): then gold answers and near misses are checked on the server itself, as every task's
    are. Without it they are seeds; there is no gold answer to check, only that a seed always begins the same.
    """

    blocking: ClassVar[bool] = True

    url: str = Field(default="http://127.0.0.1:8000", description="address of the server")
    file: str | None = Field(default=None, description="JSONL of problems; without it they are seeds")
    action: str | None = Field(
        default="message",
        description="field of the action that a reply becomes; null: the reply is a JSON object itself",
    )
    observation: str | None = Field(
        default=None, description="field of the observation that is told; by default all of it, as JSON"
    )
    rules: str = Field(default="", description="system message that says how to play")
    won: float = Field(default=1.0, gt=0, description="an episode whose rewards come to this scores 1, half of it 0.5")
    timeout_s: float = Field(default=60.0, gt=0, description="deadline of each answer of the server")

    @model_validator(mode="after")
    def _readable(self) -> OpenEnv:
        _client_class()
        if self.file is not None:
            _lines(self.file)
        return self

    @property
    def has_gold(self) -> bool:
        return self.file is not None

    def size(self, split: Split) -> int | None:
        return None if self.file is None else len(self._of(split))

    def problem(self, index: int, split: Split = "train") -> Problem:
        if self.file is not None:
            here = self._of(split)
            if not here:
                raise OndolError(f"{self.file} has no problem for the {split} split", "give it more lines")
            return here[shuffled(self.seed, index, len(here))]
        for attempt in range(1000):
            seed = Random(f"{self.seed}/{split}/{index}/{attempt}").randrange(_SEEDS)
            question = f"{self.url} seed {seed}"
            if split_of(question) == split:
                return Problem(question_id(question), question, "", {"reset": {"seed": seed}})
        raise AssertionError("one seed in eight is for testing")

    def _of(self, split: Split) -> list[Problem]:
        return [p for p in _lines(str(self.file)) if split_of(p.question) == split]

    def open(self, problem: Problem) -> _Session:
        return _Session(self, problem.data["reset"])

    def check(self, count: int = 20) -> None:
        if self.has_gold:
            return super().check(count)
        splits: tuple[Split, ...] = ("train", "test")
        for split in splits:
            for index in range(min(count, 3)):  # each costs the server a session
                begun = set()
                for _ in range(2):
                    game = self.open(self.problem(index, split))
                    try:
                        begun.add(game.start())
                    finally:
                        game.close()
                if len(begun) > 1:
                    raise OndolError(
                        f"the server begins {self.problem(index, split).question} in two ways",
                        "an environment that ignores its seed cannot be compared or resumed: give it one that does not",
                    )


class _Session:
    """One episode on the server."""

    def __init__(self, task: OpenEnv, reset: dict[str, Any]) -> None:
        self.task, self.options, self.rules = task, reset, task.rules
        self.total, self.done = 0.0, False
        client = _client_class()(
            base_url=task.url, connect_timeout_s=min(10.0, task.timeout_s), message_timeout_s=task.timeout_s
        )
        self.client = client.sync()

    def start(self) -> str:
        try:
            first = self.client.reset(**self.options)
        except Exception as e:  # of the client: no server, a refusal, a deadline
            raise OndolError(
                f"the OpenEnv server at {self.task.url} does not begin an episode: {_said(e)}",
                "start it, or set task.url; `options` of its reset come from the file's `reset`",
            ) from e
        self.total, self.done = float(first.reward or 0.0), bool(first.done)
        return self._text(first.observation)

    def act(self, said: str) -> Told:
        if self.done:
            return Told("? the episode is over", ok=False)
        action: Any = {self.task.action: said.strip()}
        if self.task.action is None:
            try:
                action = json.loads(said[said.index("{") : said.rindex("}") + 1])
            except ValueError:
                return Told("? reply with one JSON object", ok=False)
        try:
            result = self.client.step(action)
        except RuntimeError as e:  # an action that the environment does not take; the episode goes on
            return Told(f"? {_said(e)}", ok=False)
        except Exception as e:
            raise OndolError(f"the OpenEnv server at {self.task.url} is gone: {_said(e)}", "see its log") from e
        reward = float(result.reward or 0.0)
        self.total, self.done = self.total + reward, bool(result.done)
        score = min(1.0, max(0.0, self.total / self.task.won)) if self.done else 0.0
        return Told(self._text(result.observation), reward=reward, done=self.done, score=score)

    def close(self) -> None:
        with contextlib.suppress(Exception):  # the episode is over either way
            self.client.close()

    def _text(self, observation: Any) -> str:
        if self.task.observation is not None:
            if not isinstance(observation, dict) or self.task.observation not in observation:
                have = ", ".join(observation) if isinstance(observation, dict) else type(observation).__name__
                raise OndolError(f"an observation has no field '{self.task.observation}'", f"it has: {have}")
            observation = observation[self.task.observation]
        if isinstance(observation, str):
            return observation
        if isinstance(observation, dict):
            observation = {k: v for k, v in observation.items() if k not in ("done", "reward", "metadata")}
        return json.dumps(observation, ensure_ascii=False)


def _client_class() -> Any:
    try:
        from openenv.core.generic_client import GenericEnvClient
    except ImportError as e:
        raise OndolError(f"OpenEnv's client is not installed ({e})", "pip install openenv-core") from e
    return GenericEnvClient


def _said(e: Exception) -> str:
    return " ".join(str(e).split())[:300] or type(e).__name__


@lru_cache(maxsize=4)
def _lines(file: str) -> tuple[Problem, ...]:
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise OndolError(f"{file} cannot be read: {e}", "task.file is a JSONL file of problems") from e
    out = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            options, actions = row["reset"], row["actions"]
            fits = isinstance(options, dict) and isinstance(actions, list) and all(isinstance(a, str) for a in actions)
        except (ValueError, KeyError, TypeError):
            fits = False
        if not fits or not actions:
            raise OndolError(
                f"line {number} of {file} is not a problem", '{"reset": {"seed": 1}, "actions": ["a reply", "another"]}'
            )
        question = json.dumps(options, sort_keys=True)
        out.append(Problem(question_id(question), question, "\n".join(actions), {"reset": options}))
    if not out:
        raise OndolError(f"{file} has no problems", "one JSON object a line")
    return tuple(out)
