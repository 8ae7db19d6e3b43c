"""Records of benchmarks: a file of JSON lines, a record for each key, what many have alike written once."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "records").glob("*.jsonl"))


def _module() -> Any:
    spec = importlib.util.spec_from_file_location("records", ROOT / "benchmarks" / "records.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


records = _module()
MACHINE, OTHER = {"cores": 2, "device": "cpu"}, {"cores": 8, "device": "cuda"}


def row(name: str, seed: int, **more: Any) -> dict[str, Any]:
    return {"kind": "row", "name": name, "seed": seed, **more}


def test_a_record_replaces_the_one_of_its_key_alone(tmp_path: Path) -> None:
    store = records.Records(tmp_path / "bed.jsonl")
    written = [row("TA", 0, mean=1), row("TA", 1, mean=2), {"kind": "run", "study": "a", "name": "TA", "seed": 0}]
    for record in [*written, {**written[2], "study": "b"}, row("TA", 0, mean=3)]:
        store.write(record)
    expected = [row("TA", 0, mean=3), written[1], written[2], {**written[2], "study": "b"}]
    assert records.Records(tmp_path / "bed.jsonl").find() == expected
    assert store.find(kind="row", seed=1) == [written[1]]
    assert store.first(name="TIES") is None
    assert [path.name for path in tmp_path.iterdir()] == ["bed.jsonl"]


def test_blocks_that_records_share_are_written_once(tmp_path: Path) -> None:
    path = tmp_path / "bed.jsonl"
    store = records.Records(path)
    written = [row("TA", seed, machine=MACHINE, scores={"a": 0.25}) for seed in range(3)]
    for record in [*written, row("GPU", 0, machine=OTHER)]:
        store.write(record)
    assert store.find(name="TA") == written
    assert store.first(name="GPU")["machine"] == OTHER
    assert path.read_text().count('"cores":2') == 1
    store.write(row("GPU", 0, machine=MACHINE))
    assert "cuda" not in path.read_text()


def test_numbers_are_written_with_six_digits(tmp_path: Path) -> None:
    store = records.Records(tmp_path / "bed.jsonl")
    store.write(row("TA", 0, scores={"a": 200 / 3, "b": [1e-9 / 3, 12_345_678, True, None]}, name_of="1/3"))
    assert store.first(name="TA") == row(
        "TA", 0, scores={"a": 66.6667, "b": [3.33333e-10, 12_345_678, True, None]}, name_of="1/3"
    )


def test_what_heads_gave_is_in_columns_over_the_tasks() -> None:
    report = {"heads": {"b": {"kept": True, "pull": 0.1}}, "protocol": "disjoint"}
    assert records.summary(report, TASKS) == {
        "heads": {"kept": [None, True], "pull": [None, 0.1]},
        "protocol": "disjoint",
    }


def test_the_order_of_a_shared_blocks_names_is_kept(tmp_path: Path) -> None:
    store = records.Records(tmp_path / "bed.jsonl")
    for seed, names in enumerate((("a", "b"), ("b", "a"))):
        store.write(row("TA", seed, rows_per_split=dict.fromkeys(names, 1)))
    assert [list(record["rows_per_split"]) for record in store.find()] == [["a", "b"], ["b", "a"]]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"name":"TA"}', '{"kind":"row","name":"TA","machine":"0123456789ab"}', '{"kind":"row","name":"CART"}'],
)
def test_a_damaged_file_is_refused_and_left_alone(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bed.jsonl"
    path.write_text('{"kind":"row","name":"CART"}\n' + line + "\n")
    before = path.read_text()
    with pytest.raises(ValueError, match=r"bed\.jsonl, line 2: "):
        records.Records(path).write(row("TIES", 0))
    assert path.read_text() == before


TASKS = {"a": {"test": 9}, "b": {"test": 9}}


def judged(agreement: float) -> dict[str, Any]:
    signals = {"agreement": agreement, "divergence": 1.0, "histogram": 0.5, "entropy": 2.0, "inputs": 8}
    return {"a": signals, "b": {**signals, "agreement": agreement + 0.1}}


@pytest.mark.parametrize(
    ("kept", "agreement"),
    [
        ({"step_kept": 10, "share_kept": 1.0}, [0.2, 0.2 + 0.1]),
        ({"step_kept": 10, "share_kept": 0.5}, [0.3, 0.3 + 0.1]),
        ({"step_kept": None, "steps_kept": {"a": 0, "b": 10}}, [0.1, 0.2 + 0.1]),
    ],
    ids=["a step", "a point on the line to the start", "each task's step"],
)
def test_a_summary_has_the_judgements_of_what_was_kept(kept: dict[str, Any], agreement: list[float]) -> None:
    report = {
        **kept,
        "losses": {"a": [1.0] * 500, "b": [1.0] * 500},
        "kept": [1.0] * 500,
        "judged": {"0": judged(0.1), "10": judged(0.2)},
        "judged_on": {"a": "select", "b": "select"},
        "way_back": [
            {"step": 0, "share": 0.5, "judged": judged(0.7)},
            {"step": 10, "share": 0.5, "judged": judged(0.3)},
        ],
        "largest_class_share": {"b": {"before": 0.6, "after": 0.5}, "a": {"before": 0.4, "after": 0.3}},
        "splits": TASKS,
        "notes": ["one"],
    }
    summary = records.summary(report, TASKS)
    assert summary["judged_kept"] == {
        "agreement": agreement, "divergence": [1.0, 1.0], "histogram": [0.5, 0.5], "entropy": [2.0, 2.0]
    }  # fmt: skip
    assert summary["largest_class_share"] == {"before": [0.4, 0.6], "after": [0.3, 0.5]}
    assert summary["judged_on"] == "select"
    assert set(summary) == {*kept, "judged_kept", "judged_on", "largest_class_share", "notes"}


def test_splits_other_than_the_test_beds_stay_in_a_summary() -> None:
    assert records.summary({"splits": {"a": {"test": 1}}}, TASKS) == {"splits": {"a": {"test": 1}}}


def test_all_records_together_stay_small() -> None:
    assert FILES
    assert sum(path.stat().st_size for path in (ROOT / "records").rglob("*") if path.is_file()) <= 1_000_000


def _lists_of_numbers(value: Any) -> Iterator[list[Any]]:
    if isinstance(value, list) and value and all(isinstance(item, int | float) for item in value):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _lists_of_numbers(inner)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_record_has_what_every_step_came_to(path: Path) -> None:
    assert all(len(numbers) <= 16 for record in records.Records(path).find() for numbers in _lists_of_numbers(record))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_rows_name_what_ran_on_what(path: Path) -> None:
    for record in records.Records(path).find(kind="row"):
        assert {"settings", "versions", "machine", "inputs", "command", "rows_per_split"} <= set(record)
        assert list(record["rows_per_split"]) == list(record["scores"])
        assert record["mean"] == pytest.approx(sum(record["scores"].values()) / len(record["scores"]))
        assert record["versions"]["torch"]
        assert all(len(files["model.safetensors"]) == 64 for files in record["inputs"].values())


def test_a_written_file_reads_as_json_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "bed.jsonl"
    records.Records(path).write(row("λ", 0, machine=MACHINE, note="two\nlines\u2028and more"))
    assert records.Records(path).first()["note"] == "two\nlines\u2028and more"
    path.write_text(path.read_text(encoding="utf-8").rstrip("\n"), encoding="utf-8")
    assert len(records.Records(path).find()) == 1
    assert [json.loads(line)["kind"] for line in path.open(encoding="utf-8")] == ["row"]
    records.Records(path).write(row("μ", 0, machine=MACHINE))
    assert [json.loads(line)["kind"] for line in path.open(encoding="utf-8")] == ["shared", "row", "row"]
    assert "λ" in path.read_text(encoding="utf-8")
