"""Tables and sentences for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from rich.table import Table as Grid
from rich.text import Text

from adarank.cli.console import clock, err, out, recent, size
from adarank.cli.formats import Sheet
from adarank.cli.formats import grid as grid_of
from adarank.cli.sheets import cell, head, title_of
from adarank.data.metrics import LOSS
from adarank.io.bundle import About
from adarank.recipe.catalogue import Entry
from adarank.recipe.registry import METHODS
from adarank.workflow.inspect import LayerRow, TensorRow
from adarank.workflow.scores import Table
from adarank.workflow.search import Point

if TYPE_CHECKING:
    from adarank.recipe.papers import PaperRow


def note(text: str) -> None:
    """A stage as it begins."""
    err.print(text, style="dim")


def say(first: object, rest: str, style: str = "bold") -> None:
    """A line whose beginning stands out."""
    out.print(Text.assemble((str(first), style), rest))


def plan(described: Mapping[str, Any], verbose: bool) -> None:
    """What a merge will do, stage by stage."""
    for name, stage in described.get("stages", {}).items():
        out.print(f"stage {name}:", style="dim")
        plan(stage, verbose)
    if described.get("stages"):
        out.print("the output:", style="dim")
    actions = described["actions"]
    words = {
        "decompose": "decomposed",
        "scale": "merged by λ·delta",
        "train": "trained",
        "average": "averaged",
        "keep": "kept from the base",
    }
    if not described["decomposes"]:
        words |= {"decompose": "merged as matrices", "scale": "merged, other than matrices"}
    of = "tasks" if described["reads"] else "experts"
    say(described["merge_method"], f" of {len(described['tasks'])} {of}: {', '.join(described['tasks'])}")
    if described["reads"]:
        out.print(f"  reads {described['reads']}: a reference, not a merge")
    for action, word in words.items():
        if actions.get(action):
            out.print(f"  {actions[action]:5d} tensors {word}")
    for row in described["slices"]:
        out.print(f"        {_layers(row)}")
    for names, tasks in _same_heads(described["heads"]).items():
        out.print(f"        head of {tasks}: {', '.join(names)}")
    for member, dropped in described["dropped"].items():
        for reason in dict.fromkeys(dropped.values()):
            unused = [name for name, why in dropped.items() if why == reason]
            few = unused if len(unused) <= 3 else [f"{unused[0]} and {len(unused) - 1} more"]
            for name in few:
                out.print(f"        not used from {member}: {name} ({reason})")
    for task, splits in described.get("splits", {}).items():
        out.print(f"        inputs of {task}: " + ", ".join(f"{count} to {split}" for split, count in splits.items()))
    if "statistics" in described:
        out.print(f"        {_statistics_read(described['statistics'])}")
    if verbose:
        grid = Grid(box=None)
        grid.add_column("tensor", overflow="fold")
        for name in ("shape", "dtype", "action", "why"):
            grid.add_column(name)
        for name, row in described["tensors"].items():
            grid.add_row(name, "×".join(map(str, row["shape"])), row["dtype"], row["action"], row["reason"])
        out.print(grid)
    if described["task_aware"]:
        out.print(f"  {METHODS[described['merge_method']].in_use}")
        out.print(
            f"  {len(described['tasks'])} whole experts would take {size(described['experts_bytes'])}, heads apart"
        )
    remarks(described)
    out.print(f"  output {size(described['output_bytes'])}, predicted peak memory {size(described['peak_bytes'])}")


def _layers(row: Mapping[str, Any]) -> str:
    """Where some layers of the output come from."""

    def numbers(first: int, after: int) -> str:
        return (
            f"layers {first} to {after - 1}" if after - first > 1 else f"layer {first}" if after > first else "no layer"
        )

    of = ", ".join(f"{source['model']} ({numbers(*source['layers'])})" for source in row["of"])
    return f"{numbers(*row['layers'])}: {of}"


def merged(record: Mapping[str, Any], recipe: str, folder: Path) -> None:
    """What a merge came to, and what comes next."""
    for block, shown in _OF_BLOCK.items():
        if block in record:
            shown(record[block])
    for block in _OF_BLOCK:
        for line in record.get(block, {}).get("notes", ()):
            out.print(line, style="dim")
    remarks(record["plan"], record["kept_though_changed"], record["kept_though_of_other_shape"])
    written = f" written in {clock(record['seconds'])}"
    if "bundle" in record:
        say(folder, f"{written}: {bundle_size(record['bundle'])}")
        out.print(METHODS[record["plan"]["merge_method"]].in_use)
    else:
        of_lora = record.get("lora")
        say(folder, f"{written}, {size(of_lora['bytes'] if of_lora else record['plan']['output_bytes'])}")
        if of_lora:
            out.print(of_adapter(of_lora))
    if record["plan"]["kind"] and "stages" not in record:  # of tasks: there is something to score
        out.print(f"next: adarank evaluate {recipe} {folder}", style="dim")


def of_adapter(lora: Mapping[str, Any]) -> str:
    """How near an output that is an adapter comes to the merged model, in a sentence."""
    worst = max(lora["relative_errors"], key=lora["relative_errors"].__getitem__)
    error, of_worst = lora["relative_error"], lora["relative_errors"][worst]
    return f"adapter of rank {lora['rank']}: {error:.2%} of the merged task vector is lost, at most {of_worst:.2%} of one tensor ({worst})"


def remarks(
    described: Mapping[str, Any],
    changed: Mapping[str, float] | None = None,
    reshaped: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
) -> None:
    """What a user may not expect: of the recipe, and of what was kept from the base though experts changed it.

    Arguments:
        changed: tensor -> by how much.
        reshaped: tensor -> expert -> the shape that it has there, so that it cannot merge.
    """
    for text in described["notes"]:
        say("note:", f" {text}", "bold yellow")
    far = {name: share for name, share in (changed or {}).items() if share > 0.01}
    if far:
        names = ", ".join(f"{name} (by up to {100 * share:.0f}%)" for name, share in list(far.items())[:3])
        more = f" and {len(far) - 3} more" if len(far) > 3 else ""
        patterns = ", ".join(f'"{name}"' for name in [name for name in far if name not in (reshaped or {})][:3])
        remedy = f" To merge them: select: {{scale: [{patterns}]}}." if patterns else ""
        say("note:", f" kept from the base though experts changed them: {names}{more}.{remedy}", "bold yellow")
    if reshaped:
        listed = [f"{name} ({', '.join(f'{tuple(shape)} in {task}' for task, shape in of.items())})" for name, of in reshaped.items()]  # fmt: skip
        more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
        say("note:", f" kept from the base where experts have another shape: {', '.join(listed[:3])}{more}.", "bold yellow")  # fmt: skip


def bundle_size(sizes: Mapping[str, Any]) -> str:
    """A bundle's size beside that of one model and of all experts."""
    count, experts = len(sizes["tasks"]), sizes["experts"]
    return (
        f"{size(sizes['bundle'])} for {count} tasks, {100 * sizes['bundle'] / experts:.0f}% of the {size(experts)} of "
        f"{count} whole experts and {sizes['bundle'] / sizes['one']:.1f} times one model"
    )


