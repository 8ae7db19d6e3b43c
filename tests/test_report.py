"""Pages of outputs: what they say is what the record says, in one file that needs nothing else."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import adarank
from adarank.cli.main import main
from adarank.errors import AdaRankError, CheckpointError, DataError, OutputError
from adarank.report.figures import Chart
from adarank.report.masks import COLUMNS, row_of
from adarank.report.scores import interval, score_table
from browser import CHROMIUM, in_browser
from text_zoo import ADAPT, TASKS, make_zoo, recipe

ADAPTED = {**ADAPT, "adapt": {"steps": 4, "batch_size": 4, "check_every": 2, "learn_heads": True, "keep": "last"}}
KINDS: dict[str, dict[str, Any]] = {
    "one": {"merge_method": "cart", "parameters": {"rank": 0.5}},
    "adapted": ADAPTED,
    "bundle": {"merge_method": "emr"},
    "surgery": {"merge_method": "surgery", "adapt": {"steps": 2, "batch_size": 4}},
}
SCORES = {
    "split": "test",
    "protocol": "disjoint",
    "counts": {"mood": 40, "colour": 50},
    "rows": {"experts": {"mood": 80.0, "colour": 90.0}, "adapted": {"mood": 60.0, "colour": 45.0}},
    "task_aware": {},
    "summary": {"experts": {"mean": 85.0, "normalised": 100.0}, "adapted": {"mean": 52.5, "normalised": 62.5}},
}
VOID = {"meta", "path", "polyline", "circle", "br", "wbr"}


class Page(HTMLParser):
    """The page's elements: (tag, attributes, text), and the rows of each table by the class of its section."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.text, self.unclosed, self.section = "", [], ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.elements.append((tag, values))
        if tag in ("section", "details"):
            self.section = values.get("class") or values.get("id") or self.section
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th") and self.rows.get(self.section):
            self.rows[self.section][-1].append("")
        if tag not in VOID:
            self.unclosed.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.unclosed.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"script", "style"} & set(self.unclosed):
            return
        self.text += data
        if {"td", "th"} & set(self.unclosed):
            self.rows[self.section][-1][-1] += data

    def table(self, section: str) -> dict[str, list[str]]:
        """First cell -> the others, of the rows that hold numbers."""
        return {" ".join(row[0].split()): [" ".join(cell.split()) for cell in row[1:]] for row in self.rows[section]}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_zoo(tmp_path_factory.mktemp("report"))
    for name, changes in KINDS.items():
        adarank.merge_recipe(recipe(folder, f"{name}.yaml", **changes), folder / name)
    return folder


@pytest.fixture(scope="module")
def adapted(zoo: Path) -> Page:
    return Page(adarank.write_report([zoo / "adapted"], zoo / "adapted-page.html", SCORES))


def record(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "adarank.json").read_text())
    return content


def test_agreement_on_the_page_is_the_records(zoo: Path, adapted: Page) -> None:
    block = record(zoo / "adapted")["adaptation"]
    table = adapted.table("agreement")
    for task in TASKS:
        start, kept = block["judged"]["0"][task], block["judged"][str(block["step_kept"])][task]
        inputs, before, after, divergence, *_ = table[task]
        assert int(inputs) == kept["inputs"]
        assert before.split()[0] == f"{100 * start['agreement']:.1f}"
        assert after.split()[0] == f"{100 * kept['agreement']:.1f}"
        assert divergence == f"{kept['divergence']:.3f}"
    mean = sum(block["judged"]["0"][task]["agreement"] for task in TASKS) / len(TASKS)
    assert f"from {100 * mean:.1f}% at the start" in adapted.text
    assert f"step {block['step_kept']}" in adapted.text


