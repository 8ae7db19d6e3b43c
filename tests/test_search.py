"""`adarank search`: every point as a merge of its own would score it, one SVD per matrix, resumed, on select only."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from adarank.cli.main import main
from adarank.data.task import TaskData
from adarank.errors import AdaRankError
from adarank.methods import METHODS
from adarank.recipe.job import open_job
from adarank.recipe.reader import load_recipe
from adarank.spectral.svd import decompose, stored_spectra
from adarank.workflow.evaluate import evaluate, score_result
from adarank.workflow.merge import merge
from adarank.workflow.search import Axis, Point, edges, level, parse_axis, search
from text_zoo import make_zoo, recipe


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("search"))


AXES = [Axis("rank", (0.1, 0.5)), Axis("lambda", (0.5, 1.0))]


@given(first=st.integers(-50, 50), steps=st.integers(0, 40), step=st.sampled_from([0.1, 0.25, 0.3, 1.0, 2.5]))
def test_a_range_has_both_ends_and_reads_as_written(first: int, steps: int, step: float) -> None:
    start = first * 0.1
    text = f"lambda={start:.6g}:{start + steps * step:.6g}:{step}"
    values = parse_axis(text).values
    assert len(values) == steps + 1
    assert values[0] == float(f"{start:.6g}")
    assert values[-1] == pytest.approx(start + steps * step)
    assert all(len(str(value)) < 8 for value in values)


def test_lists_keep_their_types() -> None:
    assert parse_axis("rank=.04,.08, 1").values == (0.04, 0.08, 1)
    assert parse_axis("normalize=true,false").values == (True, False)


@pytest.mark.parametrize("text", ["lambda", "lambda=", "=1,2", "lambda=1:2", "lambda=1:2:0", "lambda=2:1:0.5", "lambda=0:1:0.3", "lambda=a:b:c"])  # fmt: skip
def test_what_is_no_axis_is_refused(text: str) -> None:
    with pytest.raises(AdaRankError, match="not an axis"):
        parse_axis(text)


@pytest.mark.parametrize(
    ("values", "best", "beyond"),
    [
        ({"rank": (0.1, 0.2, 0.4)}, 0.2, None),  # inside
        ({"rank": (0.1, 0.2, 0.4)}, 0.1, 0.05),
        ({"rank": (0.1, 0.2, 0.4)}, 0.4, 0.8),
        ({"rank": (0.2, 0.4, 0.8)}, 0.8, 1.0),  # a share ends at 1
        ({"rank": (0.25, 0.5, 1.0)}, 1.0, None),
        ({"lambda": (1.0, 2.0)}, 2.0, 4.0),
        ({"lambda": (1.0,)}, 1.0, None),  # nothing was varied
        ({"combine": ("sum", "mean")}, "sum", None),
    ],
)
def test_a_best_value_at_the_end_of_what_was_tried_is_told(values, best, beyond) -> None:
    ((axis, tried),) = values.items()
    points = [Point({axis: own}, {"a": 2.0 if own == best else 1.0, "b": 1.0}) for own in tried]
    kind = METHODS["ties_merging" if axis == "combine" else "cart"]
    assert edges(kind, points) == ({axis: (best, beyond)} if beyond else {})


def test_every_point_scores_as_its_own_merge(zoo: Path, tmp_path: Path) -> None:
    path = recipe(zoo, "grid.yaml")
    ranked, record = search(path, zoo / "grid.best.yaml", AXES)
    assert [p["settings"] for p in record["points"]] == [
        {"rank": r, "lambda": c} for r, c in itertools.product((0.1, 0.5), (0.5, 1.0))
    ]
    for point in ranked[:2]:
        own = recipe(zoo, "one.yaml", parameters=dict(point.settings))
        out = tmp_path / str(ranked.index(point))
        merge(load_recipe(own), out)
        assert evaluate(load_recipe(own), [out], "select").rows[str(out)] == dict(point.scores)
    assert [p.mean for p in ranked] == sorted((p.mean for p in ranked), reverse=True)
    best = load_recipe(zoo / "grid.best.yaml")
    assert best.parameters == dict(ranked[0].settings)
    assert best.models == load_recipe(path).models
    assert not list(zoo.glob(".grid.best*"))


def test_each_matrix_is_decomposed_once_whatever_the_grid(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    plain = torch.linalg.svd

    def counted(matrix: torch.Tensor, **named: Any) -> Any:
        seen.append(matrix.numpy().tobytes())
        return plain(matrix, **named)

    monkeypatch.setattr(torch.linalg, "svd", counted)
    path = recipe(zoo, "once.yaml")
    network = open_job(load_recipe(path)).network
    matrices = [name for name, choice in network.choices.items() if choice.action == "decompose"]
    search(path, zoo / "once.best.yaml", AXES)
    assert len(set(seen)) == len(seen) == 2 * len(matrices) > 0  # of two experts


def test_a_search_that_was_cut_off_goes_on(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, best = recipe(zoo, "cut.yaml"), zoo / "cut.best.yaml"

    def stop(point: object, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(path, best, AXES, progress=stop)
    assert not best.exists()
    calls: list[int] = []
    plain = score_result
    monkeypatch.setattr("adarank.workflow.search.score_result", lambda *given: (calls.append(1), plain(*given))[1])
    ranked, _ = search(path, best, AXES)
    assert len(calls) == 2
    assert len(ranked) == 4


def test_the_test_split_is_never_read(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = TaskData.targets
    given: list[set[int]] = []

    def watched(self: TaskData, rows: list[int]) -> list[int]:
        given.append(set(rows) & set(self.splits.rows["test"]))
        return plain(self, rows)

    monkeypatch.setattr(TaskData, "targets", watched)
    search(recipe(zoo, "select.yaml"), zoo / "select.best.yaml", AXES[:1])
    assert given
    assert not set.union(*given)


@pytest.mark.parametrize(
    ("axes", "changes", "message"),
    [
        (["rnak=0.1,0.2"], {}, "has no such setting.*rank"),
        (["rank=0.1,7"], {}, "rank"),
        ([], {}, "nothing to vary"),
        (["rank=0.1,0.2"], {"merge_method": "adarank"}, "learns what it writes"),
    ],
)
def test_mistakes_are_sentences_before_anything_is_done(zoo: Path, capsys, axes, changes, message) -> None:
    path = recipe(zoo, "wrong.yaml", **changes)
    given = [part for text in axes for part in ("--over", text)]
    assert main(["search", str(path), str(zoo / "wrong.best.yaml"), *given]) == 1
    shown = capsys.readouterr().err
    assert re.search(message, shown)
    assert not (zoo / "wrong.best.yaml").exists()
    assert not (zoo / "wrong.best.search.json").exists()


def test_outputs_are_not_overwritten_and_stay_beside_the_recipe(zoo: Path, tmp_path: Path) -> None:
    path = recipe(zoo, "there.yaml")
    (zoo / "there.best.yaml").write_text("mine")
    with pytest.raises(AdaRankError, match="already exists"):
        search(path, zoo / "there.best.yaml", AXES)
    with pytest.raises(AdaRankError, match="same folder"):
        search(path, tmp_path / "best.yaml", AXES)
    with pytest.raises(AdaRankError, match="the recipe itself"):
        search(path, path, AXES, force=True)
    assert (zoo / "there.best.yaml").read_text() == "mine"


def test_the_command_shows_the_best_points_and_keeps_a_record(zoo: Path, capsys) -> None:
    path = recipe(zoo, "shown.yaml", merge_method="svd_k")
    best = zoo / "shown.best.yaml"
    assert main(["search", str(path), str(best), "--over", "lambda=0.5:1.0:0.5", "--over", "rank=.1,.5"]) == 0
    out = capsys.readouterr().out
    assert "best of 4 points" in out
    record = json.loads((zoo / "shown.best.search.json").read_text())
    assert set(record["at_the_edge"]) == {"lambda", "rank"}  # two values have ends alone
    assert all(f"The best {axis}, {at:g}, is at the end" in out for axis, at in record["at_the_edge"].items())
    assert record["split"].startswith("select, with labels")
    assert yaml.safe_load(best.read_text())["parameters"] == record["best"]["settings"]


def test_a_search_in_which_nothing_changes_says_so(zoo: Path, capsys) -> None:
    """CART of two experts is their average at any λ."""
    path = recipe(zoo, "level.yaml")
    assert main(["search", str(path), str(zoo / "level.best.yaml"), "--over", "lambda=0.5:1.0:0.25"]) == 0
    out = capsys.readouterr().out
    assert "All 3 points score the same" in out
    assert "at the end of what was tried" not in out


@given(rows=st.integers(1, 6), columns=st.integers(1, 6), seed=st.integers(0, 99))
def test_a_stored_spectrum_is_the_one_that_was_stored(tmp_path_factory, rows: int, columns: int, seed: int) -> None:
    folder = tmp_path_factory.mktemp("spectra")
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    plain = decompose(matrix)
    with stored_spectra(folder):
        first, second = decompose(matrix), decompose(matrix.clone())
        decompose(matrix + 1)
    assert len(list(folder.iterdir())) == 2
    for own in (first, second):
        assert all(torch.equal(getattr(own, part), getattr(plain, part)) for part in "usv")


def test_a_search_in_which_nothing_changes_has_no_edge() -> None:
    kind = METHODS["cart"]
    same, other = ([Point({"rank": r}, {"a": s}) for r, s in zip((0.1, 0.2, 0.4), scores, strict=True)]
                   for scores in ((50.0, 50.0, 50.0), (50.0, 51.0, 52.0)))  # fmt: skip
    assert level(same)
    assert not level(other)
    assert edges(kind, same) == {}
    assert set(edges(kind, other)) == {"rank"}
