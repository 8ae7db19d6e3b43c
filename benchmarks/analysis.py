"""The figures of docs/analysis.md: `adarank analyse` on both test beds, a record and a drawing for each.

    python benchmarks/analysis.py demo-8 FOLDER [--figures NAME …]
    python benchmarks/analysis.py minilm-8 FOLDER --recipe examples/minilm-8/average.yaml

What lies whole in FOLDER is not computed again. Records are lines of records/analysis.jsonl, drawings docs/figures/BED-FIGURE.svg.
λ of demo-8 is the best of its labelled select split, minilm-8's as in its recipes. So few inputs per task that a laptop does it
in minutes: the records say how many.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from adarank.cli.threads import wait_passively

wait_passively()  # before PyTorch is loaded

from records import FOLDER, Records

from adarank.workflow.analyse import Options, analyse
from adarank.workflow.demo import ZOO

DRAWINGS = Path(__file__).resolve().parent.parent / "docs" / "figures"
SHARES = (0, 0.02, 0.04, 0.08, 0.16, 0.32, 1)
FIGURES: dict[str, dict[str, tuple[dict[str, Any], int | None]]] = {
    "demo-8": {
        "ranks": ({}, None),
        "interference": ({}, None),
        "components": ({"lambda": 0.1, "top": 0.05}, 40),
        "rank-sweep": ({"ta": 0.1, "cart": 0.7, "shares": SHARES}, 30),
        "task-count": ({"counts": (2, 4, 8), "most": 4}, 16),
        "landscape": ({"points": 6, "shares": (0, 0.04, 0.16, 0.64, 1), "cart": (0.7, 1.5), "ta": (0.1,)}, 10),
    },
    "minilm-8": {
        "ranks": ({}, None),
        "interference": ({}, None),
        "components": ({"lambda": 0.3, "top": 0.01, "of": ("sst2", "trec", "agnews", "cola")}, 12),
        "rank-sweep": (
            {"ta": 0.3, "cart": 1.3, "shares": (0, 0.02, 0.04, 0.08, 0.16, 0.5, 1), "ways": ("merged",)},
            12,
        ),
    },
}
"""Bed -> figure -> its settings, and how many inputs per task are scored."""
LARGEST = 100_000  # bytes of a drawing in the documentation
RECORDED = ("settings", "split", "limit", "metrics", "sentences", "inputs", "versions", "machine", "begun", "seconds")


def run(bed: str, figure: str, recipe: Path, folder: Path) -> None:
    """One figure: computed if it is not there, recorded, its drawing put into the documentation."""
    settings, limit = FIGURES[bed][figure]
    out = folder / figure
    if not out.with_suffix(".json").exists():
        analyse(figure, recipe, out, settings, Options(limit=limit), note=print)
    content = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    record = {"kind": "analysis", "study": bed, "name": figure, **{key: content[key] for key in RECORDED}}
    Records(FOLDER / "analysis.jsonl").write(record)
    DRAWINGS.mkdir(exist_ok=True)
    if out.with_suffix(".svg").stat().st_size < LARGEST:
        shutil.copyfile(out.with_suffix(".svg"), DRAWINGS / f"{bed}-{figure}.svg")
    print(f"{bed}, {figure}:", *content["sentences"], sep="\n  ")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bed", choices=FIGURES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", type=Path, default=ZOO / "recipe.yaml")
    parser.add_argument("--figures", nargs="+", metavar="NAME")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for figure in options.figures or FIGURES[options.bed]:
        run(options.bed, figure, options.recipe, options.folder)


if __name__ == "__main__":
    main()
