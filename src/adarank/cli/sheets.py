"""What each command's table holds, as data, for `formats`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adarank.cli.formats import Cell, Rounded, Sheet
from adarank.data.metrics import LOSS, PERPLEXITY, less_is_better
from adarank.recipe.registry import METHODS
from adarank.workflow.scores import Table

if TYPE_CHECKING:
    from adarank.io.bundle import About
    from adarank.recipe.catalogue import Entry
    from adarank.recipe.papers import PaperRow
    from adarank.workflow.inspect import LayerRow, TensorRow
    from adarank.workflow.search import Point


_PLURALS = {LOSS: "losses", PERPLEXITY: "perplexities"}


def cell(value: float, metric: str, digits: int = 1) -> Rounded:
    """A score: per cent with one digit, a loss with three, a perplexity with two."""
    if metric.endswith(PERPLEXITY):
        return Rounded(value, 2)
    return Rounded(value, 3 if less_is_better(metric) else digits)


def head(task: str, metric: str) -> str:
    """What a column of scores is called: the task, with its metric where it is not accuracy."""
    return task if metric == "accuracy" else f"{task} ({metric})"


def title_of(table: Table) -> str:
    """What is scored, on what, in which unit."""
    losses = {task: table.metric(task) for task in table.counts if less_is_better(table.metric(task))}
    kinds = " and ".join(_PLURALS.get(kind, kind) for kind in sorted(set(losses.values())))
    unit = f"{kinds}, less is better" if len(losses) == len(table.counts) else "per cent"
    title = f"{table.source}, {unit}" if table.source else f"{table.split} split, {unit}, {table.protocol} protocol"
    if table.protocol == "transductive":
        title += " (adapted on the very inputs that are scored)"
    if losses and len(losses) < len(table.counts):
        named = ", ".join(f"the {kind} of {task}" for task, kind in losses.items())
        title += f"; mean without {named}, of which less is better"
    return title


def scores(table: Table) -> Sheet:
    """Models by tasks, with mean and normalised score."""
    tasks = list(table.counts)
    of_mean = table.metric(table.averaged()[0])
    rows: list[Sequence[Cell]] = []
    for row, values in table.rows.items():
        normal = table.normalised(row)
        name = f"{row} (task-aware)" if row in table.bundles else row
        normalised = None if normal is None else Rounded(normal, 1)
        rows.append((name, cell(table.mean(row), of_mean), normalised, *(cell(values[t], table.metric(t)) for t in tasks)))  # fmt: skip
    counts = ", ".join(f"{task} {count}" for task, count in table.counts.items())
    notes = [
        f"Inputs: {counts}.",
        *table.notes,
        *dict.fromkeys(METHODS[kind].in_use for kind in table.bundles.values()),
    ]
    return Sheet(("model", "mean", "norm.", *(head(t, table.metric(t)) for t in tasks)), rows, title_of(table), notes)


def classes(table: Table) -> Sheet:
    """Every class of every task by every model."""
    rows: list[Sequence[Cell]] = [
        (task, row, each.name, each.inputs, *(Rounded(share, 1) for share in (each.precision, each.recall, each.f1)))
        for task in table.counts
        for row, of_row in table.classes.items()
        for each in of_row.get(task, ())
    ]
    without = [task for task in table.counts if not any(of_row.get(task) for of_row in table.classes.values())]
    notes = [f"No classes: {', '.join(without)}."] if without else []
    columns = ("task", "model", "class", "inputs", "precision", "recall", "F1")
    return Sheet(columns, rows, f"{table.split} split, class by class, per cent", notes)


def points(ranked: Sequence[Point], metrics: Mapping[str, str]) -> Sheet:
    """All points of a search, the best first."""
    first = ranked[0]
    of_mean = next(iter(metrics.values())) if first.losses else ""
    rows: list[Sequence[Cell]] = [
        (
            *(
                value if isinstance(value, int) and not isinstance(value, bool) else str(value)
                for value in point.settings.values()
            ),
            cell(point.mean, of_mean, 2),
            *(cell(value, metrics[task]) for task, value in point.scores.items()),
        )
        for point in ranked
    ]
    columns = (*first.settings, "mean", *(head(task, metrics[task]) for task in first.scores))
    return Sheet(columns, rows, "select split, with labels")


def tensors(rows: Sequence[TensorRow]) -> Sheet:
    """A checkpoint's tensors; of a task vector its norm in per cent of the base's."""
    columns = ("tensor", "shape", "dtype", "norm", "‖τ‖/‖W₀‖ %", "rank for 95%", "rank")
    return Sheet(columns, [
        (row.name, _shape(row.shape), row.dtype, Rounded(row.norm, 4), None if row.delta is None else Rounded(100 * row.delta, 2), row.rank95, row.rank)
        for row in rows
    ])  # fmt: skip


def layers(tasks: Sequence[str], rows: Sequence[LayerRow]) -> Sheet:
    """λ and kept components per tensor and task, a line each."""
    cells = [
        (row.name, task, Rounded(row.lam[i], 3), row.kept[i] if row.kept else None, row.sizes[i] if row.kept else None)
        for row in rows
        for i, task in enumerate(tasks)
    ]
    soft = ["Masks are soft: a component counts as kept where its mask is ½ or more."] if any(r.soft for r in rows) else []  # fmt: skip
    return Sheet(("tensor", "task", "λ", "kept", "of"), cells, notes=soft)


def bundle(about: About, sizes: Mapping[str, Any]) -> Sheet:
    """The size of each part of a bundle."""
    parts = [("shared by all tasks", sizes["shared"]), *((f"{t}, with its head", n) for t, n in sizes["tasks"].items())]
    return Sheet(("weights", "bytes"), parts, f"{about.kind} bundle", [METHODS[about.kind].in_use])


def methods(entries: Mapping[str, Entry]) -> Sheet:
    """The catalogue."""
    return Sheet(("method", "formula", "needs"), [(e.name, e.formula, e.needs) for e in entries.values()])


def method(entry: Entry) -> Sheet:
    """One method's settings."""
    rows = [(s.name, s.default, s.allowed, s.meaning) for s in entry.settings]
    notes = [f"{entry.formula} ({entry.source})"]
    return Sheet(("setting", "default", "allowed", "meaning"), rows, f"{entry.name}: {entry.summary}", notes)


def papers(rows: Sequence[PaperRow]) -> Sheet:
    """The papers' rows, each with its recipe and the papers' figures."""
    from adarank.recipe.papers import SETTINGS  # the tables of the papers are made when it is imported

    cells = [
        (
            row.name,
            "\n".join(part for part in (row.yaml() if row.recipe else "", row.hint) if part),
            *(row.shown(k) for k in SETTINGS),
        )
        for row in rows
    ]
    return Sheet(("row", "recipe", *SETTINGS.values()), cells)


def plan(described: Mapping[str, Any]) -> Sheet:
    """Every tensor with what happens to it."""
    rows = [(n, _shape(row["shape"]), row["dtype"], row["action"], row["reason"]) for n, row in described["tensors"].items()]  # fmt: skip
    return Sheet(("tensor", "shape", "dtype", "action", "why"), rows, notes=described["notes"])


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))
