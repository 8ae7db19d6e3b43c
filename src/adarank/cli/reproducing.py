"""The command `reproduce`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adarank.cli.formats import Cell, Rounded, Sheet
from adarank.cli.reports import Left

if TYPE_CHECKING:
    from adarank.recipe.suites import Published, Suite
    from adarank.workflow.reproduce import Needed, Reproduced


def add(commands: Any, tabular: argparse.ArgumentParser, left: Left) -> None:
    """The command's parser, among the others; `left` says what an interruption leaves."""
    command = commands.add_parser(
        "reproduce", parents=[tabular], help="make the papers' tables anew, beside the published figures"
    )
    command.add_argument("suite", nargs="?", help="such as vision-8-b32 or glue-7-gpt2; without it they are listed")
    command.add_argument(
        "--row",
        action="append",
        default=[],
        metavar="ROW",
        help="of the papers' tables, or 'Table 4' or 'Data budget' (default: all rows but these two tables' variants)",
    )
    command.add_argument(
        "--protocol",
        choices=("transductive", "disjoint"),
        default="transductive",
        help="adapt on the inputs that are scored, as the papers do (default), or on others",
    )
    command.add_argument("--dry-run", action="store_true", help="list every file that is needed, with its size")
    command.add_argument("--limit", type=int, metavar="N", help="use at most N inputs of a task")
    command.add_argument("--steps", type=int, metavar="N", help="of adaptation, in place of the papers'")
    command.add_argument("--to", type=Path, metavar="FOLDER", help="for the outputs (default: reproduced/SUITE)")
    command.add_argument("--from", dest="folder", type=Path, default=Path("."), metavar="FOLDER", help="where models and datasets may lie as org/name")  # fmt: skip
    command.add_argument("--force", action="store_true", help="replace outputs of other recipes")
    command.set_defaults(run=_reproduce, left=left)


def _reproduce(options: argparse.Namespace) -> None:
    from adarank.cli import show
    from adarank.cli.formats import rendered
    from adarank.cli.progress import screen
    from adarank.recipe.suites import rows, suite, suites
    from adarank.workflow.reproduce import needed_files, reproduce

    if options.suite is None:
        content: Any = suites()
        made = [Sheet(("suite", "what it is"), list(content.items()))]
    elif options.dry_run:
        chosen, needed = suite(options.suite), needed_files(options.suite, options.folder)
        names = [row.name for row in rows(options.row)]
        content = {"suite": chosen.name, "rows": names, "files": [vars(each) for each in needed]}
        made = [files(chosen, needed, names)]
    else:
        out = options.to or Path("reproduced") / options.suite
        with screen() as shown:
            result = reproduce(
                options.suite, out, options.row, options.protocol, options.limit, options.steps, options.folder,
                options.force, shown.note, shown.step,
            )  # fmt: skip
        beside = [differences(result, table) for table in result.comparable()]
        content, made = result.plain(), [comparison(result), *beside, *map(published, result.suite.published)]
    if options.json:
        print(json.dumps(content, indent=1, ensure_ascii=False))
    elif options.format != "text":
        print(rendered(made, options.format), end="")
    else:
        for sheet in made:
            show.sheet(sheet) if len(sheet.columns) < 6 else _wide(sheet)


def _wide(sheet: Sheet) -> None:
    """A table with a column per task."""
    from adarank.cli.console import write
    from adarank.cli.tables import wide

    columns = sheet.texts()
    write(sheet.title, style="bold")
    wide(columns[:1], columns[1:])
    for text in sheet.notes:
        write(text, style="dim")
    write("")


def files(chosen: Suite, needed: list[Needed], rows: list[str]) -> Sheet:
    """What is read, with sizes; nothing is fetched for it."""
    known = sum(each.bytes for each in needed if each.bytes is not None)
    missing = sum(each.bytes for each in needed if each.bytes is not None and not each.here)
    unknown = [each for each in needed if each.bytes is None]
    notes = [f"Rows: {', '.join(rows)}.", *chosen.notes]
    if len(unknown) < len(needed):
        notes.append(f"{known / 1e9:.3f} GB, of which {missing / 1e9:.3f} GB are not on this machine yet.")
    if unknown:
        notes.append(f"Of {len(unknown)} repositories the size is not known offline.")
    lines: list[list[Cell]] = [
        [each.source, each.repository, each.file, "not known offline" if each.bytes is None else str(each.bytes), "yes" if each.here else "no"]
        for each in needed
    ]  # fmt: skip
    return Sheet(("source", "repository", "file", "bytes", "here"), lines, f"{chosen.title}: what is read", notes)


def comparison(result: Reproduced) -> Sheet:
    """Scores here, and beside them what was published of the same checkpoints, with the difference."""
    beside, tasks = result.comparable(), list(result.suite.tasks)
    heads: list[str] = ["row", "mean"]
    for number in range(1, len(beside) + 1):
        heads += [f"published [{number}]", f"difference [{number}]"]
    lines: list[list[Cell]] = []
    for row, scores in result.scores.items():
        line: list[Cell] = [row, Rounded(result.means[row], 2)]
        for table in beside:
            there = table.means.get(row)
            line += [None, None] if there is None else [Rounded(there, 2), Rounded(result.means[row] - there, 2)]
        lines.append([*line, *(Rounded(scores[task], 2) for task in tasks)])
    notes = [f"[{number}] {table.source}." for number, table in enumerate(beside, 1)]
    notes += [f"Checkpoints: {result.suite.about}.", *result.suite.notes]
    if len(beside) < len(result.suite.published):
        notes.append(
            "The tables below of other checkpoints are not compared: their differences would say nothing of methods."
        )
    notes += [f"{row}: not made. {why}" for row, why in result.failed.items()]
    if result.protocol == "transductive":
        notes.append("Transductive: adapted on the very inputs that are scored, as in the papers.")
    return Sheet([*heads, *tasks], lines, f"{result.suite.title}: scores here, per cent", notes)


def differences(result: Reproduced, table: Published) -> Sheet:
    """What scores here are above those of a published table of the same checkpoints, in points."""
    tasks = list(result.suite.tasks)
    lines: list[list[Cell]] = []
    for row, scores in result.scores.items():
        there = {task: score for task, score in table.scores.get(row, {}).items() if task in scores}
        if row in table.means:
            by_task = (Rounded(scores[task] - there[task], 2) if task in there else None for task in tasks)
            lines.append([row, Rounded(result.means[row] - table.means[row], 2), *by_task])
    return Sheet(("row", "mean", *tasks), lines, f"Scores here less those of {table.source}, in points")


def published(table: Published) -> Sheet:
    """A published table as it is."""
    from adarank.recipe.suites import families

    tasks = list(dict.fromkeys(task for scores in table.scores.values() for task in scores))
    rows = list(dict.fromkeys([*table.scores, *table.means]))
    lines: list[list[Cell]] = [
        [row, *(None if value is None else Rounded(value, 2) for value in (table.means.get(row), *(table.scores.get(row, {}).get(t) for t in tasks)))]
        for row in rows
    ]  # fmt: skip
    notes = [f"Checkpoints: {families()[table.checkpoints]}.", *([table.note] if table.note else [])]
    return Sheet(("row", "mean", *tasks), lines, f"Published: {table.source}", notes)
