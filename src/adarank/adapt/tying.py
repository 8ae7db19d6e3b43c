"""λ per tensor, layer, task or model: which entries of the (tensors, tasks) matrix of coefficients share one number.

    tensor   λ_t of every tensor          AdaMerging's and CART++'s "layer-wise", AdaRank
    layer    λ_t of every layer
    shared-layer   λ of every layer       AdaRank's Equation 5 as it is printed
    task     λ_t                          AdaMerging's "task-wise"
    model    λ                            Task Arithmetic's

What is learned are the numbers themselves, so an optimiser sees each once; its gradient is the sum of its entries'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adarank.alignment.layers import layer_groups

LambdaPer = Literal["tensor", "layer", "shared-layer", "task", "model"]


@dataclass(frozen=True)
class Tying:
    """A (tensors, tasks) matrix made of fewer numbers.

    Attributes:
        rows: (tensors,) the row of numbers that each tensor takes.
        columns: (tasks,) the column that each task takes.
    """

    rows: Tensor
    columns: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the numbers."""
        return int(self.rows.max()) + 1, int(self.columns.max()) + 1

    def spread(self, numbers: Tensor) -> Tensor:
        """The (tensors, tasks) matrix."""
        return numbers[self.rows][:, self.columns]

    def gather(self, matrix: Tensor) -> Tensor:
        """The sum of the entries that each number stands for: its gradient, from theirs."""
        by_row = matrix.new_zeros(self.shape[0], matrix.shape[1]).index_add_(0, self.rows, matrix)
        return matrix.new_zeros(self.shape).index_add_(1, self.columns, by_row)


def tie(names: Sequence[str], tasks: int, per: LambdaPer) -> Tying:
    """The tying of `tasks` tasks over the tensors of these names."""
    layers = layer_groups(names)
    owners = {"tensor": names, "layer": layers, "shared-layer": layers}.get(per, [""] * len(names))
    places = {owner: place for place, owner in enumerate(dict.fromkeys(owners))}
    columns = torch.zeros(tasks, dtype=torch.long) if per in ("model", "shared-layer") else torch.arange(tasks)
    return Tying(torch.tensor([places[owner] for owner in owners]), columns)
