"""The catalogue on the terminal: all methods, one method's page, the rows of the papers' tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from adarank.cli.console import head, write
from adarank.cli.tables import fit, lines, print_lines
from adarank.recipe.catalogue import Entry

if TYPE_CHECKING:
    from adarank.recipe.papers import PaperRow


def methods(entries: Mapping[str, Entry]) -> None:
    """The catalogue: a line each where there is room, else a method's formula beneath its name."""
    whole = lines([["method", "formula", "needs"], *([e.name, e.formula, e.needs] for e in entries.values())])
    if fit(whole):
        print_lines(whole)
        return
    for entry in entries.values():
        head(entry.name, f"  {entry.needs}", hang=2)
        write(entry.formula, 2, 4)
    write("A method's settings: adarank methods NAME", style="dim")


def method(entry: Entry) -> None:
    """One method's page."""
    head(entry.name, f"  {entry.summary}", hang=2)
    write("")
    write(entry.formula, 2, 4)
    write("")
    for label in ("needs", "reads", "memory", "source"):
        write(f"{label:6}  {getattr(entry, label)}", 0, 8)
    if entry.settings:
        write("")
        write("settings", style="bold")
    for setting in entry.settings:
        parts = [setting.default if setting.default == "required" else f"default {setting.default}", setting.allowed]
        head(setting.name, "  " + "; ".join(filter(None, parts)), indent=2, hang=6)
        if setting.meaning:
            write(setting.meaning, 6)


def papers(rows: Sequence[PaperRow]) -> None:
    """The papers' rows, each with its figures and beneath them its recipe."""
    from adarank.recipe.papers import SETTINGS  # the tables of the papers are made when it is imported

    write("Figures of the papers, mean over tasks in percent, and the recipe of each row; none is a result of adarank.")
    titles = [title.split(", ") for title in SETTINGS.values()]
    cells = [[row.name, *(row.shown(key) for key in SETTINGS)] for row in rows]
    heads = [["", *(paper for paper, _ in titles)], ["row", *(model for _, model in titles)]]
    whole = lines([*heads, *cells], right=range(1, len(titles) + 1), gap=" ")
    beside = fit(whole)
    if beside:
        print_lines(whole[:2], heads=2)
    for row, line in zip(rows, whole[2:], strict=True):
        if beside:
            print_lines([line])
        else:
            shown = [f"{title} {row.shown(key)}" for key, title in SETTINGS.items() if row.shown(key)]
            head(row.name, "  " + "; ".join(shown), hang=4)
        for part in (row.yaml() if row.recipe else "", row.hint):
            if part:
                write(part, 4, 6)
