"""Models of other vocabularies as models of one: rows of embedding and output tables by token, read one table at a time.

    token         id in the output   rows of a (its ids)   rows of b            base
    <unk>         0                  0                     0                    0
    cat           1                  2                     1                    1
    <begin>       2                  3                     the mean of holders  the mean of holders
    (padding)     3                  the mean of a's rows  the mean of b's      the mean of the base's

Which row stands for what is planned once, from vocabularies alone (`recipe/tokenizers.py`); here rows are read by the plan.
As mergekit does, each model's table is completed for the output's vocabulary first, and merged as any other tensor then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adarank.alignment.naming import named_as
from adarank.errors import MismatchError, itemise
from adarank.io.checkpoint import Checkpoint, TensorInfo


@dataclass(frozen=True)
class Filled:
    """Rows that a model takes from others: each the mean of one row of every model in `rows`; of none, zeros.

    Attributes:
        ids: (n,) rows of the output's table.
        rows: model -> (n,) rows of that model's table.
    """

    ids: Tensor
    rows: Mapping[str, Tensor]


@dataclass(frozen=True)
class RowPlan:
    """How a model's tables become tables of the output's vocabulary. What is in neither list is padding.

    Attributes:
        size: rows of the output's tables.
        ids: (k,) rows of the output that the model itself has.
        rows: (k,) which rows of its tables these are.
        filled: those that it takes from others.
    """

    size: int
    ids: Tensor
    rows: Tensor
    filled: tuple[Filled, ...] = ()

    def changes(self, rows: int) -> bool:
        """Whether a table of so many rows becomes another one."""
        every = torch.arange(self.size)
        return self.size != rows or not (torch.equal(self.ids, every) and torch.equal(self.rows, every))

    def padding(self) -> Tensor:
        """(size,) true for rows of no token."""
        blank = torch.ones(self.size, dtype=torch.bool)
        blank[torch.cat([self.ids, *(each.ids for each in self.filled)])] = False
        return blank


class _Tables:
    """The tables of one model, under the names that they have in the base."""

    def __init__(self, checkpoint: Checkpoint, tables: Iterable[str], names: Mapping[str, str]) -> None:
        self._checkpoint = checkpoint
        self._stored = {names[name]: name for name in tables}

    def find(self, name: str, shape: Sequence[int]) -> str | None:
        """What the model calls a table; a model with one matrix alone uses it as input and output table."""
        if name in self._stored:
            return self._stored[name]
        matrices = [n for n in self._stored.values() if len(self._checkpoint.tensors[n].shape) == 2]
        alone = len(matrices) == 1 and len(shape) == 2 and self._checkpoint.tensors[matrices[0]].shape[1:] == shape[1:]
        return matrices[0] if alone else None

    def rows(self, name: str, shape: Sequence[int], wanted: Tensor) -> Tensor:
        """Some rows of a table, as stored."""
        stored = self.find(name, shape)
        assert stored is not None  # looked up before anything is read
        return self._checkpoint.read(stored)[wanted]


class RowsByToken(Checkpoint):
    """A checkpoint as one of the output's vocabulary, under the same names. Other tensors are as they were.

    Tables are float32 (float64 for float64) when they are read, so that means are not rounded before the merge.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tables: Sequence[str],
        plan: RowPlan,
        names: Mapping[str, str],
        peers: Mapping[str, _Tables],
    ) -> None:
        self.__dict__.update(checkpoint.__dict__)
        self._whole, self._plan, self._names, self._peers = checkpoint, plan, names, peers
        self._tables = set(tables)
        self.tensors = _resized(checkpoint, tables, plan.size)

    def read(self, name: str) -> Tensor:
        """The tensor of this name; a table with the output's rows."""
        stored = self._whole.read(name)
        if name not in self._tables:
            return stored
        dtype = torch.promote_types(stored.dtype, torch.float32)
        table = torch.zeros((self._plan.size, *stored.shape[1:]), dtype=dtype)
        table[self._plan.ids] = stored[self._plan.rows].to(dtype)
        for each in self._plan.filled:
            parts = [
                self._peers[m].rows(self._names[name], stored.shape, rows).to(dtype) for m, rows in each.rows.items()
            ]
            if parts:
                table[each.ids] = torch.stack(parts).mean(0)
        blank = self._plan.padding()
        if blank.any():
            table[blank] = table[~blank].mean(0)
        return table

    @property
    def making_bytes(self) -> int:
        """Memory of the largest table that is made, and of what it is made of."""
        made = max((2 * self.tensors[name].numel * 4 for name in self._tables), default=0)
        return max(made, self._whole.making_bytes)

    @property
    def unused(self) -> Mapping[str, str]:
        """What is in the files and not among the tensors."""
        return self._whole.unused

    @property
    def quantisation(self) -> str | None:
        """As of the checkpoint."""
        return self._whole.quantisation


def rows_by_token(
    members: Mapping[str, Checkpoint], tables: Mapping[str, Sequence[str]], plans: Mapping[str, RowPlan]
) -> dict[str, RowsByToken]:
    """Models of several vocabularies as models of one, their tensors paired as `align` pairs them.

    Arguments:
        members: what to call a model -> the model; the base, or what stands for it, first.
        tables: model -> names of its tensors with a row for each token.
        plans: model -> where its rows come from.

    Raises:
        MismatchError: a model takes rows of one that lacks the table; all are named.
    """
    shapes = {m: {n: i.shape for n, i in _resized(c, tables[m], plans[m].size).items()} for m, c in members.items()}
    root = {
        n: shape for n, shape in next(iter(shapes.values())).items() if n not in next(iter(members.values())).aliases
    }
    names = {m: named_as(shapes[m], root, members[m].label).names for m in members}
    peers = {m: _Tables(members[m], tables[m], names[m]) for m in members}
    problems = [
        f"{model} has no '{names[label][name]}', and {label} needs {len(each.ids)} row(s) of it"
        for label, plan in plans.items()
        for name in tables[label]
        for each in plan.filled
        for model in each.rows
        if peers[model].find(names[label][name], members[label].tensors[name].shape) is None
    ]
    if problems:
        raise MismatchError(itemise("tokenizer: rows of tokens are taken from models that lack the table:", problems))
    return {m: RowsByToken(members[m], tables[m], plans[m], names[m], peers) for m in members}


def _resized(checkpoint: Checkpoint, tables: Sequence[str], size: int) -> dict[str, TensorInfo]:
    return {
        name: replace(info, shape=(size, *info.shape[1:])) if name in tables else info
        for name, info in checkpoint.tensors.items()
    }
