"""Whether equal names and shapes mean the same: rows of the same tokens, and tensors of the same function.

Names and shapes are what alignment sees. Two vocabularies of one size may number their tokens differently, and two
networks of one shape may compute different things of their tensors; neither average is a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from adarank.alignment.selection import is_table
from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.errors import MismatchError, itemise
from adarank.io.checkpoint import Checkpoint
from adarank.io.vocabulary import Vocabulary, VocabularyReader, comparable, files_of
from adarank.models.configurations import compare_configurations, compare_processors, few

Member = TypeVar("Member")
# Tokens that stand for nothing until a fine-tuning gives them a meaning.
_RESERVED = re.compile(r"^[<\[]\|?(un_?used|reserved|place_?holder|dummy|control_\d|extra_\d)", re.IGNORECASE)


def check_compatible(
    network: AlignedCheckpoints,
    base: Checkpoint | None,
    experts: Mapping[str, Checkpoint],
    by_token: bool = False,
    reader: VocabularyReader | None = None,
) -> list[str]:
    """Compare vocabularies and configurations wherever two members have them; returns notes on harmless differences.

    Arguments:
        by_token: tables have been brought to one vocabulary, so that the files' ids are not theirs.
        reader: what has read vocabularies already.

    Raises:
        MismatchError: ids stand for different tokens, or a setting that decides what shared tensors compute differs.
        CheckpointError: a file of a vocabulary or an image processor is damaged.
    """
    members = labelled(base, experts)
    of_settings, notes = compare_configurations(
        {name: member.config for name, member in members.items()}, _tied(network)
    )
    folders = {name: member.folder for name, member in members.items() if member.path.is_dir()}
    holders, rows = _tables(network)
    of_tokens, more = compare_vocabularies(
        {} if by_token else {name: folder for name, folder in folders.items() if name in holders}, rows, reader
    )
    _refuse(of_settings, of_tokens)
    return [*notes, *more, *compare_processors(folders)]


def check_apart(base: Checkpoint | None, experts: Mapping[str, Checkpoint], by_token: bool = False) -> None:
    """As `check_compatible`, of models whose tensors do not align: what else is wrong with them.

    Raises:
        MismatchError, CheckpointError: as there.
    """
    members = labelled(base, experts)
    configs = {name: member.config for name, member in members.items()}
    names = {name for member in members.values() for name in member.tensors}
    of_settings, _ = compare_configurations(configs, any("lm_head" in name for name in names))
    tables = {
        label: [info.shape[0] for name, info in member.tensors.items() if len(info.shape) == 2 and is_table(name)]
        for label, member in members.items()
    }
    with_rows = {label: members[label] for label, rows in tables.items() if rows and not by_token}
    folders = {label: member.folder for label, member in with_rows.items() if member.path.is_dir()}
    of_tokens, _ = compare_vocabularies(folders, max((max(rows) for rows in tables.values() if rows), default=0))
    _refuse(of_settings, of_tokens)


def check_modules(network: AlignedCheckpoints, base: object, experts: Mapping[str, object]) -> None:
    """Compare the configurations that modules of `transformers` carry; others have none.

    Raises:
        MismatchError: a setting that decides what shared tensors compute differs.
    """
    readers = {
        n: getattr(getattr(member, "config", None), "to_dict", None) for n, member in labelled(base, experts).items()
    }
    configs = {name: read() for name, read in readers.items() if read is not None}
    _refuse(compare_configurations(configs, _tied(network))[0], [])


def labelled(base: Member | None, experts: Mapping[str, Member]) -> dict[str, Member]:
    """What sentences call base and experts -> the member."""
    return {
        **({"the base": base} if base is not None else {}),
        **{f"expert '{t}'": member for t, member in experts.items()},
    }


def _tied(network: AlignedCheckpoints) -> bool:
    """Whether an output embedding is among what merges."""
    return any("lm_head" in name for name in network.tensors)


def _refuse(of_settings: list[str], of_tokens: list[str]) -> None:
    texts = []
    if of_settings:
        heading = "Settings of config.json differ that decide what the tensors compute:"
        remedy = "Models merge if they compute the same function of their tensors. Correct config.json where it is wrong, or leave the model out."
        texts.append(itemise(heading, of_settings, remedy))
    if of_tokens:
        heading = "Vocabularies differ: rows of different tokens would be merged."
        remedy = "Give experts that were fine-tuned with the base's tokenizer. Where a tokenizer's files are not the model's, replace or remove them."
        texts.append(itemise(heading, of_tokens, remedy))
    if texts:
        raise MismatchError("\n".join(texts))


def _tables(network: AlignedCheckpoints) -> tuple[set[str], int]:
    """The members that hold an embedding table, and how many rows the largest has."""
    named = labelled(network.base, network.experts)
    tables = [name for name, info in network.tensors.items() if len(info.shape) == 2 and is_table(name)]
    holders = {label for label, member in named.items() if any(name in member.names for name in tables)}
    return holders, max((network.tensors[name].shape[0] for name in tables), default=0)


@dataclass
class _Tokens:
    """What is known of tokens and rows so far, and of whom."""

    of_token: dict[str, tuple[int, str]] = field(default_factory=dict)
    of_row: dict[int, tuple[str, str]] = field(default_factory=dict)

    def add(self, who: str, vocabulary: Vocabulary) -> None:
        for token, row in vocabulary.ids.items():
            self.of_token.setdefault(token, (row, who))
            if row not in self.of_row or _RESERVED.match(self.of_row[row][0]):
                self.of_row[row] = (token, who)

    def moved(self, who: str, vocabulary: Vocabulary, rows: int) -> Iterator[str]:
        """Tokens with another id than before."""
        for token, row in vocabulary.ids.items():
            known, whose = self.of_token.get(token, (row, who))
            if known != row and min(known, row) < rows:
                yield f"{token!r} is {known} in {whose}, {row} in {who}"

    def replaced(self, who: str, vocabulary: Vocabulary, rows: int) -> Iterator[str]:
        """Rows with another token than before, where neither is reserved."""
        for token, row in vocabulary.ids.items():
            known, whose = self.of_row.get(row, (token, who))
            if known != token and token not in self.of_token and row < rows and not (_RESERVED.match(known) or _RESERVED.match(token)):  # fmt: skip
                yield f"{row} is {known!r} in {whose}, {token!r} in {who}"

    def added(self, vocabulary: Vocabulary, rows: int) -> list[str]:
        """New tokens on rows that stood for nothing before."""
        new = {token: row for token, row in vocabulary.ids.items() if token not in self.of_token and row < rows}
        return [f"{token!r} ({row})" for token, row in new.items() if not _RESERVED.match(token)]


def compare_vocabularies(
    folders: Mapping[str, Path], rows: int, reader: VocabularyReader | None = None
) -> tuple[list[str], list[str]]:
    """Problems and notes, in sentences, of the tokenizers in some folders; folders without one are left out.

    Arguments:
        folders: what to call a model -> where its tokenizer's files are.
        rows: how many ids the embedding table has; tokens beyond them are no matter.
        reader: what has read vocabularies already.
    """
    holders, shared = comparable(folders)
    if rows == 0 or len(holders) < 2:
        return [], []
    if shared is None:
        listed = ", ".join(f"{name} has {' and '.join(files_of(folders[name]))}" for name in holders)
        return [], [f"Vocabularies were not compared: their files are of different kinds ({listed})."]
    reader = reader or VocabularyReader()
    marks = {name: reader.mark(folders[name]) for name in holders}
    distinct = [name for number, name in enumerate(marks) if marks[name] not in list(marks.values())[:number]]
    if len(distinct) < 2:
        return [], []
    read = {name: vocabulary for name in distinct if (vocabulary := reader.read(folders[name], shared)) is not None}
    return _differences(read, rows)


def _differences(read: Mapping[str, Vocabulary], rows: int) -> tuple[list[str], list[str]]:
    tokens, problems, notes = _Tokens(), [], []
    first = next(iter(read))
    for who, vocabulary in read.items():
        if who != first and vocabulary.ids != read[first].ids:
            differing = [*tokens.moved(who, vocabulary, rows), *tokens.replaced(who, vocabulary, rows)]
            added = tokens.added(vocabulary, rows)
            if differing:
                problems.append(f"{vocabulary.file}: {few(differing)}")
            elif added:
                notes.append(f"{who} has {len(added)} token(s) that models before it have not: {few(added)}. Their rows merge with what is in these rows there.")  # fmt: skip
        if who != first:
            notes += _other_text(first, read[first], who, vocabulary)
        tokens.add(who, vocabulary)
    return problems, notes


def _other_text(first: str, one: Vocabulary, who: str, other: Vocabulary) -> Iterator[str]:
    """The same tokens, and another way to split text into them."""
    differing = ["merges"] if one.merges and other.merges and one.merges != other.merges else []
    differing += [key for key, value in one.text.items() if key in other.text and other.text[key] != value]
    if differing:
        yield f"Tokenizers of {first} and {who} split text differently ({', '.join(differing)}). The merged model comes with that of the first."  # fmt: skip
