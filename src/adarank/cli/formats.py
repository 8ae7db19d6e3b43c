"""Tables as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rounded:
    """A number that people see with so many digits after the point, or so many in all, and programs whole."""

    value: float
    digits: int
    in_all: bool = False

    def __str__(self) -> str:
        return f"{self.value:.{self.digits}{'g' if self.in_all else 'f'}}"


Cell = str | int | Rounded | None


@dataclass(frozen=True)
class Sheet:
    """A table as data.

    Attributes:
        columns: their names. A column is of numbers if all its cells are.
        rows: cells, None where there is nothing.
        title, notes: what stands above and below; CSV, which programs read, has neither.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    notes: Sequence[str] = ()

    def numeric(self) -> list[bool]:
        """Of each column whether it is of numbers."""
        return [
            any(row[i] is not None for row in self.rows) and not any(isinstance(row[i], str) for row in self.rows)
            for i in range(len(self.columns))
        ]

    def texts(self) -> list[list[str]]:
        """Column by column, its name and its cells as people see them."""
        return [[name, *(_text(row[place]) for row in self.rows)] for place, name in enumerate(self.columns)]


def rendered(sheets: Sequence[Sheet], form: str) -> str:
    """Tables in one of the formats that are not text, a blank line between two.

    Example:
        >>> print(rendered([Sheet(("task", "score"), [("mood", Rounded(81.25, 1))])], "csv"), end="")
        task,score
        mood,81.25
    """
    renderers: dict[str, Callable[[Sheet], str]] = {"md": _markdown, "csv": _csv, "latex": _latex}
    return "\n".join(renderers[form](sheet) for sheet in sheets)


def _text(cell: Cell) -> str:
    return "" if cell is None else str(cell)


def _csv(sheet: Sheet) -> str:
    """RFC 4180 with plain line ends; numbers whole, so that nothing is lost to rounding."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(sheet.columns)
    writer.writerows([cell.value if isinstance(cell, Rounded) else cell for cell in row] for row in sheet.rows)
    return text.getvalue()


def _markdown(sheet: Sheet) -> str:
    """A table of GitHub's Markdown."""
    heads, numeric = [_in_markdown(name) for name in sheet.columns], sheet.numeric()
    lines = [heads, ["---:" if numbers else "---" for numbers in numeric]]
    lines += [[_in_markdown(_text(cell)) for cell in row] for row in sheet.rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    parts = [_in_markdown(sheet.title), table, *map(_in_markdown, sheet.notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _in_markdown(text: str) -> str:
    for special in "\\`*_<|[]":
        text = text.replace(special, f"\\{special}")
    return text.replace("\n", "<br>")


def _latex(sheet: Sheet) -> str:
    """A table with rules of the package booktabs."""
    kinds = "".join("r" if numbers else "l" for numbers in sheet.numeric())
    lines = ["% needs \\usepackage{booktabs}", "\\begin{table}", "\\centering"]
    lines += [f"\\caption{{{_in_latex(sheet.title)}}}"] if sheet.title else []
    lines += [f"\\begin{{tabular}}{{{kinds}}}", "\\toprule", _latex_row(sheet.columns), "\\midrule"]
    lines += [_latex_row(list(map(_text, row))) for row in sheet.rows]
    lines += ["\\bottomrule", "\\end{tabular}", *(f"\n{_in_latex(text)}" for text in sheet.notes), "\\end{table}"]
    return "\n".join(lines) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(_in_latex, cells)) + " \\\\"


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "|": "$|$",
    "λ": r"$\lambda$", "τ": r"$\tau$", "Σ": r"$\Sigma$", "α": r"$\alpha$", "θ": r"$\theta$", "κ": r"$\kappa$",
    "ε": r"$\varepsilon$", "ρ": r"$\rho$", "ℓ": r"$\ell$", "∂": r"$\partial$", "‖": r"$\|$", "≥": r"$\ge$", "≤": r"$\le$",
    "∘": r"$\circ$", "·": r"$\cdot$", "×": r"$\times$", "±": r"$\pm$", "÷": r"$\div$", "∝": r"$\propto$", "⊥": r"$\perp$",
    "⟨": r"$\langle$", "⟩": r"$\rangle$", "⌊": r"$\lfloor$", "⌋": r"$\rfloor$", "→": r"$\to$", "ᵀ": r"$^\top$",
    "₀": "$_0$", "₁": "$_1$", "₂": "$_2$", "₃": "$_3$", "¹": "$^1$", "²": "$^2$", "⁻": "$^-$", "½": r"$\frac12$",
    "Ĝ": r"$\hat{G}$", "…": r"\dots{}",
}  # fmt: skip
_ACCENTS = {"\u0304": "bar", "\u0302": "hat"}  # combining characters, which follow what they stand on


def _in_latex(text: str) -> str:
    """Text with all that LaTeX would take for a command or lacks in its text fonts escaped; lines above one another."""
    if "\n" in text:
        lines = " \\\\ ".join(map(_in_latex, text.splitlines()))
        return f"\\shortstack[l]{{{lines}}}"
    parts: list[str] = []
    for letter in text:
        if letter in _ACCENTS and parts and parts[-1].isalpha():
            parts[-1] = f"$\\{_ACCENTS[letter]}{{{parts[-1]}}}$"
        else:
            parts.append(_LATEX.get(letter, letter))
    return "".join(parts)
