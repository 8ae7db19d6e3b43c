"""An output's card with the scores that were measured afterwards."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adarank.errors import CheckpointError, DataError, OutputError, itemise
from adarank.io.files import read_json
from adarank.io.hub import local_path
from adarank.io.lock import resolved
from adarank.io.output_folder import RECORD, differences, read_list
from adarank.io.writer import atomic_folder, write_record
from adarank.outputs.card import write_card
from adarank.settings import nearest

_REFERENCES = ("experts", "base")


def score_card(out: str | Path, scores: Mapping[str, Any], row: str | None = None) -> dict[str, Any]:
    """Put scores into an output's model card and its record; all its other files stay as they are.

    Arguments:
        out: a folder that `merge` wrote, unchanged since.
        scores: what `adarank evaluate --json` printed, as data.
        row: the output's row in it; by default the one of its path, or the only one that is no reference.

    Returns:
        The record, with `scores`: name, split, protocol, and of each task metric, score, the expert's score, inputs.

    Raises:
        CheckpointError: it has no record.
        DataError: `scores` are something else, or have no such row.
        OutputError: files of the output were changed, a card that was edited among them.

    Example:
        table = adarank.evaluate_recipe("recipe.yaml", ["merged"])
        adarank.score_card("merged", table.plain())
    """
    folder = local_path(out)
    record = _record(folder)
    record["scores"] = {"name": folder.resolve().name, **_of_row(scores, folder, row)}
    with atomic_folder(resolved(folder), force=True) as new:
        _take(folder, new, record["files"])
        write_card(new, record)
        write_record(new, record)
    return record


def _record(folder: Path) -> dict[str, Any]:
    if not (folder / RECORD).is_file():
        raise CheckpointError(f"{folder}: no {RECORD}. Give a folder that merge wrote.")
    listed = read_list(folder / RECORD)
    if listed is None:
        raise OutputError(f"{folder}: its {RECORD} lists no files (an older version wrote it). Merge again.")
    problems = differences(folder, listed)
    if problems:
        remedy = "Move them elsewhere, put the scores in, and bring them back."
        raise OutputError(itemise(f"{folder}: files that were added or changed since the merge:", problems, remedy))
    record: dict[str, Any] = read_json(folder / RECORD)
    if not isinstance(record.get("plan"), dict) and not isinstance(record.get("extracted"), dict):
        raise CheckpointError(
            f"{folder}: no merge, so it has no card (by its {RECORD}). Give a folder that merge wrote."
        )
    return record


def _take(folder: Path, new: Path, files: Mapping[str, Any]) -> None:
    """The same files in another folder: the very same, where the file system can; else copies."""
    for name in files:
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(folder / name, new / name)
        except OSError:  # a file system without them
            shutil.copy(folder / name, new / name)


def _of_row(scores: Mapping[str, Any], folder: Path, row: str | None) -> dict[str, Any]:
    try:
        rows, counts, metrics = scores["rows"], scores["counts"], scores.get("metrics", {})
        name = _row(list(rows), folder, row)
        experts = rows.get("experts", {})
        tasks = {
            task: {
                "metric": str(metrics.get(task, "accuracy")),
                "score": float(rows[name][task]),
                "expert": float(experts[task]) if task in experts else None,
                "inputs": int(count),
            }
            for task, count in counts.items()
        }
        note = name.partition(" [")[2].rstrip("]")
        protocol = f"{scores['protocol']}, {note}" if note and note != scores["protocol"] else str(scores["protocol"])
        return {"split": str(scores["split"]), "protocol": protocol, "tasks": tasks}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"scores: not what adarank evaluate --json prints ({type(error).__name__}: {error}). Give a file with that."
        ) from None


def _row(rows: list[str], folder: Path, given: str | None) -> str:
    """Which row is the output's."""
    if given is not None:
        if given not in rows:
            raise DataError(f"scores: no row '{given}'.{nearest(given, rows)}")
        return given
    outputs = [name for name in rows if name not in _REFERENCES]
    same = [name for name in outputs if Path(name.partition(" [")[0]).resolve() == folder.resolve()] or outputs
    if len(same) != 1:
        raise DataError(f"scores: none of the rows {', '.join(rows)} is of {folder} for certain. Name it (--row).")
    return same[0]
