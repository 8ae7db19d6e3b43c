"""Search for a method's settings on the labelled select split: every point of a grid, one SVD per matrix.

The test split is never read. A search that was cut off goes on where it was.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from adarank.data.spec import Split
from adarank.data.task import TaskData
from adarank.errors import OutputError, RecipeError
from adarank.io.record import Clock, Note, machine, versions
from adarank.io.writer import write_json, write_text
from adarank.method import MergeMethod
from adarank.models import TaskModels
from adarank.recipe.job import Job, open_job
from adarank.recipe.reader import load_recipe
from adarank.recipe.registry import METHODS
from adarank.recipe.schema import Recipe
from adarank.settings import nearest, parse
from adarank.spectral.svd import stored_spectra
from adarank.workflow.build_networks import build_models
from adarank.workflow.context import Run
from adarank.workflow.evaluate import score_result
from adarank.workflow.load_tasks import load_tasks

SPLIT: Split = "select"
_MOST = 100_000


@dataclass(frozen=True)
class Axis:
    """One setting and the values to try."""

    name: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Point:
    """A point of the grid and its scores ×100 on the select split."""

    settings: Mapping[str, Any]
    scores: Mapping[str, float]

    @property
    def mean(self) -> float:
        return sum(self.scores.values()) / len(self.scores)


def parse_axis(text: str) -> Axis:
    """An axis from `name=first:last:step` (ends included) or `name=a,b,c`.

    Raises:
        RecipeError: it is neither.
    """
    name, equals, given = text.partition("=")
    name, given = name.strip(), given.strip()
    try:
        if not (name and equals and given):
            raise ValueError
        if ":" in given:
            first, last, step = (float(part) for part in given.split(":"))
            count = round((last - first) / step) if step else -1
            if not 0 <= count < _MOST or abs(first + count * step - last) > 1e-6 * abs(step):
                raise ValueError
            # 12 digits: 0.1 + 2·0.1 is to read 0.3
            return Axis(name, tuple(float(f"{first + i * step:.12g}") for i in range(count + 1)))
        return Axis(name, tuple(yaml.safe_load(part) for part in given.split(",") if part.strip()))
    except (ValueError, yaml.YAMLError):
        raise RecipeError(
            f"--over {text}: not an axis. Write name=first:last:step, where whole steps lead from first to last, or name=a,b,c."
        ) from None


def search(
    path: Path,
    best: Path,
    axes: Sequence[Axis],
    force: bool = False,
    note: Note = lambda text: None,
    progress: Callable[[Point, int, int], None] = lambda point, done, total: None,
) -> tuple[list[Point], dict[str, Any]]:
    """Score every point of a grid; write the best one as a recipe and all of them as its record.

    Arguments:
        path: the recipe, with a method that does not adapt, and tasks.
        best: recipe to write, in the same folder; its record goes beside it as `NAME.search.json`.
        axes: settings of the method's `parameters` to vary. Points are their product.
        progress: called with each point and how many are done.

    Returns:
        The points, best mean first (of equal ones the first of the grid), and the record.

    Raises:
        AdaRankError: anything wrong with recipe, axes, inputs or output, before a point is tried.
    """
    clock = Clock()
    record_path = best.with_suffix(".search.json")
    _check_outputs(path, best, record_path, force)
    recipe = load_recipe(path)
    points = _grid(recipe, axes)
    job = open_job(recipe)
    methods = [_method(job, settings) for settings in points]
    data = load_tasks(job)
    for own in data.values():
        own.targets(own.splits.rows[SPLIT])
    for method in methods:
        method.of_data(data)
    note("Hashing the inputs")
    inputs = job.inputs()
    prints = {task: own.fingerprint() for task, own in data.items()}
    identity = json.dumps([recipe.merge_method, recipe.parameters, inputs, prints], sort_keys=True, default=str)
    state = best.parent / f".{best.stem}.search" / hashlib.sha256(identity.encode()).hexdigest()[:16]
    note("Loading the networks")
    models = build_models(job)
    found = try_points(job, models, data, list(zip(points, methods, strict=True)), state, progress)
    found += each_tasks_best(recipe.kind, found)
    ranked = sorted(found, key=lambda point: -point.mean)  # stable: of equals the first of the grid
    record = {
        "split": f"{SPLIT}, with labels; the test split was not read",
        "method": recipe.merge_method,
        "axes": {axis.name: list(axis.values) for axis in axes},
        "best": {"settings": dict(ranked[0].settings), "mean": ranked[0].mean, "scores": dict(ranked[0].scores)},
        "at_the_edge": {axis: at for axis, (at, _) in edges(recipe.kind, found).items()},
        "points": [{"settings": dict(p.settings), "mean": p.mean, "scores": dict(p.scores)} for p in found],
        "rows_per_split": {task: {s: len(rows) for s, rows in own.splits.rows.items()} for task, own in data.items()},
        "recipe": recipe.model_dump(mode="json", by_alias=True, exclude_unset=True),
        "inputs": inputs,
        "versions": versions(),
        "machine": machine(recipe.device),
        **clock.spent(),
    }
    write_json(record_path, record)
    _write_best(path, best, recipe, ranked[0], record_path)
    shutil.rmtree(state.parent, ignore_errors=True)
    return ranked, record


def try_points(
    job: Job,
    models: TaskModels,
    data: Mapping[str, TaskData],
    points: Sequence[tuple[Mapping[str, Any], MergeMethod]],
    state: Path,
    progress: Callable[[Point, int, int], None] = lambda point, done, total: None,
) -> list[Point]:
    """Score points of one method on the select split, in order.

    Arguments:
        points: (settings, the method with them).
        state: folder of the spectra, of statistics, and of the points done: those are not tried again.
    """
    found: list[Point] = []
    with stored_spectra(state / "spectra"):
        for number, (settings, method) in enumerate(points, start=1):
            kept = state / f"{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()}.json"
            if kept.exists():
                scores = json.loads(kept.read_text(encoding="utf-8"))
            else:
                run = Run(replace(job, method=method), data, state=state / "statistics" / "state.pt", ready=models)
                scores = score_result(run.job, models, data, method.run(run), SPLIT)
                write_json(kept, scores)
            found.append(Point(settings, scores))
            progress(found[-1], number, len(points))
    return found


def each_tasks_best(kind: type[MergeMethod], points: Sequence[Point]) -> list[Point]:
    """The point made of each task's own best settings, where a task-aware method has them per model; else nothing.

    It needs no scoring: its settings change the weights of their own task alone. Of equals the first is taken.
    """
    axes = list(points[0].settings)
    if not set(axes) <= set(kind.of_one_task()):
        return []
    best = {task: max(points, key=lambda point: point.scores[task]) for task in points[0].scores}
    settings = {axis: {task: point.settings[axis] for task, point in best.items()} for axis in axes}
    return [Point(settings, {task: point.scores[task] for task, point in best.items()})]


def level(points: Sequence[Point]) -> bool:
    """True if what was varied changes no score."""
    return len(points) > 1 and all(point.scores == points[0].scores for point in points)


def edges(kind: type[MergeMethod], points: Sequence[Point]) -> dict[str, tuple[float, float]]:
    """Numbers whose best lies at the end of what was tried, so that better ones may lie beyond it.

    Returns:
        Axis -> (the best, the next one beyond it by the ratio of the last two), where the method allows that.
    """
    best = max(points, key=lambda point: point.mean).settings
    found: dict[str, tuple[float, float]] = {}
    if level(points):
        return found
    for axis, at in best.items():
        values = sorted({p.settings[axis] for p in points if isinstance(p.settings[axis], (int, float))})
        if len(values) < 2 or at not in (values[0], values[-1]) or values[0] <= 0:
            continue
        beyond = float(f"{at * at / values[1 if at == values[0] else -2]:.2g}")
        for further in (beyond, 1.0):  # shares end at 1
            if (further - at) * (beyond - at) > 0 and _allowed(kind, axis, further):
                found[axis] = (float(at), further)
                break
    return found


def _allowed(kind: type[MergeMethod], axis: str, value: float) -> bool:
    try:
        parse(kind, {axis: value}, kind.name)
    except RecipeError:
        return False
    return True


def _check_outputs(path: Path, best: Path, record: Path, force: bool) -> None:
    if best.resolve().parent != path.resolve().parent:
        raise OutputError(
            f"{best}: the best recipe extends {path.name}, so it must lie in the same folder. Give {path.parent / best.name}."
        )
    if best.resolve() == path.resolve():
        raise OutputError(f"{best}: is the recipe itself. Give another file for the best one.")
    there = [str(file) for file in (best, record) if file.exists()]
    if there and not force:
        raise OutputError(f"{', '.join(there)}: already exists. Give another name, or --force to replace it.")


def _grid(recipe: Recipe, axes: Sequence[Axis]) -> list[dict[str, Any]]:
    kind = recipe.kind
    if kind.not_searched:
        others = [name for name, other in METHODS.built_in.items() if not other.not_searched]
        raise RecipeError(
            f"merge_method: '{kind.name}' {kind.not_searched}; a search tries those of methods that do not adapt, such as {', '.join(others[:4])}."
        )
    if not axes:
        raise RecipeError("search: nothing to vary. Give --over name=first:last:step or --over name=a,b,c.")
    known = [field.alias or name for name, field in kind.model_fields.items()]
    for axis in axes:
        if axis.name not in known:
            raise RecipeError(f"--over {axis.name}: '{kind.name}' has no such setting.{nearest(axis.name, known)}")
    return [
        dict(zip((axis.name for axis in axes), values, strict=True))
        for values in itertools.product(*(axis.values for axis in axes))
    ]


def _method(job: Job, settings: Mapping[str, Any]) -> MergeMethod:
    """The recipe's method with a point's settings, checked as a merge would check it."""
    changed = job.recipe.model_copy(update={"parameters": {**job.recipe.parameters, **settings}})
    method = changed.method(job.network.merged())
    method.check(job.network)
    return method


def _write_best(path: Path, best: Path, recipe: Recipe, point: Point, record: Path) -> None:
    parameters = {**recipe.parameters, **point.settings}
    text = (
        f"# The best of {record.name}: mean {point.mean:.2f} on the labelled select split.\n"
        f"extends: {path.name}\n" + yaml.safe_dump({"parameters": parameters}, sort_keys=False)
    )
    write_text(best, text)
