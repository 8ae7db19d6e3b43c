"""Rows to adapt, select and test: seeded, disjoint, and never with the same input in two splits."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from adarank.data.spec import SPLITS, DataSettings, Split


@dataclass(frozen=True)
class Splits:
    """Row numbers per split.

    Attributes:
        rows: split -> row numbers.
        dropped: split -> rows left out of it because their input is also in a later split.
    """

    rows: Mapping[Split, tuple[int, ...]]
    dropped: Mapping[Split, int]


def by_fraction(keys: Sequence[Hashable], settings: DataSettings) -> Splits:
    """Split one table by the settings' fractions.

    Rows with equal inputs go to the same split together, so that no test input is ever adapted on.

    Arguments:
        keys: each row's input.
    """
    groups: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    members = list(groups.values())
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(settings.split_seed)).tolist()
    rows: dict[Split, list[int]] = {split: [] for split in SPLITS}
    edges = {
        "adapt": settings.adapt,
        "select": settings.adapt + settings.select,
        "test": settings.adapt + settings.select + settings.test,
    }
    placed = 0
    for group in order:
        share = (placed + 0.5) / len(keys)
        target = next((split for split in SPLITS if share < edges[split]), None)
        placed += len(members[group])
        if target:
            rows[target].extend(members[group])
    return _finish({split: tuple(sorted(of_split)) for split, of_split in rows.items()}, {}, settings)


def by_file(keys: Sequence[Hashable], counts: Mapping[Split, int], settings: DataSettings) -> Splits:
    """Splits given as files, whose rows stand one file after another in `keys`.

    A row of `adapt` whose input is also in `select` or `test`, or of `select` in `test`, is left out and counted.
    """
    rows: dict[Split, tuple[int, ...]] = {}
    dropped: dict[Split, int] = {}
    ranges: dict[Split, range] = {}
    start = 0
    for split in SPLITS:
        ranges[split] = range(start, start + counts.get(split, 0))
        start = ranges[split].stop
    later: set[Hashable] = set()
    for split in reversed(SPLITS):
        rows[split] = tuple(row for row in ranges[split] if keys[row] not in later)
        dropped[split] = len(ranges[split]) - len(rows[split])
        later |= {keys[row] for row in ranges[split]}
    return _finish(rows, {s: n for s, n in dropped.items() if n}, settings)


def _finish(rows: Mapping[Split, tuple[int, ...]], dropped: Mapping[Split, int], settings: DataSettings) -> Splits:
    if settings.protocol == "transductive":
        rows = {**rows, "adapt": rows["test"]}
    return Splits(rows, dropped)


def limited(splits: Splits, limit: int | None, seed: int) -> Splits:
    """At most `limit` rows per split, by a seeded choice."""
    if limit is None:
        return splits
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[Split, tuple[int, ...]] = {}
    for split, rows in splits.rows.items():
        order = torch.randperm(len(rows), generator=generator)[:limit].tolist()
        chosen[split] = tuple(sorted(rows[i] for i in order))
    if splits.rows["adapt"] == splits.rows["test"]:  # transductive: the rows adapted on are those scored
        chosen["adapt"] = chosen["test"]
    return Splits(chosen, splits.dropped)


def budgeted(splits: Splits, settings: DataSettings) -> Splits:
    """Only the `budget` of the adapt rows, one at least, by a seeded choice."""
    if settings.budget is None:
        return splits
    rows = splits.rows["adapt"]
    count = min(len(rows), max(1, round(settings.budget * len(rows))))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.split_seed))[:count].tolist()
    return Splits({**splits.rows, "adapt": tuple(sorted(rows[i] for i in order))}, splits.dropped)
