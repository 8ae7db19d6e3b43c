"""The table of lm-4: a small Llama and its experts of verse, news, code and arithmetic, merged in every way that fits.

    python zoo/lm_build.py --verse FILE --news FILE --out BED
    python benchmarks/language_models.py --bed BED --work DIR [--rows NAME ...] [--seed 0] [--steps N]

Every row is merged by its recipe, once; of rows with several settings the one with the least mean loss on the labelled select
split is taken. Then perplexity and next-token accuracy of every domain, and exact answers of arithmetic, are counted on the test
split. Rows that `records/lm-4.jsonl` has are left out unless named. WORK keeps models, recipes and state: a cut run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adarank.cli.threads import wait_passively

wait_passively()  # before PyTorch is loaded

import yaml
from records import FOLDER, Records, summary
from torch import nn

from adarank.data.spec import Split
from adarank.data.task import TaskData
from adarank.io.checkpoint import Checkpoint
from adarank.io.record import machine, versions
from adarank.models.generation import CausalModels
from adarank.recipe.job import open_job
from adarank.recipe.reader import load_recipe
from adarank.workflow.load_tasks import load_tasks
from adarank.workflow.merge import merge
from adarank.workflow.scores import measure_task

KIND = "language row"
COMMAND = "python benchmarks/language_models.py --bed BED --work DIR"
DOMAINS = ("verse", "news", "code", "arithmetic")
Recipe = dict[str, Any]
_LAMBDAS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


def grid(method: str, **others: Any) -> list[Recipe]:
    """A method with each λ of the grid."""
    return [{"merge_method": method, "parameters": {"lambda": value, **others}} for value in _LAMBDAS]


def adapted(parameters: Recipe | None = None, **adapt: Any) -> list[Recipe]:
    """AdaRank with these settings, and these of its loop."""
    return [{"merge_method": "adarank", "parameters": parameters or {}, "adapt": {"batch_size": 8, **adapt}}]


# name -> its candidates; of those after "lora" the adapters are the experts
ROWS: Mapping[str, Sequence[Recipe]] = {
    "average": [{"merge_method": "average"}],
    "task arithmetic": grid("task_arithmetic"),
    "TIES": grid("ties", density=0.2, normalize=False),
    "DARE": grid("dare", drop=0.5),
    "TSV-M": grid("tsv_m"),
    "WUDI": grid("wudi"),
    "CART": grid("cart", rank=0.16),
    "AdaRank by entropy": adapted(objective="entropy"),
    "AdaRank by entropy, about the average": adapted({"origin": "average"}, objective="entropy"),
    "AdaRank": adapted(),
    "AdaRank, 450 steps": adapted(steps=450),
    "AdaRank about the average": adapted({"origin": "average"}),
    "AdaRank block by block": adapted(by="block"),
    "AdaRank block by block, about the average": adapted({"origin": "average"}, by="block"),
}
SEEDED = ("DARE", *(name for name in ROWS if name.startswith("AdaRank")))


class Bed:
    """Models, data and recipes of the bed.

    Arguments:
        lora: experts are the LoRA adapters, else the whole models.
    """

    def __init__(self, bed: Path, work: Path, lora: bool, seed: int, steps: int | None) -> None:
        self.bed, self.seed, self.steps, self.experts = bed.resolve(), seed, steps, "adapters" if lora else "experts"
        self.work = work.resolve() / self.experts
        self.work.mkdir(parents=True, exist_ok=True)
        self.family = CausalModels()
        self.job = open_job(load_recipe(self.recipe("data", {"merge_method": "average"})))
        self.data = load_tasks(self.job)

    def recipe(self, name: str, changes: Recipe) -> Path:
        """Write a recipe over the bed; `changes` are its method and settings."""
        models = []
        for domain in DOMAINS:
            files = {split: str(self.bed / "data" / domain / f"{split}.jsonl") for split in ("adapt", "select", "test")}
            task: dict[str, Any] = {
                "name": domain,
                "kind": "text-generation",
                "data": files,
                "columns": {"text": "prompt"},
            }
            if domain == "arithmetic":
                task |= {"columns": {"text": "prompt", "answer": "answer"}, "answers": "generate", "max_new_tokens": 64}
            models.append({"model": str(self.bed / self.experts / domain), "task": task})
        if self.steps and "adapt" in changes:
            changes = {**changes, "adapt": {**changes["adapt"], "steps": self.steps}}
        content = {
            "base_model": str(self.bed / "base"),
            "models": models,
            "device": "cpu",
            "seed": self.seed,
            **changes,
        }
        path = self.work / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return path

    def merged(self, name: str, changes: Recipe) -> tuple[Path, dict[str, Any]]:
        """An output of a recipe and its record, made if it is not there."""
        out = self.work / name
        if not (out / "adarank.json").is_file():
            merge(self.recipe(name, changes), out, note=lambda text: print(f"    {text}", flush=True))
        return out, json.loads((out / "adarank.json").read_text(encoding="utf-8"))

    def score(self, module: nn.Module, domain: str, metric: str, split: Split = "test") -> float:
        """A module's score on a domain."""
        data: TaskData = replace(self.data[domain], metric=metric)
        return measure_task(self.family, module, data, split).value

    def loss(self, folder: Path) -> float:
        """Mean loss over the domains on the select split: what settings are chosen by."""
        module = self.family.load(Checkpoint(folder))
        return sum(self.score(module, domain, "loss", "select") for domain in DOMAINS) / len(DOMAINS)

    def scores(self, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
        """All figures of a row, given the module that serves each domain; lists are in the order of `DOMAINS`."""
        return {
            "perplexity": [round(self.score(modules[domain], domain, "perplexity"), 4) for domain in DOMAINS],
            "token_accuracy": [round(self.score(modules[domain], domain, "token_accuracy"), 3) for domain in DOMAINS],
            "exact_match": round(self.score(modules["arithmetic"], "arithmetic", "exact_match"), 2),
        }

    def of_one(self, folder: Path) -> dict[str, Any]:
        """The figures of one model for all domains."""
        module = self.family.load(Checkpoint(folder))
        return self.scores(dict.fromkeys(DOMAINS, module))

    def row(self, name: str) -> dict[str, Any]:
        """The figures of a row, its settings and what they cost."""
        if name == "base":
            return self.of_one(self.bed / "base")
        if name == "experts":
            return self.scores({domain: self.family.load(self.job.experts[domain]) for domain in DOMAINS})
        started, slug = time.monotonic(), name.replace(" ", "-").lower()
        suffix = f"-{self.seed}" if name in SEEDED else ""
        tried = [(f"{slug}{suffix}-{i}" if len(ROWS[name]) > 1 else f"{slug}{suffix}", c) for i, c in enumerate(ROWS[name])]  # fmt: skip
        made = [(*self.merged(place, changes), changes) for place, changes in tried]
        losses = [self.loss(out) for out, _, _ in made] if len(made) > 1 else [math.nan]
        out, record, changes = made[losses.index(min(losses))]
        content = {**self.of_one(out), "settings": changes, "candidates": len(made)}
        content["seconds"] = round(record.get("seconds", time.monotonic() - started), 1)
        if "adaptation" in record:
            rows = {domain: {} for domain in DOMAINS}
            content["adaptation"] = summary(record["adaptation"], rows) if "judged" in record["adaptation"] else {}
        for place, _ in tried:
            shutil.rmtree(self.work / f"{place}.state", ignore_errors=True)
        return content


def main() -> int:
    """Make the rows that are missing, or those named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bed", type=Path, required=True, help="what zoo/lm_build.py wrote")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument(
        "--rows", nargs="*", metavar="NAME", help=f"base, experts, {', '.join(ROWS)}; 'lora: NAME' of the adapters"
    )
    parser.add_argument("--seed", type=int, default=0, help="of batches, and of what DARE drops")
    parser.add_argument("--steps", type=int, help="of adaptation, in place of the default")
    parser.add_argument("--records", type=Path, default=FOLDER / "lm-4.jsonl")
    options = parser.parse_args()
    records = Records(options.records)
    manifest = json.loads((options.bed / "manifest.json").read_text(encoding="utf-8"))
    every = ["base", "experts", *ROWS, "lora: experts", *(f"lora: {name}" for name in ROWS)]
    beds: dict[bool, Bed] = {}
    for title in options.rows or every:
        lora, name = title.startswith("lora: "), title.removeprefix("lora: ")
        seed = options.seed if name in SEEDED else 0
        if not options.rows and records.first(kind=KIND, name=title, seed=seed):
            continue
        print(title, flush=True)
        bed = beds.setdefault(lora, Bed(options.bed, options.work, lora, options.seed, options.steps))
        row = bed.row(name)
        print(f"  {row['perplexity']} {row['token_accuracy']} {row['exact_match']}", flush=True)
        about = {"command": COMMAND, "inputs": bed.job.inputs(), "versions": versions(), "machine": machine("cpu")}
        records.write({"kind": KIND, "name": title, "seed": seed, "domains": list(DOMAINS), **row, **about})
    bed_record = {key: manifest[key] for key in ("seed", "numbers", "characters", "parameters", "made_with")}
    records.write({"kind": "bed", "name": "lm-4", **bed_record})
    return 0


if __name__ == "__main__":
    sys.exit(main())