def test_lambda_and_masks_on_the_page_are_the_files(zoo: Path, adapted: Page) -> None:
    masks = adarank.MaskFile.load(zoo / "adapted" / "masks.safetensors")
    table = adapted.table("coefficients")
    assert set(table) == {"tensor", *masks.lam}
    for name, lam in masks.lam.items():
        assert [cell.split()[0] for cell in table[name]] == [f"{value:.3f}" for value in lam.tolist()]
        if name in masks.masks:
            shares = [count / size for count, size in zip(masks.kept(name), masks.sizes[name], strict=True)]
            assert [cell.split()[1] for cell in table[name]] == [f"{100 * share:.0f}%" for share in shares]
    text = (zoo / "adapted-page.html").read_text()
    shown = json.loads(re.search(r'class="data">(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]
    assert [matrix["name"] for matrix in shown] == list(masks.masks)
    for matrix in shown:
        parts = masks.masks[matrix["name"]].float().split(masks.sizes[matrix["name"]])
        for row, part in zip(matrix["rows"], parts, strict=True):
            values = [(ord(cell) - 33) / 31 - 1 for cell in row["cells"]]
            torch.testing.assert_close(torch.tensor(values), part.clamp(-1, 2), atol=0.017, rtol=0)
            assert row["kept"] == int((part >= 0.5).sum())
            assert row["of"] == part.numel()


def test_scores_files_hashes_and_heads_are_shown(zoo: Path, adapted: Page) -> None:
    table = adapted.table("scores")
    low, high = interval(0.6, 40)
    assert table["mood"][2] == f"60.0 {100 * low:.1f}–{100 * high:.1f} 75.0%"
    assert table["mean"][2] == "52.5 62.5%"
    content = record(zoo / "adapted")
    assert adapted.table("files").keys() == {"file", *content["files"]}
    hashes = {entry["sha256"] for entry in content["files"].values()}
    hashes |= {digest for of in content["inputs"].values() for digest in of.values()}
    assert all(digest in adapted.text for digest in hashes)
    for task, head in content["adaptation"]["heads"].items():
        kept, before, after, *_ = adapted.table("heads")[task]
        assert ("kept" in kept) == head["kept"]
        assert [before, after] == [f"{100 * value:.1f}" for value in head["agreement"]]
    assert "merge_method: adarank" in adapted.text
    assert adapted.table("tensors").keys() == {"tensor", *content["plan"]["tensors"]}


@pytest.mark.parametrize("name", KINDS)
def test_a_page_needs_no_other_file_nor_the_network(zoo: Path, tmp_path: Path, name: str) -> None:
    file = adarank.write_report([zoo / name], tmp_path / "page.html")
    page = Page(file)
    assert {tag for tag, _ in page.elements} >= {"style", "script", "h1", "section"}
    for tag, attributes in page.elements:
        assert "src" not in attributes
        assert tag != "link"
        assert (attributes.get("href") or "#").startswith("#")
    text = file.read_text()
    assert not re.search(r"https?://|@import|url\(|\bfetch\(|XMLHttpRequest", text)
    assert str(zoo) not in text
    assert f"{len(TASKS)} models were merged into" in page.text


@pytest.mark.parametrize("name", KINDS)
def test_figures_have_words_and_tables_have_headings(zoo: Path, tmp_path: Path, name: str) -> None:
    page = Page(adarank.write_report([zoo / name], tmp_path / "page.html", SCORES))
    figures = [attributes for tag, attributes in page.elements if tag in ("svg", "canvas")]
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in figures)
    assert bool(figures) == (name in ("adapted", "surgery"))
    assert all(attributes.get("scope") for tag, attributes in page.elements if tag == "th")
    assert all(attributes.get("aria-label") for _, attributes in page.elements if attributes.get("role") == "region")


def test_outputs_stand_side_by_side(zoo: Path, tmp_path: Path) -> None:
    page = Page(adarank.write_report([zoo / name for name in KINDS], tmp_path / "page.html"))
    methods = [row[1] for row in page.rows["summary"][1:]]
    assert methods == [changes["merge_method"] for changes in KINDS.values()]


def halves(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The record without each of its parts, and without each part of these."""
    for key, value in content.items():
        yield {k: v for k, v in content.items() if k != key}
        yield {**content, key: None}
        for inner in value if isinstance(value, dict) else ():
            yield {**content, key: {k: v for k, v in value.items() if k != inner}}
            yield {**content, key: {**value, inner: None}}


@pytest.mark.parametrize("name", ["adapted", "bundle"])
def test_a_record_that_lacks_something_gets_a_sentence(zoo: Path, tmp_path: Path, name: str) -> None:
    out = shutil.copytree(zoo / name, tmp_path / "out")
    for content in [{}, *halves(record(out))]:
        (out / "adarank.json").write_text(json.dumps(content))
        page = Page(adarank.write_report([out, zoo / name], scores=SCORES, force=True))
        assert "files" in content or "The record does not hold what is shown here ('files')" in page.text


def test_a_merge_that_has_not_ended_gets_a_sentence(tmp_path: Path) -> None:
    state = tmp_path / ".out.state"
    state.mkdir()
    (state / "adarank-workspace").write_text("")
    page = Page(adarank.write_report([tmp_path / "out"]))
    assert "This merge has not ended" in page.text
    with pytest.raises(CheckpointError, match="nothing to show"):
        adarank.write_report([tmp_path / "other"])


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    out = tmp_path / "<b>&out"
    out.mkdir()
    (out / "adarank.json").write_text(json.dumps({"plan": {"merge_method": "</script><i>"}}))
    page = Page(adarank.write_report([out], tmp_path / "page.html"))
    assert "<b>&out" in page.text
    assert "i" not in {tag for tag, _ in page.elements}


def test_pages_overwrite_nothing_else(zoo: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    adarank.write_report([zoo / "one"], page)
    with pytest.raises(OutputError, match="already exists"):
        adarank.write_report([zoo / "one"], page)
    adarank.write_report([zoo / "one"], page, force=True)
    page.write_text("mine")
    with pytest.raises(OutputError, match="no page of adarank"):
        adarank.write_report([zoo / "one"], page, force=True)
    with pytest.raises(OutputError, match="lies in the output"):
        adarank.write_report([zoo / "one"], zoo / "one" / "page.html")
    assert page.read_text() == "mine"


@pytest.mark.parametrize("scores", [{}, {"rows": 1}, {**SCORES, "rows": {"experts": {}}}, {**SCORES, "summary": None}])
def test_scores_that_are_none_are_refused(zoo: Path, tmp_path: Path, scores: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="adarank evaluate --json"):
        adarank.write_report([zoo / "one"], tmp_path / "page.html", scores)
    assert not list(tmp_path.iterdir())


def test_merge_writes_a_page_beside_its_output(zoo: Path, tmp_path: Path, capsys: Any) -> None:
    path, out = recipe(zoo, "beside.yaml", merge_method="average"), tmp_path / "out"
    assert main(["merge", str(path), str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(str(tmp_path / "out.html"))
    assert main(["merge", str(path), str(tmp_path / "other"), "--no-report"]) == 0
    assert sorted(file.name for file in tmp_path.iterdir() if file.suffix) == ["out.html"]
    assert main(["verify", str(out), "--from", str(zoo)]) == 0
    shutil.rmtree(out)
    assert main(["merge", str(path), str(out)]) == 1  # the page of what was there
    assert not out.exists()
    assert main(["merge", str(path), str(out), "--force"]) == 0


@pytest.mark.parametrize("out", [".", "/", "a\0b", "x" * 300])
def test_outputs_that_cannot_be_are_refused_as_without_a_page(zoo: Path, out: str, capsys: Any) -> None:
    said = []
    for more in ([], ["--no-report"]):
        assert main(["merge", str(zoo / "one.yaml"), out, *more]) == 1
        said.append(capsys.readouterr().err)
    assert said[0] == said[1]


def test_evaluations_go_into_a_page(zoo: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["evaluate", str(zoo / "one.yaml"), str(zoo / "one"), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    page = tmp_path / "page.html"
    options = ["--scores", str(tmp_path / "scores.json"), "--to", str(page)]
    assert main(["report", str(zoo / "one"), *options]) == 0
    table = Page(page).table("scores")
    for task in TASKS:
        shown = [float(cell.split()[0]) for cell in table[task][1:]]
        assert shown == [round(row[task], 1) for row in scores["rows"].values()]


@given(st.integers(0, 300), st.data())
def test_an_interval_holds_what_the_inputs_do_not_rule_out(inputs: int, data: st.DataObject) -> None:
    """Its ends are where the score test just accepts: |p - e| = z √(e (1 - e) / n)."""
    hits = data.draw(st.integers(0, inputs))
    share = hits / inputs if inputs else 0.5
    low, high = interval(share, inputs)
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        if inputs and 0 < end < 1:
            assert math.isclose(abs(share - end), 1.959964 * math.sqrt(end * (1 - end) / inputs), abs_tol=1e-9)


@given(st.lists(st.floats(-30, 30, width=32), max_size=500))
def test_a_maps_row_has_the_components_or_their_means(values: list[float]) -> None:
    row = row_of(torch.tensor(values))
    assert len(row) == min(len(values), COLUMNS)
    assert row.isascii()
    assert row.isprintable()
    if 0 < len(values) <= COLUMNS:
        shown = torch.tensor([(ord(cell) - 33) / 31 - 1 for cell in row])
        torch.testing.assert_close(shown, torch.tensor(values).clamp(-1, 2), atol=0.017, rtol=0)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=300), st.sampled_from(["agreement", "loss"]))
def test_charts_keep_within_their_box(values: list[float], kind: str) -> None:
    view: Any = Chart("", range(len(values)), values, kind, kept=1).view()
    _, _, left, top, right, bottom = view["box"]
    points = [tuple(map(float, point.split(","))) for point in view["path"].split()]
    assert 1 <= len(points) <= 120
    assert all(left <= x <= right and top <= y <= bottom for x, y in points)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize(("width", "dark"), [(375, False), (1280, False), (375, True)])
def test_the_page_works_in_a_browser(zoo: Path, adapted: Page, tmp_path: Path, width: int, dark: bool) -> None:
    result = in_browser((zoo / "adapted-page.html").read_text(), tmp_path, width, dark)
    assert result["window"] == width
    assert result["dark"] == dark
    assert result["errors"] == []
    assert result["wide"] <= result["window"]
    assert result["written"] > 100
    assert result["faint"] == []
    assert result["broken"] == []
    assert result["changed"]
    assert result["up"] == "80.0,90.0"
    assert result["down"] == "90.0,80.0"


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "adarank.json").write_text("{")
    with pytest.raises(AdaRankError, match=r"adarank\.json"):
        adarank.write_report([out])
    (out / "adarank.json").write_text("{}")
    (out / "masks.safetensors").write_text("no masks")
    assert "masks file cannot be read" in Page(adarank.write_report([out])).text


def test_what_rounds_to_zero_has_no_minus(zoo: Path, tmp_path: Path) -> None:
    rows = {"experts": {"mood": 80.0, "colour": 90.0}, "adapted": {"mood": -0.04, "colour": -0.06}}
    scores = {**SCORES, "rows": rows, "metrics": {"mood": "matthews", "colour": "matthews"}}
    table = Page(adarank.write_report([zoo / "one"], tmp_path / "page.html", scores)).table("scores")
    assert [table[task][2].split()[0] for task in TASKS] == ["0.0", "-0.1"]


def test_only_shares_have_intervals_and_less_loss_is_better() -> None:
    rows = {"experts": {"mood": 0.5, "colour": 90.0}, "adapted": {"mood": 1.0, "colour": 45.0}}
    table = score_table({**SCORES, "rows": rows, "metrics": {"mood": "loss", "colour": "macro_f1"}})
    loss, f1 = (row["cells"][1] for row in table["rows"])
    assert loss["interval"] is None
    assert f1["interval"] is None
    assert loss["normalised"] == f1["normalised"] == 50.0
