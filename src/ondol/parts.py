"""Parts and how a recipe finds them.

A *part* is a pydantic model: its fields are its settings, its methods are its work. A recipe names one as
`{name = "grpo", clip_low = 0.1}`; the name is a built-in one, one of an installed package's entry points
(group `ondol.<room>`), or a reference `"package.module:Object"`.
"""

from __future__ import annotations

import importlib
import operator
from importlib.metadata import entry_points
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ondol.errors import OndolError, nearest


class Part(BaseModel):
    """Base of everything a recipe can name. Settings are fixed once made; unknown settings are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


T = TypeVar("T")

#: room -> name -> "module:object". Strings, so that listing the names imports nothing.
BUILT_IN: dict[str, dict[str, str]] = {
    "tools": {
        "browser": "ondol.tools.browser:Browser",
        "calculator": "ondol.tools.calculator:Calculator",
        "cpython": "ondol.tools.cpython:CPython",
        "files": "ondol.tools.files:Files",
        "image": "ondol.tools.image:ImageTool",
        "isolated": "ondol.tools.isolated:Isolated",
        "mcp": "ondol.tools.mcp:McpTools",
        "memory": "ondol.tools.memory:Memory",
        "python": "ondol.tools.python:Python",
        "remote": "ondol.tools.remote:RemoteTools",
        "search": "ondol.tools.search:Search",
        "shell": "ondol.tools.shell:Shell",
        "sql": "ondol.tools.sql:Sql",
        "zoom": "ondol.tools.zoom:Zoom",
    },
    "tasks": {
        "arithmetic": "ondol.tasks.arithmetic:Arithmetic",
        "digits": "ondol.tasks.digits:Digits",
        "gymnasium": "ondol.tasks.gymnasium:Gymnasium",
        "jsonl": "ondol.tasks.jsonl:Jsonl",
        "miniwob": "ondol.tasks.miniwob:Miniwob",
        "openenv": "ondol.tasks.openenv:OpenEnv",
        "reasoning-gym": "ondol.tasks.reasoning_gym:ReasoningGym",
        "recall": "ondol.tasks.recall:Recall",
        "search-qa": "ondol.tasks.search_qa:SearchQuestions",
        "sql": "ondol.tasks.sql:SqlQuestions",
        "textworld": "ondol.tasks.textworld:TextWorld",
        "two-addends": "ondol.tasks.two_addends:TwoAddends",
        "verifiers": "ondol.tasks.verifiers:Verifiers",
        "widgets": "ondol.tasks.widgets:Widgets",
    },
    "verifiers": {
        "exact": "ondol.rewards.exact:Exact",
        "math": "ondol.rewards.math:Math",
        "numeric": "ondol.rewards.numeric:Numeric",
    },
    "scorers": {
        "canonical": "ondol.rewards.scorers:Canonical",
        "embedding": "ondol.rewards.scorers:Embedding",
        "exact": "ondol.rewards.scorers:Exact",
        "model": "ondol.rewards.scorers:PairModel",
        "ngram": "ondol.rewards.scorers:NGram",
        "short-answer": "ondol.rewards.scorers:ShortAnswer",
    },
    "envs": {
        "feedback": "ondol.envs.feedback:FeedbackEnv",
        "game": "ondol.envs.game:GameEnv",
        "miniwob": "ondol.envs.miniwob:MiniwobEnv",
        "moves": "ondol.envs.moves:MovesEnv",
        "program": "ondol.envs.program:ProgramEnv",
        "stream": "ondol.envs.stream:StreamEnv",
        "tool": "ondol.envs.tool:ToolEnv",
        "widgets": "ondol.envs.widgets:WidgetsEnv",
    },
    "methods": {
        "cispo": "ondol.methods.cispo:CISPO",
        "dapo": "ondol.methods.dapo:DAPO",
        "darling": "ondol.methods.darling:Darling",
        "dcpo": "ondol.methods.dcpo:DCPO",
        "dpo": "ondol.methods.dpo:DPO",
        "dr-grpo": "ondol.methods.dr_grpo:DrGRPO",
        "gmpo": "ondol.methods.gmpo:GMPO",
        "grpo": "ondol.methods.grpo:GRPO",
        "grpo-roc": "ondol.methods.grpo_roc:GRPORoC",
        "gspo": "ondol.methods.gspo:GSPO",
        "ipo": "ondol.methods.ipo:IPO",
        "kto": "ondol.methods.kto:KTO",
        "orpo": "ondol.methods.orpo:ORPO",
        "pacs": "ondol.methods.pacs:PACS",
        "pass-at-k": "ondol.methods.pass_at_k:PassAtK",
        "ppo": "ondol.methods.ppo:PPO",
        "reinforce": "ondol.methods.reinforce:REINFORCE",
        "reinforce++": "ondol.methods.reinforce_pp:ReinforcePP",
        "rloo": "ondol.methods.rloo:RLOO",
        "simpletir": "ondol.methods.simpletir:SimpleTIR",
        "simpo": "ondol.methods.simpo:SimPO",
        "ui-tars-ppo": "ondol.methods.ui_tars:UITarsPPO",
        "vapo": "ondol.methods.vapo:VAPO",
    },
}


def names(room: str) -> list[str]:
    """All names a recipe may use in this room: built in, then those of installed packages."""
    return sorted({*BUILT_IN[room], *(e.name for e in entry_points(group=f"ondol.{room}"))})


def find(room: str, name: str) -> Any:
    """The object that `name` stands for in `room`. Raises OndolError with the nearest known name."""
    reference = BUILT_IN[room].get(name)
    if reference is None and ":" in name:
        reference = name
    if reference is None:
        for entry in entry_points(group=f"ondol.{room}"):
            if entry.name == name:
                reference = entry.value
                break
        else:
            raise OndolError(f"no {room.rstrip('s')} is called '{name}'", nearest(name, names(room)))
    module, _, attribute = reference.partition(":")
    try:
        return operator.attrgetter(attribute)(importlib.import_module(module))
    except Exception as e:  # a module may fail in any way while it is imported
        why = str(e) if isinstance(e, (ImportError, AttributeError)) else f"{type(e).__name__}: {e}"
        raise OndolError(
            f"'{reference}' cannot be loaded: {why}", "check that the module is on PYTHONPATH and defines it"
        ) from e


def make(room: str, table: dict[str, Any] | str, where: str = "") -> Any:
    """Build a part from a recipe's table (or bare name). `where` is the key path, for messages."""
    table = {"name": table} if isinstance(table, str) else dict(table)
    name = table.pop("name", None)
    if not isinstance(name, str):
        raise OndolError(f"{where or room}: a table here needs a 'name'", f"known: {', '.join(names(room))}")
    try:
        cls = find(room, name)
    except OndolError as e:
        raise OndolError(f"{where + ': ' if where else ''}{e.what}", e.remedy) from e
    if not (isinstance(cls, type) and issubclass(cls, Part)):
        raise OndolError(
            f"{where + ': ' if where else ''}'{name}' is no part that a recipe can name",
            "name a subclass of ondol.parts.Part",
        )
    try:
        return cls(**table)
    except ValidationError as e:
        raise explain(e, where or name, cls) from e


