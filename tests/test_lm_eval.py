"""Results of lm-evaluation-harness as a table of ours: its metrics, its names, its counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adarank.cli.main import main
from adarank.errors import DataError
from adarank.workflow.lm_eval import read_lm_eval


def results(path: Path, shift: float = 0.0, **changes: Any) -> Path:
    """A file as lm_eval 0.4 writes it, with a group of tasks."""
    content = {
        "results": {
            "arc_easy": {"alias": "arc_easy", "acc,none": 0.5 + shift, "acc_stderr,none": 0.01, "acc_norm,none": 0.25},
            "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.125 + shift, "exact_match_stderr,strict-match": 0.1},
            "wikitext": {"alias": "wikitext", "word_perplexity,none": 20.0 - 8 * shift, "word_perplexity_stderr,none": "N/A"},
            "mmlu": {"acc,none": 0.375, "acc_stderr,none": 0.004, "alias": "mmlu"},
            "mmlu_law": {"acc,none": 0.3, "alias": " - law"},
        },
        "group_subtasks": {"mmlu": ["mmlu_law"], "arc_easy": []},
        "n-samples": {"arc_easy": {"original": 2376, "effective": 200}, "gsm8k": {"original": 10, "effective": 10}},
        "config": {"model": "hf", "model_args": f"pretrained=models/{path.stem},dtype=float32"},
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**content, **changes}))
    return path


def test_scores_are_the_harness_own(tmp_path: Path) -> None:
    table = read_lm_eval([str(results(tmp_path / "a.json")), f"experts={results(tmp_path / 'b.json', 0.25)}"])
    assert table.rows == {
        "models/a": {"arc_easy": 50.0, "gsm8k": 12.5, "wikitext": 20.0, "mmlu": 37.5},
        "experts": {"arc_easy": 75.0, "gsm8k": 37.5, "wikitext": 18.0, "mmlu": 37.5},
    }
    assert table.metrics == {
        "arc_easy": "acc", "gsm8k": "exact_match strict-match", "wikitext": "word_perplexity", "mmlu": "acc",
    }  # fmt: skip
    assert table.counts == {"arc_easy": 200, "gsm8k": 10, "wikitext": 0, "mmlu": 0}
    assert table.mean("models/a") == pytest.approx((50 + 12.5 + 37.5) / 3)  # of shares alone
    wanted = (50 / 75 + 12.5 / 37.5 + 18 / 20 + 1) / 4  # of the perplexity the expert's by its own
    assert table.normalised("models/a") == pytest.approx(100 * wanted)
    assert table.notes == ("arc_easy: acc; the harness also has acc_norm.",)


def test_the_command_prints_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = results(tmp_path / "run" / "model" / "results_2026.json").parent.parent
    other = results(tmp_path / "b.json", 0.1)
    assert main(["evaluate", "--from-lm-eval", f"base={folder}", "--from-lm-eval", f"merged={other}"]) == 0
    shown = capsys.readouterr().out
    assert "lm-evaluation-harness, per cent; mean without the word_perplexity of wikitext" in " ".join(shown.split())
    assert "the harness also has acc_norm" in shown
    assert main(["evaluate", "--from-lm-eval", str(other), "--format", "csv"]) == 0
    assert "models/b" in capsys.readouterr().out
    assert main(["evaluate", "--from-lm-eval", str(other), "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["source"] == "lm-evaluation-harness"
    assert plain["rows"]["models/b"]["gsm8k"] == pytest.approx(22.5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"results": {"arc_easy": {"acc,none": 0.5}}}, "'b' lacks gsm8k"),
        ({"n-samples": {"arc_easy": {"effective": 2376}}}, "arc_easy has 200 inputs in 'a' and 2376 in 'b'"),
        ({"results": None}, "no results of lm-evaluation-harness"),
        ({"results": {"arc_easy": {"alias": "x", "acc,none": "N/A"}}}, "no task in it has a score"),
    ],
)
def test_results_of_other_tasks_are_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    files = [f"a={results(tmp_path / 'a.json')}", f"b={results(tmp_path / 'b.json', **changes)}"]
    with pytest.raises(DataError) as error:
        read_lm_eval(files)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["a.json", "a.json"], "a second row called 'models/a'"),
        (["x=nothing.json"], "no such file"),
        (["twice"], "2 files results*.json in it"),
    ],
)
def test_rows_need_a_name_and_a_file(tmp_path: Path, monkeypatch: Any, given: list[str], sentence: str) -> None:
    monkeypatch.chdir(tmp_path)
    results(tmp_path / "a.json")
    for name in ("results_1.json", "results_2.json"):
        results(tmp_path / "twice" / name)
    with pytest.raises(DataError) as error:
        read_lm_eval(given)
    assert sentence in str(error.value)


def test_a_table_is_of_a_recipe_or_of_the_harness(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(results(tmp_path / "a.json"))
    assert main(["evaluate"]) == 1
    assert "Give a recipe, or --from-lm-eval" in " ".join(capsys.readouterr().err.split())
    assert main(["evaluate", "recipe.yaml", "--from-lm-eval", file]) == 1
    assert "Leave the recipe out" in " ".join(capsys.readouterr().err.split())
