"""What `inspect` shows: a checkpoint's tensors, what an adapted output kept of whom, the sizes of a bundle."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from adarank.alignment.layers import layer_groups
from adarank.cli import sheets
from adarank.cli.console import head, size, write
from adarank.cli.formats import Sheet
from adarank.cli.show import bundle_size
from adarank.cli.tables import fit, lines, listing, print_lines
from adarank.io.bundle import About
from adarank.recipe.registry import METHODS
from adarank.workflow.inspect import LayerRow

_BAR = 20
_LEGEND = (
    "What a task's expert changed of a matrix is a sum of components (singular directions). kept: those of them that went into "
    "this model, each times λ. Tensors that are no matrices have no components: all that was changed went in, times λ."
)


def tensors(content: Sheet) -> None:
    """A checkpoint's tensors; without a base there is no task vector to speak of."""
    columns = [column for column in content.texts() if any(column[1:])]
    heads, *rows = zip(*columns, strict=True)
    listing(heads, rows, right=range(3, len(heads)))


def output(tasks: Sequence[str], rows: Sequence[LayerRow], full: bool, method: str) -> None:
    """What an adapted output kept of each task: a row per task and per layer, or (`full`) all tensors."""
    matrices = sum(bool(row.kept) for row in rows)
    counts = [_counts(rows, number) for number in range(len(tasks))]
    kept, of = (sum(numbers) for numbers in zip(*counts, strict=True))
    share = f" ({_percent(kept, of)} of these kept)" if of else ""
    head(
        method,
        f" of {len(tasks)} tasks: {matrices} matrices by their components{share}, {len(rows) - matrices} other tensors whole",
        hang=2,
    )
    content = sheets.layers(tasks, rows)
    if full:
        _every_tensor(content)
    else:
        _by_task(tasks, rows)
        _by_layer(tasks, rows)
    for text in (*content.notes, _LEGEND):
        write(text, style="dim")
    if not full:
        write("Every tensor: inspect --full. As data: inspect --json.", style="dim")


def _by_task(tasks: Sequence[str], rows: Sequence[LayerRow]) -> None:
    """A row per task: how much of it was kept, and by how much it was added."""
    cells = [["task", "kept", "", "components", "λ mean", "λ least", "λ most"]]
    for number, task in enumerate(tasks):
        kept, of = _counts(rows, number)
        lam = [row.lam[number] for row in rows]
        share = [_percent(kept, of), "█" * round(_BAR * kept / of), f"{kept} of {of}"] if of else ["", "", ""]
        cells.append([task, *share, f"{sum(lam) / len(lam):.3f}", f"{min(lam):.3f}", f"{max(lam):.3f}"])
    for dropped in ([], [2], [2, 3]):  # the bar goes first where there is no room
        made = lines([[cell for n, cell in enumerate(row) if n not in dropped] for row in cells], _right(dropped))
        if fit(made):
            print_lines(made)
            return
    listing(cells[0][:2] + cells[0][4:], [row[:2] + row[4:] for row in cells[1:]], right=range(1, 5))


def _right(dropped: Sequence[int]) -> set[int]:
    """Numbers of the columns of figures, once some are left out."""
    kept = [n for n in range(7) if n not in dropped]
    return {place for place, n in enumerate(kept) if n not in (0, 2)}


def _by_layer(tasks: Sequence[str], rows: Sequence[LayerRow]) -> None:
    """A row per layer: the share kept of all tasks, and of whom the least and the most."""
    groups: dict[str, list[LayerRow]] = {}
    for row, group in zip(rows, layer_groups([row.name for row in rows]), strict=True):
        groups.setdefault(group, []).append(row)
    cells = []
    for group, members in groups.items():
        counts = [_counts(members, number) for number in range(len(tasks))]
        if not all(of for _, of in counts):
            continue
        kept = [100 * part / of for part, of in counts]
        least, most = kept.index(min(kept)), kept.index(max(kept))
        whole = _percent(sum(part for part, _ in counts), sum(of for _, of in counts))
        of_tasks = [f"{tasks[least]} {kept[least]:.0f}%", f"{tasks[most]} {kept[most]:.0f}%"]
        cells.append([group or "all", whole, *of_tasks])
    if cells:
        write("")
        listing(["part", "kept", "least of", "most of"], cells, right=[1])


def _every_tensor(content: Sheet) -> None:
    """A tensor's name, and beneath it a row per task."""
    of_all = zip(*(column[1:] for column in content.texts()), strict=True)
    for name, of_one in itertools.groupby(of_all, key=lambda row: row[0]):
        write(name, hang=2, style="bold")
        cells = [[task, f"λ {lam}", f"kept {kept} of {of}" if kept else ""] for _, task, lam, kept, of in of_one]
        made = lines(cells, right=[1])
        if fit(made, 2):
            print_lines(made, 2, heads=0)
        else:
            for task, lam, part in cells:
                write(f"{task}  {lam}  {part}", 2, 4)


def _counts(rows: Sequence[LayerRow], task: int) -> tuple[int, int]:
    """Components that are kept of a task, and how many there are."""
    with_masks = [row for row in rows if row.kept]
    return sum(row.kept[task] for row in with_masks), sum(row.sizes[task] for row in with_masks)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%"


def bundle(about: About, sizes: Mapping[str, Any]) -> None:
    """What a bundle is, and the size of each of its parts."""
    head(about.kind, f" bundle: {bundle_size(sizes)}", hang=2)
    write(METHODS[about.kind].in_use)
    rows = [[str(part), size(int(str(count)))] for part, count in sheets.bundle(about, sizes).rows]
    listing(["weights", "size"], rows, right=[1])
