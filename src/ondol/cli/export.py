"""`ondol export`: records as JSON lines, or the model as a folder."""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path

from ondol.cli._common import print_json, runs_root
from ondol.errors import OndolError
from ondol.store import Run


def run(args: Namespace) -> int:
    output = Path(args.output)
    with Run.open(Run.find(runs_root(args), args.run)) as opened:
        if args.what == "model":
            source = opened.path / "model"
            if not source.is_dir():
                raise OndolError(
                    f"{opened.name} has no trained model yet", f"finish it first: ondol resume {opened.name}"
                )
            if output.exists() and (not output.is_dir() or any(output.iterdir())):
                raise OndolError(f"{output} exists", "choose a new folder")
            shutil.copytree(source, output, dirs_exist_ok=True)
            count = len(list(output.iterdir()))
        else:
            count = opened.export(args.what, output)
    if args.json:
        print_json({"what": args.what, "path": str(output), "count": count})
    else:
        print(f"{output}: {count} {'files' if args.what == 'model' else 'records'}")
    return 0
