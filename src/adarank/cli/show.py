"""What plans, merges, scores and searches say on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adarank.cli import sheets
from adarank.cli.console import clock, head, recent, size, write
from adarank.cli.formats import Sheet
from adarank.cli.tables import fit, lines, listing, print_lines, wide
from adarank.recipe.registry import METHODS
from adarank.workflow.scores import Table
from adarank.workflow.search import Point


def plan(described: Mapping[str, Any], verbose: bool) -> None:
    """What a merge will do, stage by stage."""
    for name, stage in described.get("stages", {}).items():
        write(f"stage {name}:", style="dim")
        plan(stage, verbose)
    if described.get("stages"):
        write("the output:", style="dim")
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
    head(described["merge_method"], f" of {len(described['tasks'])} {of}: {', '.join(described['tasks'])}", hang=2)
    if described["reads"]:
        write(f"reads {described['reads']}: a reference, not a merge", 2, 4)
    for action, word in words.items():
        if actions.get(action):
            write(f"{actions[action]:5d} tensors {word}", 2)
    for row in described["slices"]:
        write(_layers(row), 8, 10)
    for names, tasks in _same_heads(described["heads"]).items():
        write(f"head of {tasks}: {', '.join(names)}", 8, 10)
    for member, dropped in described["dropped"].items():
        for reason in dict.fromkeys(dropped.values()):
            unused = [name for name, why in dropped.items() if why == reason]
            few = unused if len(unused) <= 3 else [f"{unused[0]} and {len(unused) - 1} more"]
            for name in few:
                write(f"not used from {member}: {name} ({reason})", 8, 10)
    for task, splits in described.get("splits", {}).items():
        counts = ", ".join(f"{count} to {split}" for split, count in splits.items())
        write(f"inputs of {task}: {counts}", 8, 10)
    if "statistics" in described:
        write(_statistics_read(described["statistics"]), 8, 10)
    if verbose:
        rows = [
            [name, "×".join(map(str, row["shape"])), row["dtype"], row["action"], row["reason"]]
            for name, row in described["tensors"].items()
        ]
        listing(["tensor", "shape", "dtype", "action", "why"], rows)
    if described["task_aware"]:
        write(METHODS[described["merge_method"]].in_use, 2)
        write(f"{len(described['tasks'])} whole experts would take {size(described['experts_bytes'])}, heads apart", 2)
    remarks(described)
    budget = f" of {size(described['memory'])}" if described["memory"] else ""
    files = ", factors mapped from files" if described["factors_in_files"] else ""
    write(
        f"output {size(described['output_bytes'])}, predicted peak memory {size(described['peak_bytes'])}{budget}{files}",
        2,
    )


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
            write(line, style="dim")
    remarks(record["plan"], record["kept_though_changed"], record["kept_though_of_other_shape"])
    written = f" written in {clock(record['seconds'])}"
    if "bundle" in record:
        head(folder, f"{written}: {bundle_size(record['bundle'])}")
        write(METHODS[record["plan"]["merge_method"]].in_use)
    else:
        of_lora = record.get("lora")
        head(folder, f"{written}, {size(of_lora['bytes'] if of_lora else record['plan']['output_bytes'])}")
        if of_lora:
            write(of_adapter(of_lora))
    if record["plan"]["kind"] and "stages" not in record:  # of tasks: there is something to score
        write(f"next: adarank evaluate {recipe} {folder}", style="dim")


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
        head("note:", f" {text}", "bold yellow")
    far = {name: share for name, share in (changed or {}).items() if share > 0.01}
    if far:
        names = ", ".join(f"{name} (by up to {100 * share:.0f}%)" for name, share in list(far.items())[:3])
        more = f" and {len(far) - 3} more" if len(far) > 3 else ""
        patterns = ", ".join(f'"{name}"' for name in [name for name in far if name not in (reshaped or {})][:3])
        remedy = f" To merge them: select: {{scale: [{patterns}]}}." if patterns else ""
        head("note:", f" kept from the base though experts changed them: {names}{more}.{remedy}", "bold yellow")
    if reshaped:
        listed = [f"{name} ({', '.join(f'{tuple(shape)} in {task}' for task, shape in of.items())})" for name, of in reshaped.items()]  # fmt: skip
        more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
        head("note:", f" kept from the base where experts have another shape: {', '.join(listed[:3])}{more}.", "bold yellow")  # fmt: skip


def bundle_size(sizes: Mapping[str, Any]) -> str:
    """A bundle's size beside that of one model and of all experts."""
    count, experts = len(sizes["tasks"]), sizes["experts"]
    return (
        f"{size(sizes['bundle'])} for {count} tasks, {100 * sizes['bundle'] / experts:.0f}% of the {size(experts)} of "
        f"{count} whole experts and {sizes['bundle'] / sizes['one']:.1f} times one model"
    )