def explain(error: ValidationError, where: str, model: type[BaseModel]) -> OndolError:
    """A pydantic error in our words: the path of the wrong key, what is wrong, and the nearest right key."""
    lines, remedies = [], []
    for item in error.errors():
        path = ".".join([where, *(str(p) for p in item["loc"])]).strip(".")
        owner: type[BaseModel] | None = model
        for key in item["loc"][:-1]:
            owner = _model_of(owner, key)
        fields = owner.model_fields if owner is not None else {}
        last = str(item["loc"][-1]) if item["loc"] else ""
        if item["type"] == "extra_forbidden":
            lines.append(f"{path}: there is no such key")
            remedies.append(nearest(last, fields))
            continue
        if item["type"] == "missing":
            lines.append(f"{path}: this key is required")
        elif (
            isinstance(item["input"], dict) and item["type"] == "value_error"
        ):  # a whole table: its keys are in the text
            lines.append(f"{path}: {item['msg']}".removeprefix(": ").replace("Value error, ", "", 1))
        else:
            lines.append(f"{path}: {item['msg'].removeprefix('Value error, ')} (got {item['input']!r:.80})")
        if last in fields and fields[last].description:
            remedies.append(f"{path}: {fields[last].description}")
    return OndolError("\n".join(lines), "\n     ".join(dict.fromkeys(remedies)) or None)


def _model_of(owner: type[BaseModel] | None, key: int | str) -> type[BaseModel] | None:
    """The pydantic model that field `key` of `owner` holds, if it holds one, or several in a list."""
    if isinstance(key, int):  # a place in a list whose members were found already
        return owner
    field = owner.model_fields.get(key) if owner is not None else None
    if field is None:
        return None
    for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
