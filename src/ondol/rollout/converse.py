"""A conversation of a person with a model and its tools: the rollout loop with the person as the environment."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ondol.engines.base import Completion, Engine, Request, Sampling
from ondol.envs.tool import Toolbox, ToolEnv
from ondol.errors import OndolError
from ondol.records import Finish, Message, StopReason, Turn
from ondol.rollout.driver import STOP_REASONS


@dataclass
class Answer:
    """What came of one question.

    Attributes:
        turns: what the model wrote, its calls and their results; each `start:end` is a stretch of `Conversation.ids`.
        stop_reason: ANSWERED, or why there is no proper answer.
        anew: the conversation no longer fitted the context and was forgotten before this question.
    """

    question: str
    turns: list[Turn] = field(default_factory=list)
    stop_reason: StopReason = StopReason.ERROR
    error: str = ""
    anew: bool = False

    @property
    def text(self) -> str:
        """The last thing the model wrote."""
        return self.turns[-1].text if self.turns else ""


class Conversation:
    """Questions and answers over one growing list of token ids. Close it, or use it in a `with`.

    Args:
        env: tools, system message, and how many turns a question gets (`max_turns`).
        seed: of the random streams; question and turn follow, so the same conversation can be had again.
        watch: called with each turn as soon as it is complete, results of its calls included.
        timeout_s: deadline of one turn.
    """

    _id = "chat"

    def __init__(
        self,
        engine: Engine,
        renderer: Any,
        env: ToolEnv,
        sampling: Sampling,
        seed: int = 0,
        *,
        watch: Callable[[Turn], None] = lambda turn: None,
        timeout_s: float = 600.0,
    ) -> None:
        self.engine, self.renderer, self.env, self.sampling, self.seed = engine, renderer, env, sampling, seed
        self.watch, self.timeout_s = watch, timeout_s
        self.style, self.schemas = env.call_style(renderer), env.schemas(renderer)
        self.context_length: float = getattr(engine, "context_length", math.inf)  # an endpoint's is not known
        self.toolbox = Toolbox(env, renderer, self._id)
        self._runner = asyncio.Runner()  # one event loop for all: sessions of tools live in it
        self._forget()

    def ask(self, question: str) -> Answer:
        """Put a question; up to `env.max_turns` turns, tools included.

        Raises OndolError for a question that no conversation has room for.
        """
        answer = Answer(question)
        message = Message("user", question)
        self._say(message)
        if self.asked and len(self.ids) + self.sampling.max_tokens > self.context_length:
            self.new()
            answer.anew = True
            self._say(message)
        if len(self.ids) >= self.context_length:
            length = len(self.ids)
            self.new()
            raise OndolError(
                f"the question makes a prompt of {length} tokens; the model's context is {self.context_length}",
                "ask a shorter one",
            )
        self.asked += 1
        for turn in range(self.env.max_turns):
            if not self._turn(answer, turn):
                break
        return answer

    def new(self) -> None:
        """Forget everything said, and what the tools remember."""
        self.engine.release(self._id)
        self._runner.run(self.toolbox.close())
        self._forget()

    def close(self) -> None:
        """Free what engine and tools hold."""
        self.engine.release(self._id)
        with self._runner:
            self._runner.run(self.toolbox.close())

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _forget(self) -> None:
        self.ids: list[int] = []
        self.messages: list[Message] = []
        self.ended = False  # the ids end with an end-of-turn token
        self.asked = 0

    def _say(self, message: Message) -> None:
        """Append what the model did not say."""
        if self.messages:
            self.messages.append(message)
            self.ids += self.renderer.observation([message], ended=self.ended)
            return
        system = self.env.system_text(self.renderer)
        self.messages = [*([Message("system", system)] if system else []), message]
        self.ids = self.renderer.prompt(self.messages, self.schemas)

    def _turn(self, answer: Answer, number: int) -> bool:
        """Sample one turn and carry out its calls; whether another one follows."""
        if len(self.ids) >= self.context_length:  # a tool's result took the last room
            answer.stop_reason = StopReason.CONTEXT
            return False
        done = self._sample(number)
        calls = self.style.parse(done.text) if self.style else []
        turn = Turn(len(self.ids), len(self.ids) + len(done.ids), done.text, done.finish, calls)
        self.ids += done.ids
        self.ended = done.finish is Finish.END
        self.messages.append(Message("assistant", done.text, tuple(calls)))
        answer.turns.append(turn)
        goes_on = False
        if done.finish in STOP_REASONS:
            answer.stop_reason, answer.error = STOP_REASONS[done.finish], done.error
        elif not calls:
            answer.stop_reason = StopReason.ANSWERED if done.text.strip() else StopReason.EMPTY
        elif number == self.env.max_turns - 1:
            answer.stop_reason = StopReason.MAX_TURNS
        else:
            turn.results, observation = self._runner.run(self.toolbox.carry_out(calls))
            self._say(observation)
            if any(r.done for r in turn.results):
                answer.stop_reason = StopReason.ENV_DONE
            else:
                goes_on = True
        self.watch(turn)
        return goes_on

    def _sample(self, turn: int) -> Completion:
        self.engine.submit(
            Request(
                session=self._id,
                ids=list(self.ids),
                sampling=self.sampling,
                seed=(self.seed, self.asked, turn),
                stop=self.style.stop if self.style else (),
                end_ids=self.renderer.end_ids,
                messages=list(self.messages),
                timeout_s=self.timeout_s,
            )
        )
        while self.engine.busy:
            for completion in self.engine.step():
                return completion
        raise OndolError("the engine lost a turn", "this is a mistake in the engine")
