"""One row of a table at a time: merged or adapted, scored on test, and its record written."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from printer import Printer
from records import Records, summary
from table_rows import (
    ADAPTED,
    DEMO,
    LEARNED_HEADS,
    MODULES,
    PLAIN,
    STATIC,
    STATISTICS,
    TASK_AWARE,
    WEMOE_LR_TIMES_STEPS,
    Bed,
    Grid,
)
from table_search import widened

from adarank.adapt.distilled import DISTILLED
from adarank.adapt.methods import ADAPTIVE
from adarank.adapt.problem import Predictions
from adarank.adapt.settings import AdaptSettings
from adarank.data.task import TaskData
from adarank.io.checkpoint import Checkpoint
from adarank.io.record import Clock, machine, versions
from adarank.methods import METHODS, Masked, Method, merge_tensors
from adarank.outputs.bundle import load_bundle
from adarank.recipe.job import open_job
from adarank.recipe.reader import load_recipe, parse_recipe
from adarank.recipe.schema import Recipe
from adarank.settings import parse
from adarank.spectral.mask_file import FILE, MaskFile
from adarank.workflow.build_networks import build_models
from adarank.workflow.context import RecipeContext
from adarank.workflow.evaluate import heads_held, heads_of, score_all, score_bundle
from adarank.workflow.heads import learned_heads
from adarank.workflow.load_tasks import load_tasks
from adarank.workflow.merge import merge
from adarank.workflow.problem import expert_predictions, problem_of
from adarank.workflow.scores import Table

LEARN_HEADS = AdaptSettings(learn_heads=True)


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

    def record(self, row: str, seed: int, content: dict[str, Any], kind: str = "row") -> None:
        """Score what the networks hold on test and write the row's record."""
        tested = {task: len(of.splits.rows["test"]) for task, of in self.data.items()}
        table = Table("test", "disjoint", tested, metrics={task: of.metric for task, of in self.data.items()})
        table.rows[row] = content.pop("scores", None) or score_all(self.job, self.models, self.data, "test")
        counts = {
            task: {split: len(rows) for split, rows in own.splits.rows.items()} for task, own in self.data.items()
        }
        for part in ("adaptation", "training", "statistics", "learned_heads"):
            if part in content:
                content[part] = summary(content[part], counts)
        record = {
            "kind": kind,
            "name": row,
            "seed": seed,
            "split": "test",
            "protocol": "disjoint",
            "mean": table.mean(row),
            "scores": table.rows[row],
            **content,
            "rows_per_split": counts,
            "command": self.command + " --heads learn" * (kind == LEARNED_HEADS),
            "inputs": self.inputs,
            "versions": versions(),
            "machine": machine(self.job.recipe.device),
        }
        self.records.write(record)
        print(
            f"{row:28s} {kind} seed {seed}  mean {record['mean']:6.2f}  "
            + "  ".join(f"{t} {s:.1f}" for t, s in table.rows[row].items()),
            flush=True,
        )

    def recorded(self, row: str, seed: int, kind: str = "row") -> bool:
        return self.records.first(kind=kind, name=row, seed=seed) is not None

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
        content = self._merged(method, data or self.data)
        self.record(row, seed, content | {"chosen": chosen})

    def _merged(self, method: Method, data: Mapping[str, TaskData]) -> dict[str, Any]:
        """Fill the networks with what a method that does not adapt gives; its settings, what it cost and its report."""
        clock = Clock()
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as kept:
            job, state = replace(self.job, method=method), Path(kept) / "state.pt"
            result = method.run(RecipeContext(job, data, state=state, ready=self.models))
            self.models.fill(result.tensors)
        spent = clock.spent()
        settings = {
            "merge_method": method.name,
            "parameters": method.model_dump(by_alias=True, exclude={"weights", "masks"}),
        }
        costs = {"merge_seconds": spent["seconds"], "peak_resident_bytes": spent["peak_resident_bytes"]}
        return {"settings": settings, **costs} | result.recorded()

    @cached_property
    def predictions(self) -> dict[str, Predictions]:
        """The experts' predictions: computed once for all rows whose heads are learned on the merged body."""
        return expert_predictions(self.job, self.models, self.data, LEARN_HEADS)

    def _heads_after(self, row: str, seed: int, method: Method, chosen: str) -> None:
        """The row of a method that does not adapt, with heads that are learned as by `heads: learn`."""
        predictions = self.predictions
        content = self._merged(method, self.data) | {"chosen": chosen}
        if not self.recorded(row, seed):
            self.record(row, seed, dict(content))
        problem = problem_of(self.job, self.models, self.data, LEARN_HEADS, predictions)
        with heads_held(self.models, {}):
            _, report = learned_heads(self.job, problem, lambda text: None)
            self.record(row, seed, content | {"learned_heads": report}, LEARNED_HEADS)

    def search(self, row: str) -> dict[str, Any]:
        """The settings of a row with the best mean on select; the whole grid is kept in a record of the kind "search"."""
        name, axes = TASK_AWARE[row] if row in TASK_AWARE else STATIC[row][:2]
        stem, kind = "energy" if "energy" in axes else name, METHODS[name]
        record = self.records.first(kind="search", name=stem)
        if record is None:
            clock = Clock()
            found = widened(self, kind, name, axes, self.folder / "search" / stem)
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
            parameters, adapt = (
                {"lr": WEMOE_LR_TIMES_STEPS / steps},
                {**adapt, "steps": steps, "check_every": steps // 2},
            )
        arithmetic = {"start": {"parameters": dict(scale)}} if name == "surgery" else dict(scale)
        changes = {"merge_method": name, "parameters": {**parameters, **arithmetic}, "adapt": adapt, "seed": seed}
        self.scored_bundle(row, seed, changes, "λ on select, with labels; modules: no labels", self._data_of(seed))

    def scored_bundle(
        self, row: str, seed: int, changes: Mapping[str, Any], chosen: str, data: Mapping[str, TaskData]
    ) -> None:
        """Write a bundle, unless it is there, and the record of its scores."""
        out = self.output(row, seed)
        if not out.exists():
            merge(self.recipe(changes), out, progress=Printer(row, seed), data=data)
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
        out = self.output(row, seed)
        changes, chosen = self._adapted(row, start)
        changes["adapt"] |= self._heads(row, False)
        merged = self._filled(row, seed, out, changes)
        content = {"settings": merged["settings"], "adaptation": merged["adaptation"], "merge_seconds": merged["seconds"],
                   "peak_resident_bytes": merged["peak_resident_bytes"],
                   "chosen": chosen}  # fmt: skip
        self.record(row, seed, content)

    def _filled(self, row: str, seed: int, out: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Merge to `out`, unless it is there, and fill the networks with it; its record."""
        if not out.exists():
            progress = Printer(row, seed)
            merge(self.recipe({**changes, "seed": seed}), out, progress=progress, data=self._data_of(seed))
        checkpoint = Checkpoint(out)
        self.models.fill((name, checkpoint.read(name)) for name in self.job.network.tensors)
        merged: dict[str, Any] = json.loads((out / "adarank.json").read_text())
        return merged

    def _adapted(self, row: str, start: Mapping[str, float]) -> tuple[dict[str, Any], str]:
        """The recipe of an adaptive row but for models, data and seed, and what was chosen."""
        own = ADAPTED[row]
        parameters = {**start, **own.parameters}
        changes: dict[str, Any] = {"merge_method": own.method, "parameters": parameters}
        if not own.start:
            loop = dict(self.bed.bases if own.loop is None else own.loop)
            return {**changes, "adapt": loop}, "nothing: as adarank does by default, without labels"
        loop = dict(self.bed.adapt[parameters.get("origin", "pretrained")])
        if own.steps:
            larger = loop["steps"] / own.steps
            loop |= {"steps": own.steps, **{name: larger * loop[name] for name in ("lr_masks", "lr_lambda")}}
        chosen = "start: λ and rank on select, with labels; adaptation: no labels"
        return {**changes, "adapt": {"preset": "paper", **loop}}, chosen

    @staticmethod
    def _heads(row: str, learned: bool) -> dict[str, bool]:
        """Whether heads are learned once the body is; nothing to say where they are learned by the same steps."""
        return {} if (ADAPTIVE | DISTILLED)[ADAPTED[row].method].joint_heads else {"learn_heads": learned}

    def trained(self, row: str, seed: int) -> None:
        """The reference, with labels, on what the experts were trained on. It has heads of its own."""
        out = self.output(row, seed)
        if self.bed is DEMO and self.labelled is None:
            print(f"{row}: left out; give --labelled", flush=True)
            return
        changes = {"merge_method": "multitask", "parameters": dict(self.bed.training), "seed": seed,
                   "models": self._labelled_models()}  # fmt: skip
        if not out.exists():
            merge(self.recipe(changes), out, progress=Printer(row, seed))
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

    def learned_heads(self, row: str, seed: int) -> None:
        """The row once more, each task's head learned on the merged body: after data-free merges, or as adaptation does.

        Of an adaptive row that is both records: it has the same body with the experts' heads.
        """
        out = self.output(f"{row}, learned heads", seed)
        if row not in ADAPTED:
            self._heads_after(row, seed, *self._plain(row, seed))
            return
        of = ADAPTED[row].start
        changes, chosen = self._adapted(row, self.search(of) if of else {})
        changes["adapt"] |= self._heads(row, True)
        merged = self._filled(row, seed, out, changes)
        content = {name: merged[name] for name in ("settings", "adaptation", "learned_heads") if name in merged}
        content |= {
            "merge_seconds": merged["seconds"],
            "peak_resident_bytes": merged["peak_resident_bytes"],
            "chosen": chosen,
        }
        heads = merged["adaptation"].pop("heads", {})
        self.record(row, seed, dict(content))
        with heads_of(out, self.models):
            self.record(row, seed, content | {"adaptation": {"heads": heads}}, LEARNED_HEADS)

    def _plain(self, row: str, seed: int) -> tuple[Method, str]:
        """A row's method that does not adapt, as it is after `search`, and what chose its settings."""
        axes: Grid = {}
        if row in STATISTICS:
            name, parameters = STATISTICS[row][0], {**STATISTICS[row][1], "seed": seed}
        elif row in PLAIN:
            name, parameters = PLAIN[row]
        else:
            name, axes, seeds = STATIC[row]
            parameters = (self.search(row) if axes else {}) | ({"seed": seed} if seeds > 1 else {})
        chosen = f"{', '.join(axes)} on select, with labels" if axes else "nothing to choose"
        return parse(METHODS[name], parameters, name), f"{chosen}; heads: no labels"

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
