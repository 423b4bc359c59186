"""Environments of the package verifiers (github.com/PrimeIntellect-ai/verifiers): play them with `env.name = "program"`.

Such an environment asks the model over OpenAI's chat API, carries out its tools and scores the rollout by its own rubric. Nothing of
that is repeated here: it is given the base URL at which the policy answers, and its requests become the turns of a trajectory.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import signal
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from random import Random
from typing import Any

from pydantic import Field, model_validator

from ondol.errors import OndolError
from ondol.records import Problem
from ondol.tasks.base import Split, question_id, shuffled, split_of
from ondol.tasks.programs import Played, ProgramTask


class Verifiers(ProgramTask):
    """The rows of one environment. Score: its rubric's reward against `won`; the reward itself is kept as it is.

    Test problems are those of the environment's evaluation set; where it has none, one row in eight of its training set.
    """

    environment: str = Field(default="", description="the environment's name: that of its installed package")
    args: dict[str, Any] = Field(default_factory=dict, description="arguments of its load_environment")
    gold_response: str | None = Field(
        default=None,
        description="shape of a right response, e.g. '<answer>{answer}</answer>', to check the rubric with the rows' answers "
        "and for warm starts",
    )
    won: float = Field(default=1.0, gt=0, description="a rollout rewarded this much scores 1, half of it 0.5")
    timeout_s: float = Field(default=600.0, gt=0, description="deadline of an episode, its rubric included")

    @model_validator(mode="after")
    def _loadable(self) -> Verifiers:
        if not self.environment:
            raise ValueError("environment is missing: the name of an environment of the package verifiers")
        if self.gold_response is not None and "{answer}" not in self.gold_response:
            raise ValueError("gold_response has no {answer} in it")
        found = self._loaded
        if found.requires_group_rollouts:
            raise ValueError(
                f"{self.environment} scores rollouts by comparing them with the others of their group, which is not "
                "supported: choose an environment whose reward functions take one rollout"
            )
        return self

    @property
    def _loaded(self) -> Any:
        return _load(self.environment, json.dumps(self.args, sort_keys=True))

    def _rows(self, split: Split) -> tuple[Any, Sequence[int]]:
        return _rows(self.environment, json.dumps(self.args, sort_keys=True), split)

    def size(self, split: Split) -> int:
        return len(self._rows(split)[1])

    def problem(self, index: int, split: Split = "train") -> Problem:
        dataset, numbers = self._rows(split)
        if not numbers:
            raise OndolError(
                f"{self.environment} has no row for the {split} split", "see its load_environment's arguments"
            )
        number = numbers[shuffled(self.seed, index, len(numbers))]
        row = dataset[number]
        question, answer = _question(row), row.get("answer")
        return Problem(
            question_id(question), question, answer if isinstance(answer, str) else "", {"split": split, "row": number}
        )

    def play(self, problem: Problem, base_url: str, api_key: str) -> Played:
        from verifiers.clients import OpenAIChatCompletionsClient

        native = _native().with_options(base_url=base_url, api_key=api_key, timeout=self.timeout_s)
        return self._played(problem, OpenAIChatCompletionsClient(native))

    def _played(self, problem: Problem, client: Any) -> Played:
        row = dict(self._rows(problem.data["split"])[0][problem.data["row"]])
        try:
            rollout = asyncio.wait_for(self._loaded.run_rollout(row, client, "policy", {}), self.timeout_s)
            out = asyncio.run_coroutine_threadsafe(rollout, _loop()).result()
        except TimeoutError as e:
            raise OndolError(f"{self.environment} took longer than {self.timeout_s:g} s", "see task.timeout_s") from e
        except Exception as e:  # of the environment's own code
            raise OndolError(f"{self.environment} failed: {type(e).__name__}: {e}") from e
        if error := out.get("error"):
            if error["error"] == "EmptyModelResponseError":  # the policy's own doing: it said nothing
                return Played("", 0.0, 0.0)
            said = " ".join(str(error["error_chain_str"]).split())[:300]
            raise OndolError(f"{self.environment} gave the rollout up: {said}")
        reward = float(out["reward"])
        if not math.isfinite(reward):
            raise OndolError(f"{self.environment} gave the reward {reward}", "its rubric must give finite numbers")
        return Played(_last(out["completion"]), min(1.0, max(0.0, reward / self.won)), reward)

    def score(self, problem: Problem, response: str) -> float:
        """What the environment gives for this response, said at every one of its turns."""
        return self._played(problem, _says(response)).score

    @property
    def has_gold(self) -> bool:
        return self.gold_response is not None

    def gold(self, problem: Problem) -> str:
        return self._response(problem.answer)

    def near_misses(self, problem: Problem) -> list[str]:
        return ["", self._response(""), self._response(problem.answer + "0")]

    def demonstration(self, problem: Problem, random: Random, right: bool) -> str:
        return self.gold(problem) if right else self._response(problem.answer + "0")

    def _response(self, answer: str) -> str:
        if self.gold_response is None:
            raise OndolError(
                f"what a right response to {self.environment} looks like is not known",
                "set task.gold_response, e.g. '<answer>{answer}</answer>'",
            )
        return self.gold_response.replace("{answer}", answer)

    def check(self, count: int = 20) -> None:
        """Gold answers and near misses where `gold_response` tells their shape; else only that the rubric gives a number, and not all for blanks."""
        if self.has_gold:
            return super().check(count)
        splits: tuple[Split, ...] = ("train", "test")
        for split in splits:
            for index in range(min(count, self.size(split))):
                problem = self.problem(index, split)
                if self.score(problem, " ") >= 1.0:
                    raise OndolError(
                        f"{split} problem {index} ({problem.question!r:.200}) is won by saying nothing but spaces",
                        "raise task.won, or fix the rubric",
                    )


def _question(row: dict[str, Any]) -> str:
    """The text that the row ends its prompt with."""
    prompt = row["prompt"]
    content = prompt if isinstance(prompt, str) else prompt[-1].get("content") if prompt else ""
    if isinstance(content, list):
        content = "\n".join(str(part.get("text") or "") for part in content)
    return str(content or "")


def _last(completion: Any) -> str:
    """The text that a rollout ended with."""
    if isinstance(completion, list):
        completion = completion[-1].get("content") if completion else ""
    return completion if isinstance(completion, str) else ""


def _says(text: str) -> Any:
    """A client whose model always answers `text`."""
    from openai.types.chat import ChatCompletion
    from verifiers.clients import OpenAIChatCompletionsClient

    class Says(OpenAIChatCompletionsClient):
        async def get_native_response(self, *_: Any, **__: Any) -> ChatCompletion:
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            return ChatCompletion.model_validate(
                {"id": "said", "object": "chat.completion", "created": 0, "model": "said", "choices": [choice]}
            )

    return Says(_native())


@lru_cache(maxsize=1)
def _native() -> Any:
    """OpenAI's client, made once, as that takes a while; each episode has its own address."""
    from openai import AsyncOpenAI

    return AsyncOpenAI(base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0)


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """An environment takes SIGINT and SIGTERM when it is made; they are ours."""
    taken = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(s) for s in taken]
    try:
        yield
    finally:
        for number, handler in zip(taken, before, strict=True):
            if signal.getsignal(number) is not handler and handler is not None:
                signal.signal(number, handler)


