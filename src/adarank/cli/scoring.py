"""The table that `evaluate` prints: of a recipe's models, or of what lm-evaluation-harness measured."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from adarank.errors import RecipeError
from adarank.io.record import Note

if TYPE_CHECKING:
    from adarank.workflow.scores import Table


def add_from_lm_eval(command: argparse.ArgumentParser) -> None:
    """The option that reads what another program measured."""
    command.add_argument(
        "--from-lm-eval",
        action="append",
        metavar="[NAME=]JSON",
        help="a row of what lm-evaluation-harness wrote; once for each model, without a recipe",
    )


def table_of(options: argparse.Namespace, note: Note) -> Table:
    """The scores that the command's options ask for.

    Raises:
        AdaRankError: anything wrong with recipe, data, outputs or files.
    """
    if options.from_lm_eval:
        if options.recipe is not None:
            raise RecipeError(f"{options.recipe}: --from-lm-eval needs no recipe: its tasks are those of the harness. Leave the recipe out.")  # fmt: skip
        from adarank.workflow.lm_eval import read_lm_eval

        return read_lm_eval(options.from_lm_eval)
    if options.recipe is None:
        raise RecipeError("evaluate: no recipe is given. Give a recipe, or --from-lm-eval and a file.")
    from adarank.workflow.evaluate import evaluate

    return evaluate(options.recipe, options.outputs, options.split, note, options.per_class)
