"""Turn many fine-tuned models into one: AdaRank, CART and their kin.

    merged = adarank.merge(base, {"a": expert_a, "b": expert_b}, "cart", {"rank": 0.08})
    adapted = adarank.adapt(base, {"a": module_a, "b": module_b}, {"a": batches_a, "b": batches_b})

From files: `load_recipe` and `merge_recipe`, or the command line (`adarank --help`).
"""

from __future__ import annotations

from adarank.adapt.settings import AdaptSettings
from adarank.alignment.selection import Select
from adarank.api import Adapted, adapt, evaluate, merge, merge_each
from adarank.errors import AdaRankError
from adarank.outputs.bundle import Bundle, extract, from_bundle, load_bundle
from adarank.outputs.merged import load_task
from adarank.recipe.job import open_job
from adarank.recipe.reader import load_recipe
from adarank.spectral.mask_file import MaskFile
from adarank.workflow.evaluate import evaluate as evaluate_recipe
from adarank.workflow.merge import merge as merge_recipe

__version__ = "0.1.0"
__all__ = [
    "AdaRankError",
    "AdaptSettings",
    "Adapted",
    "Bundle",
    "MaskFile",
    "Select",
    "adapt",
    "evaluate",
    "evaluate_recipe",
    "extract",
    "from_bundle",
    "load_bundle",
    "load_recipe",
    "load_task",
    "merge",
    "merge_each",
    "merge_recipe",
    "open_job",
]
