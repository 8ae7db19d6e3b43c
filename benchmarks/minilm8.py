"""The minilm-8 table: every method on eight real text experts, one record per row.

    python benchmarks/minilm8.py FOLDER [--records records/minilm-8] [--rows NAME …] [--threads 2]

FOLDER holds `models/` (base and experts) and `text/` (task data), as examples/minilm-8/README.md describes. λ and rank
of static methods, which adaptive ones start from, are chosen on the labelled `select` split; adaptation reads no
label, and its last step is the one that is scored. Rows whose record exists are skipped; an adaptation that was cut
off continues from its saved state.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from adarank import networks, pipeline, scoring
from adarank.adapt.methods import ADAPTIVE
from adarank.blocks import Blocks, build_blocks
from adarank.checkpoint import Checkpoint
from adarank.evaluate import Table
from adarank.masks import FILE, MaskFile, random_mask, top_mask
from adarank.methods import CART, Masked, Method, SVDk, TaskArithmetic, WeightAverage, merge_tensors
from adarank.plan import Job, open_job
from adarank.recipe import Recipe, load_recipe, parse_recipe
from adarank.record import Clock, machine, versions
from adarank.tasks import load_tasks
from adarank.writer import write_json

EXAMPLES = Path(__file__).parent.parent / "examples" / "minilm-8"
GRIDS: dict[str, dict[str, list[float]]] = {
    "task_arithmetic": {"rank": [1.0], "lambda": [0.1, 0.2, 0.3, 0.4, 0.5, 0.7]},
    "svd_k": {"rank": [0.04, 0.08, 0.16, 0.32], "lambda": [0.3, 0.5, 0.8, 1.2]},
    "cart": {"rank": [0.02, 0.04, 0.08, 0.16], "lambda": [0.7, 1.0, 1.3, 1.6, 2.0]},
}
STEPS, BATCH = 250, 8
# lr × steps is that of the released RoBERTa settings: 5e-5 × 5,000 about the base, 1e-4 × 5,000 about the average.
RATES = {"pretrained": 1e-3, "average": 2e-3}
# row -> (adaptive method, origin, learns masks, learns λ, seeds)
ADAPTED: dict[str, tuple[str, str, bool, bool, int]] = {
    "CART+AdaRank": ("adarank", "average", True, True, 3),
    "TA+AdaRank": ("adarank", "pretrained", True, True, 3),
    "CART++": ("cart++", "average", False, True, 1),
    "AdaMerging": ("adamerging", "pretrained", False, True, 1),
    "CART+AdaRank, self-label": ("adarank", "average", True, True, 1),
    "CART+AdaRank, masks only": ("adarank", "average", True, False, 1),
    "TA+AdaRank, masks only": ("adarank", "pretrained", True, False, 1),
}


class Bench:
    """The job, its data and one set of networks, shared by all rows."""

    def __init__(self, folder: Path, records: Path) -> None:
        self.folder, self.records = folder.resolve(), records
        self.job = self.open("average", {})
        self.data = load_tasks(self.job)
        self.models = networks.build_models(self.job)
        self.inputs = self.job.inputs()

    def recipe(self, name: str, changes: Mapping[str, Any]) -> Recipe:
        given = load_recipe(EXAMPLES / f"{name}.yaml").model_dump(mode="json", by_alias=True, exclude_unset=True)
        return parse_recipe({**given, **changes}, self.folder)

    def open(self, name: str, changes: Mapping[str, Any]) -> Job:
        return open_job(self.recipe(name, changes))

    def record(self, row: str, seed: int, content: dict[str, Any]) -> None:
        """Score what the networks hold on test and write the row's record."""
        table = Table("test", "disjoint", {})
        table.rows[row] = content.pop("scores", None) or scoring.score_all(self.job, self.models, self.data, "test")
        counts = {
            task: {split: len(rows) for split, rows in own.splits.rows.items()} for task, own in self.data.items()
        }
        record = {
            "row": row,
            "seed": seed,
            "split": "test",
            "protocol": "disjoint",
            "mean": table.mean(row),
            "scores": table.rows[row],
            **content,
            "rows_per_split": counts,
            "command": "python benchmarks/minilm8.py FOLDER",
            "inputs": self.inputs,
            "versions": versions(),
            "machine": machine(),
        }
        self.records.mkdir(parents=True, exist_ok=True)
        write_json(self.path(row, seed), record)
        print(
            f"{row:28s} seed {seed}  mean {record['mean']:6.2f}  "
            + "  ".join(f"{t} {s:.1f}" for t, s in table.rows[row].items()),
            flush=True,
        )

    def path(self, row: str, seed: int) -> Path:
        return self.records / f"{row.replace('+', '-plus-').replace(',', '').replace(' ', '-').lower()}-seed{seed}.json"

    def static(self, row: str, method: Method, chosen: str) -> None:
        clock = Clock()
        self.models.fill(merge_tensors(method, self.job.network))
        seconds = clock.spent()["seconds"]
        settings = {
            "merge_method": method.name,
            "parameters": method.model_dump(by_alias=True, exclude={"weights", "masks"}),
        }
        self.record(row, 0, {"settings": settings, "chosen": chosen, "merge_seconds": seconds})

    def grid(self, name: str, blocks: Mapping[str, Blocks]) -> dict[str, float]:
        """The λ and rank with the best mean score on select; the whole grid is kept in a record of its own."""
        path = self.records / f"search-{name}.json"
        if not path.exists():
            points = [self._point(blocks, rank, lam) for rank in GRIDS[name]["rank"] for lam in GRIDS[name]["lambda"]]
            best = max(points, key=lambda point: point["mean"])
            self.records.mkdir(parents=True, exist_ok=True)
            write_json(
                path,
                {
                    "method": name,
                    "split": "select, with labels",
                    "best": best,
                    "points": points,
                    "machine": machine(),
                    "versions": versions(),
                },
            )
        best = json.loads(path.read_text())["best"]
        print(f"search {name}: {best}", flush=True)
        return {"rank": best["rank"], "lambda": best["lambda"]}

    def _point(self, blocks: Mapping[str, Blocks], rank: float, lam: float) -> dict[str, float]:
        tasks = len(self.job.network.tasks)
        merged = ((n, b.compose(torch.full((tasks,), lam), top_mask(b.sizes, rank))) for n, b in blocks.items())
        self.models.fill(merged)
        scores = scoring.score_all(self.job, self.models, self.data, "select")
        return {"rank": rank, "lambda": lam, "mean": sum(scores.values()) / len(scores), **scores}

    def adapted(self, row: str, seed: int, start: Mapping[str, float]) -> None:
        method, origin, learn_masks, learn_lambda, _ = ADAPTED[row]
        out = self.folder / "out" / self.path(row, seed).stem
        given = {"origin": origin, **start, "learn_masks": learn_masks, "learn_lambda": learn_lambda}
        rate = RATES[origin]
        changes = {
            "merge_method": method,
            "parameters": given,
            "adapt": {
                "steps": STEPS,
                "batch_size": BATCH,
                "lr_masks": rate,
                "lr_lambda": rate,
                "objective": "self-label" if "self-label" in row else "entropy",
                "keep": "last",
            },
            "seed": seed,
        }
        assert method in ADAPTIVE
        if not out.exists():
            progress = _Printer(row, seed)
            pipeline.merge(self.recipe("average", changes), out, progress=progress)
        merged = json.loads((out / "adarank.json").read_text())
        checkpoint = Checkpoint(out)
        self.models.fill((name, checkpoint.read(name)) for name in self.job.network.tensors)
        content = {"settings": merged["settings"], "adaptation": merged["adaptation"], "merge_seconds": merged["seconds"],
                   "peak_resident_bytes": merged["peak_resident_bytes"],
                   "chosen": "start: λ and rank on select, with labels; adaptation: no labels, last step"}  # fmt: skip
        self.record(row, seed, content)

    def random_masks(self, row: str, of: str, seed: int) -> None:
        """The learned λ with masks of the same density in random places."""
        learned = MaskFile.load(self.folder / "out" / self.path(of, 0).stem / FILE)
        generator = torch.Generator().manual_seed(seed)
        shuffled = {n: random_mask(m, learned.sizes[n], generator) for n, m in learned.masks.items()}
        method = Masked(
            masks=MaskFile(learned.origin, learned.tasks, learned.lam, shuffled, learned.sizes, learned.about)
        )
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


