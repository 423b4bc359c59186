"""`ondol serve`: a model behind an OpenAI-compatible endpoint, and a recorder of the agents that talk to it."""

from __future__ import annotations

import asyncio
import json
import os
from argparse import Namespace

from rich.console import Console
from rich.text import Text

from ondol.cli._common import find_model, load, runs_root
from ondol.envs.tool import ToolEnv
from ondol.errors import OndolError
from ondol.recipe import to_table


def run(args: Namespace) -> int:
    token = args.token if args.token is not None else os.environ.get("ONDOL_SERVE_TOKEN")
    if token is not None and (not token or not token.isascii() or not token.isprintable() or " " in token):
        raise OndolError("this token cannot stand in a header", "use letters and digits, at least one")
    if args.most < 1:
        raise OndolError(f"--most {args.most}: at least one turn has to be taken on", "for example --most 64")
    from ondol.tools.server.http import is_loopback, listen, url_of

    if token is None and not is_loopback(args.host):
        raise OndolError(
            f"'{args.host}' can be reached from other machines, and there is no token",
            "give --token (or $ONDOL_SERVE_TOKEN), or listen at 127.0.0.1",
        )
    recipe, path, folder = find_model(args)
    console = Console(stderr=args.json, highlight=False, soft_wrap=True)
    loaded = load(recipe, path, lambda line: console.print(Text(line, "dim")))

    from ondol.serve.http import Endpoint, serve
    from ondol.serve.record import Recorder, recording_run
    from ondol.serve.worker import Worker
    from ondol.tools.speaker import Speaker
    from ondol.train.plans import make_engine

    env = recipe.env if isinstance(recipe.env, ToolEnv) else None
    calls = env.calls if env is not None and env._tools else "json"
    speaker = Speaker(
        loaded.renderer,
        loaded.tokenizer,
        calls=args.calls or calls,
        known=env._tools if env is not None else (),
        system=env.system if env is not None else None,
        result_role=env.result_role if env is not None else "user",
    )
    name = folder.name if folder else recipe.name
    sock = listen(args.host, args.port)
    url = url_of(sock)
    recording = None
    if args.record:  # its recipe names the model that really spoke
        spoken = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": path})})
        recording = recording_run(runs_root(args), name, to_table(spoken))
    recorder = Recorder(recording, problems_per_step=recipe.train.prompts_per_step) if recording is not None else None
    if recording is not None:
        recording.state = "running"
    endpoint = Endpoint(
        Worker(make_engine(recipe, loaded), most=args.most),
        speaker,
        name=name,
        sampling=recipe.sampling,
        context_length=loaded.context_length,
        timeout_s=recipe.rollout.timeout_s,
        recorder=recorder,
        group_size=recipe.train.samples_per_prompt,
    )

    def ready() -> None:
        if args.json:
            recorded = None if recording is None else str(recording.path)
            print(
                json.dumps({"url": f"{url}/v1", "model": name, "token": token is not None, "recording": recorded}),
                flush=True,
            )
            return
        console.print(Text(f"{name} at {url}/v1   (Ctrl-C ends it)"))
        if recording is not None:
            console.print(
                Text(f"an agent at {url}/episodes/NAME/v1 is recorded; its score: POST {url}/episodes/NAME/score")
            )
            console.print(
                Text(
                    f"recorded in {recording.path}   train on it: ondol train {args.run} --from-dump {recording.path.name}"
                )
            )

    try:
        asyncio.run(serve(endpoint, sock, token=token, ready=ready))
    except KeyboardInterrupt:
        pass
    finally:
        if recording is not None and recorder is not None:
            recording.state = "finished"
            recording.close()
            if not args.json:
                console.print(Text(f"{recorder.written} episodes recorded, {recorder.dropped} without a score dropped"))
    return 0