def _same_heads(heads: Mapping[str, list[str]]) -> dict[tuple[str, ...], str]:
    """Tensor names -> the tasks whose head they are: "each task" when all agree."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for task, names in heads.items():
        if names:
            groups.setdefault(tuple(names), []).append(task)
    return {names: "each task" if len(tasks) == len(heads) else ", ".join(tasks) for names, tasks in groups.items()}


def scores(table: Table) -> None:
    """Models by tasks, with mean and normalised score."""
    content = sheets.scores(table)
    write(content.title)
    columns = content.texts()
    lead = [[*column, last] for column, last in zip(columns[:3], ("inputs", "", ""), strict=True)]
    of_tasks = [[*column, str(count)] for column, count in zip(columns[3:], table.counts.values(), strict=True)]
    wide(lead, of_tasks, dim_last=True)
    for text in (*table.notes, *dict.fromkeys(METHODS[kind].in_use for kind in table.bundles.values())):
        write(text)


def after_demo(folder: Path, quick: bool, recipe: Path) -> None:
    """Where the demo's model is, and what comes next."""
    write(f"AdaRank's model is in {folder}: one body, and a head for each task.", hang=2)
    if quick:
        write("--quick shows that everything works; leave it out to see how well.")
    write("What it kept of each expert:")
    write(f"adarank inspect {folder}", 2, 4)
    write("Your own checkpoints: put their folders into a copy of this recipe, then plan it:")
    write(str(recipe), 2, 4, style="dim")
    write("adarank plan COPY", 2)


def extracted(record: Mapping[str, Any], output: Path, folder: Path) -> None:
    """What was written of one task, and what was left out."""
    about = record["extracted"]
    head(folder, f" written: task {about['task']} of {output}")
    if about["left_out"]:
        count, first = len(about["left_out"]), about["left_out"][0]
        write(f"{count} tensor(s) left out that its architecture has no place for, such as {first}", style="dim")
    for text in record["notes"]:
        head("note:", f" {text}", "bold yellow")


def searched(
    ranked: Sequence[Point], metrics: Mapping[str, str], at_the_edge: Mapping[str, float], level: bool, best: Path
) -> None:
    """What a search came to.

    Arguments:
        metrics: task -> what it is scored by.
        at_the_edge: axis -> the best value, where that is at the end of what was tried.
        level: all points score the same.
    """
    points(ranked, metrics)
    if level:
        write(f"All {len(ranked)} points score the same: what was varied changes nothing here.")
    for axis, at in at_the_edge.items():
        write(f"The best {axis}, {at:g}, is at the end of what was tried: better ones may lie beyond.")
    head(best, f" has the best settings; all points are in {best.stem}.search.json")
    write(f"next: adarank merge {best} OUT", style="dim")


def sheet(content: Sheet) -> None:
    """A table that has no layout of its own: in columns where they have room, else the first cells in a line above."""
    if content.title:
        write(content.title)
    numbers = [place for place, numeric in enumerate(content.numeric()) if numeric]
    cells = [["" if cell is None else str(cell) for cell in row] for row in content.rows]
    whole = lines([list(content.columns), *cells], numbers)
    if fit(whole):
        print_lines(whole)
    else:
        lead = min(numbers, default=len(content.columns))
        rows = [[", ".join(row[:lead]), *row[lead:]] for row in [list(content.columns), *cells]]
        listing(rows[0], rows[1:], range(1, len(rows[0])))
    for text in content.notes:
        write(text, style="dim")


