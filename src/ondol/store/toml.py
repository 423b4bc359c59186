"""Write a recipe as TOML. Python reads TOML (`tomllib`) but does not write it; what is written reads back equal."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ondol.errors import OndolError

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_SHORT = {"\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r", '"': '\\"', "\\": "\\\\"}


def dump_toml(data: Mapping[str, Any]) -> str:
    """TOML text of nested dicts, lists, strings, numbers and booleans.

    Raises:
        OndolError: a value TOML has no form for (None above all), with its key path.
    """
    lines: list[str] = []
    _table(data, (), lines)
    return "\n".join(lines).strip("\n") + "\n" if lines else ""


def _table(data: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    """A table's own values first: after a sub-table's header they would belong to that one."""
    tables = {k: v for k, v in data.items() if isinstance(v, Mapping)}
    values = {k: v for k, v in data.items() if k not in tables}
    if path and (values or not tables):
        lines += ["", f"[{'.'.join(_key(k, path) for k in path)}]"]
    for key, value in values.items():
        where = (*path, key)
        text = f"{_key(key, where)} = {_value(value, where)}"
        if isinstance(value, list | tuple) and len(text) > 100:
            items = "".join(f"    {_value(v, (*where, str(i)))},\n" for i, v in enumerate(value))
            text = f"{_key(key, where)} = [\n{items}]"
        lines.append(text)
    for key, value in tables.items():
        _table(value, (*path, key), lines)


def _key(key: str, where: tuple[str, ...]) -> str:
    if not isinstance(key, str):
        raise OndolError(f"{'.'.join(map(str, where))}: a TOML key is a string, not {key!r}")
    return key if _BARE.fullmatch(key) else f'"{_escape(key, where)}"'


def _value(value: Any, where: tuple[str, ...]) -> str:
    if isinstance(value, bool):  # before int: a bool is one
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(str(value), where)
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return repr(float(value)) if math.isfinite(value) else str(float(value))
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(v, (*where, str(i))) for i, v in enumerate(value)) + "]"
    if isinstance(value, Mapping):
        items = (f"{_key(k, (*where, k))} = {_value(v, (*where, k))}" for k, v in value.items())
        return "{" + ", ".join(items) + "}"
    remedy = "leave the key out where there is nothing to say" if value is None else None
    raise OndolError(f"{'.'.join(where)}: TOML has no form for {type(value).__name__} ({value!r:.60})", remedy)


def _string(text: str, where: tuple[str, ...]) -> str:
    if "\n" not in text:
        return f'"{_escape(text, where)}"'
    # Prompts read better over several lines. The newline after the opening quotes is not part of the string.
    lines = "\n".join(_escape(line, where) for line in text.split("\n"))
    return f'"""\n{lines}"""'


def _escape(text: str, where: tuple[str, ...]) -> str:
    out = []
    for char in text:
        code = ord(char)
        if 0xD800 <= code < 0xE000:
            raise OndolError(f"{'.'.join(map(str, where))}: half a character (U+{code:04X}) cannot be written")
        out.append(_SHORT.get(char) or (f"\\u{code:04X}" if code < 0x20 or code == 0x7F else char))
    return "".join(out)
