"""A model's predictions on a task's inputs, without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adarank.data.spec import Split
from adarank.data.task import Batch, TaskData
from adarank.io.progress import advance
from adarank.models.family import Family


def split_batches(
    family: Family, data: TaskData, split: Split, device: torch.device | str
) -> Iterator[tuple[list[int], Batch]]:
    """(row numbers, inputs on the device) over a split, longest first.

    Raises:
        DataError: the split is empty.
    """
    data.filled(split)
    for rows, batch in data.scored_batches(split, family.token_budget):
        yield rows, {name: tensor.to(device) for name, tensor in batch.items()}


@torch.no_grad()
def predict(family: Family, module: nn.Module, data: TaskData, split: Split) -> tuple[list[int], Tensor]:
    """Row numbers and (rows, classes) logits over a split, without labels."""
    device = next(module.parameters()).device
    rows: list[int] = []
    parts: list[Tensor] = []
    for batch_rows, batch in split_batches(family, data, split, device):
        rows += batch_rows
        parts.append(family.logits(module, batch).cpu())
        advance(len(batch_rows))
    return rows, torch.cat(parts)


Forward = Callable[[nn.Module, Any], Tensor]