def points(ranked: Sequence[Point], metrics: Mapping[str, str], most: int = 10) -> None:
    """The best points of a search."""
    write(f"select split, with labels: the best of {len(ranked)} points")
    columns, lead = sheets.points(ranked[:most], metrics).texts(), len(ranked[0].settings) + 1
    wide(columns[:lead], columns[lead:])


def adapted(report: Mapping[str, Any]) -> None:
    """What adaptation came to: steps, the one kept and why, and which tasks collapsed."""
    about_base = False
    if origins := report.get("origins"):
        about_base = origins["average"] < origins["pretrained"]
        write(
            f"about the {'base' if about_base else 'average'}: the experts' average agrees with the experts on "
            f"{100 * origins['average']:.1f}% of unlabelled inputs, the base on {100 * origins['pretrained']:.1f}%"
        )
    if report["starts"]:
        best = max(report["starts"], key=lambda start: start["value"])
        rank = f"rank {best['rank']:g}, " if "components_kept" in report else ""
        write(
            f"start: {rank}λ {best['lambda']:g}: nearest to the experts on unlabelled inputs, "
            f"of {len(report['starts'])} looked at"
        )
    if report.get("start_at_edge"):
        names = " and ".join(report["start_at_edge"])
        beside = ", with origin: pretrained beside it (else it is about the average)" if about_base else ""
        head(
            "edge:",
            f" the best start has the last {names} that is looked at. Beyond it a better one may lie: set it by hand{beside}.",
        )
    taken = f"{report['steps']} steps"
    kept = f", {100 * report['components_kept']:.2f}% of the components kept" if "components_kept" in report else ""
    kept += " (their soft masks are ½ or more)" if report.get("mask") == "soft" else ""
    write(taken + kept)
    if "steps_kept" in report:
        steps = ", ".join(f"{task} {step}" for task, step in report["steps_kept"].items())
        write(f"kept by task: step {steps}: {report['why_kept']}.")
    elif report["rolled_back"]:
        head("rolled back to the start:", f" {report['why_kept']}.")
    else:
        share = f"{report['share_kept']:g} of the way from the start to step" if report["share_kept"] < 1 else "step"
        write(f"kept {share} {report['step_kept']}: {report['why_kept']}.")
    if report.get("not_routed"):
        write(f"{len(report['not_routed'])} tensors are the same for every input (the record names them)", style="dim")
    if "told_by_router" in report:
        shares = ", ".join(f"{task} {100 * share:.0f}%" for task, share in report["told_by_router"].items())
        write(f"inputs that the router gives to their own task: {shares}")
    for task in report["collapsed"]:
        seen = report["largest_class_share"][task]
        head(
            "collapsed:",
            f" {task} now gives one class to {100 * seen['after']:.0f}% of its inputs "
            f"({100 * seen['before']:.0f}% at the start, {100 * seen['expert']:.0f}% by its expert). "
            "Use objective: self-label, keep: best, fewer steps, or smaller step sizes.",
            "bold red",
        )
    for task, seen in report["largest_class_share"].items():
        if task not in report["collapsed"] and seen["after"] == 1 > seen["expert"]:
            write(f"{task}: one class for all its inputs, as at the start ({100 * seen['expert']:.0f}% by its expert).")
    for task, step in report["collapse_seen"].items():
        if task not in report["collapsed"]:
            write(f"{task} had collapsed to one class at step {step}; what was kept has not.", style="dim")
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
        write(f"heads learned, agreement with the experts: {', '.join(kept)}")
    if stay:
        write(f"heads of the experts kept, as learned ones did not agree more: {', '.join(stay)}")


def trained(report: Mapping[str, Any]) -> None:
    """What training came to, and what it read."""
    ends = ", ".join(f"{task} {recent(values):.3f}" for task, values in report["losses"].items() if values)
    write(f"{report['what']}, {report['steps']} steps; reads {report['reads']}")
    if ends:
        write(f"mean loss of the last steps: {ends}")


def calibrated(report: Mapping[str, Any]) -> None:
    """What statistics a merge took, and where they left something open."""
    write(f"{_statistics_read(report)}, in {clock(report['seconds'])}")
    without = f"{report['tensors_without_statistics']} {report['merged_without']}"
    write(f"{report['tensors_with_statistics']} tensors merged by them, {without}")
    if report["undetermined"]:
        write(
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
