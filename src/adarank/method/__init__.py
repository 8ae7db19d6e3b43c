"""The one contract of everything that can stand under `merge_method`."""

from __future__ import annotations

from adarank.method.context import Context, Result, changed_tensors
from adarank.method.contract import MergeMethod
from adarank.method.outline import Another, Given, Outline, Site, sites_of

__all__ = [
    "Another",
    "Context",
    "Given",
    "MergeMethod",
    "Outline",
    "Result",
    "Site",
    "changed_tensors",
    "sites_of",
]
