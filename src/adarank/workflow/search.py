"""Search for a method's settings on the labelled select split: every point of a grid, one SVD per matrix.

The test split is never read. A search that was cut off goes on where it was.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from adarank.data.metrics import less_is_better
from adarank.data.spec import Split
from adarank.data.task import TaskData
from adarank.errors import DataError, OutputError, Problems, RecipeError
from adarank.io.hub import local_path
from adarank.io.lock import resolved
from adarank.io.output_folder import remove_ours
from adarank.io.parsing import parse_json, parse_yaml, repetition
from adarank.io.progress import advance, stage
from adarank.io.record import Clock, Note, machine, versions
from adarank.io.writer import locked, state_folder, write_json
from adarank.method import MergeMethod
from adarank.models import TaskModels
from adarank.recipe.job import Job
from adarank.recipe.paths import portable
from adarank.recipe.registry import METHODS
from adarank.recipe.schema import Recipe
from adarank.settings import nearest, parse
from adarank.spectral.svd import stored_spectra
from adarank.workflow.answers import with_answers
from adarank.workflow.build_networks import build_models
from adarank.workflow.context import RecipeContext
from adarank.workflow.evaluate import score_result
from adarank.workflow.left_over import state_of_search
from adarank.workflow.listed_files import ListedFiles
from adarank.workflow.load_tasks import load_opened, scored_by
from adarank.workflow.prepare import check_labels, open_recipe, whole

SPLIT: Split = "select"
_MOST = 100_000


@dataclass(frozen=True)
class Axis:
    """One setting and the values to try."""

    name: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Point:
    """A point of the grid and its scores on the select split, in per cent, a loss as it is.

    Attributes:
        losses: the scores are losses, so that less is better.
    """

    settings: Mapping[str, Any]
    scores: Mapping[str, float]
    losses: bool = False

    @property
    def mean(self) -> float:
        """Mean score over tasks."""
        return sum(self.scores.values()) / len(self.scores)

    @property
    def worth(self) -> float:
        """What points are ranked by: more is better."""
        return -self.mean if self.losses else self.mean

    def of_task(self, task: str) -> float:
        """One task's score, turned so that more is better."""
        return -self.scores[task] if self.losses else self.scores[task]


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
        return Axis(name, tuple(parse_yaml(part) for part in given.split(",") if part.strip()))
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
    metric: str | None = None,
) -> tuple[list[Point], dict[str, Any]]:
    """Score every point of a grid; write the best one as a recipe and all of them as its record.

    Arguments:
        path: the recipe, with a method that does not adapt, and tasks.
        best: recipe to write, in the same folder; its record goes beside it as `NAME.search.json`.
        axes: settings of the method's `parameters` to vary. Points are their product.
        progress: called with each point and how many are done.
        metric: score every task by this one, such as `loss`, in place of the recipe's.

    Returns:
        The points, best mean first (of equal ones the first of the grid), and the record.

    Raises:
        AdaRankError: anything wrong with recipe, axes, inputs or output, before a point is tried.
    """
    local_path(path, kind=RecipeError)
    if not best.name or local_path(best, kind=OutputError).is_dir():
        raise OutputError(
            f"{best}: is not the name of a file, which the best recipe needs. Give a name such as best.yaml."
        )
    best = resolved(best)
    files = ListedFiles((best,), best.with_suffix(".search.json"), state_of_search(best), "search", "a search")
    _check_place(path, best)
    files.check(force)
    with locked(files.record):  # which names the state, too, and is the same for best.yaml and best.yml
        files.check(force)
        return _search(path, files, axes, note, progress, metric)


def _search(
    path: Path,
    files: ListedFiles,
    axes: Sequence[Axis],
    note: Note,
    progress: Callable[[Point, int, int], None],
    metric: str | None,
) -> tuple[list[Point], dict[str, Any]]:
    """What `search` does, once its output is this run's alone."""
    clock = Clock()
    problems = Problems()
    opened = open_recipe(path, problems)
    points, methods = [], []
    if opened and opened.sound:
        with problems.noted():
            points = _grid(opened.recipe, axes)
    if opened and opened.job:
        with problems.noted():
            methods = [_method(opened.job, settings) for settings in points]
    data = scored_by(load_opened(opened, problems) if opened else {}, metric, problems)
    check_labels(data, SPLIT, problems)
    with problems.noted():
        _check_metrics(data)
    job = whole(opened, problems)
    recipe = job.recipe
    for method in methods:
        method.of_data(data)
    if recipe.heads == "learn":
        note("Points are compared with the experts' heads; heads are learned when the best recipe is merged")
    note("Hashing the inputs")
    inputs = job.inputs()
    prints = {task: of.fingerprint() for task, of in data.items()}
    metrics = {task: of.metric for task, of in data.items()}
    identity = json.dumps(
        [recipe.merge_method, recipe.parameters, inputs, prints, metrics], sort_keys=True, default=str
    )
    note("Loading the networks")
    models = build_models(job)
    with state_folder(files.state):
        state = files.state / hashlib.sha256(identity.encode()).hexdigest()[:16]
        if recipe.kind.data:
            data = with_answers(job, data, inputs, state, note, lambda _: models)
        tried = try_points(job, models, data, list(zip(points, methods, strict=True)), state, progress)
        tried += each_tasks_best(recipe.kind, tried)
        ranked = sorted(tried, key=lambda point: -point.worth)  # stable: of equals the first of the grid
        record = {
            "split": f"{SPLIT}, with labels; the test split was not read",
            "method": recipe.merge_method,
            "metrics": metrics,
            "axes": {axis.name: list(axis.values) for axis in axes},
            "best": {"settings": dict(ranked[0].settings), "mean": ranked[0].mean, "scores": dict(ranked[0].scores)},
            "at_the_edge": {axis: at for axis, (at, _) in edges(recipe.kind, tried).items()},
            "points": [{"settings": dict(p.settings), "mean": p.mean, "scores": dict(p.scores)} for p in tried],
            "rows_per_split": {t: {s: len(rows) for s, rows in of.splits.rows.items()} for t, of in data.items()},
            "recipe": portable(recipe),
            "inputs": inputs,
            "versions": versions(),
            "machine": machine(recipe.device),
            **clock.spent(),
        }
        files.write({files.made[0]: _best_text(path, recipe, ranked[0], files.record).encode()}, record)
    remove_ours(files.state)
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
    tried: list[Point] = []
    losses = all(less_is_better(of.metric) for of in data.values())
    with stored_spectra(state / "spectra"), stage("Searching", len(points)):
        for number, (settings, method) in enumerate(points, start=1):
            kept = state / f"{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()}.json"
            scores = _kept_scores(kept, job.network.tasks)
            if scores is None:
                run = RecipeContext(
                    replace(job, method=method), data, state=state / "statistics" / "state.pt", ready=models
                )
                scores = score_result(run.job, models, data, method.run(run), SPLIT)
                write_json(kept, scores)
            tried.append(Point(settings, scores, losses))
            advance()
            progress(tried[-1], number, len(points))
    return tried


