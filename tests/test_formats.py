"""Tables as Markdown, CSV and LaTeX: nothing is lost on the way, and nothing in a cell is taken for layout."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import adarank
from adarank import __version__
from adarank.cli.formats import Rounded, Sheet, rendered
from adarank.cli.main import main
from text_zoo import ADAPT, TASKS, recipe

TEXTS = st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=8)
SHEETS = st.lists(st.tuples(TEXTS, TEXTS, st.integers(), st.floats(allow_nan=False, allow_infinity=False)), min_size=1, max_size=4)  # fmt: skip
COLUMNS = ("a", "b|c", "d_e", "f")


def sheet_of(rows: list[tuple[str, str, int, float]]) -> Sheet:
    return Sheet(COLUMNS, [(*row[:3], Rounded(row[3], 1)) for row in rows], title="100% of_it", notes=("N & M",))


@given(SHEETS)
def test_csv_gives_every_cell_back(rows: list[tuple[str, str, int, float]]) -> None:
    text = rendered([sheet_of(rows)], "csv")
    head, *body = list(csv.reader(io.StringIO(text, newline="")))
    assert tuple(head) == COLUMNS
    assert [(a, b, int(c), float(d)) for a, b, c, d in body] == rows


@given(SHEETS)
def test_markdown_has_a_line_a_row_and_its_cells(rows: list[tuple[str, str, int, float]]) -> None:
    lines = [line for line in rendered([sheet_of(rows)], "md").split("\n") if line.startswith("| ")]
    assert len(lines) == len(rows) + 2
    for line in lines:
        assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == len(COLUMNS) + 1
    for line, row in zip(lines[2:], rows, strict=True):
        first = re.split(r" (?<!\\)\| ", line[2:])[0]
        assert re.sub(r"\\([\\`*_<|\[\]])", r"\1", first) == row[0]


@given(SHEETS)
def test_latex_escapes_all_that_it_would_read(rows: list[tuple[str, str, int, float]]) -> None:
    lines = rendered([sheet_of(rows)], "latex").split("\n")
    body = lines[lines.index("\\midrule") + 1 : lines.index("\\bottomrule")]
    assert len(body) == len(rows)
    for line in body:
        assert line.endswith(" \\\\")
        plain = re.sub(r"\\[&%$#_{}]", "", line.removesuffix(" \\\\"))
        assert plain.count("&") == len(COLUMNS) - 1
        assert not set("%#~") & set(plain)
        assert plain.count("{") == plain.count("}")
        assert plain.count("$") % 2 == 0
        assert not re.search(r"[_^]", re.sub(r"\$[^$]*\$", "", plain))
    assert "\\caption{100\\% of\\_it}" in lines


def test_latex_is_as_written_by_hand() -> None:
    sheet = Sheet(("task", "W̄ ≥ λ₀"), [("a_b & c", Rounded(12.345, 1)), ("~^\\", None), ("x\ny", 1)])
    assert rendered([sheet], "latex").splitlines()[3:10] == [
        "\\begin{tabular}{lr}",
        "\\toprule",
        "task & $\\bar{W}$ $\\ge$ $\\lambda$$_0$ \\\\",
        "\\midrule",
        "a\\_b \\& c & 12.3 \\\\",
        "\\textasciitilde{}\\textasciicircum{}\\textbackslash{} &  \\\\",
        "\\shortstack[l]{x \\\\ y} & 1 \\\\",
    ]


@pytest.fixture(scope="module")
def output(text: Path) -> Path:
    out = text / "formats"
    adarank.merge_recipe(recipe(text, "formats.yaml", **ADAPT), out)
    adarank.merge_recipe(recipe(text, "formats-emr.yaml", merge_method="emr"), text / "formats-emr")
    return out


def test_every_command_with_a_table_has_the_formats(
    text: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = text / "models"
    plain = str(recipe(text, "formats-plain.yaml", merge_method="task_arithmetic"))
    commands = {
        "evaluate": (["evaluate", plain, str(output)], 3),
        "plan": (["plan", plain], len(json.loads(shown(capsys, "plan", plain, "--json"))["tensors"])),
        "search": (["search", plain, str(text / "formats.best.yaml"), "--over", "lambda=0.1,0.3", "--force"], 2),
        "inspect": (["inspect", str(models / "mood"), "--base", str(models / "base")], None),
        "layers": (["inspect", str(output)], None),
        "bundle": (["inspect", str(text / "formats-emr")], 1 + len(TASKS)),
        "methods": (["methods"], None),
        "method": (["methods", "cart"], None),
        "papers": (["methods", "--papers"], None),
    }
    for name, (command, count) in commands.items():
        head, *rows = csv.reader(io.StringIO(shown(capsys, *command, "--format", "csv")))
        assert rows, name
        assert count in (None, len(rows)), name
        assert all(len(row) == len(head) for row in rows), name
        markdown = shown(capsys, *command, "--format", "md")
        assert sum(line.startswith("|") for line in markdown.splitlines()) == len(rows) + 2, name
        assert shown(capsys, *command, "--format", "latex").count(" \\\\\n") == len(rows) + 1, name


def test_csv_scores_are_those_of_json(text: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", str(text / "formats.yaml"), str(output)]
    content = json.loads(shown(capsys, *command, "--json"))
    for row in csv.DictReader(io.StringIO(shown(capsys, *command, "--format", "csv"))):
        name = row["model"]
        assert {task: float(row[task]) for task in TASKS} == content["rows"][name]
        assert float(row["mean"]) == content["summary"][name]["mean"]
        assert float(row["norm."]) == content["summary"][name]["normalised"]


def test_one_form_at_a_time(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["methods", "--json", "--format", "csv"], ["methods", "--format", "html"]):
        with pytest.raises(SystemExit) as refused:
            main(arguments)
        assert refused.value.code == 2
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert __version__ in capsys.readouterr().out


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out
