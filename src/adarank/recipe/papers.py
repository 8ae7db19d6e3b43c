"""The rows of the papers' tables, and the recipe that makes each.

Figures are the papers' own, mean over tasks in per cent, to hold one's own run of the same checkpoints against. They are
no result of this project. Sources: AdaRank, arXiv:2503.22178, Tables 1, 2, 3 and, for what these leave out, 4, 5, 6 and 9;
CART, arXiv:2412.12153, Tables 1 and 2. AdaRank's vision rows are of eight tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

SETTINGS = {
    "adarank-b32": "AdaRank, ViT-B/32",
    "adarank-l14": "AdaRank, ViT-L/14",
    "roberta": "AdaRank, RoBERTa",
    "gpt2": "AdaRank, GPT-2",
    "cart-b32": "CART, ViT-B/32",
    "cart-l14": "CART, ViT-L/14",
}


@dataclass(frozen=True)
class PaperRow:
    """One row of the papers' tables.

    Attributes:
        name: as AdaRank's tables call it, or CART's where it is there alone.
        recipe: `merge_method`, `parameters` and `adapt` of what makes it; empty for rows that `adarank evaluate` always shows.
        hint: what to choose otherwise for other models, or where to look.
        figures: key of `SETTINGS` -> the paper's figure, per cent.
        like: of a row that varies another one (what is learned, on how many inputs): that row, whose released settings it has.
    """

    name: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    hint: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    like: str = ""

    def yaml(self) -> str:
        """The recipe in one line, without models and data."""
        return yaml.safe_dump(dict(self.recipe), default_flow_style=True, width=1000, sort_keys=False).strip()[1:-1]

    def shown(self, key: str) -> str:
        """A figure as printed there; nothing where that table lacks the row."""
        value = self.figures.get(key)
        return "" if value is None else f"{value:.2f}" if key in ("roberta", "gpt2") else f"{value:.1f}"


def _figures(*values: float | None) -> dict[str, float]:
    return {key: value for key, value in zip(SETTINGS, values, strict=True) if value is not None}


def _static(method: str, **parameters: Any) -> dict[str, Any]:
    return {"merge_method": method, **({"parameters": parameters} if parameters else {})}


def _adapted(method: str, preset: str) -> dict[str, Any]:
    return {"merge_method": method, "adapt": {"preset": preset}}


def _variant(baseline: str, what: str, figure: float | None, **changes: Any) -> PaperRow:
    """A row of AdaRank with its released settings but for some."""
    recipe = {**_adapted("adarank", f"vit-b32-8-{baseline.lower()}"), **changes}
    hint = "Table 4" if figure is not None else "the paper's later version"
    return PaperRow(f"{baseline}+AdaRank, {what}", recipe, hint, _figures(figure, *[None] * 5), f"{baseline}+AdaRank")


_BY_SEARCH = "λ by `adarank search`"
ROWS = (
    PaperRow("Pretrained", {}, "the row `base` of `adarank evaluate`", _figures(48.0, 65.0, None, None, 48.0, 64.5)),
    PaperRow("Individual", {}, "its row `experts`", _figures(90.5, 94.2, 84.83, 76.80, 90.5, 94.2)),
    PaperRow("Traditional MTL", _static("multitask"), "labels needed", _figures(89.1, 93.1, None, None, 88.9, 93.5)),
    PaperRow("Weight Averaging", _static("average"), "", _figures(65.9, 79.6, 62.02, 50.57, 65.9, 79.6)),
    PaperRow("Fisher Merging", _static("fisher"), "", _figures(68.3, 82.2, None, None, 68.3, 82.2)),
    PaperRow("RegMean", _static("regmean"), "", _figures(71.8, 83.7, None, None, 71.8, 83.7)),
    PaperRow("Task Arithmetic", _static("task_arithmetic", **{"lambda": 0.3}), "",
             _figures(69.2, 84.5, 67.18, 60.64, 69.1, 84.5)),
    PaperRow("Ties-Merging", _static("ties_merging"), "", _figures(72.4, 86.1, 64.44, 61.12, 72.4, 86.0)),
    PaperRow("Consensus-Ties", _static("consensus_ties"), _BY_SEARCH, _figures(74.8, 87.2, None, None, None, None)),
    PaperRow("Consensus-TA", _static("consensus_ta"), _BY_SEARCH, _figures(75.2, 86.6, None, None, None, None)),
    PaperRow("TSV-M", _static("tsv_m"), _BY_SEARCH, _figures(83.8, 91.2, None, None, None, None)),
    PaperRow("CART", _static("cart", rank=0.08), "CART's paper; AdaRank's: λ and rank by `adarank search`",
             _figures(84.7, 92.6, 69.97, 61.82, 83.0, 90.8)),
    PaperRow("AdaMerging", _adapted("adamerging", "adamerging"), "", _figures(80.1, 90.8, 67.62, 59.97, 80.1, 90.8)),
    PaperRow("AdaMerging++", _adapted("adamerging++", "adamerging"), "", _figures(81.1, 91.0, None, None, 81.1, 91.0)),
    PaperRow("TA+AdaRank", _adapted("adarank", "vit-b32-8-ta"), "vit-l14-8-ta, roberta-7-ta, gpt2-7-ta",
             _figures(87.9, 92.9, 70.32, 63.28, None, None)),
    PaperRow("CART+AdaMerging (CART++)", {"merge_method": "cart++", "adapt": {"preset": "paper", "steps": 500}},
             "neither paper tells the steps: these are AdaMerging's", _figures(85.9, 93.1, None, None, 86.6, 92.6)),
    PaperRow("CART+AdaRank", _adapted("adarank", "vit-b32-8-cart"), "vit-l14-8-cart, roberta-7-cart, gpt2-7-cart",
             _figures(89.2, 93.4, 74.17, 64.85, None, None)),
    PaperRow("EMR-Merging", _static("emr"), "task-aware", _figures(88.8, 93.5, None, None, None, None)),
    PaperRow("AdaMerging w/Surgery",
             {"merge_method": "surgery", "parameters": {"start": {"merge_method": "adamerging", "adapt": {"preset": "adamerging"}}}},
             "task-aware", _figures(87.5, 92.3, None, None, None, None)),
    PaperRow("TSV-C", _static("tsv_c"), "task-aware", _figures(89.0, 93.8, None, None, None, None)),
    PaperRow("TALL-Masks", _static("tall_masks"), "task-aware; α by `adarank search`", _figures(90.8, 94.3, None, None, None, None)),
    PaperRow("TSV-M+AdaRank", {"merge_method": "adarank", "parameters": {"basis": "tsv_m"}, "adapt": {"preset": "paper", "steps": 10_000}},
             "the paper's later version"),
    PaperRow("Iso-CTS+AdaRank", {"merge_method": "adarank", "parameters": {"basis": "iso_cts"}, "adapt": {"preset": "paper", "steps": 10_000}},
             "the paper's later version"),
    PaperRow("Iso-CTS", _static("iso_cts"), "in the paper's later version"),
    PaperRow("WEMoE", _static("wemoe"), "a bundle that merges for every input; in the paper's later version"),
    PaperRow("Task-wise AdaMerging", _adapted("adamerging", "adamerging-task"), "in FusionBench's tables"),
    _variant("TA", "λ only", 80.1, parameters={"learn_masks": False}),
    _variant("TA", "masks only", 79.9, parameters={"learn_lambda": False}),
    _variant("CART", "λ only", 85.9, parameters={"learn_masks": False}),
    _variant("CART", "masks only", 88.7, parameters={"learn_lambda": False}),
    PaperRow("CART at AdaRank's start", _static("cart", rank=0.16, **{"lambda": 2.3}), "Table 4; λ and rank of the preset of CART+AdaRank",
             _figures(84.7, None, None, None, None, None), like="CART+AdaRank"),
    _variant("TA", "1% of data", None, data={"protocol": "transductive", "budget": 0.01}),
)  # fmt: skip
TABLES: Mapping[str, tuple[str, ...]] = {
    "Table 4": ("Task Arithmetic", "TA+AdaRank, λ only", "TA+AdaRank, masks only", "TA+AdaRank",
                "CART at AdaRank's start", "CART+AdaRank, λ only", "CART+AdaRank, masks only", "CART+AdaRank"),
    "Data budget": ("TA+AdaRank, 1% of data", "TA+AdaRank"),
}  # fmt: skip
"""Tables that are made whole: the ablation of λ and masks, and how few inputs do. Name -> rows."""
