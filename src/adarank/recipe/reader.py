"""From a YAML file, or what would be in it, to a validated recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from adarank.errors import RecipeError, itemise
from adarank.io.hub import local_path
from adarank.io.parsing import parse_documents
from adarank.recipe.checks import check
from adarank.recipe.mergekit import NOT_DONE, whole_models
from adarank.recipe.registry import METHODS
from adarank.recipe.schema import Recipe
from adarank.recipe.sizes import shard_bytes
from adarank.recipe.stages import parse_stages
from adarank.settings import parse

RecipeLike = Recipe | str | Path | Mapping[str, Any]
"""A recipe, its file, or what would be in its file."""


def load_recipe(given: RecipeLike) -> Recipe:
    """Read and validate a recipe.

    Arguments:
        given: its file; or a mapping with the same keys, with paths from the working folder. A `Recipe` is returned as it is.

    Returns:
        The recipe, with defaults filled in.

    Raises:
        RecipeError: it is missing, not YAML, or has problems; all of them are listed.

    Example:
        recipe = adarank.load_recipe("recipe.yaml")
        print(recipe.merge_method, list(recipe.experts))
    """
    if isinstance(given, Recipe):
        return given
    if isinstance(given, Mapping):
        return parse_recipe(given, Path.cwd())
    path = Path(given)
    local_path(path, kind=RecipeError)
    documents = [_extended(path, values, ()) for values in _read_yaml(path, ())]
    folder = path.resolve().parent
    if len(documents) == 1:
        return parse_recipe(documents[0], folder, str(path))
    return parse_stages(documents, lambda values, where: parse_recipe(values, folder, where), str(path))


def _read_yaml(path: Path, inside: tuple[Path, ...]) -> list[dict[str, Any]]:
    """The mappings in a recipe file: one, or one for each stage."""
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe. Give a YAML file.")
    if path.resolve() in inside:
        raise RecipeError(f"{path}: extends itself, by way of {inside[-1]}. Remove one of the extends lines.")
    try:
        documents = parse_documents(path.read_text(encoding="utf-8")) or [None]
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise RecipeError(f"{path}: not readable YAML ({' '.join(str(error).split())}).") from None
    for values in documents:
        if not isinstance(values, dict):
            raise RecipeError(f"{path}: a mapping of settings was needed, got {type(values).__name__}.")
    return documents


def _extended(path: Path, values: dict[str, Any], inside: tuple[Path, ...]) -> dict[str, Any]:
    """What a file says; `extends: other.yaml` gives the keys that it does not have itself."""
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if (
        not isinstance(parent, str)
        or "\0" in parent
        or (path.parent / parent).resolve().parent != path.resolve().parent
    ):
        raise RecipeError(f"{path}: extends must name a recipe in the same folder, got {parent!r}.")
    further = (*inside, path.resolve())
    of_parent = _read_yaml(path.parent / parent, further)
    if len(of_parent) > 1:
        raise RecipeError(f"{path}: extends {parent}, which has {len(of_parent)} stages. Only a recipe of one is extended.")  # fmt: skip
    return {**_extended(path.parent / parent, of_parent[0], further), **values}


def parse_recipe(values: Mapping[str, Any], folder: Path, where: str = "recipe") -> Recipe:
    """Validate a recipe given as a mapping."""
    asks_nothing = {*NOT_DONE, "slices", "models"}
    values = whole_models({key: value for key, value in values.items() if value is not None or key not in asks_nothing})
    refused = [f"'{key}' is not supported. {reason}" for key, reason in NOT_DONE.items() if key in values]
    if refused:
        raise RecipeError(f"{where}: {refused[0]}" if len(refused) == 1 else itemise(f"{where}:", refused))
    recipe = parse(Recipe, {**values, "folder": folder}, where)
    if recipe.device == "auto":
        recipe = recipe.model_copy(update={"device": "cuda" if torch.cuda.is_available() else "cpu"})
    else:
        _check_device(recipe.device, where)
    METHODS.named(recipe.merge_method, f"{where}: unknown merge_method")
    check(recipe, where)
    return recipe


def with_shards(given: RecipeLike, size: str | None) -> Recipe:
    """A recipe with another `max_shard_size`, where one is given.

    Raises:
        RecipeError: as `load_recipe`, and of a size that is none.
    """
    recipe = load_recipe(given)
    if size is None:
        return recipe
    try:
        changed = recipe.model_copy(update={"max_shard_size": shard_bytes(int(size) if size.isdigit() else size)})
    except ValueError as error:
        raise RecipeError(f"--max-shard-size: {error} (got '{size}').") from None
    check(changed, str(given))
    return changed


def _check_device(name: str, where: str) -> None:
    try:
        kind, number = torch.device(name).type, torch.device(name).index
    except RuntimeError:
        raise RecipeError(f"{where}: device: '{name}' is not a valid device. Give auto, cpu, cuda or cuda:N.") from None
    if kind not in ("cpu", "cuda"):
        raise RecipeError(f"{where}: device: '{name}' is not supported. Give auto, cpu, cuda or cuda:N.")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and (number or 0) >= there:
        raise RecipeError(
            f"{where}: device: '{name}' was given, and PyTorch sees {there} CUDA device(s). Give auto or cpu."
        )
