"""The test beds, and the rows of their tables: each a method, what is tried for it, and how it is adapted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adarank.workflow import demo

ROOT = Path(__file__).parent.parent
Grid = dict[str, list[float]]


@dataclass(frozen=True)
class Bed:
    """A test bed: its recipe, and what was set by hand for it.

    Attributes:
        adapt: origin -> settings of the loop.
        training: settings of multi-task training.
        bases: settings of the loop for AdaRank on other bases, where the default's take too long.
        routed: steps of WEMoE.
    """

    name: str
    recipe: Path
    adapt: Mapping[str, Mapping[str, Any]]
    training: Mapping[str, Any]
    bases: Mapping[str, Any] = field(default_factory=dict)
    routed: int = 100


_LAMBDA = [0.1, 0.2, 0.3, 0.4, 0.5, 0.7]
_WHOLE = [0.5, 0.8, 1.0, 1.3, 1.6, 2.0]  # for methods whose λ multiplies one whole merged task vector
# row -> (method, what is tried for it on select, seeds). The first value of a tie is taken.
STATIC: dict[str, tuple[str, Grid, int]] = {
    "TA": ("task_arithmetic", {"lambda": _LAMBDA}, 1),
    "CART": ("cart", {"rank": [0.02, 0.04, 0.08, 0.16, 0.32], "lambda": [0.7, 1.0, 1.3, 1.6, 2.0]}, 1),
    "SVD_k": ("svd_k", {"rank": [0.04, 0.08, 0.16, 0.32], "lambda": [0.3, 0.5, 0.8, 1.2]}, 1),
    "TIES": ("ties_merging", {"lambda": [0.2, 0.3, 0.5, 0.7, 1.0, 1.3]}, 1),
    "DARE+TA": ("dare", {"lambda": _LAMBDA}, 3),
    "DARE+TIES": ("dare_ties_merging", {"lambda": _LAMBDA}, 3),
    "Consensus-TA": ("consensus_ta", {"lambda": _LAMBDA}, 1),
    "Consensus-TIES": ("consensus_ties", {"lambda": [0.3, 0.5, 0.7, 1.0, 1.3]}, 1),
    "Breadcrumbs": ("breadcrumbs", {"density": [0.9], "lambda": _LAMBDA}, 1),
    "DELLA": ("della", {"density": [0.5], "lambda": _WHOLE}, 3),
    "SCE": ("sce", {"select_topk": [0.1, 0.2, 0.5, 1.0]}, 1),
    "Model Stock": ("model_stock", {}, 1),
    "STAR": ("star", {"share": [0.2, 0.4, 0.6], "lambda": [1.0, 2.0, 3.0, 4.0]}, 1),
    "TSV-M": ("tsv_m", {"lambda": _WHOLE}, 1),
    "Iso-C": ("iso_c", {"lambda": _WHOLE}, 1),
    "Iso-CTS": ("iso_cts", {"lambda": _WHOLE}, 1),
    "SVC": ("svc", {"lambda": [0.3, 0.5, 0.8]}, 1),
    "DC-Merge": ("dc_merge", {"lambda": [0.5, 1.0, 2.0]}, 1),
    "WUDI": ("wudi", {"lambda": [0.3, 0.5, 0.8]}, 1),
    "SWUDI": ("swudi", {"lambda": [0.1, 0.2, 0.4]}, 1),
    "ACTMat": ("actmat", {"lambda": [0.3, 0.5, 0.8]}, 1),
    "ESM": ("esm", {"lambda": [0.3, 0.5, 0.8]}, 1),
    "CART, energy": ("cart", {"energy": [0.3, 0.5], "lambda": [0.7, 1.0, 1.3]}, 1),
}
# Task-aware rows, each a bundle: (method, what is tried on select). TALL-masks' α is chosen task by task, as in its paper.
TASK_AWARE: dict[str, tuple[str, Grid]] = {
    "TALL-masks": ("tall_masks", {"lambda_mask": [0.2, 0.3, 0.4, 0.5, 0.6]}),
    "EMR": ("emr", {}),
    "TSV-C": ("tsv_c", {}),
    "CART-indexing": ("cart_indexing", {"rank": [0.08], "lambda": [0.7, 1.0, 1.3, 1.6, 2.0]}),
}
# Adapters and routers, on task arithmetic with the λ of the row TA: (method, its adapt block). WEMoE has as many steps as
# two cores can take, each as much larger than the paper's (1,000 of 1e-4) as they are fewer.
MODULES: dict[str, tuple[str, dict[str, Any]]] = {
    "TA+Surgery": ("surgery", {}),
    "WEMoE, entropy": ("wemoe", {"preset": "paper"}),
    "WEMoE": ("wemoe", {}),
    "Twin-Merging": ("twin_merging", {}),
}
WEMOE_LR_TIMES_STEPS = 1000 * 1e-4
# row -> (method, parameters). Nothing is chosen; the seed picks the 256 adapt inputs per task that are looked at. The
# empirical Fisher information reads their labels.
STATISTICS: dict[str, tuple[str, dict[str, Any]]] = {
    "Fisher": ("fisher", {}),
    "Fisher, empirical": ("fisher", {"kind": "empirical"}),
    "RegMean": ("regmean", {}),
    "RegMean++": ("regmean++", {}),
    "FeatCal": ("featcal", {}),
    "FeatCal, from the average": ("featcal", {"start": "average"}),
}
MINILM = Bed(
    "minilm-8",
    ROOT / "examples" / "minilm-8" / "average.yaml",
    # lr × steps is that of the released RoBERTa settings: 5e-5 × 5,000 about the base, 1e-4 × 5,000 about the average.
    {
        origin: {"steps": 250, "batch_size": 8, "lr_masks": rate, "lr_lambda": rate}
        for origin, rate in (("pretrained", 1e-3), ("average", 2e-3))
    },
    {"steps": 600, "batch_size": 8, "lr": 1e-4, "heads": "expert"},  # in so few steps fresh heads would not get far
    {"steps": 100, "check_every": 25},
    routed=30,
)
# lr × steps is that of AdaMerging's released vision settings: 1e-3 × 500.
_DEMO = {"steps": 150, "batch_size": 16, "lr_masks": 1 / 300, "lr_lambda": 1 / 300}
DEMO = Bed(
    "demo-8",
    demo.ZOO / "recipe.yaml",
    {"pretrained": _DEMO, "average": _DEMO},
    {"steps": 600, "batch_size": 16, "lr": 1e-3, "heads": "fixed"},  # its experts' heads are the base's, and were fixed
)
BEDS = {bed.name: bed for bed in (MINILM, DEMO)}


@dataclass(frozen=True)
class Adapted:
    """A row of an adaptive method.

    Attributes:
        start: the static row whose settings, chosen on select with labels, it starts from, with entropy and the last step
            kept as in the papers. None: all is as adarank does by default, with no label anywhere.
        parameters: all its others.
        steps: where it differs from the bed's: so many, each as much larger as they are fewer.
        loop: of rows without labelled start, settings of the loop beside the defaults; None is the bed's for other bases.
    """

    method: str
    start: str | None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    loop: Mapping[str, Any] | None = None


_AVERAGE, _BASE = {"origin": "average"}, {"origin": "pretrained", "rank": 1.0}
_BINARY = {"mask": "binary"}  # the paper's; adarank's own default is soft masks
ADAPTED: dict[str, Adapted] = {
    "AdaRank": Adapted("adarank", None, loop={}),
    "AdaRank, 32 inputs a step": Adapted("adarank", None, loop={"steps": 200, "batch_size": 32}),
    "AdaRank, binary masks": Adapted("adarank", None, _BINARY, loop={}),
    "AdaRank's start": Adapted("adarank", None, loop={"steps": 0}),
    "AdaRank, λ alone": Adapted("adarank", None, {"learn_masks": False}, loop={}),
    "AdaRank, masks alone": Adapted("adarank", None, {"learn_lambda": False}, loop={}),
    "TSV-M+AdaRank, soft masks": Adapted("adarank", None, {"basis": "tsv_m"}, loop={}),
    "SyMerge": Adapted("symerge", None, loop={}),
    "SAMerging": Adapted("samerging", None, loop={}),
    "ProDistill": Adapted("prodistill", None, loop={}),
    "AdaRank, by block": Adapted("adarank", None, loop={"by": "block"}),
    "AdaRank about the base": Adapted("adarank", None, {"origin": "pretrained", **_BINARY}),
    "TSV-M+AdaRank": Adapted("adarank", None, {"basis": "tsv_m", **_BINARY}),
    "Iso-C+AdaRank": Adapted("adarank", None, {"basis": "iso_c", **_BINARY}),
    "Iso-CTS+AdaRank": Adapted("adarank", None, {"basis": "iso_cts", **_BINARY}),
    "CART+AdaRank": Adapted("adarank", "CART", {**_AVERAGE, **_BINARY}),
    "TA+AdaRank": Adapted("adarank", "TA", {**_BASE, **_BINARY}),
    "CART++": Adapted("cart++", "CART", _AVERAGE),
    "AdaMerging": Adapted("adamerging", "TA", _BASE),
    "AdaMerging, task-wise": Adapted("adamerging", "TA", {**_BASE, "lambda_per": "task"}, steps=100),
    "AdaMerging++": Adapted("adamerging++", "TIES", _BASE, steps=100),
    "CART+AdaRank, masks only": Adapted("adarank", "CART", {**_AVERAGE, **_BINARY, "learn_lambda": False}),
    "TA+AdaRank, masks only": Adapted("adarank", "TA", {**_BASE, **_BINARY, "learn_lambda": False}),
}
SEEDS = 3  # of every row in which unlabelled or labelled data are drawn at random
TRAINED = "multi-task training"
LEARNED_HEADS = (
    "learned heads"  # kind of the records of rows whose heads were learned; those of the kind "row" have the experts'
)
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {  # rows without anything to choose: (method, parameters)
    "base": ("task_arithmetic", {"lambda": 0.0}),
    "weight average": ("average", {}),
}
# every row that gives one model, but for the empirical Fisher information, which reads labels
WITH_HEADS = (
    *PLAIN,
    *STATIC,
    *(row for row in STATISTICS if row != "Fisher, empirical"),
    *(row for row in ADAPTED if not row.endswith("masks only")),
)
WORTH = 0.25  # points of mean score that a search must gain beyond its grid to go on there
