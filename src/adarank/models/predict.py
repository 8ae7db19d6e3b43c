"""A model's predictions on a task's inputs, without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adarank.data.spec import Split
from adarank.data.task import Batch, TaskData
from adarank.errors import DataError
from adarank.io.progress import advance
from adarank.models.family import Family

# A processor takes a third longer for each of a thousand small images in one batch: what layers give leaves its caches.
CPU_ROWS = 128


def split_batches(
    family: Family, data: TaskData, split: Split, device: torch.device | str
) -> Iterator[tuple[list[int], Batch]]:
    """(row numbers, inputs on the device) over a split, longest first.

    Raises:
        DataError: the split is empty.
    """
    data.filled(split)
    on_cpu = torch.device(device).type == "cpu"
    budget, most = (family.cpu_token_budget, CPU_ROWS) if on_cpu else (family.token_budget, None)
    for rows, batch in data.scored_batches(split, budget, most):
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


def call_module(module: nn.Module, batch: Any) -> Tensor:
    """(batch, classes) logits of a module that is called with the batch: a mapping as keywords, a tuple as positions.

    Raises:
        DataError: it gives something else.
    """
    dtype = next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), torch.float32)

    def fitting(value: Any) -> Any:  # adaptation is in float32, whatever the dtype that inputs came in
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    if isinstance(batch, Mapping):
        out = module(**{key: fitting(value) for key, value in batch.items()})
    elif isinstance(batch, (tuple, list)):
        out = module(*map(fitting, batch))
    else:
        out = module(fitting(batch))
    if isinstance(out, Mapping) and "logits" in out:  # as outputs of transformers are, too
        out = out["logits"]
    logits = out[0] if isinstance(out, (tuple, list)) else getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise DataError(
            f"A module gave {got} where logits (batch, classes) were needed. Give `forward`, a function of module and batch."
        )
    return logits
