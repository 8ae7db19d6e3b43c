"""From a YAML file, or what would be in it, to a validated recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from adarank.errors import Problems, RecipeError, itemise, listed
from adarank.io.hub import local_path
from adarank.io.parsing import parse_documents
from adarank.recipe.checks import check
from adarank.recipe.draft import METHOD, Draft, salvaged, with_stand_in
from adarank.recipe.mergekit import NOT_DONE, beside_parameters, whole_models
from adarank.recipe.registry import METHODS
from adarank.recipe.schema import Recipe
from adarank.recipe.sizes import bytes_of
from adarank.recipe.stages import draft_stages

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
    problems = Problems()
    draft = read_draft(given, problems)
    problems.refuse()
    assert draft is not None
    return draft.recipe


def read_draft(given: RecipeLike, problems: Problems) -> Draft | None:
    """A recipe as far as it can be read; what is wrong with it is noted. None if nothing can be.

    Arguments:
        given: as for `load_recipe`.
    """
    if isinstance(given, Recipe):
        return Draft.of(given)
    with problems.noted():
        if isinstance(given, Mapping):
            return draft_recipe(given, Path.cwd(), "recipe", problems)
        path = Path(given)
        local_path(path, kind=RecipeError)
        documents = [_extended(path, values, ()) for values in _read_yaml(path, ())]
        folder = path.resolve().parent
        if len(documents) == 1:
            return draft_recipe(documents[0], folder, str(path), problems)

        def read(values: Mapping[str, Any], where: str, problems: Problems) -> Draft | None:
            return draft_recipe(values, folder, where, problems)

        return draft_stages(documents, read, str(path), problems)
    return None


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
    problems = Problems()
    draft = draft_recipe(values, folder, where, problems)
    problems.refuse()
    assert draft is not None
    return draft.recipe


def draft_recipe(values: Mapping[str, Any], folder: Path, where: str, problems: Problems) -> Draft | None:
    """A recipe given as a mapping, as far as it can be read; what is wrong with it is noted as one error."""
    here = Problems()
    draft = None
    with here.noted():
        asks_nothing = {*NOT_DONE, "slices", "models"}
        whole = whole_models({k: value for k, value in values.items() if value is not None or k not in asks_nothing})
        with here.noted():
            _refuse_not_done(whole, where)
        passed_over = beside_parameters(whole)
        done = {key: value for key, value in whole.items() if key not in {*NOT_DONE, *passed_over}}
        draft = salvaged({**done, "folder": folder}, where, here)
    if draft is not None:
        draft = replace(draft, recipe=draft.recipe.beside(passed_over))
        draft = _checked(draft, where, here)
    if len(here.errors) > 1:
        texts = [text.removeprefix(f"{where}: ") for error in here.errors for text in listed(error)]
        here.errors = [RecipeError(itemise(f"{where}: {len(texts)} problem(s).", texts))]
    problems.errors += here.errors
    return draft and replace(draft, sound=not here.errors)


def _refuse_not_done(values: Mapping[str, Any], where: str) -> None:
    refused = [f"'{key}' is not supported. {reason}" for key, reason in NOT_DONE.items() if key in values]
    if refused:
        raise RecipeError(f"{where}: {refused[0]}" if len(refused) == 1 else itemise(f"{where}:", refused))


def _checked(draft: Draft, where: str, problems: Problems) -> Draft:
    """A draft with its device, its parts checked against each other; with another method where it names none."""
    recipe = draft.recipe
    if recipe.device != "auto":
        with problems.noted():
            _check_device(recipe.device, where)
    if recipe.device == "auto" or problems.errors:
        recipe = recipe.model_copy(update={"device": "cuda" if torch.cuda.is_available() else "cpu"})
    if METHOD not in draft.left_out:
        known = len(problems.errors)
        with problems.noted():
            METHODS.named(recipe.merge_method, f"{where}: unknown merge_method")
        if len(problems.errors) > known:
            return replace(draft, recipe=with_stand_in(recipe), left_out=draft.left_out | {METHOD})
        with problems.noted():
            check(recipe, where, draft.left_out)
    return replace(draft, recipe=recipe)


def with_shards(given: RecipeLike, size: str | None) -> RecipeLike:
    """A recipe with another `max_shard_size`, where one is given. What is wrong with the recipe itself is left to its reader.

    Raises:
        RecipeError: the size is none, or is for a method that writes no single model.
    """
    limit = bytes_of("--max-shard-size", size)
    if limit is None:
        return given
    problems = Problems()
    draft = read_draft(given, problems)
    if draft is None or problems.errors:
        return given
    changed = draft.recipe.model_copy(update={"max_shard_size": limit})
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
