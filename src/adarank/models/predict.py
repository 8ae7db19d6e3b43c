"""A model's predictions on a task's inputs, without labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adarank.data.spec import Split
from adarank.data.task import TaskData
from adarank.errors import DataError
from adarank.models.family import Family


@torch.no_grad()
def predict(family: Family, module: nn.Module, data: TaskData, split: Split) -> tuple[list[int], Tensor]:
    """Row numbers and (rows, classes) logits over a split, without labels."""
    device = next(module.parameters()).device
    rows: list[int] = []
    parts: list[Tensor] = []
    for batch_rows, batch in data.scored_batches(split, family.token_budget):
        rows += batch_rows
        parts.append(family.logits(module, {k: v.to(device) for k, v in batch.items()}).cpu())
    if not rows:
        raise DataError(
            f"task '{data.name}': its {split} split is empty. Give its data a {split} file, or a larger {split} fraction."
        )
    return rows, torch.cat(parts)


Forward = Callable[[nn.Module, Any], Tensor]
