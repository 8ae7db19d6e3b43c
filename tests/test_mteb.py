"""Results of mteb as a table of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adarank.cli.main import main
from adarank.errors import DataError
from adarank.workflow.mteb import read_mteb


def results(folder: Path, shift: float = 0.0, **changes: Any) -> Path:
    """A folder as mteb 1 and 2 write it: a file for each task, and what the model is."""
    files = {
        "STSBenchmark": {"test": [{"cosine_pearson": 0.7, "cosine_spearman": 0.75 + shift, "main_score": 0.75 + shift, "hf_subset": "default", "languages": ["eng-Latn"]}]},
        "STS17": {"test": [
            {"spearman": 0.5, "main_score": 0.5, "hf_subset": "en-en", "languages": ["eng-Latn"]},
            {"spearman": 0.25, "main_score": 0.25, "hf_subset": "en-de", "languages": ["eng-Latn", "deu-Latn"]},
        ]},
        "MSMARCO": {"dev": [{"ndcg_at_10": 0.125, "map_at_10": 0.1, "main_score": 0.125, "hf_subset": "default"}]},
    }  # fmt: skip
    place = folder / "org__model" / "abc"
    place.mkdir(parents=True)
    (place / "model_meta.json").write_text(json.dumps({"name": f"org/{folder.name}", "revision": "abc"}))
    for task, scores in files.items():
        content = {"task_name": task, "mteb_version": "2.1.0", "scores": scores, "evaluation_time": 1.5}
        (place / f"{task}.json").write_text(json.dumps({**content, **changes}))
    return folder


def test_main_scores_are_per_cent_and_means_of_subsets(tmp_path: Path) -> None:
    table = read_mteb([str(results(tmp_path / "a")), f"experts={results(tmp_path / 'b', 0.125)}"])
    assert table.rows["org/a"] == {"MSMARCO": 12.5, "STS17": 37.5, "STSBenchmark": 75.0}
    assert table.rows["experts"]["STSBenchmark"] == 87.5
    assert table.metrics == {"MSMARCO": "ndcg_at_10", "STS17": "spearman", "STSBenchmark": "cosine_spearman"}
    assert set(table.notes) == {"STS17: mean of 2 subsets.", "MSMARCO: split dev."}
    assert table.mean("org/a") == pytest.approx((12.5 + 37.5 + 75) / 3)


def test_the_command_prints_the_results_of_mteb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = results(tmp_path / "a"), results(tmp_path / "b", 0.1)
    assert main(["evaluate", "--from-mteb", f"base={first}", "--from-mteb", f"merged={second}"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "mteb, per cent" in shown
    assert "mean of 2 subsets" in shown
    assert main(["evaluate", "recipe.yaml", "--from-mteb", str(first)]) == 1
    assert "--from-mteb needs no recipe" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("changes", "words"), [
    ({"scores": {"test": [{"hf_subset": "default"}]}}, "a subset without a main_score"),
    ({"scores": {}}, "no results of mteb"),
    ({"task_name": None, "mteb_dataset_name": "STS17"}, "mteb 1.11 or newer"),
])  # fmt: skip
def test_files_that_are_no_results_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_mteb([str(results(tmp_path / "a", **changes))])


def test_results_of_other_tasks_or_several_models_are_refused(tmp_path: Path) -> None:
    first, second = results(tmp_path / "a"), results(tmp_path / "b")
    (second / "org__model" / "abc" / "STS17.json").unlink()
    with pytest.raises(DataError, match="'org/b' lacks STS17"):
        read_mteb([str(first), str(second)])
    with pytest.raises(DataError, match="results of 2 models or revisions"):
        read_mteb([str(tmp_path)])
    with pytest.raises(DataError, match="no results of mteb"):
        read_mteb([str(tmp_path / "none")])
    with pytest.raises(DataError, match="a second row called 'x'"):
        read_mteb([f"x={first}", f"x={first}"])
