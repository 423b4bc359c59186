"""A real OpenEnv server with a small environment: a number is guessed. `python tests/tasks/openenv_server.py PORT`"""

from __future__ import annotations

import sys
from random import Random
from typing import Any

from openenv.core.env_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State

TRIES = 5


class Guess(Action):
    message: str


class Told(Observation):
    told: str = ""


def secret(seed: int) -> int:
    return Random(seed).randint(1, 20)


class Guessing(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self.number, self.tries = 0, 0

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Told:
        self.number, self.tries = secret(seed or 0), 0
        return Told(told=f"Guess my number, 1 to 20. Its last digit is {self.number % 10}.")

    def step(self, action: Guess, timeout_s: float | None = None, **kwargs: Any) -> Told:
        if not action.message.isdigit():
            raise ValueError(f"not a number: {action.message}")
        self.tries += 1
        guess = int(action.message)
        if guess == self.number:
            return Told(told="Right.", reward=1.0, done=True)
        return Told(told="higher" if guess < self.number else "lower", reward=0.0, done=self.tries == TRIES)

    @property
    def state(self) -> State:
        return State(step_count=self.tries)


if __name__ == "__main__":
    import uvicorn

    app = create_fastapi_app(Guessing, Guess, Told, max_concurrent_envs=64)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", ws="websockets-sansio")
