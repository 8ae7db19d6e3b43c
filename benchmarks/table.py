"""The tables of both test beds: every method on eight real experts, one record per row and seed.

    python benchmarks/table.py minilm-8 FOLDER [--rows NAME …] [--threads 2]
    python benchmarks/table.py demo-8 FOLDER
    python benchmarks/table.py demo-8 FOLDER --heads learn

With `--heads learn` each task's head is learned too, in the rows that have such a column; else heads are the experts'.
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
import shutil
import sys
from pathlib import Path

from adarank.cli.threads import wait_passively

wait_passively()  # before PyTorch is loaded

import torch
from records import FOLDER, Records
from table_bench import Bench
from table_rows import (
    ADAPTED,
    BEDS,
    LEARNED_HEADS,
    MODULES,
    SEEDS,
    STATIC,
    STATISTICS,
    TASK_AWARE,
    TRAINED,
    WITH_HEADS,
)

from adarank.methods import METHODS, WeightAverage
from adarank.settings import parse
from adarank.workflow.build_networks import network_tensors
from adarank.workflow.evaluate import score_experts


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


def learn_heads(bench: Bench, rows: list[str], seeds: int = SEEDS) -> None:
    """Rows with learned heads: a seed of those that draw nothing at random, all of the adapted."""
    for seed in range(seeds):
        for row in rows or WITH_HEADS:
            if (seed == 0 or row in ADAPTED) and not bench.recorded(row, seed, LEARNED_HEADS):
                bench.learned_heads(row, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bed", choices=BEDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=Path, metavar="FILE", help="default: records/BED.jsonl")
    parser.add_argument("--rows", nargs="*", default=[])
    parser.add_argument("--heads", choices=["expert", "learn"], default="expert", help="whose heads each task has")
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
    bench = Bench(bed, arguments.folder, records, arguments.labelled)
    (learn_heads if arguments.heads == "learn" else run)(bench, arguments.rows, arguments.seeds)
    if not arguments.keep and not arguments.rows:
        shutil.rmtree(arguments.folder / "out", ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
