"""Whose tokenizer a merge comes with, and where the rows of its tables come from, as mergekit's `tokenizer` says it.

The rules are mergekit's, as its documentation has them and as they were measured (docs/recipes.md): a row that a model
has is its own; one that it lacks is the base's, where there is a base that has it, else the mean of all that have it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adarank.alignment.rows import Filled, RowPlan, rows_by_token
from adarank.errors import MismatchError, RecipeError, itemise
from adarank.io.checkpoint import Checkpoint
from adarank.io.hub import same_model
from adarank.io.side_files import tokenizer_files
from adarank.io.vocabulary import VocabularyReader, comparable, files_of, read_vocabulary
from adarank.models.compatibility import labelled
from adarank.models.configurations import few
from adarank.models.text import stored_tokenizer
from adarank.models.union import ids_of, union
from adarank.models.vocabulary_tables import VocabularyTables, vocabulary_tables
from adarank.recipe.schema import ModelToken, Recipe, TokenizerSettings, Zero
from adarank.recipe.token_ids import TokenIds, resized

_TASKS = "Rows are brought together in merges without tasks: a task's inputs are encoded with its expert's tokenizer, whose ids would be other rows. Give experts of one vocabulary, or no tasks."
_NETWORKS = "'{name}' writes a network for each task, with its expert's tokenizer, whose ids would be other rows. Give models of one vocabulary, or a method that writes one model."
_ROWLESS = "Give models whose tables have these rows, name their source under tokenizer: tokens, or remove them from the tokenizer."


@dataclass(frozen=True)
class OutputTokenizer:
    """The tokenizer that is written.

    Attributes:
        source: the model whose files these are.
        made: a tokenizer of `transformers` to be saved in their place, where tokens were added.
        token_ids: brings ids in configurations to those of the output; None where they are as in the base.
    """

    source: Checkpoint
    made: Any = None
    token_ids: TokenIds | None = None


@dataclass(frozen=True)
class Tokens:
    """A recipe's models and the tokenizer that it names.

    Attributes:
        base, experts: the models; as models of one vocabulary where rows are brought together.
        tokenizer: None if the recipe names none, or a model that has none.
        aligned: rows are brought together.
        notes: what happened to them, in sentences.
    """

    base: Checkpoint | None
    experts: dict[str, Checkpoint]
    tokenizer: OutputTokenizer | None = None
    aligned: bool = False
    notes: tuple[str, ...] = ()

    @property
    def output_tokens(self) -> Collection[str]:
        """The tokens of the tokenizer that is written, as far as its files tell."""
        if self.tokenizer and self.tokenizer.made is not None:
            return frozenset(self.tokenizer.made.get_vocab())
        root = self.base or next(iter(self.experts.values()))
        vocabulary = read_vocabulary((self.tokenizer.source if self.tokenizer else root).folder)
        return vocabulary.ids.keys() if vocabulary else ()


def settle_tokens(
    recipe: Recipe, base: Checkpoint | None, experts: Mapping[str, Checkpoint], reader: VocabularyReader
) -> Tokens:
    """The models with rows by token, as far as the recipe asks for it; as they are where the vocabularies are equal.

    Reads headers and the files of tokenizers.

    Raises:
        RecipeError: a source is none of the recipe's models, or has no tokenizer or token.
        MismatchError: rows would have to be brought together, and cannot be; it names the tokens.
        CheckpointError: a file of a vocabulary is damaged.
    """
    settings = recipe.tokenizer_settings
    if settings is None:
        return Tokens(base, dict(experts))
    members = labelled(base, experts)
    sources = _Sources(recipe, members)
    source = None if settings.source == "union" else sources.named(settings.source, "source")
    first = next(iter(members))
    tables = {label: vocabulary_tables(member) for label, member in members.items()}
    ids = _vocabularies(members, tables, reader)
    one_model = not (recipe.tasks or recipe.kind.in_use)
    if not _to_be_moved(settings, ids, tables, source or first, keeps_padding=not one_model):
        chosen = members[source or first]
        return Tokens(base, dict(experts), OutputTokenizer(chosen) if tokenizer_files(chosen.side_files()) else None)
    if not one_model:
        why = _TASKS if recipe.tasks else _NETWORKS.format(name=recipe.merge_method)
        lines = [*_differences(ids, tables), *(f"{key} is given" for key in ("tokens", "pad_to_multiple_of") if getattr(settings, key))]  # fmt: skip
        raise MismatchError(itemise(f"tokenizer: '{settings.source}' was asked for, and the vocabularies differ:", lines, why))  # fmt: skip
    return _Alignment(settings, sources, tables, source, reader).tokens(base, experts)


class _Sources:
    """The recipe's models by their references."""

    def __init__(self, recipe: Recipe, members: Mapping[str, Checkpoint]) -> None:
        self.members, self._folder = members, recipe.folder
        self.based = recipe.base_model is not None
        self._references = {f"expert '{task}'": entry.model for task, entry in recipe.experts.items()}
        if recipe.base_model is not None:
            self._references = {"the base": recipe.base_model, **self._references}

    def named(self, source: str, key: str) -> str:
        """The label of the model that a source names: `base`, or the path or hub id of one of the recipe's models."""
        if source == "base" and key == "source":
            return next(iter(self.members))
        label = next((each for each, name in self._references.items() if same_model(source, name, self._folder)), None)
        if label is None:
            listed = ", ".join(dict.fromkeys(self._references.values()))
            words = "Give base, union, or one of" if key == "source" else "Give one of"
            raise RecipeError(f"tokenizer: the {key} '{source}' is none of the recipe's models. {words} {listed}.")
        if not tokenizer_files(self.members[label].side_files()):
            raise RecipeError(f"tokenizer: the {key} '{source}' ({self.members[label].folder}) has no tokenizer. Copy its files there, or give another source.")  # fmt: skip
        return label


