"""The command line: it parses, calls one library function, and shows what came back."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from adarank import __version__
from adarank.cli import analysing, reports, reproducing, scoring, sharing
from adarank.cli.arguments import Command
from adarank.cli.exits import ended, say
from adarank.cli.launch import together
from adarank.cli.threads import keep_to_quota, wait_passively
from adarank.errors import ProcessError

if TYPE_CHECKING:
    from adarank.cli.formats import Sheet

FORMATS = ("text", "md", "csv", "latex")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0 done, 1 an error in what was given or in the system, in one sentence, or an output that does not verify, 2 wrong usage, 70 a bug
        in adarank, 130 interrupted.
    """
    _print_anything()
    commands = parser()
    given = sys.argv[1:] if arguments is None else list(arguments)
    if not given:
        commands.print_help()
        return 0
    options = commands.parse_args(given)
    wait_passively()
    keep_to_quota()
    signal.signal(signal.SIGTERM, _terminate)  # so that a termination cleans up as Ctrl-C does
    try:
        with together():
            return ended(options)
    except ProcessError as error:
        say(f"adarank: {error}")
        return 1


def _print_anything() -> None:
    """Text that the terminal's encoding lacks, or that is no text (names of files may be so), is printed as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def parser() -> argparse.ArgumentParser:
    """The argument parser of all commands."""
    top = argparse.ArgumentParser(prog="adarank", description="Turn many fine-tuned models into one.")
    top.add_argument("--version", action="version", version=f"adarank {__version__}")
    top.set_defaults(shares=False)
    common = Command(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as JSON")
    common.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: one a core that the process may use)"
    )
    tabular = Command(add_help=False)
    form = tabular.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the result as JSON")
    form.add_argument("--format", choices=FORMATS, default="text", help="of the table that is printed (default: text)")
    tabular.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: one a core that the process may use)"
    )
    commands = top.add_subparsers(parser_class=Command, title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", parents=[tabular], help="merge the eight vision experts that adarank ships")
    demo.add_argument(
        "out", nargs="?", type=Path, default=Path("adarank-demo"), help="folder to write (default: adarank-demo)"
    )
    demo.add_argument("--quick", action="store_true", help="fewer images and steps: to see that it works, not how well")
    demo.add_argument("--seed", type=int, default=0, help="of the adaptation batches (default: 0)")
    demo.add_argument("--force", action="store_true", help="replace an existing output of adarank")
    reports.add_no_report(demo)
    demo.set_defaults(run=_demo, left=_left_of_demo)

    plan = commands.add_parser("plan", parents=[tabular], help="what a recipe will do, from headers alone")
    plan.add_argument("recipe", help="YAML recipe")
    _add_memory(plan)
    plan.add_argument("-v", "--verbose", action="store_true", help="list every tensor with its action")
    plan.set_defaults(run=_plan, left=_nothing_left)

    merge = commands.add_parser(
        "merge", parents=[common], help="merge by a recipe, adapting or training if its method does"
    )
    merge.add_argument("recipe", help="YAML recipe")
    merge.add_argument("out", type=Path, help="folder to write; the same command continues an interrupted adaptation")
    merge.add_argument("--force", action="store_true", help="replace an existing output of adarank")
    reports.add_no_report(merge)
    merge.add_argument(
        "--max-shard-size", metavar="SIZE", help="of a file of weights, such as 500MB or 2GiB (default: 5GB)"
    )
    _add_memory(merge)
    merge.set_defaults(run=_merge, left=_left_of_merge, shares=True)

    evaluate = commands.add_parser("evaluate", parents=[tabular], help="base, experts and merged models in one table")
    evaluate.add_argument("recipe", nargs="?", help="YAML recipe")
    evaluate.add_argument("outputs", nargs="*", type=Path, metavar="out", help="folders written by merge")
    evaluate.add_argument(
        "--split", choices=("test", "select"), default="test", help="which split to score (default: test)"
    )
    evaluate.add_argument(
        "--per-class", action="store_true", help="precision, recall and F1 of every class, too (csv: of these alone)"
    )
    analysing.add_metric(evaluate)
    scoring.add_sources(evaluate)
    evaluate.set_defaults(run=_evaluate, left=_nothing_left)

    search = commands.add_parser(
        "search", parents=[tabular], help="try a method's settings on the labelled select split"
    )
    search.add_argument("recipe", type=Path, help="YAML recipe")
    search.add_argument("best", type=Path, help="recipe to write with the best settings, in the same folder")
    search.add_argument(
        "--over",
        action="append",
        default=[],
        metavar="AXIS",
        help="name=first:last:step or name=a,b,c; several make a grid",
    )
    analysing.add_metric(search)
    search.add_argument("--force", action="store_true", help="replace an existing best recipe and its record")
    search.set_defaults(run=_search, left=_left_of_search)

    sharing.add(commands, common, tabular, _nothing_left, _left_of_merge)

    reproducing.add(commands, tabular, _left_of_reproduce)

    inspect = commands.add_parser(
        "inspect",
        parents=[tabular],
        help="tensors, task-vector norms and ranks; λ and masks of an output; sizes of a bundle",
    )
    inspect.add_argument("checkpoint", type=Path, help="a checkpoint, or a folder written by merge")
    inspect.add_argument("--base", type=Path, help="the base to take the task vector from")
    inspect.add_argument("--full", action="store_true", help="every tensor of an adapted output, a row for each task")
    inspect.set_defaults(run=_inspect, left=_nothing_left)

    analysing.add(commands, common)
    reports.add(commands, common, _nothing_left)

    methods = commands.add_parser("methods", parents=[tabular], help="the catalogue of methods")
    methods.add_argument("name", nargs="?", help="one method, with its settings")
    methods.add_argument("--papers", action="store_true", help="the rows of the papers' tables, and what makes each")
    methods.set_defaults(run=_methods, left=_nothing_left)
    return top


def _add_memory(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--memory",
        metavar="SIZE",
        help="budget of memory beside mapped files, such as 8GB; what cannot keep it is refused",
    )


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=1, ensure_ascii=False))


def _nothing_left(options: argparse.Namespace) -> str:
    return "This command keeps nothing on the way: the same command starts from the beginning."


def _left_of_merge(options: argparse.Namespace) -> str:
    from adarank.workflow.left_over import of_merge

    return of_merge(options.out)


def _left_of_search(options: argparse.Namespace) -> str:
    from adarank.workflow.left_over import of_search

    return of_search(options.best)


def _left_of_reproduce(options: argparse.Namespace) -> str:
    return "Rows that are merged lie in their folders, and an adaptation's last saved step beside its own: the same command goes on."


def _left_of_demo(options: argparse.Namespace) -> str:
    from adarank.workflow.left_over import of_demo

    return of_demo(options.out)


def _tabled(options: argparse.Namespace, *sheets: Sheet) -> bool:
    """Print tables in the format that was given; False if that is text, which `show` lays out."""
    if options.format == "text":
        return False
    from adarank.cli.formats import rendered

    print(rendered(sheets, options.format), end="")
    return True


def _demo(options: argparse.Namespace) -> None:
    from adarank.cli import sheets, show
    from adarank.cli.progress import screen
    from adarank.workflow import demo

    reports.check(options)
    with screen() as shown:
        table = demo.run(options.out, options.quick, options.seed, options.force, shown.note, shown.step)
    page = reports.write(options, table.plain())
    if options.json:
        _print_json(table.plain())
        return
    if _tabled(options, sheets.scores(table)):
        return
    show.scores(table)
    show.after_demo(options.out, options.quick, demo.ZOO / "recipe.yaml")
    reports.name(page)


def _plan(options: argparse.Namespace) -> None:
    from adarank.cli import sheets, show
    from adarank.cli.progress import screen
    from adarank.recipe.sizes import bytes_of
    from adarank.workflow.plan import plan

    with screen():
        described = plan(options.recipe, bytes_of("--memory", options.memory))
    if options.json:
        _print_json(described)
    elif not _tabled(options, sheets.plan(described)):
        show.plan(described, options.verbose)


def _merge(options: argparse.Namespace) -> None:
    from adarank.cli import show
    from adarank.cli.progress import screen
    from adarank.io import processes
    from adarank.recipe.reader import with_shards
    from adarank.recipe.sizes import bytes_of
    from adarank.workflow.merge import merge

    reports.check(options)
    recipe, memory = with_shards(options.recipe, options.max_shard_size), bytes_of("--memory", options.memory)
    with screen() as shown:
        record = merge(recipe, options.out, options.force, shown.note, shown.step, memory=memory)
    if processes.rank() > 0:
        return
    page = reports.write(options)
    if options.json:
        _print_json(record)
    else:
        show.merged(record, options.recipe, options.out)
        reports.name(page)


def _evaluate(options: argparse.Namespace) -> None:
    from adarank.cli import sheets, show
    from adarank.cli.progress import screen

    with screen() as shown:
        table = scoring.table_of(options, shown.note)
    parts = [sheets.scores(table), *([sheets.classes(table)] if options.per_class else [])]
    if options.json:
        _print_json(table.plain())
    elif not _tabled(options, *(parts[-1:] if options.format == "csv" else parts)):
        show.scores(table)
        for sheet in parts[1:]:
            show.sheet(sheet)


def _search(options: argparse.Namespace) -> None:
    from adarank.cli import sheets, show
    from adarank.cli.progress import screen
    from adarank.workflow.search import level, parse_axis, search

    axes = [parse_axis(text) for text in options.over]
    given = (options.recipe, options.best, axes, options.force)
    with screen() as shown:
        ranked, record = search(*given, shown.note, shown.point, options.metric)
    if options.json:
        _print_json(record)
        return
    if not _tabled(options, sheets.points(ranked, record["metrics"])):
        show.searched(ranked, record["metrics"], record["at_the_edge"], level(ranked), options.best)


def _inspect(options: argparse.Namespace) -> None:
    from adarank.cli import inspecting, sheets
    from adarank.cli.progress import screen
    from adarank.io.bundle import BundleFolder, is_bundle
    from adarank.workflow import inspect as inspection

    if is_bundle(options.checkpoint) and options.base is None:
        bundle = BundleFolder(options.checkpoint)
        if options.json:
            about = bundle.about
            _print_json(
                {"kind": about.kind, "settings": about.settings, "tasks": list(about.tasks), "bytes": bundle.sizes}
            )
        elif not _tabled(options, sheets.bundle(bundle.about, bundle.sizes)):
            inspecting.bundle(bundle.about, bundle.sizes)
        return
    if inspection.is_adapted(options.checkpoint) and options.base is None:
        tasks, layers = inspection.inspect_output(options.checkpoint)
        if options.json:
            _print_json({"tasks": tasks, "layers": [dataclasses.asdict(row) for row in layers]})
        elif not _tabled(options, sheets.layers(tasks, layers)):
            inspecting.output(tasks, layers, options.full, inspection.method_of(options.checkpoint))
        return
    with screen():
        rows = inspection.inspect_checkpoint(options.checkpoint, options.base)
    if options.json:
        _print_json([dataclasses.asdict(row) for row in rows])
    elif not _tabled(options, sheets.tensors(rows)):
        inspecting.tensors(sheets.tensors(rows))


def _methods(options: argparse.Namespace) -> None:
    from adarank.cli import pages, sheets
    from adarank.recipe import catalogue
    from adarank.recipe.papers import ROWS

    if options.papers:
        rows = [row for row in ROWS if options.name in (None, row.recipe.get("merge_method"))]
        if options.json:
            _print_json([dataclasses.asdict(row) for row in rows])
        elif not _tabled(options, sheets.papers(rows)):
            pages.papers(rows)
        return
    entries = {options.name: catalogue.entry(options.name)} if options.name else catalogue.catalogue()
    if options.json:
        _print_json({name: dataclasses.asdict(entry) for name, entry in entries.items()})
    elif options.name:
        if not _tabled(options, sheets.method(entries[options.name])):
            pages.method(entries[options.name])
    elif not _tabled(options, sheets.methods(entries)):
        pages.methods(entries)


if __name__ == "__main__":
    sys.exit(main())
