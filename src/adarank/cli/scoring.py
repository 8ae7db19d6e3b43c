"""The table that `evaluate` prints: of a recipe's models, or of what lm-evaluation-harness or mteb measured."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from adarank.errors import RecipeError

if TYPE_CHECKING:
    from adarank.io.record import Note
    from adarank.workflow.scores import Table


def add_sources(command: argparse.ArgumentParser) -> None:
    """The options that read what other programs measured."""
    others = command.add_mutually_exclusive_group()
    others.add_argument(
        "--from-lm-eval",
        action="append",
        metavar="[NAME=]JSON",
        help="a row of what lm-evaluation-harness wrote; once for each model, without a recipe",
    )
    others.add_argument(
        "--from-mteb",
        action="append",
        metavar="[NAME=]DIR",
        help="a row of what mteb wrote of a sentence encoder; once for each model, without a recipe",
    )


def table_of(options: argparse.Namespace, note: Note) -> Table:
    """The scores that the command's options ask for.

    Raises:
        AdaRankError: anything wrong with recipe, data, outputs or files.
    """
    other = "--from-lm-eval" if options.from_lm_eval else "--from-mteb" if options.from_mteb else ""
    if other and options.recipe is not None:
        raise RecipeError(f"{options.recipe}: {other} needs no recipe: its tasks are those that were measured. Leave the recipe out.")  # fmt: skip
    if other and options.metric is not None:
        raise RecipeError(f"--metric {options.metric}: {other} reads what was measured, by its own metrics. Leave --metric out.")  # fmt: skip
    if options.from_lm_eval:
        from adarank.workflow.lm_eval import read_lm_eval

        return read_lm_eval(options.from_lm_eval)
    if options.from_mteb:
        from adarank.workflow.mteb import read_mteb

        return read_mteb(options.from_mteb)
    if options.recipe is None:
        raise RecipeError("evaluate: no recipe is given. Give a recipe, or --from-lm-eval or --from-mteb and a path.")
    from adarank.workflow.evaluate import evaluate

    return evaluate(options.recipe, options.outputs, options.split, note, options.per_class, options.metric)
