"""`adarank analyse`: what is written, what goes on after a stop, what is refused before anything is computed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

import adarank
from adarank.analysis import drawing
from adarank.analysis.bench import Bench
from adarank.analysis.figure import Figure, Row
from adarank.analysis.figures import FIGURES
from adarank.cli import analysing
from adarank.cli.main import main
from adarank.errors import AdaRankError
from adarank.settings import keys
from adarank.workflow.analyse import Analysed, Options, analyse
from text_zoo import ADAPT, make_zoo, recipe

TASKS = {"mood": 2, "colour": 3, "size": 2}
MODELS = [{"model": f"models/{task}", "task": {"name": task, "data": f"data/{task}.tsv"}} for task in TASKS]

DATA_ONLY = Options(image="none")
QUICK: dict[str, dict[str, Any]] = {
    "components": {"of": ["mood"], "top": 0.05},
    "rank-sweep": {"shares": [0, 0.5]},
    "task-count": {"methods": {"average": {}}},
    "landscape": {"points": 2, "shares": [0.5], "cart": [1], "ta": []},
}
"""Settings with which a figure has little to compute."""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_zoo(tmp_path_factory.mktemp("analyse"), tasks=TASKS)
    adarank.merge_recipe(recipe(folder, "adarank.yaml", models=MODELS, **ADAPT), folder / "merged")
    adarank.merge_recipe(recipe(folder, models=MODELS), folder / "plain")
    return folder


def run(zoo: Path, figure: str, out: Path, options: Options = DATA_ONLY, **more: Any) -> Analysed:
    """An analysis of the zoo, with what the figure takes."""
    outputs = (zoo / "merged",) if FIGURES[figure].outputs else ()
    chosen = Options(outputs, options.split, options.limit, options.data, options.image)
    return analyse(figure, zoo / "recipe.yaml", out, QUICK.get(figure, {}), chosen, **more)


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Parts as they are computed; the third is interrupted, once."""
    computed: list[str] = []
    kind = FIGURES["ranks"]
    whole = kind.compute

    def compute(self: Figure, bench: Bench, part: str) -> list[Row]:
        if len(computed) == 2 and "stopped" not in computed:
            computed.append("stopped")
            raise KeyboardInterrupt
        computed.append(part)
        return whole(self, bench, part)

    monkeypatch.setattr(kind, "compute", compute)
    return computed


def test_the_command_line_names_every_figure() -> None:
    assert sorted(analysing.FIGURES) == sorted(FIGURES)


