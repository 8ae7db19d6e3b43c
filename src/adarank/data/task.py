"""One task's encoded examples: endless seeded batches without labels to adapt on, ordered batches to score."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from adarank.data.labels import Label, Problem, known_labels
from adarank.data.spec import Split
from adarank.data.splits import Splits
from adarank.errors import DataError

Batch = Mapping[str, Tensor]
"""Keyword arguments of a network's forward; never labels."""

_POOL = 16  # adaptation batches that are formed together, so that inputs of like length meet


class Examples(Protocol):
    """Encoded inputs of a task, by row number."""

    @property
    def lengths(self) -> Sequence[int]:
        """Of each row how long it is."""
        ...

    def batch(self, rows: Sequence[int]) -> Batch:
        """The inputs of some rows, padded to the longest of them."""
        ...

    def content(self) -> bytes:
        """All encoded inputs as bytes, to tell two sets apart by."""
        ...


@dataclass(frozen=True)
class TaskData:
    """A task's inputs, labels and splits.

    Attributes:
        metric: what it is scored by, one of `data.metrics`.
        labels: of each row its class number (or its classes' numbers, or its number, as `problem` says), or None where
            the file gives none; read for scoring and for the reference that is trained.
        notes: sentences about what was cut, dropped or odd, for the plan and the record.
        problem: what the network's outputs are.
        classes: the classes' names in the order of their numbers.
    """

    name: str
    metric: str
    examples: Examples
    labels: tuple[Label | None, ...]
    splits: Splits
    seed: int
    notes: tuple[str, ...] = ()
    problem: Problem = "single_label_classification"
    classes: tuple[str, ...] = ()

    def adapt_batch(self, step: int, size: int) -> Batch:
        """The inputs of an adaptation step: a pure function of (seed, step), so a resumed run sees the same ones.

        Every pass goes through all rows of the adapt split in a new seeded order; near the pass's end batches do
        not run over into the next one but are filled up from its beginning.
        """
        return self.examples.batch(self.adapt_rows(step, size))

    def adapt_rows(self, step: int, size: int) -> tuple[int, ...]:
        """Row numbers of an adaptation step."""
        rows = self.splits.rows["adapt"]
        if not rows:
            raise DataError(
                f"task '{self.name}': no rows to adapt on. Give its data an adapt split, or a larger adapt fraction."
            )
        per_pass = self.one_pass(size)
        return self._pass(step // per_pass, size)[step % per_pass]

    def one_pass(self, size: int) -> int:
        """Steps after which each row of the adapt split has been seen."""
        return -(-len(self.splits.rows["adapt"]) // size)

    def _pass(self, number: int, size: int) -> tuple[tuple[int, ...], ...]:
        return _one_pass(self.splits.rows["adapt"], tuple(self.examples.lengths), size, number, self.seed, self.name)

    def scored_batches(self, split: Split, budget: int, most: int | None = None) -> Iterator[tuple[list[int], Batch]]:
        """(row numbers, inputs) over a split, longest first, each batch at most `budget` padded tokens (or pixels' worth) and `most` rows."""
        lengths = self.examples.lengths
        order = sorted(self.splits.rows[split], key=lambda row: (-lengths[row], row))
        while order:
            count = max(1, min(budget // max(1, lengths[order[0]]), most or len(order)))
            yield order[:count], self.examples.batch(order[:count])
            order = order[count:]

    def spread(self, split: Split, count: int) -> TaskData:
        """The same task with at most `count` rows in one split, evenly spread over it: enough to watch predictions by.

        A file may be sorted by its labels, so its first rows would not do.
        """
        rows = self.splits.rows[split]
        chosen = tuple(rows[i * len(rows) // count] for i in range(count)) if len(rows) > count else rows
        return replace(self, splits=Splits({**self.splits.rows, split: chosen}, self.splits.dropped))

    def fingerprint(self) -> str:
        """Identifies the task's splits and encoded inputs."""
        digest = hashlib.sha256(
            repr((self.name, sorted(self.splits.rows.items()), list(self.examples.lengths))).encode()
        )
        digest.update(self.examples.content())
        return digest.hexdigest()

    def filled(self, split: Split) -> tuple[int, ...]:
        """The rows of a split.

        Raises:
            DataError: it is empty.
        """
        rows = self.splits.rows[split]
        if not rows:
            raise DataError(
                f"task '{self.name}': its {split} split is empty. Give its data a {split} file, or a larger {split} fraction."
            )
        return rows

    def targets(self, rows: Sequence[int]) -> list[Label]:
        """Labels of some rows.

        Raises:
            DataError: the data has no labels to score with.
        """
        labels = [self.labels[row] for row in rows]
        if self.problem == "generation":
            return known_labels(
                labels, self.name, "Name the answers' column as columns: answer, and take rows without one out."
            )
        rest = "" if all(label is None for label in labels) else ", or take the rows with label -1 out"
        return known_labels(labels, self.name, f"Name the label column under task: columns{rest}.")


@lru_cache(maxsize=64)
def _one_pass(
    rows: tuple[int, ...], lengths: tuple[int, ...], size: int, number: int, seed: int, name: str
) -> tuple[tuple[int, ...], ...]:
    """The batches of one pass: shuffled, sorted by length within pools of batches, the batches shuffled again."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}/{number}".encode()))
    order = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
    missing = -len(order) % size
    order += (order * (missing // len(order) + 1))[:missing]
    batches: list[tuple[int, ...]] = []
    for start in range(0, len(order), _POOL * size):
        pool = sorted(order[start : start + _POOL * size], key=lambda row: lengths[row])
        batches += [tuple(pool[i : i + size]) for i in range(0, len(pool), size)]
    return tuple(batches[i] for i in torch.randperm(len(batches), generator=generator).tolist())
