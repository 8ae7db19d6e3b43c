"""The checkpoints that a recipe names, opened."""

from __future__ import annotations

from collections.abc import Mapping

from adarank.errors import CheckpointError, Problems, itemise
from adarank.io.checkpoint import Checkpoint, check_any
from adarank.io.dequantise import Dequantised
from adarank.io.hub import resolve, resolve_without_download
from adarank.io.quantised import quantisation, refuse_quantised
from adarank.recipe.draft import Draft


def open_checkpoints(
    draft: Draft, problems: Problems, stages: Mapping[str, Checkpoint]
) -> tuple[Checkpoint | None, dict[str, Checkpoint]]:
    """Those of the recipe's base and experts that can be read and are not quantised, or turned into floats.

    For a recipe that will not run nothing is downloaded.

    Arguments:
        stages: name -> what an earlier stage of the recipe gave.
    """
    recipe, here = draft.recipe, Problems()
    find = resolve if draft.sound else resolve_without_download

    def opened(reference: str) -> list[Checkpoint]:
        if reference in stages:
            return [stages[reference]]
        with here.noted():
            path = find(reference, recipe.folder)
            if path is None:
                return []
            checkpoint = Checkpoint(path, reference)
            check_any(checkpoint)
            return [Dequantised(checkpoint) if recipe.dequantize and quantisation(checkpoint) else checkpoint]
        return []

    base = opened(recipe.base_model) if recipe.base_model else []
    experts = {task: each[0] for task, entry in recipe.experts.items() if (each := opened(entry.model))}
    with problems.noted():
        texts = [str(error) for error in here.errors]
        if texts:
            heading = f"{len(texts)} checkpoints cannot be read:"
            raise CheckpointError(texts[0] if len(texts) == 1 else itemise(heading, texts))
    if "dequantize" not in draft.left_out:
        with problems.noted():
            refuse_quantised([*base, *experts.values()])
    floats = {task: checkpoint for task, checkpoint in experts.items() if quantisation(checkpoint) is None}
    return next((checkpoint for checkpoint in base if quantisation(checkpoint) is None), None), floats