@lru_cache(maxsize=8)
def _load(environment: str, args: str) -> Any:
    try:
        import datasets
        import verifiers
        from verifiers.envs.environment import Environment
    except ImportError as e:
        raise ValueError(
            f"the classic environments of verifiers are not installed ({e}): pip install 'verifiers>=0.1.14,<0.4'"
        ) from e
    logging.getLogger("verifiers").setLevel(logging.CRITICAL)  # what fails is in its trajectory
    datasets.disable_progress_bars()
    try:
        with _own_signals():
            found = verifiers.load_environment(environment, **json.loads(args))
    except Exception as e:  # of the environment's own code
        raise ValueError(f"the environment '{environment}' cannot be loaded: {e}") from e
    if not isinstance(found, Environment):
        raise ValueError(f"'{environment}' is {type(found).__name__}, not a classic environment of verifiers")
    return found


@lru_cache(maxsize=16)
def _rows(environment: str, args: str, split: Split) -> tuple[Any, Sequence[int]]:
    """The environment's rows, and the numbers of those that belong to the split."""
    found = _load(environment, args)
    has_eval = found.build_eval_dataset() is not None
    if split == "test" and has_eval:
        rows = found.get_eval_dataset()
        return rows, range(len(rows))
    if found.build_dataset() is None:
        return [], []
    rows = found.get_dataset()
    if has_eval:
        return rows, range(len(rows))
    return rows, [i for i, row in enumerate(rows) if split_of(_question(row)) == split]


@lru_cache(maxsize=1)
def _loop() -> asyncio.AbstractEventLoop:
    """The one loop on which environments run: what they hold belongs to it."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="ondol-verifiers", daemon=True).start()
    return loop
