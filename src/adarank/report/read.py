"""What a page is made of: an output's record and masks, as far as they are there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adarank.errors import AdaRankError, CheckpointError
from adarank.io.files import read_json
from adarank.io.hub import local_path
from adarank.io.output_folder import RECORD, is_ours
from adarank.spectral.mask_file import FILE as MASKS
from adarank.spectral.mask_file import MaskFile


@dataclass(frozen=True)
class Output:
    """One output of a page.

    Attributes:
        record: what its record holds; empty for a merge that has not ended.
        masks: its masks and λ; None if it has none.
        note: why record or masks are not there, in a sentence; empty if they are.
    """

    name: str
    record: Mapping[str, Any]
    masks: MaskFile | None = None
    note: str = ""


def read_output(out: str | Path) -> Output:
    """An output's record and masks; of a merge that has not ended a sentence.

    Raises:
        CheckpointError: there is no output and none in the making, or its record cannot be read.
    """
    folder = local_path(out)
    name = folder.resolve().name
    if not (folder / RECORD).is_file():
        if not folder.exists() and is_ours(folder.parent / f".{folder.name}.state"):
            return Output(name, {}, note="This merge has not ended: there is a saved state, and no output yet. "
                          "The same merge command goes on with it.")  # fmt: skip
        raise CheckpointError(f"{folder}: no {RECORD}, so there is nothing to show. Give a folder that merge wrote.")
    record = read_json(folder / RECORD)
    if not (folder / MASKS).exists():
        return Output(name, record)
    try:
        return Output(name, record, MaskFile.load(folder / MASKS))
    except AdaRankError as error:
        return Output(name, record, note=f"The masks file cannot be read. {error}")