def _kept_scores(file: Path, tasks: Sequence[str]) -> dict[str, float] | None:
    """What an interrupted search kept of a point; None if there is nothing, or nothing whole: then it is scored anew."""
    if not file.is_file():
        return None
    try:
        scores = parse_json(file.read_text(encoding="utf-8"))
    except ValueError:
        return None
    fits = isinstance(scores, dict) and list(scores) == list(tasks)
    return (
        scores if fits and all(isinstance(score, float) and math.isfinite(score) for score in scores.values()) else None
    )


def each_tasks_best(kind: type[MergeMethod], points: Sequence[Point]) -> list[Point]:
    """The point made of each task's best settings, where a task-aware method has them per model; else nothing.

    It needs no scoring: each task's settings change its weights alone. Of equals the first is taken.
    """
    axes = list(points[0].settings)
    if not set(axes) <= set(kind.of_one_task()):
        return []
    best = {task: max(points, key=lambda point: point.of_task(task)) for task in points[0].scores}
    settings = {axis: {task: point.settings[axis] for task, point in best.items()} for axis in axes}
    return [Point(settings, {task: point.scores[task] for task, point in best.items()}, points[0].losses)]


def level(points: Sequence[Point]) -> bool:
    """True if what was varied changes no score."""
    return len(points) > 1 and all(point.scores == points[0].scores for point in points)


def edges(kind: type[MergeMethod], points: Sequence[Point]) -> dict[str, tuple[float, float]]:
    """Numbers whose best lies at the end of what was tried, so that better ones may lie beyond it.

    Returns:
        Axis -> (the best, the next one beyond it by the ratio of the last two), where the method allows that.
    """
    best = max(points, key=lambda point: point.worth).settings
    at_the_edge: dict[str, tuple[float, float]] = {}
    if level(points):
        return at_the_edge
    for axis, at in best.items():
        values = sorted({p.settings[axis] for p in points if isinstance(p.settings[axis], (int, float))})
        if len(values) < 2 or at not in (values[0], values[-1]) or values[0] <= 0:
            continue
        beyond = float(f"{at * at / values[1 if at == values[0] else -2]:.2g}")
        for further in (beyond, 1.0):  # shares end at 1
            if (further - at) * (beyond - at) > 0 and _allowed(kind, axis, further):
                at_the_edge[axis] = (float(at), further)
                break
    return at_the_edge


def _allowed(kind: type[MergeMethod], axis: str, value: float) -> bool:
    try:
        parse(kind, {axis: value}, kind.name)
    except RecipeError:
        return False
    return True


def _check_metrics(data: Mapping[str, TaskData]) -> None:
    """Refuse to rank by a mean of shares and losses."""
    losses = [task for task, of in data.items() if less_is_better(of.metric)]
    if losses and len({of.metric for of in data.values()}) > 1:
        named = ", ".join(f"of '{task}' it is a {data[task].metric}" for task in losses)
        raise DataError(
            f"metric: {named}, of which less is better, and of other tasks it is another metric, so that no mean ranks the points. Give such a metric to all tasks or to none."
        )


def _check_place(path: Path, best: Path) -> None:
    if best.resolve().parent != path.resolve().parent:
        raise OutputError(
            f"{best}: the best recipe extends {path.name}, so it must lie in the same folder. Give {path.parent / best.name}."
        )
    if best.resolve() == path.resolve():
        raise OutputError(f"{best}: is the recipe itself. Give another file for the best one.")


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
    repeated = repetition([axis.name for axis in axes])
    if repeated is not None:
        raise RecipeError(f"--over {axes[repeated].name}: is given twice. Give all its values at once.")
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


def _best_text(path: Path, recipe: Recipe, point: Point, record: Path) -> str:
    parameters = {**recipe.parameters, **point.settings}
    return (
        f"# The best of {record.name}: mean {point.mean:.2f}% on the labelled select split.\n"
        f"extends: {path.name}\n" + yaml.safe_dump({"parameters": parameters}, sort_keys=False)
    )
