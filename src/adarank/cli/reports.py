"""The commands that look back at outputs: `report` and `verify`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adarank.errors import AdaRankError

Left = Callable[[argparse.Namespace], str]
"""What an interrupted command leaves behind, in a sentence."""


def add_no_report(command: argparse.ArgumentParser) -> None:
    """The switch of the commands that write a page beside their output."""
    command.add_argument("--no-report", action="store_true", help="write no page (OUT.html) beside the output")


def check(options: argparse.Namespace) -> None:
    """Refuse a page that may not be written, before anything is spent; what is wrong with the output comes first."""
    if options.no_report or (os.path.exists(options.out) and not options.force):
        return
    from adarank.report.page import check_page, page_of

    page = page_of(options.out)
    if os.path.lexists(page):
        check_page(page, options.force)


def write(options: argparse.Namespace, scores: Mapping[str, Any] | None = None) -> Path | None:
    """The page of a command's output; None if it is not wanted."""
    if options.no_report:
        return None
    from adarank.cli import console
    from adarank.report.page import page_of, write_report

    page = page_of(options.out)
    try:
        return write_report([options.out], page, scores, options.force)
    except (AdaRankError, OSError) as error:  # the output is there: a page that cannot be written is a note
        console.write(f"No page was written: {error}", style="dim", console=console.err)
        return None


def name(page: Path | None) -> None:
    """Say where the page is."""
    from adarank.cli import console

    if page is not None:
        console.head(page, " shows it in a browser")


def add(commands: Any, common: argparse.ArgumentParser, left: Left) -> None:
    """The two commands' parsers, among the others; `left` says what an interruption leaves."""
    report = commands.add_parser(
        "report", parents=[common], help="one HTML page of outputs: what was merged, learned and kept, and at what cost"
    )
    report.add_argument("outputs", nargs="+", type=Path, metavar="out", help="folders written by merge")
    report.add_argument("--to", type=Path, metavar="PAGE", help="file to write (default: OUT.html beside the first)")
    report.add_argument(
        "--scores", type=Path, metavar="FILE", help="what adarank evaluate --json printed, for a table of scores"
    )
    report.add_argument("--force", action="store_true", help="replace an existing page of adarank")
    report.set_defaults(run=_report, left=left)

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
    verify.set_defaults(run=_verify, left=left)


def _report(options: argparse.Namespace) -> None:
    from adarank.cli import console
    from adarank.io.files import check_file, read_json
    from adarank.report.page import write_report

    if options.scores is not None:
        check_file(options.scores)
    scores = None if options.scores is None else read_json(options.scores)
    page = write_report(options.outputs, options.to, scores, options.force)
    if options.json:
        console.out.print(json.dumps({"page": str(page)}))
    else:
        console.head(page, f" written: {len(options.outputs)} output(s), {console.size(page.stat().st_size)}")


def _verify(options: argparse.Namespace) -> int:
    from adarank.cli import console
    from adarank.cli.progress import screen
    from adarank.workflow.verify import verify

    with screen() as shown:
        verified = verify(options.out, options.folder, shown.note)
    if options.json:
        console.out.print(json.dumps({"ok": verified.ok, **dataclasses.asdict(verified)}, indent=1, ensure_ascii=False))
        return int(not verified.ok)
    for text in verified.notes:
        console.head("note:", f" {text}", "bold yellow")
    for text in verified.problems:
        console.head("differs:", f" {text}", "bold red")
    if verified.problems:
        console.head(options.out, f" is not as it was recorded: {len(verified.problems)} problem(s)")
        return 1
    listed, more = ", ".join(verified.not_remade[:4]), len(verified.not_remade) - 4
    others = f" (not compared: {listed}{f' and {more} more' if more > 0 else ''})" if listed else ""
    remade = f", and merging again gave {len(verified.remade)} of them byte for byte{others}" if verified.remade else ""
    console.head(
        options.out, f" is as it was recorded: {verified.files} files{remade}; {verified.inputs} files of inputs"
    )
    return 0
