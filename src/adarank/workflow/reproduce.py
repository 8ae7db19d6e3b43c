"""The papers' tables made anew: each row merged by its recipe and scored, beside what was published."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adarank.adapt.history import Progress
from adarank.errors import AdaRankError, CheckpointError
from adarank.io.files import read_json
from adarank.io.hub import listed_files, local_path
from adarank.io.hub_files import used_files
from adarank.io.output_folder import RECORD
from adarank.io.record import Note
from adarank.recipe.paths import portable
from adarank.recipe.reader import parse_recipe
from adarank.recipe.schema import Recipe
from adarank.recipe.suites import REFERENCES, Protocol, Published, Suite, rows, suite
from adarank.workflow.evaluate import evaluate
from adarank.workflow.merge import merge
from adarank.workflow.scores import Table


@dataclass(frozen=True)
class Needed:
    """A file that a suite reads.

    Attributes:
        source: `model` or `dataset`.
        repository: its id on the hub.
        file: its path there; `*` where nobody here knows what there is.
        bytes: its size; None if it is not known without the hub.
        here: whether it lies on this machine.
    """

    source: str
    repository: str
    file: str
    bytes: int | None
    here: bool


@dataclass(frozen=True)
class Reproduced:
    """What reproducing came to.

    Attributes:
        scores: row of the papers -> task -> score here, per cent.
        means: row -> mean score here.
        table: as `adarank evaluate` gives it.
        outputs: row -> its folder.
    """

    suite: Suite
    protocol: Protocol
    table: Table
    scores: Mapping[str, Mapping[str, float]]
    means: Mapping[str, float]
    outputs: Mapping[str, Path]
    failed: Mapping[str, str] = field(default_factory=dict)

    def comparable(self) -> list[Published]:
        """The published tables of the very checkpoints that were merged here."""
        return [table for table in self.suite.published if table.checkpoints == self.suite.checkpoints]

    def _less(self, row: str, table: Published) -> dict[str, float]:
        """What scores here are above a published row: task -> points, and `mean`."""
        there = table.scores.get(row, {})
        by_task = {task: score - there[task] for task, score in self.scores[row].items() if task in there}
        return {"mean": self.means[row] - table.means[row], **by_task}

    def plain(self) -> dict[str, Any]:
        """As data for JSON. A difference is given where the checkpoints are the same."""
        comparable = self.comparable()
        return {
            "suite": self.suite.name,
            "checkpoints": self.suite.checkpoints,
            "protocol": self.protocol,
            "metrics": {task: self.table.metric(task) for task in self.suite.tasks},
            "inputs": dict(self.table.counts),
            "rows": {
                row: {
                    "mean": self.means[row],
                    "scores": dict(scores),
                    "differences": {table.name: self._less(row, table) for table in comparable if row in table.means},
                }
                for row, scores in self.scores.items()
            },
            "failed": dict(self.failed),
            "published": {
                table.name: {
                    "source": table.source,
                    "checkpoints": table.checkpoints,
                    "means": dict(table.means),
                    "scores": {row: dict(of) for row, of in table.scores.items()},
                }
                for table in self.suite.published
            },
        }


def needed_files(name: str, folder: str | Path = ".") -> list[Needed]:
    """Every file that reproducing a suite reads, with its size, before anything is fetched.

    Sizes are those of files on this machine (in `folder`, or in the hub's cache), else what the hub says; without it
    they are not known.

    Arguments:
        name: of the suite.
        folder: where models and datasets may lie as `org/name`, in place of the hub.

    Raises:
        RecipeError: no such suite.
    """
    chosen, place = suite(name), local_path(folder)
    needed: dict[tuple[str, str, str], Needed] = {}
    for reference in (chosen.base, *chosen.experts.values()):
        organisation, repository, *inside = reference.split("@")[0].split("/")
        for each in _of_repository("model", f"{organisation}/{repository}", place, "/".join(inside)):
            needed[each.source, each.repository, each.file] = each
    for spec in chosen.tasks.values():
        for each in _of_repository("dataset", spec["data"]["dataset"], place, "", spec["data"].get("config")):
            needed[each.source, each.repository, each.file] = each
    return list(needed.values())


def _of_repository(source: str, repository: str, place: Path, inside: str, config: str | None = None) -> list[Needed]:
    local = place / repository
    if local.is_dir():
        sizes: Mapping[str, int | None] | None = {
            f.relative_to(local).as_posix(): f.stat().st_size for f in sorted(local.rglob("*")) if f.is_file()
        }
        here = True
    else:
        sizes, here = listed_files(repository, source == "dataset")
    if sizes is None:
        return [Needed(source, repository, f"{inside}/*" if inside else "*", None, False)]
    names = used_files(sizes, inside) if source == "model" else _data_files(list(sizes), config)
    return [Needed(source, repository, file, sizes[file], here) for file in names]


def _data_files(names: Sequence[str], config: str | None) -> list[str]:
    """Of a dataset's files those that hold rows; of one configuration, where folders are named after them."""
    rows_in = [name for name in names if re.search(r"\.(parquet|arrow|csv|tsv|jsonl?|zip|tar|tar\.gz|npz)$", name)]
    of_config = [name for name in rows_in if config and name.startswith(f"{config}/")]
    return of_config or rows_in


def reproduce(
    name: str,
    out: str | Path,
    only: Sequence[str] = (),
    protocol: Protocol = "transductive",
    limit: int | None = None,
    steps: int | None = None,
    folder: str | Path = ".",
    force: bool = False,
    note: Note = lambda text: None,
    progress: Progress | None = None,
    device: str = "auto",
) -> Reproduced:
    """Merge a suite's models by the recipes of the papers' rows, and score them on its tasks.

    Arguments:
        name: of the suite, such as `vision-8-b32`.
        out: a folder for the outputs, one for each row. Rows that lie there already are not merged again.
        only: rows, as the papers call them, or `Table 4` or `Data budget`, whose rows are variants of others; by default
            all others that need no labels.
        protocol: `transductive` adapts on the inputs that are scored, as the papers do; `disjoint` on others.
        limit: use at most this many inputs of a task.
        steps: take so many steps of adaptation in place of the papers'.
        folder: where models and datasets may lie as `org/name`, in place of the hub.
        force: replace outputs of other recipes.
        note, progress: called as by `merge`.
        device: what to compute on: `auto`, `cpu`, `cuda` or `cuda:N`.

    Returns:
        Scores here, and published tables. A row that cannot be merged is in `failed`, with why; the others go on.

    Raises:
        AdaRankError: no such suite or row, or models or data that cannot be read.

    Example:
        made = adarank.reproduce("vision-8-b32", "vision-8", only=["Task Arithmetic"], limit=200)
        print(made.means)
    """
    chosen, place = suite(name), local_path(folder)
    outputs: dict[str, Path] = {}
    failed: dict[str, str] = {}
    recipe: Recipe | None = None
    wanted = rows(list(only))
    for row in wanted:
        target = local_path(out) / _slug(row.name)
        try:
            made = parse_recipe(chosen.recipe(row, protocol, limit, steps, device), place)
            note(f"{row.name}: {made.merge_method}")
            if not _is_made(target, made):
                merge(made, target, force, note, progress)
            outputs[row.name], recipe = target, recipe or made
        except AdaRankError as error:
            if len(wanted) == 1:
                raise
            failed[row.name] = str(error)
            note(f"{row.name}: {error}")
    if recipe is None:
        raise CheckpointError(f"reproduce: no row of {name} could be merged. {next(iter(failed.values()), '')}")
    table = evaluate(recipe, list(outputs.values()), note=note)
    return _result(chosen, protocol, table, outputs, failed)


def _result(
    chosen: Suite, protocol: Protocol, table: Table, outputs: Mapping[str, Path], failed: Mapping[str, str]
) -> Reproduced:
    shown = {row: reference for row, reference in REFERENCES.items() if reference in table.rows}
    for row, folder in outputs.items():
        shown[row] = next(of for of in table.rows if of.partition(" [")[0] == str(folder))
    scores = {row: table.rows[of] for row, of in shown.items()}
    means = {row: table.mean(of) for row, of in shown.items()}
    return Reproduced(chosen, protocol, table, scores, means, outputs, failed)


def _slug(row: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", row.lower()).strip("-")


def _is_made(target: Path, recipe: Recipe) -> bool:
    """Whether an output is there already, of this very recipe."""
    try:
        record = read_json(target / RECORD)
    except CheckpointError:
        return False
    return bool(record.get("recipe") == portable(recipe))