class _Printer:
    def __init__(self, row: str, seed: int) -> None:
        self.row, self.seed = row, seed

    def __call__(self, history: Any, steps: int) -> None:
        if history.step % 25 == 0 or history.step == 1:
            mean = sum(values[-1] for values in history.losses.values()) / len(history.losses)
            print(
                f"  {self.row} seed {self.seed} step {history.step}/{steps} mean loss {mean:.3f} kept {history.kept[-1]:.4f} {history.seconds:.0f} s",
                flush=True,
            )


def run(bench: Bench, rows: list[str]) -> None:
    """Rows in the order of their use: what others start from first, second and third seeds last."""

    def wanted(row: str, seed: int = 0) -> bool:
        return (not rows or row in rows) and not bench.path(row, seed).exists()

    if wanted("base"):
        bench.models.fill(networks.network_tensors(bench.job, "base"))
        bench.record("base", 0, {"settings": {"what": "the base under each expert's head"}})
    if wanted("experts"):
        scores = scoring.score_experts(bench.job, bench.models, bench.data, "test")
        bench.record("experts", 0, {"scores": scores, "settings": {"what": "each task by its own expert"}})
        bench.models.fill(networks.network_tensors(bench.job, "base"))
    if wanted("weight average"):
        bench.static("weight average", WeightAverage(), "nothing to choose")
    best = _search(bench)
    on_select = "λ and rank on select, with labels"
    if wanted("TA"):
        bench.static("TA", TaskArithmetic(scale=best["task_arithmetic"]["lambda"]), on_select)
    if wanted("SVD_k"):
        bench.static("SVD_k", SVDk(rank=best["svd_k"]["rank"], scale=best["svd_k"]["lambda"]), on_select)
    if wanted("CART"):
        bench.static("CART", CART(rank=best["cart"]["rank"], scale=best["cart"]["lambda"]), on_select)
    starts = {"pretrained": best["task_arithmetic"], "average": best["cart"]}
    for seed in range(3):
        for row, (_, origin, _, _, seeds) in ADAPTED.items():
            if seed < seeds and wanted(row, seed):
                bench.adapted(row, seed, starts[origin])
        for of in ("CART+AdaRank", "TA+AdaRank"):
            if seed == 0 and wanted(f"{of}, random masks") and bench.path(of, 0).exists():
                bench.random_masks(f"{of}, random masks", of, seed)


def _search(bench: Bench) -> dict[str, dict[str, float]]:
    found = {}
    for origin, names in {"pretrained": ("task_arithmetic", "svd_k"), "average": ("cart",)}.items():
        done = all((bench.records / f"search-{name}.json").exists() for name in names)
        blocks = {} if done else build_blocks(bench.job.network, origin)
        found.update({name: bench.grid(name, blocks) for name in names})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=Path, default=Path("records/minilm-8"))
    parser.add_argument("--rows", nargs="*", default=[])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--keep", action="store_true", help="keep the merged models in FOLDER/out when all rows are done"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run(Bench(arguments.folder, arguments.records), arguments.rows)
    if not arguments.keep and not arguments.rows:
        shutil.rmtree(arguments.folder / "out", ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
