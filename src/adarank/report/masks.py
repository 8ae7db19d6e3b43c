"""Masks and λ as the page shows them: a table over tensors and tasks, and each matrix's mask as a map."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adarank.spectral.mask_file import MaskFile
from adarank.spectral.masks import kept

COLUMNS = 192
_LOW, _STEPS, _FIRST = -1.0, 31, 33
"""A value from -1 to 2 is one printable character: its distance from -1 in 31sts, counted from '!'."""


def coefficients(masks: MaskFile) -> list[dict[str, Any]]:
    """A row per tensor: its λ and, of a matrix, the share of components that is kept, per task."""
    rows = []
    for name, lam in masks.lam.items():
        sizes = masks.sizes.get(name)
        counts = masks.kept(name) if sizes else [None] * len(lam)
        shares = [
            None if count is None or not size else count / size
            for count, size in zip(counts, sizes or [0] * len(lam), strict=True)
        ]
        cells = [{"lam": value, "share": share} for value, share in zip(lam.tolist(), shares, strict=True)]
        rows.append({"name": name, "cells": cells})
    return rows


def maps(masks: MaskFile) -> list[dict[str, Any]]:
    """Each matrix: per task λ, how many components are kept, the mask's range, and the map's row (see `row_of`)."""
    return [
        {
            "name": name,
            "rows": [
                _row(task, part, float(lam))
                for task, part, lam in zip(masks.tasks, mask.split(masks.sizes[name]), masks.lam[name], strict=True)
            ],
        }
        for name, mask in masks.masks.items()
    ]


def _row(task: str, part: Tensor, lam: float) -> dict[str, Any]:
    values = part.float()
    ends = (float(values.min()), float(values.mean()), float(values.max())) if part.numel() else (0.0, 0.0, 0.0)
    low, mean, high = (round(value, 4) for value in ends)
    return {
        "task": task,
        "lam": round(lam, 5),
        "kept": int(kept(part).sum()),
        "of": part.numel(),
        "low": low,
        "mean": mean,
        "high": high,
        "cells": row_of(part),
    }


def row_of(part: Tensor) -> str:
    """A character per component, strongest first; of more than 192, per group of neighbours: their mean."""
    groups = part.float().tensor_split(min(COLUMNS, part.numel())) if part.numel() else ()
    means = [min(max(float(group.mean()), _LOW), _LOW + 3) for group in groups]
    return "".join(chr(_FIRST + round((value - _LOW) * _STEPS)) for value in means)


def kept_by_task(masks: MaskFile) -> dict[str, float]:
    """Task -> share of its components, of all matrices, that is kept."""
    counts = dict.fromkeys(masks.tasks, 0)
    totals = dict.fromkeys(masks.tasks, 0)
    for name, sizes in masks.sizes.items():
        for task, count, size in zip(masks.tasks, masks.kept(name), sizes, strict=True):
            counts[task] += count
            totals[task] += size
    return {task: counts[task] / total for task, total in totals.items() if total}
