"""The corpus "archive": people and towns that never were. What is true of them can only be found, not known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from ondol.tools._passage import Passage


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_TRADES = words("""
    apothecary baker beekeeper bellfounder bookbinder brewer cartographer clockmaker cooper dyer engraver falconer
    ferryman gardener glassblower goldsmith lensgrinder locksmith luthier midwife miller organist potter printer saddler
    shipwright stonemason tanner weaver wheelwright
""")
_STARTS = words("Ar Bel Cor Dan El Fen Gor Hal Im Jor Kel Lor Mar Nol Or Pel Quen Ros Sel Tor Ul Ven Wil Yar Zan")
_MIDDLES = words("a e i o u ai ei")
_PERSON_ENDS = words("bin dra lin mos nek rit sa than vik zel")
_FAMILY_ENDS = words("ak enor ost usk")
_TOWN_ENDS = words("berg dale ford haven mere moor stead wick")


@dataclass(frozen=True)
class Person:
    name: str
    trade: str
    town: str
    born: int


@dataclass(frozen=True)
class Archive:
    """Invented people and towns. `founded` is by town."""

    people: tuple[Person, ...]
    founded: dict[str, int]
    passages: tuple[Passage, ...]


@lru_cache(maxsize=1)
def archive() -> Archive:
    """800 people and 80 towns, always the same. A person is known by name, a town by its name; all years are drawn."""
    random = Random("the archive")
    towns = _names(random, 80, _TOWN_ENDS)
    founded = {town: random.randint(1050, 1699) for town in towns}
    first, last = _names(random, 200, _PERSON_ENDS), _names(random, 200, _FAMILY_ENDS)
    names: dict[str, None] = {}
    while len(names) < 800:
        names[f"{random.choice(first)} {random.choice(last)}"] = None
    people = tuple(
        Person(name, random.choice(_TRADES), random.choice(towns), random.randint(1700, 1899)) for name in names
    )
    passages = [_about_town(t, founded[t], random) for t in towns] + [_about_person(p, random) for p in people]
    random.shuffle(passages)
    return Archive(people, founded, tuple(passages))


def _names(random: Random, count: int, ends: Sequence[str]) -> list[str]:
    made: dict[str, None] = {}
    while len(made) < count:
        made[random.choice(_STARTS) + random.choice(_MIDDLES) + random.choice(ends)] = None
    return list(made)


def _about_town(town: str, founded: int, random: Random) -> Passage:
    known = random.choice(
        ("its salt market", "its seven wells", "a bridge of slate", "its orchards", "a crooked tower")
    )
    return Passage(town, f"{town} is a town known for {known}. The town of {town} was founded in the year {founded}.")


def _about_person(p: Person, random: Random) -> Passage:
    habit = random.choice(
        (
            "kept a diary in verse",
            "never travelled by boat",
            "collected snail shells",
            "sang in two choirs",
            "raised geese",
        )
    )
    text = f"{p.name} was a {p.trade} who lived in {p.town}. Born in the year {p.born}, {p.name} {habit}."
    return Passage(p.name, text)
