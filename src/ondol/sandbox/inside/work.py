"""What runs in the processes that are walled in: cells of a notebook, whole programs, shell commands, file commands."""

from __future__ import annotations

import ast
import contextlib
import linecache
import os
import sys
import traceback
from typing import Any

SHOWN_FRAMES = 5
READ_CHARS = 1 << 20


def source(code: str, name: str) -> Any:
    """The parsed code, known to tracebacks by `name`."""
    tree = ast.parse(code, name)
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    return tree


def run_cell(code: str, variables: dict[str, Any], name: str) -> str:
    """Run a cell as a notebook does: the value of a last expression that is not None is printed. Returns the kind."""
    try:
        tree = source(code, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), variables)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval"), variables)
            if value is not None:
                print(repr(value))
        return "ok"
    except BaseException as e:  # SystemExit too: it ends the cell
        return failed(e)


def run_program(code: str) -> int:
    """Run a whole program as `__main__`. Returns its exit code; a traceback goes to stderr."""
    name = "<program>"
    variables = {"__name__": "__main__", "__builtins__": __builtins__}
    try:
        exec(compile(source(code, name), name, "exec"), variables)
        return 0
    except SystemExit as e:
        if e.code is None or isinstance(e.code, int):
            return int(e.code or 0) & 0xFF
        print(e.code, file=sys.stderr)
        return 1
    except BaseException as e:
        failed(e)
        return 1


def failed(error: BaseException) -> str:
    """Print the traceback, of the code's own frames: libraries' paths differ from machine to machine. Returns the kind."""
    memory = isinstance(error, MemoryError)
    try:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if f.filename.startswith(("<cell", "<program"))]
        lines = ["Traceback (most recent call last):\n", *traceback.format_list(own[-SHOWN_FRAMES:])] if own else []
        lines += traceback.format_exception_only(type(error), error)
        sys.stdout.flush()
        sys.stderr.write("".join(lines))
    except BaseException:  # no memory left even for this, or an exception whose text raises
        os.write(2, f"{type(error).__name__}\n".encode())
    return "memory" if memory else "error"


def flush() -> None:
    """What was printed must have left before we say that we are done."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()


def reopen(stdin: bool = True) -> None:
    """Text streams on the descriptors 0, 1 and 2 that cannot fail on odd characters."""
    if stdin:
        sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)  # noqa: SIM115


def seed_random(seed: str) -> None:
    """The usual generators start from the seed, so that the same code draws the same again."""
    import random

    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(random.Random(seed).getrandbits(32))


def shell_program() -> str:
    return "/bin/bash" if os.path.exists("/bin/bash") else "/bin/sh"


# -- files ---------------------------------------------------------------------------------------------------------------


class FileError(Exception):
    """What is wrong with a file command, for the model to read."""


def file_command(command: str, home: str) -> str:
    """Carry out one file command below `home`; the commands are described in the tool. Raises FileError, OSError."""
    first, _, body = command.lstrip().partition("\n")
    verb, _, path = first.strip().partition(" ")
    verb, path = verb.lower(), path.strip() or "."
    place = _inside(home, path)
    if verb == "list":
        return _list(place, home)
    if verb == "read":
        if os.path.exists(place) and not os.path.isfile(place):
            raise FileError(f"{path} is not a file")
        with open(place, encoding="utf-8", errors="replace") as f:
            return f.read(READ_CHARS)
    if verb == "write":
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with open(place, "w", encoding="utf-8", errors="replace") as f:
            f.write(body)
        return f"wrote {len(body)} characters to {path}"
    if verb == "edit":
        old, mark, new = ("\n" + body).partition("\n=======\n")
        old = old[1:]
        if not mark:  # the new text may be empty
            if not body.endswith("\n======="):
                raise FileError("an edit is: the old text, a line of seven '=', the new text")
            old, new = body.removesuffix("\n======="), ""
        with open(place, encoding="utf-8") as f:
            text = f.read()
        if not old or text.count(old) != 1:
            raise FileError(f"the old text is in {path} {text.count(old) if old else 0} times; it must be there once")
        with open(place, "w", encoding="utf-8", errors="replace") as f:
            f.write(text.replace(old, new.removesuffix("\n") if not old.endswith("\n") else new))
        return f"edited {path}"
    if verb == "delete":
        if place == os.path.realpath(home):
            raise FileError("the folder itself stays")
        os.rmdir(place) if os.path.isdir(place) else os.unlink(place)
        return f"deleted {path}"
    raise FileError(f"there is no file command '{verb[:40]}'; known: delete, edit, list, read, write")


def _inside(home: str, path: str) -> str:
    """The real path, which must lie in `home`, whatever links say."""
    if "\0" in path:
        raise FileError("a path has no zero characters")
    base = os.path.realpath(home)
    place = os.path.realpath(os.path.join(base, path))
    if place != base and not place.startswith(base + "/"):
        raise FileError(f"{path} is not in this folder")
    return place


def _list(place: str, home: str) -> str:
    if not os.path.isdir(place):
        raise FileError(f"{os.path.relpath(place, home)} is not a folder")
    lines = []
    with os.scandir(place) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            if entry.name == ".tmp" and place == os.path.realpath(home):
                continue
            if entry.is_dir(follow_symlinks=False):
                lines.append(f"{entry.name}/")
            else:
                lines.append(f"{entry.name}  {entry.stat(follow_symlinks=False).st_size} bytes")
            if len(lines) >= 1000:
                lines.append("...")
                break
    return "\n".join(lines) if lines else "(empty)"
