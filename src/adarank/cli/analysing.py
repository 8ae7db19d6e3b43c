"""The command `analyse`: a figure's settings as they are typed, and what it says when it is done."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adarank.errors import RecipeError

FIGURES = ("components", "ranks", "masks", "radar", "rank-sweep", "task-count", "landscape", "interference")


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """The command's parser, among the others."""
    command = commands.add_parser(
        "analyse", parents=[common], help="the papers' figures of a recipe's models: as a table, and drawn"
    )
    command.add_argument("figure", metavar="FIGURE", help=", ".join(FIGURES))
    command.add_argument("recipe", help="YAML recipe: its models and tasks")
    command.add_argument(
        "out",
        nargs="?",
        type=Path,
        help="files to write without their suffixes (default: the figure's name); a suffix names the kind",
    )
    command.add_argument(
        "--output", action="append", default=[], type=Path, metavar="FOLDER", help="a folder written by merge, for masks and radar; may be repeated"
    )  # fmt: skip
    command.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="settings", help="a setting of the figure; may be repeated"
    )  # fmt: skip
    command.add_argument("--split", choices=("test", "select"), default="test", help="what is scored (default: test)")
    command.add_argument("--limit", type=int, metavar="N", help="score at most N inputs per task")
    command.add_argument("--data", choices=("csv", "parquet"), default="csv", help="kind of the table (default: csv)")
    command.add_argument(
        "--image", choices=("svg", "png", "none"), default="svg", help="kind of the drawing (default: svg)"
    )
    command.add_argument("--dry-run", action="store_true", help="say what would be computed, and compute nothing")
    command.add_argument("--force", action="store_true", help="replace existing files of an analysis")
    command.set_defaults(run=_analyse, left=_left)


def add_metric(command: argparse.ArgumentParser) -> None:
    """The option of commands that score: another metric than the recipe's."""
    text = "score every task by this, such as loss (default: the recipe's)"
    command.add_argument("--metric", metavar="NAME", help=text)


def _analyse(options: argparse.Namespace) -> None:
    from adarank.cli import console
    from adarank.cli.progress import screen
    from adarank.workflow.analyse import Options, analyse

    choices = Options(options.output, options.split, options.limit, options.data, options.image)
    with screen() as shown:
        result = analyse(
            options.figure, options.recipe, options.out, settings_of(options.settings), choices, options.force, options.dry_run, shown.note
        )  # fmt: skip
    if options.json:
        about = {"figure": result.figure, "parts": result.parts, "cost": dict(result.cost)}
        files = {"files": [str(file) for file in result.files], "sentences": list(result.sentences)}
        console.out.print(json.dumps({**about, **files} if result.files else about, indent=1, ensure_ascii=False))
        return
    if not result.files:
        console.head(result.figure, f": {result.parts} parts, nothing computed", hang=2)
        for what, count in result.cost.items():
            console.write(f"{count:,} {what}", 2, 4)
        return
    for sentence in result.sentences:
        console.write(sentence, 0, 2)
    console.head(", ".join(map(str, result.files)), f" written: {len(result.rows)} rows")


def settings_of(given: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` as typed -> settings; values are YAML, and a list may be typed as a,b,c.

    Raises:
        RecipeError: one is neither, or is given twice.
    """
    from adarank.io.parsing import parse_yaml

    settings: dict[str, Any] = {}
    for text in given:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals and value):
            raise RecipeError(f"--set {text}: not a setting. Write --set name=value.")
        if name in settings:
            raise RecipeError(f"--set {name}: is given twice. Give it once.")
        plain = not set(value) & set("[{\"'")
        settings[name] = parse_yaml(f"[{value}]" if plain and "," in value else value)
    return settings


def _left(options: argparse.Namespace) -> str:
    from adarank.workflow.left_over import of_analysis

    return of_analysis(options.out or Path(options.figure))