def _vocabularies(
    members: Mapping[str, Checkpoint], tables: Mapping[str, VocabularyTables], reader: VocabularyReader
) -> dict[str, dict[str, int]]:
    """Token -> id of the models that have a tokenizer, as far as it has rows: from files of one kind, if all have them.

    Numbers of pieces may not be ids, and tell equal vocabularies all the same.
    """
    folders = {label: member.folder for label, member in members.items() if member.path.is_dir()}
    holders, kind = comparable(folders)
    ids: dict[str, dict[str, int]] = {}
    for label in holders:
        vocabulary = reader.read(folders[label], kind) if kind else None
        known = vocabulary.ids if vocabulary else stored_tokenizer(folders[label]).get_vocab()
        rows = tables[label].rows
        ids[label] = {token: row for token, row in known.items() if row < rows or not rows}
    return ids


def _to_be_moved(
    settings: TokenizerSettings,
    ids: Mapping[str, Mapping[str, int]],
    tables: Mapping[str, VocabularyTables],
    source: str,
    keeps_padding: bool,
) -> bool:
    """Whether any model's tables become others."""
    rows = {each.rows for each in tables.values() if each.rows}
    if not rows or not (ids or settings.tokens or settings.pad_to_multiple_of):
        return False
    start = ids.get(source, next(iter(ids.values()), {}))
    if len(rows) > 1 or settings.tokens or any(other != start for other in ids.values()):
        return True
    if settings.pad_to_multiple_of or (source in ids and not keeps_padding):
        return rows != {_rounded(max(start.values(), default=-1) + 1, settings.pad_to_multiple_of)}
    return False


