"""The figures of docs/analysis.md: `adarank analyse` on both test beds, a record and a drawing for each.

    python benchmarks/analysis.py demo-8 FOLDER [--figures NAME …]
    python benchmarks/analysis.py minilm-8 FOLDER --recipe examples/minilm-8/average.yaml [--output MERGED]

`masks` and `radar` are of the output of AdaRank's default, and are left out without one. What lies whole in FOLDER is not computed again. Records are lines of records/analysis.jsonl, drawings docs/figures/BED-FIGURE.svg.
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
        "masks": ({}, None),
        "radar": ({}, 128),
    },
    "minilm-8": {
        "ranks": ({}, None),
        "interference": ({}, None),
        "components": ({"lambda": 0.3, "top": 0.01}, 16),
        "rank-sweep": ({"ta": 0.3, "cart": 1.3, "shares": (0, 0.04, 0.08, 0.16, 0.5, 1)}, 16),
        "task-count": ({"counts": (2, 4, 8), "most": 4}, 16),
        "landscape": ({"points": 5, "shares": (0, 0.04, 0.16, 1), "cart": (1.3, 2.0), "ta": (0.3,)}, 8),
        "masks": ({}, None),
        "radar": ({}, 128),
    },
}
"""Bed -> figure -> its settings, and how many inputs per task are scored."""
LARGEST = 100_000  # bytes of a drawing in the documentation
RECORDED = ("settings", "split", "limit", "metrics", "sentences", "inputs", "versions", "machine", "begun", "seconds")


OF_OUTPUTS = {"masks", "radar"}


def run(bed: str, figure: str, recipe: Path, folder: Path, outputs: list[Path]) -> None:
    """One figure: computed if it is not there, recorded, its drawing put into the documentation."""
    settings, limit = FIGURES[bed][figure]
    outputs, out = outputs if figure in OF_OUTPUTS else [], folder / figure
    if not out.with_suffix(".json").exists():
        analyse(figure, recipe, out, settings, Options(outputs, limit=limit), note=print)
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
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="what `merge` wrote by AdaRank's default")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    outputs = [options.output] if options.output else []
    for figure in options.figures or [name for name in FIGURES[options.bed] if outputs or name not in OF_OUTPUTS]:
        run(options.bed, figure, options.recipe, options.folder, outputs)


if __name__ == "__main__":
    main()
