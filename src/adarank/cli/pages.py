"""The commands that look back at outputs: `report` and `verify`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """The two commands' parsers, among the others."""
    verify = commands.add_parser(
        "verify", parents=[common], help="hash an output and its inputs again, merge again, and compare"
    )
    verify.add_argument("out", type=Path, help="folder written by merge")
    verify.add_argument(
        "--from",
        dest="folder",
        type=Path,
        metavar="FOLDER",
        help="where the recipe's paths count from (default: the working folder, then the output's parent)",
    )
    verify.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> int:
    from adarank.cli import console, show
    from adarank.workflow.verify import verify

    verified = verify(options.out, options.folder, show.note)
    if options.json:
        console.out.print(json.dumps({"ok": verified.ok, **dataclasses.asdict(verified)}, indent=1, ensure_ascii=False))
        return int(not verified.ok)
    for text in verified.notes:
        show.say("note:", f" {text}", "bold yellow")
    for text in verified.problems:
        show.say("differs:", f" {text}", "bold red")
    if verified.problems:
        show.say(options.out, f" is not as it was recorded: {len(verified.problems)} problem(s)")
        return 1
    remade = f", and merging again gave {len(verified.remade)} of them byte for byte" if verified.remade else ""
    show.say(options.out, f" is as it was recorded: {verified.files} files{remade}; {verified.inputs} files of inputs")
    return 0
