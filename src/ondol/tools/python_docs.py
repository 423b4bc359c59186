"""The corpus "python": Python's language topics, and the docstrings of its standard library.

They are read from the source, which is on every machine, without importing it; the same version of Python gives the same
corpus.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ondol.tools._passage import Passage

#: modules of the standard library that are in Python itself
_MODULES = """
abc argparse ast asyncio.tasks asyncio.queues base64 bisect calendar cmd collections colorsys configparser
contextlib copy csv dataclasses datetime decimal difflib dis email.message enum filecmp fileinput fnmatch fractions
functools getpass gettext glob graphlib gzip hashlib heapq hmac html html.parser http.client http.server imaplib
inspect ipaddress json json.decoder json.encoder keyword linecache locale logging logging.handlers lzma mailbox
mimetypes netrc numbers operator optparse os pathlib pdb pickle pickletools platform plistlib poplib posixpath pprint
profile pydoc queue quopri random reprlib rlcompleter sched secrets selectors shelve shlex shutil smtplib socket
socketserver ssl stat statistics string subprocess sysconfig tarfile tempfile textwrap threading timeit tokenize trace
traceback tracemalloc types typing unittest.case unittest.mock urllib.parse urllib.request uuid warnings wave weakref
webbrowser xml.dom.minidom xml.etree.ElementTree xmlrpc.client zipapp zipfile
"""


@dataclass(frozen=True)
class Default:
    """The default value of an argument, as the source has it: `textwrap.wrap`, `width`, `70`."""

    function: str
    argument: str
    value: str


def passages() -> Iterator[Passage]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Passage(f"topic {name}", inspect.cleandoc(topics[name]))
    yield from (passage for passage, _ in _library())


@lru_cache(maxsize=1)
def _library() -> tuple[tuple[Passage, tuple[Default, ...]], ...]:
    return tuple(found for module in _MODULES.split() for found in _documented(module))


def defaults() -> tuple[Default, ...]:
    """Defaults of arguments in the corpus "python" that nobody would guess: no None, True, False, 0, 1, or empty text."""
    return tuple(d for _, found in _library() for d in found)


def _documented(module: str) -> Iterator[tuple[Passage, tuple[Default, ...]]]:
    """A module's docstring, and each public function, class and method that has one."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8", errors="replace"))
    if text := ast.get_docstring(tree):
        yield Passage(f"module {module}", text), ()
    yield from _members(module, tree)


def _members(prefix: str, node: ast.AST) -> Iterator[tuple[Passage, tuple[Default, ...]]]:
    seen = set()
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if child.name.startswith("_") or child.name in seen:
            continue
        seen.add(child.name)
        name, text = f"{prefix}.{child.name}", ast.get_docstring(child)
        if isinstance(child, ast.ClassDef):
            if text:
                yield Passage(name, text), ()
            yield from _members(name, child)
        elif text:
            signature = f"{name}({ast.unparse(child.args)})"
            yield Passage(name, f"{signature}\n{text}"), tuple(_defaults(name, child.args))


def _defaults(function: str, arguments: ast.arguments) -> Iterator[Default]:
    named = [*arguments.posonlyargs, *arguments.args]
    pairs = [*zip(named[len(named) - len(arguments.defaults) :], arguments.defaults)]
    pairs += [(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults) if d is not None]
    for argument, default in pairs:
        if (
            isinstance(default, ast.Constant)
            and type(default.value) in (int, float, str)
            and default.value not in ("", 0, 1)
        ):
            yield Default(function, argument.arg, repr(default.value))
