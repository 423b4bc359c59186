"""Games of TextWorld (Côté et al. 2018, arXiv 1806.11532): houses made at random, with a quest in them, told and played in English."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from pydantic import Field, model_validator

from ondol.errors import OndolError
from ondol.models.bundled import cache_root
from ondol.records import Problem
from ondol.tasks.games import GameTask, Told

_SEEDS = 65_635  # what TextWorld draws from
_MOST_CHARS = 100  # of a command: the interpreter's line is not much longer
#: what a player may begin a command with. The interpreter knows others, that save files, say.
_VERBS = frozenset(
    [
        "look",
        "examine",
        "inventory",
        "go",
        "north",
        "south",
        "east",
        "west",
        "n",
        "s",
        "e",
        "w",
        "i",
        "l",
        "x",
        "take",
        "put",
        "insert",
        "drop",
        "open",
        "close",
        "lock",
        "unlock",
        "eat",
        "cook",
        "slice",
        "chop",
        "dice",
        "wait",
    ]
)


class TextWorld(GameTask):
    """A game for each seed. Making one takes seconds, once: it is kept in Ondol's cache."""

    rooms: int = Field(default=3, ge=1, le=50, description="rooms of the house")
    objects: int = Field(default=5, ge=1, le=100, description="objects in the house")
    quest: int = Field(default=3, ge=1, le=30, description="actions of a shortest solution, at least")

    @model_validator(mode="after")
    def _there(self) -> TextWorld:
        _package()
        return self

    def draw(self, random: Random) -> Problem | None:
        textworld, seed = _package(), random.randrange(_SEEDS)
        try:
            game, _ = self._made(seed)
        except (
            textworld.generator.chaining.QuestGenerationError,  # no quest fits into this house
            textworld.generator.vtypes.NotEnoughNounsError,  # nor so many things
        ):
            return None
        if not game.walkthrough:
            return None
        return Problem("", f"TextWorld {seed}\n{game.objective}", "\n".join(game.walkthrough), {"seed": seed})

    def open(self, problem: Problem) -> _Played:
        return _Played(self._file(problem.data["seed"]))

    def _made(self, seed: int) -> tuple[Any, Any]:
        """The game and its options, before it is compiled."""
        textworld = _package()
        options = textworld.GameOptions()
        options.nb_rooms, options.nb_objects, options.quest_length = self.rooms, self.objects, self.quest
        options.seeds = seed
        return textworld.generator.make_game(options), options

    def _file(self, seed: int) -> Path:
        textworld = _package()
        name = f"{self.rooms}-{self.objects}-{self.quest}-{seed}"
        folder = cache_root() / "textworld" / textworld.__version__ / name
        if not (folder / "game.z8").exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as made:
                game, options = self._made(seed)
                options.path = str(Path(made) / "new" / "game.z8")
                Path(options.path).parent.mkdir()
                try:
                    textworld.generator.compile_game(game, options)
                    os.rename(Path(options.path).parent, folder)
                except OSError as e:
                    if not (folder / "game.z8").exists():  # else another process was quicker
                        raise OndolError(
                            f"TextWorld's game {name} cannot be made in {folder.parent}: {e}",
                            "check the space and the rights there; ONDOL_CACHE names another folder",
                        ) from e
        return folder / "game.z8"


class _Played:
    rules = (
        "You play a text adventure. Each turn reply with one command and nothing else, such as: look, inventory, go north, open "
        "wooden door, take key, unlock chest with key, put apple on table, insert coin into box, eat apple."
    )

    def __init__(self, path: Path) -> None:
        textworld = _package()
        wanted = textworld.EnvInfos(description=True, objective=True, won=True, lost=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jericho knows no scores of games that were made just now; TextWorld does
            self.world, self.done = textworld.start(str(path), request_infos=wanted), False

    def start(self) -> str:
        state = self.world.reset()
        self.done = False
        return f"{state['objective']}\n\n{_tidy(state['description'])}"

    def act(self, said: str) -> Told:
        lines = said.strip().lower().splitlines() or [""]
        command = re.sub(r"[^a-z0-9' -]", "", lines[-1]).strip()[:_MOST_CHARS]
        if self.done or command.split(" ")[0] not in _VERBS:
            return Told("? a command begins with a verb, such as look, go, take, open", ok=False)
        state, _, done = self.world.step(command)
        self.done = bool(done)
        return Told(_tidy(state["feedback"]), float(bool(state["won"])), self.done, float(bool(state["won"])))

    def close(self) -> None:
        self.world.close()


@lru_cache(maxsize=1)
def _package() -> Any:
    try:
        import textworld
        import textworld.generator
    except ImportError as e:
        raise OndolError(
            f"TextWorld is not installed ({e})", "pip install textworld (docs/worlds.md has a shorter way)"
        ) from e
    return textworld


def _tidy(text: str) -> str:
    """What the interpreter printed, without its prompt, its status line and empty lines in a row."""
    text = re.sub(r"^\s*>.*$", "", text.partition("Would you like to RESTART")[0], flags=re.M)
    text = re.sub(r"^-= (.*?) =-.*$", r"\1", text, flags=re.M)
    return re.sub(r"\n\s*\n+", "\n\n", text).strip()
