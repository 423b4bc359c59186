"""`ondol chat`: talk to a model, with its tools."""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.text import Text

from ondol.cli._common import find_model, load, print_json
from ondol.envs.tool import ToolEnv
from ondol.errors import OndolError
from ondol.records import StopReason, ToolResult, Turn
from ondol.rollout.converse import Answer, Conversation
from ondol.view.trajectory import CALL, DIM, SAMPLED, fold, safe_text

_HELP = "/new forgets the conversation, /quit (or Ctrl-D) leaves"
_NOTES = {
    StopReason.EMPTY: "the model ended its turn without a word",
    StopReason.MAX_TURNS: "its last turn was a call, which was not carried out; --set env.max_turns=... allows more",
    StopReason.CONTEXT: "the model's context is full; the next question begins anew",
    StopReason.TIMEOUT: "its time ran out",
    StopReason.ERROR: "failed",
}


def run(args: Namespace) -> int:
    if not (math.isfinite(args.temperature) and args.temperature >= 0):
        raise OndolError(f"--temperature {args.temperature:g}: not a temperature", "0 is greedy; 1 is the model itself")
    if args.seed < 0:
        raise OndolError(f"--seed {args.seed}: a seed is not negative", "for example --seed 1")
    if not all(q.strip() for q in args.ask):
        raise OndolError("--ask: there is no question", 'for example --ask "What is 47 * 76 + 29?"')
    recipe, path, folder = find_model(args)
    if not isinstance(recipe.env, ToolEnv):
        raise OndolError(
            f"the recipe's environment, {type(recipe.env).__name__}, is not a conversation", "chat needs the env 'tool'"
        )
    console = Console(stderr=args.json, highlight=False, soft_wrap=True)
    name = f"{folder.name}, trained" if folder else f"{recipe.model.path}, as it is before any training"
    console.print(Text(f"talking to {name}", DIM))
    loaded = load(recipe, path, lambda line: console.print(Text(line, DIM)))

    from ondol.train.plans import make_engine

    sampling = recipe.sampling.model_copy(update={"temperature": args.temperature})
    limit = f"cut at {sampling.max_tokens} tokens; --set sampling.max_tokens=... allows more"
    by_hand = not args.ask and sys.stdin is not None and sys.stdin.isatty()
    lines = args.ask or (_typed(console) if by_hand else _piped())
    answers: list[Answer] = []
    status = 0
    with Conversation(
        make_engine(recipe, loaded),
        loaded.renderer,
        recipe.env,
        sampling,
        args.seed,
        watch=lambda turn: _show(console, turn),
        timeout_s=recipe.rollout.timeout_s,
    ) as conversation:
        try:
            for answer in _answers(conversation, lines, console, by_hand):
                answers.append(answer)
                if note := {**_NOTES, StopReason.TURN_LENGTH: limit}.get(answer.stop_reason):
                    console.print(Text(f"({note}{': ' if answer.error else ''}{safe_text(answer.error)})", "yellow"))
        except KeyboardInterrupt:
            console.print()
            status = 130
    if args.json:
        print_json({"model": path, "answers": [_plain(a) for a in answers]})
    return status


def _answers(conversation: Conversation, lines: Iterable[str], console: Console, by_hand: bool) -> Iterator[Answer]:
    """Put each line to the model; commands are carried out. What is not typed here is shown."""
    for line in lines:
        word = line.strip()
        if word == "/quit":
            return
        if word == "/new":
            conversation.new()
            console.print(Text("a new conversation", DIM))
        elif word.startswith("/") and word[1:].isalpha():
            console.print(Text(f"there is no command {safe_text(word)}: {_HELP}", "yellow"))
        elif word:
            if not by_hand:
                console.print(Text("you> ", "bold cyan").append(safe_text(line), "not bold default"))
            try:
                answer = conversation.ask(line)
            except OndolError as e:
                if not by_hand:
                    raise
                console.print(Text(safe_text(f"error: {e}"), "bold red"))
                continue
            if answer.anew:
                console.print(Text("(the conversation had grown too long for the model: it began anew here)", "yellow"))
            yield answer


def _piped() -> Iterator[str]:
    """Lines of standard input that no person types."""
    if reconfigure := getattr(sys.stdin, "reconfigure", None):
        reconfigure(errors="replace")
    for line in sys.stdin or ():
        yield line.rstrip("\r\n")


def _typed(console: Console) -> Iterator[str]:
    """Lines from a person, until Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401  # gives `input` history and editing

    console.print(Text(_HELP, DIM))
    while True:
        try:
            if console.stderr:  # standard output is for JSON alone
                yield console.input("you> ")
            else:
                yield input("you> ")  # not the console's: line editing has to know the prompt
        except EOFError:
            console.print()
            return


def _show(console: Console, turn: Turn) -> None:
    """What the model wrote, and what its calls gave."""
    console.print(Text(fold(safe_text(turn.text)) or "(nothing)", SAMPLED if turn.text else DIM))
    for result in turn.results:
        text = Text("=> ", CALL if result.ok else "bold red").append(fold(safe_text(result.text)), f"not bold {DIM}")
        console.print(text)


def _plain(answer: Answer) -> dict[str, Any]:
    """An answer as data. A call that was not carried out has no result."""
    calls = []
    for turn in answer.turns:
        results: list[ToolResult | None] = [*turn.results, *([None] * (len(turn.calls) - len(turn.results)))]
        calls += [
            {
                "name": call.name,
                "arguments": call.arguments,
                "result": result.text if result else None,
                "ok": result.ok if result else None,
            }
            for call, result in zip(turn.calls, results)
        ]
    return {
        "question": answer.question,
        "answer": answer.text,
        "calls": calls,
        "turns": len(answer.turns),
        "stop_reason": answer.stop_reason.value,
        "error": answer.error or None,
        "started_anew": answer.anew,
    }
