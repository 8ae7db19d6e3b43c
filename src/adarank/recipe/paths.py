"""The files and folders that a recipe names: where they are, and how a record names them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from adarank.io.hub import split_adapter
from adarank.recipe.job import Job
from adarank.recipe.schema import Recipe

# Keys of a recipe, at any depth, whose text may name a file or folder.
_KEYS = frozenset(
    {"base_model", "model", "data", "adapt", "select", "test", "dataset", "classes", "templates", "head_file", "masks"}
)


def portable(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain data for a record: absolute paths as seen from the recipe's folder, so that it names no place
    of this machine, and the recipe still merges from there."""

    def relative(text: str) -> str:
        model, adapter = split_adapter(text, recipe.folder) if "\0" not in text else (text, None)
        if adapter is not None and os.path.isabs(model) | os.path.isabs(adapter):
            return f"{relative(model)}+{relative(adapter)}"
        if not os.path.isabs(text) or not os.path.exists(text):
            return text
        try:
            return Path(os.path.relpath(text, recipe.folder.resolve())).as_posix()
        except ValueError:  # on another drive
            return text

    content: dict[str, Any] = _mapped(_plain(recipe), relative)
    return content


def read_paths(job: Job) -> list[Path]:
    """Whatever a run of the job reads and that is on this disk: checkpoints with every file of theirs, data, masks,
    lists, and the folder of the recipe itself."""
    recipe = job.recipe
    named = [recipe.folder / Path(text).expanduser() for text in _named(_plain(recipe))]
    checkpoints = [*([job.base] if job.base else []), *job.experts.values()]
    files = [file for checkpoint in checkpoints for file in (checkpoint.path, *checkpoint.files)]
    return [path for path in (recipe.folder, *named, *files) if _exists(path)]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a text that is no path
        return False


def _plain(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Plain data with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value


def _named(value: Any) -> Iterator[str]:
    """The texts of plain data under keys that name paths."""
    for key, item in value.items() if isinstance(value, dict) else ():
        if isinstance(item, str) and key in _KEYS:
            yield item
        yield from _named(item)
    for item in value if isinstance(value, list) else ():
        yield from _named(item)
