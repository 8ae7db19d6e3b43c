"""The tables of both test beds: every method on eight real experts, one record per row and seed.

    python benchmarks/table.py minilm-8 FOLDER [--rows NAME …] [--threads 2]
    python benchmarks/table.py demo-8 FOLDER

minilm-8: FOLDER holds `models/` (base and experts) and `text/` (task data), as examples/minilm-8/README.md describes.
demo-8: the experts and images that adarank ships; FOLDER takes what is written on the way.

λ and rank of static methods, which adaptive ones start from, are chosen on the labelled `select` split, on grids that
widen until the best point lies inside; adaptation reads no label. The reference "multi-task training" reads those of the
rows that the experts were trained on: `train.tsv` beside minilm-8's `test.tsv`; demo-8's are not shipped, so there it
needs `--labelled DIR`, its sources (`--data` in zoo/README.md), and is left out without. So does the empirical Fisher
information there: demo-8's adapt images have no labels.

Records are lines of records/BED.jsonl. Rows whose record exists are skipped; an adaptation that was cut off continues from its saved state.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adarank.cli.threads import wait_passively

wait_passively()  # before PyTorch is loaded

import numpy as np
import torch
from records import FOLDER, Records, summary

from adarank.data.task import TaskData
from adarank.io.checkpoint import Checkpoint
from adarank.io.record import Clock, machine, versions
from adarank.methods import METHODS, Masked, Method, WeightAverage, merge_tensors
from adarank.outputs.bundle import load_bundle
from adarank.recipe.job import open_job
from adarank.recipe.reader import load_recipe, parse_recipe
from adarank.recipe.schema import Recipe
from adarank.settings import parse
from adarank.spectral.mask_file import FILE, MaskFile
from adarank.workflow import demo
from adarank.workflow.build_networks import build_models, network_tensors
from adarank.workflow.context import RecipeContext
from adarank.workflow.evaluate import heads_of, score_all, score_bundle, score_experts
from adarank.workflow.load_tasks import load_tasks
from adarank.workflow.merge import merge
from adarank.workflow.scores import Table
from adarank.workflow.search import Point, each_tasks_best, edges, try_points

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
_WEMOE = 1000 * 1e-4
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
    "AdaRank, 32 inputs a step": Adapted("adarank", None, loop={"batch_size": 32}),
    "AdaRank, binary masks": Adapted("adarank", None, _BINARY, loop={}),
    "TSV-M+AdaRank, soft masks": Adapted("adarank", None, {"basis": "tsv_m"}, loop={}),
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
WORTH = 0.25  # points of mean score that a search must gain beyond its grid to go on there


class Bench:
    """The job, its data and one set of networks, shared by all rows."""

    def __init__(self, bed: Bed, folder: Path, records: Records, labelled: Path | None = None) -> None:
        self.bed, self.folder, self.records, self.labelled = bed, folder.resolve(), records, labelled
        self.job = open_job(self.recipe({"merge_method": "average"}))
        self.data = load_tasks(self.job)
        self.models = build_models(self.job)
        self.inputs = self.job.inputs()

    @property
    def command(self) -> str:
        return f"python benchmarks/table.py {self.bed.name} FOLDER"

    def recipe(self, changes: Mapping[str, Any]) -> Recipe:
        """The bed's models and data with another method; paths count from FOLDER, or from the demo's own."""
        given = load_recipe(self.bed.recipe)
        values = given.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude={"parameters", "adapt"})
        return parse_recipe({**values, **changes}, given.folder if self.bed is DEMO else self.folder)

    def record(self, row: str, seed: int, content: dict[str, Any]) -> None:
        """Score what the networks hold on test and write the row's record."""
        table = Table("test", "disjoint", {})
        table.rows[row] = content.pop("scores", None) or score_all(self.job, self.models, self.data, "test")
        counts = {
            task: {split: len(rows) for split, rows in own.splits.rows.items()} for task, own in self.data.items()
        }
        for part in ("adaptation", "training", "statistics"):
            if part in content:
                content[part] = summary(content[part], counts)
        record = {
            "kind": "row",
            "name": row,
            "seed": seed,
            "split": "test",
            "protocol": "disjoint",
            "mean": table.mean(row),
            "scores": table.rows[row],
            **content,
            "rows_per_split": counts,
            "command": self.command,
            "inputs": self.inputs,
            "versions": versions(),
            "machine": machine(self.job.recipe.device),
        }
        self.records.write(record)
        print(
            f"{row:28s} seed {seed}  mean {record['mean']:6.2f}  "
            + "  ".join(f"{t} {s:.1f}" for t, s in table.rows[row].items()),
            flush=True,
        )

    def recorded(self, row: str, seed: int) -> bool:
        return self.records.first(kind="row", name=row, seed=seed) is not None

    def output(self, row: str, seed: int) -> Path:
        """Where the row's merged model is written."""
        name = row.replace("+", "-plus-").replace(",", "").replace(" ", "-").lower()
        return self.folder / "out" / f"{name}-seed{seed}"

    def from_statistics(self, row: str, seed: int) -> None:
        """Merge by a method that looks at inputs; where adapt inputs have no labels, at labelled ones of `--labelled`."""
        name, parameters = STATISTICS[row]
        chosen, data = "nothing to choose", self.data
        method = parse(METHODS[name], {**parameters, "seed": seed}, name)
        if method.reads_labels and self.bed is DEMO:
            if self.labelled is None:
                print(f"{row}: left out; give --labelled", flush=True)
                return
            data = load_tasks(open_job(self.recipe({"merge_method": "average", "models": self._labelled_models()})))
            chosen += "; labels of the experts' training rows"
        self.static(row, method, chosen, seed, data)

    def static(
        self, row: str, method: Method, chosen: str, seed: int = 0, data: Mapping[str, TaskData] | None = None
    ) -> None:
        clock = Clock()
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as kept:
            job, state = replace(self.job, method=method), Path(kept) / "state.pt"
            result = method.run(RecipeContext(job, data or self.data, state=state, ready=self.models))
            self.models.fill(result.tensors)
        spent = clock.spent()
        spent = {"merge_seconds": spent["seconds"], "peak_resident_bytes": spent["peak_resident_bytes"]}
        settings = {
            "merge_method": method.name,
            "parameters": method.model_dump(by_alias=True, exclude={"weights", "masks"}),
        }
        content = {"settings": settings, "chosen": chosen, **spent}
        self.record(row, seed, content | result.recorded())

    def search(self, row: str) -> dict[str, Any]:
        """The settings of a row with the best mean on select; the whole grid is kept in a record of the kind "search"."""
        name, axes = TASK_AWARE[row] if row in TASK_AWARE else STATIC[row][:2]
        stem, kind = "energy" if "energy" in axes else name, METHODS[name]
        record = self.records.first(kind="search", name=stem)
        if record is None:
            clock = Clock()

            def tried(values: Mapping[str, Iterable[Any]]) -> list[Point]:
                grid = [dict(zip(values, own, strict=True)) for own in itertools.product(*values.values())]
                points = [(own, parse(kind, own, name)) for own in grid]
                return try_points(self.job, self.models, self.data, points, self.folder / "search" / stem)

            found = tried(axes)
            gained = math.inf
            # until the best lies inside, or it is level there
            while (beyond := edges(kind, found)) and gained >= WORTH:
                near, before = _near(found), max(point.mean for point in found)
                for axis, (_, further) in beyond.items():
                    found += [p for p in tried({**near, axis: [further]}) if p not in found]
                gained = max(point.mean for point in found) - before
            found += each_tasks_best(kind, found)
            best = max(found, key=lambda point: point.mean)
            record = {
                "kind": "search",
                "name": stem,
                "method": name,
                "split": "select, with labels",
                "best": {**best.settings, "mean": best.mean, **best.scores},
                "points": [{**point.settings, "mean": point.mean, **point.scores} for point in found],
                "command": self.command,
                "machine": machine(self.job.recipe.device),
                "versions": versions(),
                **clock.spent(),
            }
            self.records.write(record)
            shutil.rmtree(self.folder / "search" / stem)
        best_point = record["best"]
        print(f"search {row}: {best_point}", flush=True)
        return {key: best_point[key] for key in axes}

    def bundle(self, row: str) -> None:
        """Write the bundle of a task-aware method and score each task by its own weights."""
        name, axes = TASK_AWARE[row]
        settings = self.search(row) if axes else {}
        chosen = f"{', '.join(axes)} on select, with labels" if axes else "nothing to choose"
        self.scored_bundle(row, 0, {"merge_method": name, "parameters": settings}, chosen, self.data)

    def modules(self, row: str, seed: int, scale: Mapping[str, float]) -> None:
        """Train a row's adapters or routers and score the networks that carry them."""
        name, adapt = MODULES[row]
        parameters: dict[str, Any] = {}
        if name == "wemoe":
            steps = self.bed.routed
            parameters, adapt = {"lr": _WEMOE / steps}, {**adapt, "steps": steps, "check_every": steps // 2}
        arithmetic = {"start": {"parameters": dict(scale)}} if name == "surgery" else dict(scale)
        changes = {"merge_method": name, "parameters": {**parameters, **arithmetic}, "adapt": adapt, "seed": seed}
        self.scored_bundle(row, seed, changes, "λ on select, with labels; modules: no labels", self._data_of(seed))

    def scored_bundle(
        self, row: str, seed: int, changes: Mapping[str, Any], chosen: str, data: Mapping[str, TaskData]
    ) -> None:
        """Write a bundle, unless it is there, and the record of its scores."""
        out = self.output(row, seed)
        if not out.exists():
            merge(self.recipe(changes), out, progress=_Printer(row, seed), data=data)
        bundle = load_bundle(out)
        merged = json.loads((out / "adarank.json").read_text())
        content = {
            "scores": score_bundle(self.job, self.models, self.data, bundle, "test"),
            "settings": {"merge_method": changes["merge_method"], **merged["settings"]},
            "chosen": chosen,
            "known_in_use": merged.get("adaptation", {}).get("known_in_use", "the task of every input"),
            **({"adaptation": merged["adaptation"]} if "adaptation" in merged else {}),
            "bytes": bundle.sizes,
            "merge_seconds": merged["seconds"],
            "peak_resident_bytes": merged["peak_resident_bytes"],
        }
        self.record(row, seed, content)

    def adapted(self, row: str, seed: int, start: Mapping[str, float]) -> None:
        own = ADAPTED[row]
        out = self.output(row, seed)
        parameters = {**start, **own.parameters}
        changes = {"merge_method": own.method, "parameters": parameters, "seed": seed}
        chosen = "nothing: as adarank does by default, without labels"
        changes["adapt"] = dict(self.bed.bases if own.loop is None else own.loop)
        if own.start:
            loop = dict(self.bed.adapt[parameters.get("origin", "pretrained")])
            if own.steps:
                larger = loop["steps"] / own.steps
                loop |= {"steps": own.steps, **{name: larger * loop[name] for name in ("lr_masks", "lr_lambda")}}
            changes["adapt"] = {"preset": "paper", **loop}
            chosen = "start: λ and rank on select, with labels; adaptation: no labels"
        if not out.exists():
            progress = _Printer(row, seed)
            merge(self.recipe(changes), out, progress=progress, data=self._data_of(seed))
        merged = json.loads((out / "adarank.json").read_text())
        checkpoint = Checkpoint(out)
        self.models.fill((name, checkpoint.read(name)) for name in self.job.network.tensors)
        content = {"settings": merged["settings"], "adaptation": merged["adaptation"], "merge_seconds": merged["seconds"],
                   "peak_resident_bytes": merged["peak_resident_bytes"],
                   "chosen": chosen}  # fmt: skip
        self.record(row, seed, content)

    def trained(self, row: str, seed: int) -> None:
        """The reference, with labels, on what the experts were trained on. It has heads of its own."""
        out = self.output(row, seed)
        if self.bed is DEMO and self.labelled is None:
            print(f"{row}: left out; give --labelled", flush=True)
            return
        changes = {"merge_method": "multitask", "parameters": dict(self.bed.training), "seed": seed,
                   "models": self._labelled_models()}  # fmt: skip
        if not out.exists():
            merge(self.recipe(changes), out, progress=_Printer(row, seed))
        merged = json.loads((out / "adarank.json").read_text())
        checkpoint = Checkpoint(out)
        self.models.fill((name, checkpoint.read(name)) for name in self.job.network.tensors)
        content = {key: merged[key] for key in ("settings", "training", "peak_resident_bytes")}
        content |= {
            "merge_seconds": merged["seconds"],
            "chosen": "by hand; trained on labels of the experts' training rows",
        }
        with heads_of(out, self.models):
            self.record(row, seed, content)

    def _labelled_models(self) -> list[dict[str, Any]]:
        """The bed's models, each task's adapt file being what its expert was trained on, with labels."""
        models = self.recipe({}).model_dump(mode="json", by_alias=True, exclude_unset=True)["models"]
        for entry in models:
            own = entry["task"]
            scored = own["data"] if isinstance(own["data"], dict) else {"test": own["data"]}
            own["data"] = {**scored, "adapt": self._training_file(own["name"])}
        return list(models)

    def _training_file(self, task: str) -> str:
        if self.labelled is None:
            return f"text/{task}/train.tsv"
        path = self.folder / "labelled" / f"{task}.npz"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with np.load(self.labelled / f"{task}.npz") as source:
                np.savez(path, image=source["train_x"], label=source["train_y"])
        return str(path)

    def _data_of(self, seed: int) -> dict[str, TaskData]:
        """The tasks with an adaptation seed of their own: what is read and how it is split stays."""
        return {task: replace(own, seed=seed) for task, own in self.data.items()}

    def random_masks(self, row: str, of: str, seed: int) -> None:
        """The learned λ with masks of the same density in random places."""
        learned = MaskFile.load(self.output(of, 0) / FILE)
        method = Masked(masks=learned, shuffled=True, seed=seed)
        self.models.fill(merge_tensors(method, self.job.network))
        self.record(
            row,
            seed,
            {
                "settings": {
                    "masks": f"random, each task and matrix as dense as in {of} seed 0",
                    "lambda": "as learned there",
                }
            },
        )


def _near(points: Sequence[Point]) -> dict[str, list[Any]]:
    """Of each axis, the best point's value and those next to it."""
    best = max(points, key=lambda point: point.mean).settings
    near = {}
    for axis, at in best.items():
        values = sorted({point.settings[axis] for point in points})
        place = values.index(at)
        near[axis] = values[max(0, place - 1) : place + 2]
    return near


class _Printer:
    def __init__(self, row: str, seed: int) -> None:
        self.row, self.seed = row, seed

    def __call__(self, history: Any, steps: int) -> None:
        if history.step % 25 == 0 or history.step == 1:
            mean = sum(values[-1] for values in history.losses.values()) / len(history.losses)
            kept = f" kept {history.kept[-1]:.4f}" if history.kept else ""
            print(
                f"  {self.row} seed {self.seed} step {history.step}/{steps} mean loss {mean:.3f}{kept} {history.seconds:.0f} s",
                flush=True,
            )


def run(bench: Bench, rows: list[str], seeds: int = SEEDS) -> None:
    """Rows in the order of their use: what others start from first, second and third seeds last."""

    def wanted(row: str, seed: int = 0) -> bool:
        return (not rows or row in rows) and seed < seeds and not bench.recorded(row, seed)

    if wanted("base"):
        bench.models.fill(network_tensors(bench.job, "base"))
        bench.record("base", 0, {"settings": {"what": "the base under each expert's head"}})
    if wanted("experts"):
        scores = score_experts(bench.job, bench.models, bench.data, "test")
        bench.record("experts", 0, {"scores": scores, "settings": {"what": "each task by its own expert"}})
        bench.models.fill(network_tensors(bench.job, "base"))
    if wanted("weight average"):
        bench.static("weight average", WeightAverage(), "nothing to choose")
    best = {}
    needed = {own.start for row, own in ADAPTED.items() if any(wanted(row, seed) for seed in range(SEEDS))}
    needed |= {"TA"} if any(wanted(row, seed) for row in MODULES for seed in range(SEEDS)) else set()
    for row, (name, axes, most) in STATIC.items():
        for seed in range(most):
            if wanted(row, seed) or row in needed:
                best[row] = bench.search(row) if axes else {}
            if wanted(row, seed):
                settings = best[row] | ({"seed": seed} if most > 1 else {})
                chosen = f"{', '.join(axes)} on select, with labels" if axes else "nothing to choose"
                bench.static(row, parse(METHODS[name], settings, name), chosen, seed)
    for row in TASK_AWARE:
        if wanted(row):
            bench.bundle(row)
    for seed in range(SEEDS):
        for row in STATISTICS:
            if wanted(row, seed):
                bench.from_statistics(row, seed)
        for row, own in ADAPTED.items():
            if wanted(row, seed):
                bench.adapted(row, seed, best[own.start] if own.start else {})
        for row in MODULES:
            if wanted(row, seed):
                bench.modules(row, seed, best["TA"])
        if wanted(TRAINED, seed):
            bench.trained(TRAINED, seed)
    for of in ("CART+AdaRank", "TA+AdaRank"):
        if wanted(f"{of}, random masks") and bench.recorded(of, 0):
            bench.random_masks(f"{of}, random masks", of, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bed", choices=BEDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=Path, metavar="FILE", help="default: records/BED.jsonl")
    parser.add_argument("--rows", nargs="*", default=[])
    parser.add_argument("--labelled", type=Path, metavar="DIR", help="demo-8 alone: its sources, with labels")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="at most so many of each row")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--keep", action="store_true", help="keep the merged models in FOLDER/out when all rows are done"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bed = BEDS[arguments.bed]
    records = Records(arguments.records or FOLDER / f"{bed.name}.jsonl")
    run(Bench(bed, arguments.folder, records, arguments.labelled), arguments.rows, arguments.seeds)
    if not arguments.keep and not arguments.rows:
        shutil.rmtree(arguments.folder / "out", ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
