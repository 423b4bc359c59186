"""What can be searched: folders, JSONL files, and two collections that are on every machine.

"python" is the documentation that Python brings along. "archive" is invented, people and towns that never were: no model
can know it, so an answer that is right was found.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from ondol.errors import OndolError
from ondol.tools import python_docs
from ondol.tools._passage import Passage
from ondol.tools.archive import archive

BUILT_IN = ("archive", "python")
_SUFFIXES = (".md", ".rst", ".txt")
_MOST_BYTES = 2_000_000  # of a file in a folder
_MOST_FILES = 20_000


@lru_cache(maxsize=8)
def load(corpus: str, words: int) -> tuple[Passage, ...]:
    """All passages of a corpus: a built-in name, a JSONL file or a folder; longer texts in pieces of at most `words` words.

    Raises OndolError for a corpus that is not there, is empty, or has a bad line.
    """
    if corpus == "python":
        found = python_docs.passages()
    elif corpus == "archive":
        found = iter(archive().passages)
    elif Path(corpus).is_dir():
        found = _folder(Path(corpus))
    elif Path(corpus).is_file():
        found = _jsonl(Path(corpus))
    else:
        raise OndolError(
            f"there is no corpus '{corpus}'", f"give a folder, a JSONL file, or one of: {', '.join(BUILT_IN)}"
        )
    passages = tuple(piece for p in found for piece in _pieces(p, words))
    if not passages:
        raise OndolError(
            f"the corpus '{corpus}' holds no text",
            f"a folder's files end in {', '.join(_SUFFIXES)}, lines in JSON have 'text'",
        )
    return passages


def _pieces(passage: Passage, words: int) -> Iterator[Passage]:
    """The passage, cut between its words where it is too long."""
    found = passage.text.split()
    if len(found) <= words:
        if found:
            yield passage
        return
    for number, start in enumerate(range(0, len(found), words), 1):
        yield Passage(f"{passage.title} ({number})", " ".join(found[start : start + words]))


def _folder(folder: Path) -> Iterator[Passage]:
    files = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in _SUFFIXES and p.is_file()]
    if len(files) > _MOST_FILES:
        raise OndolError(f"{folder} holds {len(files)} texts, more than {_MOST_FILES}", "choose a folder inside it")
    for path in files:
        try:
            with path.open("rb") as file:
                text = file.read(_MOST_BYTES).decode("utf-8", "replace")
        except OSError as e:
            raise OndolError(f"{path} cannot be read: {e.strerror}", "make it readable, or move it away") from e
        yield Passage(path.relative_to(folder).as_posix(), text)


def _jsonl(path: Path) -> Iterator[Passage]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as e:
        raise OndolError(f"{path} cannot be read: {e.strerror}", "check the path") from e
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            text, title = row["text"], row.get("title", f"line {number}")
            if not isinstance(text, str) or not isinstance(title, str):
                raise TypeError("'text' and 'title' are not both text")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise OndolError(
                f"{path}:{number}: {type(e).__name__}: {e}", 'each line must be like {"title": "...", "text": "..."}'
            ) from e
        yield Passage(title, text)