def _rounded(rows: int, multiple: int | None) -> int:
    return -(-rows // multiple) * multiple if multiple else rows


def _differences(ids: Mapping[str, Mapping[str, int]], tables: Mapping[str, VocabularyTables]) -> list[str]:
    """How each vocabulary differs from the first, in sentences."""
    first = next(iter(ids), "")
    start: Mapping[str, int] = ids.get(first, {})
    lines = []
    for label, other in list(ids.items())[1:]:
        added = [repr(token) for token in other if token not in start]
        lacked = [repr(token) for token in start if token not in other]
        moved = [f"{t!r} ({start[t]}, not {n})" for t, n in other.items() if start.get(t, n) != n]
        lines += [f"{label} has {len(added)} token(s) that {first} has not: {few(added)}"] if added else []
        lines += [f"{label} lacks {len(lacked)} token(s) of {first}: {few(lacked)}"] if lacked else []
        lines += [f"{label} has {len(moved)} token(s) with other ids than {first}: {few(moved)}"] if moved else []
    rows = {label: each.rows for label, each in tables.items() if each.rows}
    if len(set(rows.values())) > 1:
        lines.append(f"tables have {', '.join(f'{n} rows in {label}' for label, n in rows.items())}")
    return lines


class _Alignment:
    """Brings the rows of all models' tables together, by token."""

    def __init__(
        self,
        settings: TokenizerSettings,
        sources: _Sources,
        tables: Mapping[str, VocabularyTables],
        source: str | None,
        reader: VocabularyReader,
    ) -> None:
        self._settings, self._sources, self._tables = settings, sources, tables
        self._members = sources.members
        self._first = next(iter(self._members))
        self._source = source or self._first
        self._refuse_tables()
        loaded = self._loaded(reader)
        self._ids = {label: ids_of(tokenizer, tables[label].rows) for label, tokenizer in loaded.items()}
        others = [] if source else [(loaded[m], tables[m].rows) for m in self._members if m != self._first]
        self._made = union(self._members[self._source].folder, others, settings.tokens or {})
        self._out: dict[str, int] = self._made.get_vocab()
        self._grown = self._out != loaded[self._source].get_vocab()
        self._size = _rounded(max(self._out.values()) + 1, settings.pad_to_multiple_of)
        self._default = self._defaults()

    def tokens(self, base: Checkpoint | None, experts: Mapping[str, Checkpoint]) -> Tokens:
        """The models of one vocabulary, their tokenizer, and what is said of them."""
        moved = [label for label, each in self._tables.items() if each.rows]
        plans = {label: self._plan(label) for label in moved}
        made: dict[str, Checkpoint] = dict(rows_by_token({m: self._members[m] for m in moved}, {m: self._tables[m].names for m in moved}, plans))  # fmt: skip
        for label, checkpoint in made.items():
            checkpoint.config = resized(checkpoint.config, self._tables[label].rows, self._size)
        every = {**self._members, **made}
        token_ids = TokenIds.between(self._ids[self._first], self._out)
        tokenizer = OutputTokenizer(self._members[self._source], self._made if self._grown else None, token_ids)
        return Tokens(
            every["the base"] if base else None,
            {task: every[f"expert '{task}'"] for task in experts},
            tokenizer,
            True,
            (*self._notes(), *self._of_settings(token_ids)),
        )

    def _refuse_tables(self) -> None:
        problems = [problem for each in self._tables.values() for problem in each.problems]
        if problems:
            raise MismatchError(itemise("tokenizer: rows cannot be brought together:", problems, "Merge such models with one vocabulary and equal tables, without tokenizer."))  # fmt: skip

    def _loaded(self, reader: VocabularyReader) -> dict[str, Any]:
        """The tokenizer of each model; one that has none is read with the first's, if its tables have as many rows."""
        known: dict[tuple[tuple[str, str], ...], Any] = {}
        loaded: dict[str, Any] = {}
        without = []
        for label, member in self._members.items():
            if not (member.path.is_dir() and files_of(member.folder)):
                without.append(label)
                continue
            mark = reader.mark(member.folder)
            loaded[label] = known[mark] = known.get(mark) or stored_tokenizer(member.folder)
        lost = [label for label in without if label in (self._first, self._source) or self._tables[label].rows not in (0, self._tables[self._first].rows)]  # fmt: skip
        if lost:
            raise MismatchError(itemise("tokenizer: rows are brought together by token, and no tokenizer is beside the weights of", lost, "Copy its files there."))  # fmt: skip
        self._assumed = without
        return {label: loaded.get(label, loaded[self._first]) for label in self._members}

    def _defaults(self) -> dict[str, dict[str, int]]:
        """Token -> {model: row} of what takes the place of a row that a model lacks. All problems at once."""
        problems: list[str] = []
        chosen: dict[str, dict[str, int]] = {}
        for token, entry in (self._settings.tokens or {}).items():
            try:
                chosen[token] = self._configured(token, entry.source)
            except RecipeError as error:
                problems.append(str(error))
        if problems:
            raise RecipeError(problems[0] if len(problems) == 1 else itemise("tokenizer: tokens:", problems))
        for token in self._out:
            chosen.setdefault(token, self._holders(token)) if token not in chosen else None
        rowless = [repr(token) for token, rows in chosen.items() if not rows and token not in (self._settings.tokens or {})]  # fmt: skip
        if rowless:
            raise MismatchError(f"tokenizer: {len(rowless)} token(s) of the output have a row in no model: {few(rowless)}. {_ROWLESS}")  # fmt: skip
        return chosen

    def _holders(self, token: str) -> dict[str, int]:
        """The base, if there is one that has a token; else all models that have it, each once."""
        if self._sources.based and token in self._ids[self._first]:
            return {self._first: self._ids[self._first][token]}
        once = {self._members[m].path: m for m in reversed(list(self._members)) if token in self._ids[m]}
        return {label: self._ids[label][token] for label in self._members if label in once.values()}

    def _configured(self, token: str, source: str | ModelToken | Zero) -> dict[str, int]:
        """Where the recipe says that a token's row comes from; empty for zeros."""
        if isinstance(source, Zero):
            return {}
        reference = source if isinstance(source, str) else source.model
        label = self._sources.named(reference, f"source of token {token!r},")
        if isinstance(source, ModelToken) and source.token_id is not None:
            if source.token_id >= self._tables[label].rows:
                raise RecipeError(f"tokenizer: tokens: {token!r} is to be row {source.token_id} of {reference}, whose tables have {self._tables[label].rows}. Give another token_id.")  # fmt: skip
            return {label: source.token_id}
        wanted = token if isinstance(source, str) else str(source.token)
        if wanted not in self._ids[label]:
            raise RecipeError(f"tokenizer: tokens: {token!r} is to be {wanted!r} of {reference}, which has no such token. Give another source.")  # fmt: skip
        return {label: self._ids[label][wanted]}

    def _plan(self, label: str) -> RowPlan:
        """Where the rows of one model come from."""
        present = self._ids[label]
        forced = {token for token, entry in (self._settings.tokens or {}).items() if entry.force}
        kept = {
            number: present[token] for token, number in self._out.items() if token in present and token not in forced
        }
        groups: dict[tuple[str, ...], list[tuple[int, tuple[int, ...]]]] = {}
        for token, number in self._out.items():
            if number not in kept:
                rows = self._default[token]
                groups.setdefault(tuple(rows), []).append((number, tuple(rows.values())))
        filled = (
            Filled(
                _longs([n for n, _ in group]), {m: _longs([rows[i] for _, rows in group]) for i, m in enumerate(models)}
            )
            for models, group in groups.items()
        )
        return RowPlan(self._size, _longs(list(kept)), _longs(list(kept.values())), tuple(filled))

    def _notes(self) -> Iterator[str]:
        count, of_first = len(self._out), self._ids[self._first]
        new = [repr(token) for token in self._out if token not in of_first]
        lost = [repr(token) for token in of_first if token not in self._out]
        padding = self._size - count
        text = f"tokenizer: {count} tokens in tables of {self._size} rows" + (
            f", {padding} of them padding" if padding else ""
        )
        text += "; rows of padding are cut" if max(each.rows for each in self._tables.values()) > self._size else ""
        text += f"; {len(new)} new to {self._first}: {few(sorted(new))}" if new else ""
        text += f"; {len(lost)} of {self._first} left out: {few(sorted(lost))}" if lost else ""
        yield f"{text}."
        if self._assumed:
            yield f"tokenizer: {', '.join(self._assumed)} has none, and is read with that of {self._first}."
        everywhere = [repr(t) for t, entry in (self._settings.tokens or {}).items() if not entry.force and all(t in ids for ids in self._ids.values())]  # fmt: skip
        if everywhere:
            yield f"tokenizer: tokens without effect, as all models have them and force is not given: {few(everywhere)}."

    def _of_settings(self, token_ids: TokenIds | None) -> list[str]:
        """That config.json names other ids than the first model's, or a token that is left out."""
        if token_ids is None:
            return []
        lost = token_ids.lost(self._members[self._first].config)
        said = f"; of tokens that are left out, {', '.join(lost)} is {self._source}'s" if lost else ""
        return [f"tokenizer: ids in config.json and generation_config.json are the output's{said}."]


def _longs(numbers: Sequence[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)
