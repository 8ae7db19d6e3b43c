"""Turn many fine-tuned models into one: AdaRank, CART and their kin.

    merged = adarank.merge(base, {"a": expert_a, "b": expert_b}, "cart", {"rank": 0.08})
    adapted = adarank.adapt(base, {"a": module_a, "b": module_b}, {"a": batches_a, "b": batches_b})

From files: `load_recipe` and `merge_recipe`, or the command line (`adarank --help`).
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adarank.adapt.history import Adapted
    from adarank.adapt.settings import AdaptSettings
    from adarank.alignment.selection import Select
    from adarank.api import adapt, evaluate, learn_heads, merge, merge_each
    from adarank.errors import AdaRankError
    from adarank.io.push import push
    from adarank.outputs.bundle import Bundle, from_bundle, load_bundle
    from adarank.outputs.extract import extract
    from adarank.outputs.merged import load_task
    from adarank.recipe.job import open_job
    from adarank.recipe.reader import load_recipe
    from adarank.report.page import write_report
    from adarank.spectral.mask_file import MaskFile
    from adarank.workflow.analyse import analyse
    from adarank.workflow.evaluate import evaluate as evaluate_recipe
    from adarank.workflow.merge import merge as merge_recipe
    from adarank.workflow.reproduce import reproduce
    from adarank.workflow.score_card import score_card
    from adarank.workflow.verify import verify

__version__ = "0.1.0"
__all__ = [
    "AdaRankError",
    "AdaptSettings",
    "Adapted",
    "Bundle",
    "MaskFile",
    "Select",
    "adapt",
    "analyse",
    "evaluate",
    "evaluate_recipe",
    "extract",
    "from_bundle",
    "learn_heads",
    "load_bundle",
    "load_recipe",
    "load_task",
    "merge",
    "merge_each",
    "merge_recipe",
    "open_job",
    "push",
    "reproduce",
    "score_card",
    "verify",
    "write_report",
]
# public name -> where it is; that module is imported when the name is first used, so that `import adarank` loads no PyTorch
_HOMES = {
    "AdaRankError": "errors:AdaRankError",
    "AdaptSettings": "adapt.settings:AdaptSettings",
    "Adapted": "adapt.history:Adapted",
    "Bundle": "outputs.bundle:Bundle",
    "MaskFile": "spectral.mask_file:MaskFile",
    "Select": "alignment.selection:Select",
    "adapt": "api:adapt",
    "analyse": "workflow.analyse:analyse",
    "evaluate": "api:evaluate",
    "evaluate_recipe": "workflow.evaluate:evaluate",
    "extract": "outputs.extract:extract",
    "from_bundle": "outputs.bundle:from_bundle",
    "learn_heads": "api:learn_heads",
    "load_bundle": "outputs.bundle:load_bundle",
    "load_recipe": "recipe.reader:load_recipe",
    "load_task": "outputs.merged:load_task",
    "merge": "api:merge",
    "merge_each": "api:merge_each",
    "merge_recipe": "workflow.merge:merge",
    "open_job": "recipe.job:open_job",
    "push": "io.push:push",
    "reproduce": "workflow.reproduce:reproduce",
    "score_card": "workflow.score_card:score_card",
    "verify": "workflow.verify:verify",
    "write_report": "report.page:write_report",
}


class _Package(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'adarank' has no attribute '{name}'")
        module, _, attribute = _HOMES[name].partition(":")
        value = getattr(import_module(f"adarank.{module}"), attribute)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # packages such as `adapt`, once imported, must not take the place of the functions
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_HOMES})


sys.modules[__name__].__class__ = _Package