def bundle(about: About, sizes: Mapping[str, Any]) -> None:
    """What a bundle is, and the size of each of its parts."""
    say(about.kind, f" bundle: {bundle_size(sizes)}")
    out.print(METHODS[about.kind].in_use)
    grid = Grid(box=None, header_style="bold", pad_edge=False)
    grid.add_column("weights")
    grid.add_column("size", justify="right")
    grid.add_row("shared by all tasks", size(sizes["shared"]))
    for task, count in sizes["tasks"].items():
        grid.add_row(f"{task}, with its head", size(count))
    out.print(grid)


def extracted(record: Mapping[str, Any], output: Path, folder: Path) -> None:
    """What was written of one task, and what was left out."""
    about = record["extracted"]
    say(folder, f" written: task {about['task']} of {output}")
    if about["left_out"]:
        count, first = len(about["left_out"]), about["left_out"][0]
        out.print(f"{count} tensor(s) left out that its architecture has no place for, such as {first}", style="dim")
    for text in record["notes"]:
        say("note:", f" {text}", "bold yellow")


def _same_heads(heads: Mapping[str, list[str]]) -> dict[tuple[str, ...], str]:
    """Tensor names -> the tasks whose head they are: "each task" when all agree."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for task, names in heads.items():
        if names:
            groups.setdefault(tuple(names), []).append(task)
    return {names: "each task" if len(tasks) == len(heads) else ", ".join(tasks) for names, tasks in groups.items()}


def scores(table: Table) -> None:
    """Models by tasks, with mean and normalised score."""
    tasks = list(table.counts)
    grid = Grid(title=title_of(table), title_justify="left", title_style="", box=None, header_style="bold",
                pad_edge=False, padding=(0, 0, 0, 1))  # fmt: skip
    first = min(20, max((len(row) for row in table.rows), default=1))
    grid.add_column("model", overflow="fold", min_width=first)
    for name in ("mean", "norm.", *_broken([head(t, table.metric(t)) for t in tasks], out.width - first - 12)):
        grid.add_column(name, justify="right", no_wrap=True)
    for row, values in table.rows.items():
        normal = table.normalised(row)
        grid.add_row(
            f"{row} (task-aware)" if row in table.bundles else row,
            str(cell(table.mean(row), table.metric(table.averaged()[0]))),
            f"{normal:.1f}" if normal is not None else "",
            *(str(cell(values[t], table.metric(t))) for t in tasks),
        )
    grid.add_row("inputs", "", "", *(str(table.counts[t]) for t in tasks), style="dim")
    out.print(grid)
    for text in dict.fromkeys(METHODS[kind].in_use for kind in table.bundles.values()):
        out.print(text)


def _broken(names: Sequence[str], room: int) -> list[str]:
    """Column heads, over several lines each where they do not fit beside one another. A score takes five characters."""
    if sum(max(5, len(name)) + 1 for name in names) <= room:
        return list(names)
    most = max(5, room // len(names) - 1)
    return ["\n".join(wrap(name, most)) for name in names]


def sheet(content: Sheet) -> None:
    """A table that has no layout of its own."""
    out.print(grid_of(content))
    for text in content.notes:
        out.print(text, style="dim")


def points(ranked: Sequence[Point], metrics: Mapping[str, str], most: int = 10) -> None:
    """The best points of a search."""
    first = ranked[0]
    grid = Grid(title=f"select split, with labels: the best of {len(ranked)} points", title_justify="left",
                title_style="", box=None, header_style="bold", pad_edge=False)  # fmt: skip
    for name in (*first.settings, "mean", *(head(task, metrics[task]) for task in first.scores)):
        grid.add_column(name, justify="right")
    for point in ranked[:most]:
        cells = [str(value) for value in point.settings.values()]
        mean = cell(point.mean, LOSS if point.losses else "", 2)
        grid.add_row(*cells, str(mean), *(str(cell(score, metrics[task])) for task, score in point.scores.items()))
    out.print(grid)


def tensors(rows: list[TensorRow]) -> None:
    """A checkpoint's tensors."""
    grid = Grid(box=None, header_style="bold", pad_edge=False)
    grid.add_column("tensor", overflow="fold", min_width=_widest(rows))
    grid.add_column("shape")
    grid.add_column("dtype")
    for name in ("norm", "‖τ‖/‖W₀‖", "rank for 95%"):
        grid.add_column(name, justify="right")
    for row in rows:
        share = "" if row.delta is None else f"{100 * row.delta:.2f}%"
        rank = "" if row.rank95 is None else f"{row.rank95} of {row.rank}"
        grid.add_row(row.name, "×".join(map(str, row.shape)), row.dtype, f"{row.norm:.4g}", share, rank)
    out.print(grid)