@pytest.mark.parametrize("figure", FIGURES)
def test_every_figure_is_written_whole(figure: str, zoo: Path, tmp_path: Path) -> None:
    """Table, drawing and record; nothing else stays behind."""
    pytest.importorskip("matplotlib")
    result = run(zoo, figure, tmp_path / "figure.svg", Options())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure.csv", "figure.json", "figure.svg"]
    with (tmp_path / "figure.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(result.rows)
    assert set(table[0]) == {column for row in result.rows for column in row}
    drawn = (tmp_path / "figure.svg").read_text()
    assert drawn.rstrip().endswith("</svg>")
    assert float(drawn.partition('width="')[2].partition("pt")[0]) <= 7 * 72  # legible on a telephone
    record = json.loads((tmp_path / "figure.json").read_text())
    assert record["sentences"] == list(result.sentences)
    assert result.sentences
    assert set(record["files"]) == {"figure.csv", "figure.svg"}


@pytest.mark.parametrize("figure", FIGURES)
def test_a_dry_run_computes_and_writes_nothing(
    figure: str, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Figure, bench: Bench, part: str) -> list[Row]:
        raise AssertionError("computed")

    monkeypatch.setattr(FIGURES[figure], "compute", refuse)
    result = run(zoo, figure, tmp_path / "figure", dry_run=True)
    assert result.parts > 0
    assert all(count > 0 for count in result.cost.values())
    assert not list(tmp_path.iterdir())


def test_csv_and_parquet_hold_the_same(zoo: Path, tmp_path: Path) -> None:
    rows = run(zoo, "ranks", tmp_path / "a.csv").rows
    assert run(zoo, "ranks", tmp_path / "b.parquet").rows == rows
    assert pyarrow.parquet.read_table(tmp_path / "b.parquet").to_pylist() == rows
    with (tmp_path / "a.csv").open() as file:
        assert [float(row["share"]) for row in csv.DictReader(file)] == [row["share"] for row in rows]


def test_the_same_rows_are_drawn_the_same(zoo: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("one.svg", "two.svg"):
        run(zoo, "ranks", tmp_path / name, Options())
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    run(zoo, "ranks", tmp_path / "three.png", Options())
    assert (tmp_path / "three.png").read_bytes().startswith(b"\x89PNG")


def test_drawings_are_small_and_their_words_whole() -> None:
    drawn = b'<path d="M 1.234567 -0.5 L 20.004999 3"/><text x="7.125001">-0.0256789</text>'
    assert drawing.compact(drawn) == b'<path d="M 1.23 -0.5 L 20 3"/><text x="7.13">-0.0256789</text>'


def test_an_svg_keeps_fonts_and_what_is_referred_to() -> None:
    style = "font-size: 8px; font-family: 'A', serif; text-anchor: end"
    drawn = f'''<svg width="9"><defs><path id="m1" d="M 0 0"/></defs><g id="tick_1">\n <g>\n  <use xlink:href="#m1"/>\n </g>\n</g>
<g id="two">\n<path d="M 1 1"/>\n<text style="{style}" transform="rotate(-0 1.5 2)">rotate(-0 1 2)</text>\n</g></svg>'''
    kept = drawing.compact(drawn.encode()).decode()
    assert kept.startswith(
        """<svg font-family="'A', serif" width="9"><defs><path id="m1" d="M 0 0"/></defs><use xlink:href="#m1"/>"""
    )
    assert '<text style="font-size: 8px; text-anchor: end">rotate(-0 1 2)</text>' in kept
    assert kept.count("<g>") == kept.count("</g>") == 1


@pytest.mark.parametrize("soft", [False, True])
def test_maps_of_masks_show_values_around_one(soft: bool) -> None:
    """Soft masks of weak components may be large: colours end at 2, and neighbours are averaged."""
    matplotlib = pytest.importorskip("matplotlib")
    high = 30.0 if soft else 1.0
    rows = [
        {"output": "out", "tensor": f"layer.{layer}.m{number}.weight", "layer": layer, "task": task, "component": place + 1,
         "of": 256, "mask": high if place % 2 else 0.0, "kept": bool(place % 2), "lambda": 1.0}
        for layer in (0, 1) for number in range(4) for task in TASKS for place in range(256)
    ]  # fmt: skip
    with matplotlib.rc_context():
        figure = FIGURES["masks"]().draw(rows)
    maps = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title().removeprefix("out: ") for axis in maps] == [f"{n}.m{m}" for n in (0, 1) for m in range(4)]
    for axis in maps:
        (image,) = axis.images
        assert image.get_clim() == ((-2, 2) if soft else (0, 1))
        assert image.get_array().shape == (len(TASKS), 64)
        assert image.get_array().tolist() == [[high / 2] * 64] * len(TASKS)  # of 128, two by two


def test_an_interrupted_analysis_goes_on(
    zoo: Path, tmp_path: Path, stop_after: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["analyse", "ranks", str(zoo / "recipe.yaml"), str(tmp_path / "ranks"), "--image", "none"]
    assert main(arguments) == 130
    assert "2 finished part(s) are kept" in capsys.readouterr().err
    assert main(arguments) == 0
    assert len(stop_after) - 1 == len(set(stop_after) - {"stopped"})  # no part was computed twice
    whole = run(zoo, "ranks", tmp_path / "whole").rows
    with (tmp_path / "ranks.csv").open() as file:
        assert [row["share"] for row in csv.DictReader(file)] == [str(row["share"]) for row in whole]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_part_cut_off_by_a_kill_is_computed_again(zoo: Path, tmp_path: Path, stop_after: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(zoo, "ranks", tmp_path / "ranks")
    (kept,) = tmp_path.glob(".ranks.analysis/*/parts.jsonl")
    kept.write_text(kept.read_text()[:-30])
    first = stop_after[0]
    rows = run(zoo, "ranks", tmp_path / "ranks").rows
    assert stop_after.count(first) == 1
    assert stop_after.count(stop_after[1]) == 2
    assert rows == run(zoo, "ranks", tmp_path / "whole").rows


def test_other_settings_take_up_no_kept_part(zoo: Path, tmp_path: Path, stop_after: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(zoo, "ranks", tmp_path / "ranks")
    analyse("ranks", zoo / "recipe.yaml", tmp_path / "ranks", {"energy": 0.5}, DATA_ONLY)
    assert stop_after.count(stop_after[0]) == 2


def test_files_are_replaced_by_force_if_unchanged(zoo: Path, tmp_path: Path) -> None:
    run(zoo, "ranks", tmp_path / "ranks")
    with pytest.raises(AdaRankError, match="already exists"):
        run(zoo, "ranks", tmp_path / "ranks")
    run(zoo, "ranks", tmp_path / "ranks", force=True)
    (tmp_path / "ranks.csv").write_text("mine")
    with pytest.raises(AdaRankError, match=r"ranks\.csv: is not as an analysis wrote it"):
        run(zoo, "ranks", tmp_path / "ranks", force=True)
    assert (tmp_path / "ranks.csv").read_text() == "mine"


def test_all_that_is_wrong_is_said_at_once(zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "ranks.json").write_text("{}")
    with pytest.raises(AdaRankError) as caught:
        analyse("ranks", zoo / "no.yaml", tmp_path / "ranks", {"enrgy": 0.5}, Options((zoo,), limit=0, image="none"))
    for part in ("Did you mean 'energy'?", "no.yaml", "already exists", "takes no outputs", "--limit 0"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rank"], "Did you mean 'ranks'?"),
        (["ranks", "--set", "energy"], "not a setting"),
        (["ranks", "--set", "energy=1", "--set", "energy=1"], "given twice"),
        (["masks"], "Give --output FOLDER"),
        (["radar"], "Give --output FOLDER"),
        (["masks", "--output", "plain"], "has no masks.safetensors"),
    ],
)
def test_mistakes_end_in_a_sentence(
    arguments: list[str], said: str, zoo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(zoo)
    before = sorted(zoo.iterdir())
    assert main(["analyse", arguments[0], "recipe.yaml", *arguments[1:], "--image", "none"]) == 1
    assert said in " ".join(capsys.readouterr().err.split())
    assert sorted(zoo.iterdir()) == before


def test_weights_alone_need_no_tasks(zoo: Path, tmp_path: Path) -> None:
    bodies = {"models": [{"model": f"models/{task}"} for task in TASKS], "select": {"head": ["classifier*"]}}
    plain = recipe(zoo, "bodies.yaml", **bodies)
    rows = {name: analyse(name, plain, tmp_path / name, options=DATA_ONLY).rows for name in ("ranks", "interference")}
    assert rows["ranks"] == run(zoo, "ranks", tmp_path / "whole").rows
    with pytest.raises(AdaRankError, match="the model has no task"):
        analyse("rank-sweep", plain, tmp_path / "sweep", options=DATA_ONLY)


@pytest.mark.parametrize(
    ("figure", "changes", "said"),
    [
        ("ranks", {"select": {"scale": ["*"]}}, "no matrix of these models is decomposed"),
        ("interference", {"models": MODELS[:1]}, "takes 2 experts or more, and the recipe has 1"),
    ],
)
def test_recipes_without_what_a_figure_takes_are_refused(
    figure: str, changes: dict[str, Any], said: str, zoo: Path, tmp_path: Path
) -> None:
    lacking = recipe(zoo, "lacks.yaml", **{"models": MODELS, **changes})
    with pytest.raises(AdaRankError, match=said):
        analyse(figure, lacking, tmp_path / "x", options=DATA_ONLY)


def test_another_selection_takes_up_no_kept_part(zoo: Path, tmp_path: Path, stop_after: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        analyse("ranks", recipe(zoo, "select.yaml", models=MODELS), tmp_path / "ranks", options=DATA_ONLY)
    other = recipe(zoo, "select.yaml", models=MODELS, select={"keep": ["*layer.1*"]})
    rows = analyse("ranks", other, tmp_path / "ranks", options=DATA_ONLY).rows
    assert stop_after.count(stop_after[0]) == 2
    assert not any("layer.1" in row["tensor"] for row in rows)


@pytest.mark.parametrize("figure", FIGURES)
def test_the_page_of_figures_names_every_setting(figure: str) -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "analysis.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {figure}\n")[2].partition("\n## ")[0]
    assert section
    assert all(f"`{name}`" in section for name in keys(FIGURES[figure]))


def test_the_page_of_figures_says_what_was_recorded() -> None:
    root = Path(__file__).resolve().parent.parent
    text = (root / "docs" / "analysis.md").read_text(encoding="utf-8")
    lines = (root / "records" / "analysis.jsonl").read_text(encoding="utf-8").splitlines()
    recorded = [record for record in map(json.loads, lines) if record["kind"] == "analysis"]
    assert recorded
    for record in recorded:
        assert all(f"\n- {sentence}\n" in text for sentence in record["sentences"])
    drawings = list((root / "docs" / "figures").iterdir())
    assert {drawn.stem for drawn in drawings} <= {f"{record['study']}-{record['name']}" for record in recorded}
    assert all(drawn.stat().st_size < 100_000 and f"figures/{drawn.name}" in text for drawn in drawings)


def test_settings_are_typed_as_yaml_or_lists() -> None:
    typed = ["energy=0.9", "shares=0,0.5,1", "methods={cart: {rank: 0.5}}", "task=mood"]
    assert analysing.settings_of(typed) == {
        "energy": 0.9,
        "shares": [0, 0.5, 1],
        "methods": {"cart": {"rank": 0.5}},
        "task": "mood",
    }


def test_scores_and_losses_are_those_of_evaluate(zoo: Path, tmp_path: Path) -> None:
    """The radar's, of every model, on fewer inputs too; a task's metric may be the loss itself."""
    rows = run(zoo, "radar", tmp_path / "radar").rows
    losses = [
        {"model": f"models/{task}", "task": {"name": task, "data": f"data/{task}.tsv", "metric": "loss"}}
        for task in TASKS
    ]
    recipe(zoo, "losses.yaml", models=losses)
    scores = adarank.evaluate_recipe(zoo / "recipe.yaml", [zoo / "merged"]).rows
    lost = adarank.evaluate_recipe(zoo / "losses.yaml", [zoo / "merged"]).rows
    assert {row["model"] for row in rows} == set(scores) == {"base", str(zoo / "merged"), "experts"}
    for row in rows:
        assert row["score"] == scores[row["model"]][row["task"]]
        assert row["loss"] == lost[row["model"]][row["task"]]
    limited = analyse(
        "radar", zoo / "losses.yaml", tmp_path / "few", options=Options([zoo / "merged"], limit=3, image="none")
    )
    assert {row["inputs"] for row in limited.rows} == {3}
    assert all(row["score"] == row["loss"] for row in limited.rows)


def test_drawing_without_matplotlib_is_refused_first(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(AdaRankError, match=r"Install adarank\[report\], or give --image none"):
        run(zoo, "ranks", tmp_path / "ranks", Options())
    assert run(zoo, "ranks", tmp_path / "ranks").rows
    assert torch.is_grad_enabled()
