"""The commands that make an output ready for others, `extract`, `card` and `push`, and `convert`, for models of others."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from adarank.cli.reports import Left
from adarank.errors import RecipeError


def add(
    commands: Any, common: argparse.ArgumentParser, tabular: argparse.ArgumentParser, left: Left, left_of_merge: Left
) -> None:
    """The commands' parsers, among the others.

    Arguments:
        left, left_of_merge: what an interruption leaves, of a command that writes no folder and of one that does.
    """
    extract = commands.add_parser(
        "extract", parents=[common], help="one task of an output as an ordinary folder of transformers"
    )
    extract.add_argument("output", type=Path, help="folder that merge wrote: one model with heads, or a bundle")
    extract.add_argument("task", nargs="?", help="one of its tasks")
    extract.add_argument("out", type=Path, help="folder to write")
    extract.add_argument("--task", dest="named", metavar="NAME", help="the same, by name")
    extract.add_argument("--force", action="store_true", help="replace an existing output of adarank")
    extract.set_defaults(run=_extract, left=left_of_merge)

    card = commands.add_parser("card", parents=[common], help="put scores into an output's model card (README.md)")
    card.add_argument("out", type=Path, help="folder written by merge, unchanged since")
    card.add_argument("scores", type=Path, help="file with what adarank evaluate --json printed")
    card.add_argument("--row", help="the output's row in it (default: the one of its path, or the only one)")
    card.set_defaults(run=_card, left=left)

    convert = commands.add_parser(
        "convert",
        parents=[common],
        help="a checkpoint of open_clip or of torch.distributed as a folder that merges, without running its code",
    )
    convert.add_argument(
        "file", type=Path, help="such as finetuned.pt of task_vectors or TALL-masks, or a folder with .metadata"
    )
    convert.add_argument("out", type=Path, help="folder to write")
    convert.add_argument(
        "--layout", choices=("transformers", "open_clip"), default="transformers",
        help="open_clip: tensors as they are, q, k and v in one matrix, as the papers' code decomposes them (default: transformers)",
    )  # fmt: skip
    convert.add_argument("--force", action="store_true", help="replace an existing output of adarank")
    convert.set_defaults(run=_convert, left=left)

    push = commands.add_parser("push", parents=[tabular], help="upload an output to the hub, checked, in one commit")
    push.add_argument("out", type=Path, help="folder written by merge or extract")
    push.add_argument("name", metavar="org/name", help="repository on the hub; made if it is not there")
    push.add_argument("--private", action="store_true", help="make it private; a public one is refused")
    push.add_argument("--dry-run", action="store_true", help="check and list what would be uploaded; no connection")
    push.add_argument(
        "--force", action="store_true", help="replace the files of another output (its history keeps them)"
    )
    push.set_defaults(run=_push, left=_left_of_push)


def _extract(options: argparse.Namespace) -> None:
    from adarank.cli import show
    from adarank.cli.progress import screen
    from adarank.outputs.extract import extract

    task = options.named if options.task is None else options.task
    if task is None or None not in (options.named, options.task):
        raise RecipeError("extract: one task is needed. Write adarank extract OUTPUT TASK OUT.")
    with screen():
        record = extract(options.output, task, options.out, options.force)
    if options.json:
        print(json.dumps(record, indent=1, ensure_ascii=False))
    else:
        show.extracted(record, options.output, options.out)


def _card(options: argparse.Namespace) -> None:
    from adarank.cli import console
    from adarank.io.cards import CARD
    from adarank.io.files import check_file, read_json
    from adarank.workflow.score_card import score_card

    check_file(options.scores)
    record = score_card(options.out, read_json(options.scores), options.row)
    if options.json:
        print(json.dumps(record["scores"], indent=1, ensure_ascii=False))
    else:
        console.head(options.out / CARD, f" has the scores of {len(record['scores']['tasks'])} task(s)")


def _left_of_push(options: argparse.Namespace) -> str:
    return "Nothing of the output can be seen on the hub yet: the same command goes on with what is not uploaded."


def _push(options: argparse.Namespace) -> None:
    from adarank.cli import console
    from adarank.cli.formats import Sheet, rendered
    from adarank.cli.progress import screen
    from adarank.cli.tables import lines, print_lines
    from adarank.io.push import push

    with screen():
        pushed = push(options.out, options.name, options.private, options.force, options.dry_run)
    if options.json:
        print(json.dumps(pushed, indent=1, ensure_ascii=False))
        return
    if options.format != "text":
        rows = list(pushed["files"].items())
        print(rendered([Sheet(("file", "bytes"), rows, pushed["name"], pushed["notes"])], options.format), end="")
        return
    for text in pushed["notes"]:
        console.head("note:", f" {text}", "bold yellow")
    whole = f"{len(pushed['files'])} files, {console.size(pushed['bytes'])}"
    if options.dry_run:
        print_lines(lines([[name, console.size(size)] for name, size in pushed["files"].items()], {1}), 2, 0)
        private = ", private" if options.private else ""
        console.head(pushed["name"], f"{private} would be given {whole}. Nothing was uploaded.")
    else:
        console.head(pushed["url"], f" has {whole}")


def _convert(options: argparse.Namespace) -> None:
    from adarank.cli import console
    from adarank.cli.progress import screen
    from adarank.workflow.convert import convert

    with screen():
        record = convert(options.file, options.out, options.force, options.layout)
    if options.json:
        print(json.dumps(record, indent=1, ensure_ascii=False))
    else:
        made = record["converted"]
        console.head(options.out, f" written: {made['architecture']}, {made['tensors']} tensors")