def layers(tasks: tuple[str, ...], rows: list[LayerRow]) -> None:
    """λ and kept components per tensor and task."""
    grid = Grid(box=None, header_style="bold", pad_edge=False)
    grid.add_column("tensor", overflow="fold", min_width=_widest(rows))
    for name in ("", *tasks):
        grid.add_column(name, overflow="fold")
    for row in rows:
        grid.add_row(row.name, "λ", *(f"{value:.3f}" for value in row.lam))
        if row.kept:
            grid.add_row("", "kept", *(f"{k}/{n}" for k, n in zip(row.kept, row.sizes, strict=True)), style="cyan")
    out.print(grid)
    if any(row.soft for row in rows):
        out.print("Masks are soft: a component counts as kept where its mask is ½ or more.", style="dim")


def _widest(rows: Sequence[TensorRow | LayerRow]) -> int:
    """Room for the longest name, up to half of the terminal: names are folded then, never cut off."""
    return min(out.width // 2, max((len(row.name) for row in rows), default=1))


def methods(entries: Mapping[str, Entry]) -> None:
    """The catalogue, a line each."""
    grid = Grid("method", "formula", "needs", box=None, header_style="bold", pad_edge=False)
    for entry in entries.values():
        grid.add_row(entry.name, entry.formula, entry.needs)
    out.print(grid)


def papers(rows: Sequence[PaperRow]) -> None:
    """The papers' rows, each with its recipe and the papers' figures."""
    from adarank.recipe.papers import SETTINGS  # the tables of the papers are made when it is imported

    grid = Grid("row", "recipe", box=None, header_style="bold", pad_edge=False)
    for title in SETTINGS.values():
        grid.add_column(title, justify="right", min_width=8)
    for row in rows:
        description = "\n".join(part for part in (row.yaml() if row.recipe else "", row.hint) if part)
        grid.add_row(row.name, description, *(row.shown(key) for key in SETTINGS))
    out.print(grid)


def method(entry: Entry) -> None:
    """One method's page."""
    say(
        entry.name,
        f"  {entry.summary}\n\n  {entry.formula}\n\nneeds   {entry.needs}\nreads   {entry.reads}\nmemory  {entry.memory}\nsource  {entry.source}\n",
    )
    grid = Grid(box=None, header_style="bold", pad_edge=False)
    grid.add_column("setting", no_wrap=True, min_width=max((len(s.name) for s in entry.settings), default=1))
    for title in ("default", "allowed", "meaning"):
        grid.add_column(title, overflow="fold")
    for setting in entry.settings:
        grid.add_row(setting.name, setting.default, setting.allowed, setting.meaning)
    out.print(grid)


def adapted(report: Mapping[str, Any]) -> None:
    """What adaptation came to: steps, the one kept and why, and which tasks collapsed."""
    if report["starts"]:
        best = max(report["starts"], key=lambda start: start["value"])
        out.print(
            f"start: rank {best['rank']:g}, λ {best['lambda']:g}: nearest to the experts on unlabelled inputs, "
            f"of {len(report['starts'])} looked at"
        )
    taken = f"{report['steps']} steps" + (", stopped early" if report["stopped_early"] else "")
    kept = f", {100 * report['components_kept']:.2f}% of the components kept" if "components_kept" in report else ""
    kept += " (their soft masks are ½ or more)" if report.get("mask") == "soft" else ""
    out.print(taken + kept)
    if "steps_kept" in report:
        steps = ", ".join(f"{task} {step}" for task, step in report["steps_kept"].items())
        out.print(f"kept by task: step {steps}: {report['why_kept']}.")
    elif report["rolled_back"]:
        say("rolled back to the start:", f" {report['why_kept']}.")
    else:
        share = f"{report['share_kept']:g} of the way from the start to step" if report["share_kept"] < 1 else "step"
        out.print(f"kept {share} {report['step_kept']}: {report['why_kept']}.")
    if report.get("not_routed"):
        out.print(
            f"{len(report['not_routed'])} tensors are the same for every input (the record names them)", style="dim"
        )
    if "told_by_router" in report:
        shares = ", ".join(f"{task} {100 * share:.0f}%" for task, share in report["told_by_router"].items())
        out.print(f"inputs that the router gives to their own task: {shares}")
    for task in report["collapsed"]:
        seen = report["largest_class_share"][task]
        say(
            "collapsed:",
            f" {task} now gives one class to {100 * seen['after']:.0f}% of its inputs "
            f"({100 * seen['before']:.0f}% at the start, {100 * seen['expert']:.0f}% by its expert). "
            "Use objective: self-label, keep: best, fewer steps, or smaller step sizes.",
            "bold red",
        )
    for task, seen in report["largest_class_share"].items():
        if task not in report["collapsed"] and seen["after"] == 1 > seen["expert"]:
            out.print(
                f"{task}: one class for all its inputs, as at the start ({100 * seen['expert']:.0f}% by its expert)."
            )
    for task, step in report["collapse_seen"].items():
        if task not in report["collapsed"]:
            out.print(f"{task} had collapsed to one class at step {step}; what was kept has not.", style="dim")
    if report.get("heads"):
        with_heads(report)


def with_heads(report: Mapping[str, Any]) -> None:
    """Which tasks' heads were learned, and how near they are to their experts; which stay."""
    kept = [
        f"{task} {100 * fit['agreement'][0]:.1f} → {100 * fit['agreement'][1]:.1f}%"
        for task, fit in report["heads"].items()
        if fit["kept"]
    ]
    stay = [task for task, fit in report["heads"].items() if not fit["kept"]]
    if kept:
        out.print(f"heads learned, agreement with the experts: {', '.join(kept)}")
    if stay:
        out.print(f"heads of the experts kept, as learned ones did not agree more: {', '.join(stay)}")


def trained(report: Mapping[str, Any]) -> None:
    """What training came to, and what it read."""
    ends = ", ".join(f"{task} {recent(values):.3f}" for task, values in report["losses"].items() if values)
    out.print(f"{report['what']}, {report['steps']} steps; reads {report['reads']}")
    if ends:
        out.print(f"mean loss of the last steps: {ends}")


def calibrated(report: Mapping[str, Any]) -> None:
    """What statistics a merge took, and where they left something open."""
    out.print(f"{_statistics_read(report)}, in {clock(report['seconds'])}")
    without = f"{report['tensors_without_statistics']} {report['merged_without']}"
    out.print(f"{report['tensors_with_statistics']} tensors merged by them, {without}")
    if report["undetermined"]:
        out.print(
            f"{len(report['undetermined'])} tensors are not determined in all directions by so few inputs (the record names them)",
            style="dim",
        )


def _statistics_read(report: Mapping[str, Any]) -> str:
    counts = report["inputs"].values()
    number = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    labels = "their labels are read" if report["labels_read"] else "no label is read"
    return f"statistics of {number} adapt inputs per task, {labels}"


_OF_BLOCK = {"adaptation": adapted, "training": trained, "statistics": calibrated, "learned_heads": with_heads}
"""Block of a record -> what shows it."""
