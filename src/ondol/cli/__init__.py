"""The command line. Parsing is here and light; each command's work is in its own file, imported when it runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import ondol

_EPILOG = """examples:
  ondol check arithmetic                      is this recipe right? nothing is loaded
  ondol train arithmetic                      train, watch, and see before and after
  ondol train my.toml --set train.steps=20    one setting changed
  ondol resume last                           go on where a run stopped
  ondol show last --trajectories 3            what the model wrote, what the tools answered
  ondol chat last                             talk to the trained model, with its tools
  ondol compare grpo dapo --recipe tiny-addends    methods beside each other
  ondol tools serve --tools python            tools behind a server: VerlTool's API, and MCP
  ondol papers                                which paper's claim holds at a scale you can afford
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    p = argparse.ArgumentParser(
        prog="ondol",
        description="Train, evaluate and reshape language-model agents with reinforcement learning.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--version", action="version", version=f"ondol {ondol.__version__}")
    commands = p.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, module: str, text: str, example: str) -> argparse.ArgumentParser:
        c = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        c.set_defaults(module=module)
        c.add_argument("--json", action="store_true", help="print one JSON document instead of text for people")
        return c

    def recipe(c: argparse.ArgumentParser) -> None:
        c.add_argument("recipe", help="a TOML file, or the name of a recipe that comes with Ondol")
        c.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting, e.g. train.steps=20"
        )

    def run(c: argparse.ArgumentParser, text: str = "a run: its folder, name, a unique part of it, or 'last'") -> None:
        c.add_argument("run", help=text)

    def root(c: argparse.ArgumentParser) -> None:
        c.add_argument("--runs", default=None, metavar="DIR", help="folder of runs (default: $ONDOL_RUNS, else ./runs)")

    def several(c: argparse.ArgumentParser) -> None:
        c.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 ... N-1 for every arm (default: 3)")
        c.add_argument(
            "--jobs", type=int, default=1, metavar="N", help="runs at once, each with one thread (default: 1)"
        )

    c = command(
        "check", "check", "check a recipe whole, without loading a model", "ondol check arithmetic --set train.steps=3"
    )
    recipe(c)

    c = command("train", "train", "run a recipe", "ondol train arithmetic --set seed=1")
    recipe(c)
    root(c)
    c.add_argument("--rollout-only", action="store_true", help="sample and record trajectories; change no weights")
    c.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help="rollouts by workers on a Ray cluster: 'local' (begun here), 'auto' (the one that runs), ray://HOST:10001 or 'none'; "
        "their number is rollout.processes (default: 2)",
    )
    c.add_argument("--from-dump", metavar="FILE|RUN", help="train on recorded trajectories instead of sampling")

    c = command("resume", "train", "go on with a run that was stopped or killed", "ondol resume last --cluster none")
    run(c)
    root(c)
    c.add_argument("--cluster", metavar="ADDRESS", help="with another Ray cluster, or 'none': on this machine")
    c.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change where it runs, e.g. rollout.processes=2 or train.learners=1; what it learns cannot be changed",
    )

    c = command(
        "evaluate",
        "evaluate",
        "score a run's model, or a recipe's, on held-out problems",
        "ondol evaluate last --problems 100",
    )
    run(c, "a run, or a recipe (then its model as it is before any training); with --by also a model's path")
    root(c)
    c.add_argument(
        "--by",
        choices=("capability",),
        help="not the recipe's task, but an environment for each capability: planning, tool use, memory, reasoning ...",
    )
    c.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting of the recipe")
    c.add_argument("--problems", type=int, default=None, help="how many held-out problems")
    c.add_argument("--samples", type=int, default=None, help="sampled answers per problem")
    c.add_argument("--endpoint", metavar="URL", help="score a model behind an OpenAI-compatible server instead")
    c.add_argument("--endpoint-images", action="store_true", help="the model there sees pictures: send them")
    c.add_argument("--endpoint-model", metavar="NAME", default="default", help="the model's name at that server")

    c = command(
        "chat", "chat", "talk to a run's model, with its tools", 'ondol chat last --ask "What is 47 * 76 + 29?"'
    )
    run(c, "a run, or a recipe (then its model before any training)")
    root(c)
    c.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting of the recipe")
    c.add_argument(
        "--ask", action="append", default=[], metavar="TEXT", help="ask this and print the answer instead of a dialogue"
    )
    c.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    c.add_argument("--seed", type=int, default=0)

    c = command("runs", "runs", "list runs", "ondol runs")
    root(c)

    c = command(
        "show",
        "show",
        "what a run did: ladder, metrics, trajectories, plot",
        "ondol show last --trajectories 2 --wrong",
    )
    run(c)
    root(c)
    c.add_argument("--trajectories", type=int, default=0, metavar="N", help="also N trajectories in full")
    c.add_argument(
        "--phase", default=None, help="of this phase only (before/greedy, warm_start, rl, after/sampled ...)"
    )
    c.add_argument("--step", type=int, default=None, help="of this step only")
    c.add_argument("--wrong", action="store_true", help="only trajectories that failed")
    c.add_argument("--plot", metavar="FILE.png", help="write the curves there")

    c = command(
        "export",
        "export",
        "write a run's records, or its model, for other programs",
        "ondol export last trajectories -o t.jsonl",
    )
    run(c)
    c.add_argument(
        "what",
        choices=("trajectories", "metrics", "events", "model", "trl", "verl"),
        help="JSON lines; 'model' is a folder that transformers loads; trl, verl: those trainers' datasets (.jsonl or .parquet)",
    )
    c.add_argument("-o", "--output", required=True, metavar="PATH", help="file (folder for 'model') to write")
    root(c)

    c = command(
        "compare",
        "compare",
        "methods beside each other: same prompts, seeds and budget",
        "ondol compare grpo dapo dcpo:dac=false --recipe tiny-addends --seeds 3",
    )
    c.add_argument(
        "arms",
        nargs="+",
        metavar="ARM",
        help="[LABEL=]METHOD[:KEY=VALUE,...], the first is what the others are compared to; a KEY is a setting of the "
        "method, or of the recipe where it begins with one of its tables (optimizer.learning_rate=5e-4)",
    )
    c.add_argument("--recipe", required=True, help="a TOML file, or the name of a recipe that comes with Ondol")
    c.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting for all arms")
    several(c)
    c.add_argument("--folder", metavar="DIR", help="where runs and results are kept (default: compare/RECIPE)")

    command("methods", "methods", "the table of methods: what each is, and whether it runs", "ondol methods")

    c = command("papers", "papers", "papers, their claims, and what was seen of them", "ondol papers 2509.02333")
    c.add_argument("paper", nargs="?", help="an arXiv number: one paper in full")
    c.add_argument("--results", metavar="DIR", help="where to look for results (default: yours, then those that ship)")

    c = command(
        "reproduce",
        "reproduce",
        "run what a paper claims, and say what held",
        "ondol reproduce 2509.02333 --scale laptop --seeds 3",
    )
    c.add_argument("paper", help="an arXiv number, see: ondol papers")
    c.add_argument(
        "--scale", default="laptop", help="laptop (default), gpu or full; the last two say what they would run"
    )
    several(c)
    c.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting of all arms (a trial)"
    )
    c.add_argument(
        "--only",
        metavar="NAME",
        action="append",
        default=[],
        help="an arm or a study alone; what the result says of the others stays",
    )
    c.add_argument(
        "--long",
        action="store_true",
        help="only the arms that take hours, where a paper has any; what they show is added to the result",
    )
    c.add_argument("--folder", metavar="DIR", help="where runs are kept (default: compare/papers)")
    c.add_argument("--results", metavar="DIR", help="where the result is written (default: results/papers)")

    c = command(
        "bench",
        "bench",
        "how fast a model samples and learns here, beside what the machine can do",
        "ondol bench arithmetic --batch 32",
    )
    run(c, "a run, or a recipe (then its model before any training)")
    root(c)
    c.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting of the recipe")
    c.add_argument("--prompt", type=int, default=96, help="tokens of a prompt")
    c.add_argument("--new", type=int, default=32, help="tokens sampled after it")
    c.add_argument("--batch", type=int, default=64, help="most rows sampled at once")
    c.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")

    c = command(
        "serve",
        "serve",
        "an OpenAI-compatible endpoint for a run's model; with --record it keeps what agents did there",
        "ondol serve last --port 8000 --record",
    )
    run(c, "a run, or a recipe (then its model before any training)")
    root(c)
    c.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting of the recipe")
    c.add_argument("--host", default="127.0.0.1", help="where to listen; beyond this machine only with a token")
    c.add_argument("--port", type=int, default=0, help="0 (default): any free one; it is printed")
    c.add_argument("--token", default=None, help="every request must carry it (or set $ONDOL_SERVE_TOKEN)")
    c.add_argument(
        "--calls",
        choices=("json", "tags"),
        default=None,
        help="how the model writes calls (default: as the recipe has it)",
    )
    c.add_argument("--most", type=int, default=256, metavar="N", help="turns under way at once; more are refused")
    c.add_argument(
        "--record", action="store_true", help="keep the episodes of agents, token by token, as a run to train on"
    )

    c = command("tools", "tools", "the tools, and a server for them", "ondol tools serve --tools python --port 8765")
    actions = c.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, text: str, example: str) -> argparse.ArgumentParser:
        a = actions.add_parser(name, help=text, description=text, epilog=f"example: {example}")
        a.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="JSON instead of text for people")
        return a

    action("list", "the tools that a recipe can name", "ondol tools list")
    c = action(
        "serve",
        "serve tools over HTTP (VerlTool's batch API, and MCP at /mcp) or, with --stdio, to one MCP client",
        "ondol tools serve --tools python,calculator --port 8765",
    )
    c.add_argument(
        "--tools", default=None, metavar="NAMES", help="which, separated by commas (default: python,calculator)"
    )
    c.add_argument(
        "--tool",
        action="append",
        default=[],
        metavar="TABLE",
        help='one more, with settings: {name = "python", timeout_s = 5}',
    )
    c.add_argument(
        "--in-process", action="store_true", help="run tools of your own (module:Class) in the server, not in processes"
    )
    c.add_argument("--host", default="127.0.0.1", help="where to listen; beyond this machine only with a token")
    c.add_argument("--port", type=int, default=0, help="0 (default): any free one; it is printed")
    c.add_argument("--token", default=None, help="every request must carry it (or set $ONDOL_TOOLS_TOKEN)")
    c.add_argument("--stdio", action="store_true", help="speak MCP over stdin and stdout instead of HTTP")
    c.add_argument("--no-mcp", action="store_true", help="do not serve MCP at /mcp")
    c.add_argument("--max-running", type=int, default=64, metavar="N", help="calls at work at once (default: 64)")
    c.add_argument("--max-waiting", type=int, default=8192, metavar="N", help="more than these waiting are refused")
    c.add_argument("--idle", type=float, default=3600, metavar="S", help="forget a trajectory unused for so long")
    c.add_argument("--request-timeout", type=float, default=None, metavar="S", help="of one batch (default: none)")
    c.add_argument("--grace", type=float, default=30, metavar="S", help="for calls at work when told to stop")
    c.add_argument(
        "--done-if-invalid", action="store_true", help="an action that no tool understands ends its trajectory"
    )

    command("doctor", "doctor", "what this machine and installation can do", "ondol doctor")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit status: 0 done, 1 a mistake that the message explains, 130 stopped by the user."""
    args = parser().parse_args(argv)
    from ondol.errors import OndolError

    try:
        return importlib.import_module(f"ondol.cli.{args.module}").run(args)
    except OndolError as e:
        if args.json:
            import json

            print(json.dumps({"error": e.what, "remedy": e.remedy}))
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, say) has seen enough
        sys.stderr.close()
        return 0
