"""TextWorld's text adventures (Côté et al. 2018, arXiv 1806.11532), made from a seed: rooms, things, and a quest."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from random import Random
from typing import Any

from pydantic import Field

from ondol.errors import OndolError
from ondol.records import Problem
from ondol.tasks.games import GameTask, Told

_RULES = (
    "You play a text adventure. Each turn reply with one command and nothing else, such as: look, inventory, go north, "
    "take apple, take apple from chest, drop apple, put apple on table, insert apple into chest, open chest, close chest, "
    "unlock door with key, lock door with key, eat apple, examine apple."
)
_MOST_CHARS = 200  # of a command


class TextWorld(GameTask):
    """Games made by TextWorld's own generator. One is compiled when it is first played, which takes seconds, and kept."""

    rooms: int = Field(default=3, ge=1, le=50, description="rooms of a game")
    things: int = Field(default=5, ge=1, le=100, description="things in it")
    quest_length: int = Field(default=3, ge=1, le=50, description="commands that the quest takes at least")
    folder: Path | None = Field(default=None, description="where games are kept; by default a temporary folder")

    def draw(self, random: Random) -> Problem:
        seed = random.randrange(1_000_000)
        return Problem("", f"adventure {seed} ({self.rooms} rooms, quest of {self.quest_length})", "", {"seed": seed})

    def open(self, problem: Problem) -> _Played:
        path, _ = self._made(problem.data["seed"])
        return _Played(path)

    def gold(self, problem: Problem) -> str:
        """The generator's own walkthrough."""
        return "\n".join(self._made(problem.data["seed"])[1].walkthrough)

    def _made(self, seed: int) -> tuple[str, Any]:
        """A game's file and what it was made from."""
        textworld = _package()
        folder = self.folder or Path(tempfile.gettempdir()) / f"ondol-textworld-{os.getuid()}"
        name = f"r{self.rooms}-t{self.things}-q{self.quest_length}-{seed}"
        path = folder / f"{name}.z8"
        if path.exists() and path.with_suffix(".json").exists():
            return str(path), textworld.Game.load(str(path.with_suffix(".json")))
        options = textworld.GameOptions()
        options.nb_rooms, options.nb_objects, options.quest_length = self.rooms, self.things, self.quest_length
        options.seeds = seed
        with tempfile.TemporaryDirectory() as aside:  # a game that is there is whole
            options.path = str(Path(aside) / f"{name}.z8")
            try:
                made, game = textworld.make(options)
            except Exception as e:  # the generator's and the compiler's, whatever they are
                raise OndolError(
                    f"TextWorld cannot make a game of {self!r}: {e}"[:500], "give it more rooms and things"
                ) from e
            folder.mkdir(parents=True, exist_ok=True)
            for file in (Path(made).with_suffix(".json"), Path(made)):
                part = folder / f"{file.name}.{os.getpid()}.part"
                part.write_bytes(file.read_bytes())
                part.replace(folder / file.name)
        return str(path), game


class _Played:
    rules = _RULES

    def __init__(self, path: str) -> None:
        textworld = _package()
        infos = textworld.EnvInfos(feedback=True, description=True, objective=True, won=True, lost=True)
        self.world = textworld.start(path, infos)
        self.done = False

    def start(self) -> str:
        state = self.world.reset()
        self.done = False
        return _plain(f"{state.objective}\n{state.description}")

    def act(self, said: str) -> Told:
        lines = [line.strip() for line in said.split("\n") if line.strip()]
        command = re.sub(r"[^\x20-\x7e]", "", lines[-1] if lines else "")[:_MOST_CHARS].strip()
        if not command or self.done or command.lower().split()[0] in ("quit", "restart", "restore", "save", "undo"):
            return Told("? one command, such as: look", ok=False)
        state, _, done = self.world.step(command)
        self.done = bool(done)
        won = bool(state.won)
        return Told(_plain(state.feedback), float(won), self.done, float(won))

    def close(self) -> None:
        self.world.close()


def _package() -> Any:
    try:
        import textworld
    except ImportError as e:
        raise OndolError(f"TextWorld cannot be had: {e}", "pip install textworld") from e
    return textworld


def _plain(text: str) -> str:
    """Without blank lines and the prompt."""
    return "\n".join(line.strip() for line in text.split("\n") if line.strip() not in ("", ">"))
