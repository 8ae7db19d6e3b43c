"""The shipped demo: demo-8, a small base and eight vision experts, merged by every way that users compare."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from adarank.adapt.history import Progress
from adarank.errors import CheckpointError, Interrupted, itemise
from adarank.io.checkpoint import Checkpoint
from adarank.io.record import Note
from adarank.io.writer import claimed
from adarank.recipe.job import open_job
from adarank.recipe.reader import load_recipe, parse_recipe
from adarank.recipe.registry import METHODS
from adarank.recipe.schema import Recipe
from adarank.workflow.build_networks import build_models, network_tensors
from adarank.workflow.context import RecipeContext
from adarank.workflow.evaluate import heads_of, score_all, score_experts
from adarank.workflow.left_over import of_demo
from adarank.workflow.load_tasks import load_tasks
from adarank.workflow.merge import merge
from adarank.workflow.score_card import score_card
from adarank.workflow.scores import Table

ZOO = Path(__file__).parent.parent / "demo8"
# Coefficients are the best on the labelled select split (kind "search" in records/demo-8.jsonl); no test label was read.
ROWS: dict[str, dict[str, Any]] = {
    "average": {"merge_method": "average"},
    "TA": {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.1}},
    "CART": {"merge_method": "cart", "parameters": {"rank": 0.16, "lambda": 0.7}},
    "CART+heads": {"merge_method": "cart", "parameters": {"rank": 0.16, "lambda": 0.7}, "heads": "learn"},
    "AdaMerging": {
        "merge_method": "adamerging",
        "parameters": {"lambda": 0.1},
        "adapt": {
            "steps": 20,
            "check_every": 10,
            "check_inputs": 128,
            "batch_size": 16,
            "lr_lambda": 0.02,
            "objective": "entropy",
            "keep": "best",
        },
    },
    "AdaRank": {},
}
_LIMIT = 80  # inputs per task and split of the quick demo
# so few inputs and steps make agreement jump
_QUICK = {"steps": 40, "batch_size": 8, "check_every": 40, "tolerance": 2}


def check_zoo(folder: Path) -> None:
    """Compare every file of the demo with the hash in its manifest.

    Raises:
        CheckpointError: files are missing or changed; all are named.
    """
    path = folder / "manifest.json"
    remedy = "Install adarank again, or restore the folder from the repository."
    if not path.is_file():
        raise CheckpointError(f"{path}: the demo's manifest is missing. {remedy}")
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError):
        raise CheckpointError(f"{path}: the demo's manifest is damaged. {remedy}") from None
    problems = []
    for name, entry in files.items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{file}: is missing")
        elif (digest := hashlib.sha256(file.read_bytes()).hexdigest()) != entry["sha256"]:
            problems.append(f"{file}: has SHA-256 {digest[:12]}…, and {entry['sha256'][:12]}… was needed")
    if len(problems) == 1:
        raise CheckpointError(f"{problems[0]}. {remedy}")
    if problems:
        raise CheckpointError(itemise(f"{len(problems)} files of the demo are unusable:", problems, remedy))


def run(
    out: Path,
    quick: bool = False,
    seed: int = 0,
    force: bool = False,
    note: Note = lambda text: None,
    progress: Progress | None = None,
    zoo: Path = ZOO,
) -> Table:
    """Merge demo-8 in every way of `ROWS`, write AdaRank's model to `out`, and score all on the test split.

    Arguments:
        quick: fewer inputs and steps: to see that everything works, not how well.
        seed: of the adaptation batches.
        note: called with each stage as it begins.
        progress: called after each adaptation step.
        zoo: a folder that `zoo/build.py` made, with a recipe.yaml.

    Raises:
        AdaRankError: a file of the demo is missing or changed, or `out` cannot be written.
    """
    with claimed(out, force) as place:
        return _run(place, quick, seed, force, note, progress, zoo)


def _run(out: Path, quick: bool, seed: int, force: bool, note: Note, progress: Progress | None, zoo: Path) -> Table:
    """What `run` does, once the output is this run's alone."""
    check_zoo(zoo)
    recipe = load_recipe(zoo / "recipe.yaml")
    jobs = {row: open_job(_changed(recipe, changes, quick, seed)) for row, changes in ROWS.items()}
    job = jobs["average"]
    data = load_tasks(job)
    models = build_models(job)
    table = Table("test", "disjoint", {task: len(of.splits.rows["test"]) for task, of in data.items()})

    def score(row: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
        models.fill(tensors)
        table.rows[row] = score_all(job, models, data, "test")
        note(f"{row}: mean accuracy {table.mean(row):.1f}%")

    note(f"{sum(table.counts.values())} test images of {len(data)} tasks")
    table.rows["experts"] = score_experts(job, models, data, "test")
    note(f"experts: mean accuracy {table.mean('experts'):.1f}%, each task by its fine-tuned model")
    score("base", network_tensors(job, "base"))
    with tempfile.TemporaryDirectory(prefix="adarank-demo-") as scratch:
        for row, of_row in jobs.items():
            if not of_row.method.data and of_row.recipe.heads == "expert":
                score(row, of_row.method.run(RecipeContext(of_row)).tensors)
                continue
            note(f"{row}: {of_row.recipe.merge_method}")
            folder = out if row == "AdaRank" else Path(scratch) / row
            try:
                merge(of_row.recipe, folder, force, note, progress, data)
            except Interrupted as stopped:  # its own words are of a merge that alone was asked for
                where = str(stopped).partition(". ")[0]
                raise Interrupted(f"{where}, in the row {row}. {of_demo(out)}") from None
            written = Checkpoint(folder)
            with heads_of(folder, models):
                score(row, ((name, written.read(name)) for name in job.network.tensors))
    score_card(out, table.plain(), "AdaRank")
    return table


def _changed(recipe: Recipe, changes: Mapping[str, Any], quick: bool, seed: int) -> Recipe:
    """The shipped recipe with a row's method, and less to do if it is to be quick."""
    values = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
    if changes:
        values = {k: v for k, v in values.items() if k not in ("parameters", "adapt")} | dict(changes)
    if quick:
        for entry in values["models"]:
            entry["task"]["limit"] = _LIMIT
        if METHODS[values["merge_method"]].adapt_block:
            values["adapt"] = {**(values.get("adapt") or {}), **_QUICK}
    return parse_recipe({**values, "seed": seed}, recipe.folder)
