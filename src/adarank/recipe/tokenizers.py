"""Whose tokenizer a merge comes with, as mergekit's `tokenizer` and `tokenizer_source` say it."""

from __future__ import annotations

from collections.abc import Mapping

from adarank.alignment.selection import is_table
from adarank.errors import MismatchError, RecipeError, itemise
from adarank.io.checkpoint import Checkpoint
from adarank.io.hub import same_model
from adarank.io.side_files import tokenizer_files
from adarank.io.vocabulary import Vocabulary, comparable, fingerprint, read_vocabulary
from adarank.models.compatibility import labelled
from adarank.models.configurations import few
from adarank.recipe.schema import Recipe

_REMEDY = "Rows of different tokens are not brought together here: give models of one vocabulary, or resize their tables and tokenizers alike first."


def tokenizer_source(recipe: Recipe, base: Checkpoint | None, experts: Mapping[str, Checkpoint]) -> Checkpoint | None:
    """The model whose tokenizer's files are written; None if the recipe names none, or a base that has none.

    `union` is the tokenizer of the first model that has every token of every model.

    Raises:
        RecipeError: the source is none of the recipe's models, or has no tokenizer.
        MismatchError: the vocabularies differ, so that tables would have to be resized; it names the tokens.
        CheckpointError: a file of a vocabulary is damaged.
    """
    source = recipe.tokenizer_of
    if source is None:
        return None
    members = labelled(base, experts)
    chosen = None if source == "union" else _named(source, recipe, base, experts)
    read = _vocabularies(members)
    whole = next((label for label, own in read.items() if all(other.ids.items() <= own.ids.items() for other in read.values())), None)  # fmt: skip
    if read and (_resized(members) or (chosen is None and whole is None)):
        lines = _differences(read)
        if lines:
            raise MismatchError(itemise(f"tokenizer: '{source}' was asked for, and the vocabularies differ:", lines, _REMEDY))  # fmt: skip
    if chosen is None:
        chosen = members[whole] if whole else None
    return chosen if chosen is not None and tokenizer_files(chosen.side_files()) else None


def _named(source: str, recipe: Recipe, base: Checkpoint | None, experts: Mapping[str, Checkpoint]) -> Checkpoint:
    """The model that a source names: `base`, or the path or hub id of one of the recipe's models."""
    if source == "base":
        return base or next(iter(experts.values()))
    references = {entry.model: experts[task] for task, entry in recipe.experts.items()}
    references |= {recipe.base_model: base} if recipe.base_model and base else {}
    chosen = next((each for name, each in references.items() if same_model(source, name, recipe.folder)), None)
    if chosen is None:
        raise RecipeError(f"tokenizer: the source '{source}' is none of the recipe's models. Give base, union, or one of {', '.join(references)}.")  # fmt: skip
    if not tokenizer_files(chosen.side_files()):
        raise RecipeError(f"tokenizer: the source '{source}' ({chosen.folder}) has no tokenizer. Copy its files there, or give another source.")  # fmt: skip
    return chosen


def _vocabularies(members: Mapping[str, Checkpoint]) -> dict[str, Vocabulary]:
    """The vocabularies that compare, by model: those of whole folders, in files of one kind. Equal files are read once."""
    folders = {label: member.folder for label, member in members.items() if member.path.is_dir()}
    holders, shared = comparable(folders)
    read: dict[str, Vocabulary] = {}
    known: dict[tuple[tuple[str, str], ...], Vocabulary] = {}
    for label in holders if shared else ():
        mark = tuple(sorted(fingerprint(folders[label]).items()))
        vocabulary = known.get(mark) or read_vocabulary(folders[label], shared)
        if vocabulary is not None:
            known[mark] = read[label] = vocabulary
    return read


def _resized(members: Mapping[str, Checkpoint]) -> bool:
    """Whether embedding tables of one name have different numbers of rows."""
    rows: dict[str, set[int]] = {}
    for member in members.values():
        for name, info in member.tensors.items():
            if len(info.shape) == 2 and is_table(name):
                rows.setdefault(name, set()).add(info.shape[0])
    return any(len(counts) > 1 for counts in rows.values())


def _differences(read: Mapping[str, Vocabulary]) -> list[str]:
    """How each vocabulary differs from the first, in sentences."""
    (first, start), *others = read.items()
    lines = []
    for label, own in others:
        added = [repr(token) for token in own.ids if token not in start.ids]
        lacked = [repr(token) for token in start.ids if token not in own.ids]
        moved = [f"{t!r} ({start.ids[t]}, not {n})" for t, n in own.ids.items() if start.ids.get(t, n) != n]
        lines += [f"{label} has {len(added)} token(s) that {first} has not: {few(added)}"] if added else []
        lines += [f"{label} lacks {len(lacked)} token(s) of {first}: {few(lacked)}"] if lacked else []
        lines += [f"{label} has {len(moved)} token(s) with other ids than {first}: {few(moved)}"] if moved else []
    return lines
