"""What a file says twice, or its checksum denies, is refused: never one of two values, never damaged numbers, in silence."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from adarank.calibration.gather import Store
from adarank.cli.main import main
from adarank.data.read import read_table
from adarank.errors import CheckpointError, DataError, RecipeError
from adarank.io.archive import check_archive, load_saved
from adarank.io.checkpoint import Checkpoint
from adarank.io.parsing import parse_json, parse_yaml
from adarank.io.state import read_state
from adarank.outputs.bundle import load_bundle
from adarank.recipe.reader import load_recipe
from adarank.workflow.search import parse_axis, search
from make import family, read_all, save, save_bin, save_shards, state

NESTED = ['{"a": 1}', "[1, 2]", '{"a": {"b": [1, {"c": null}]}, "d": "x"}', "3", '"a\\u00e9"']
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_what_names_nothing_twice_reads_as_ever(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
    text = yaml.safe_dump(value)
    assert parse_yaml(text) == yaml.safe_load(text)


MERGED = "a: &x {p: 1, q: 2}\nb: &y {<<: *x, p: 3}\nc: {<<: [*y, *x], q: 4}\nd: *y\n"


def test_merge_keys_and_aliases_repeat_nothing() -> None:
    assert parse_yaml(MERGED) == yaml.safe_load(MERGED)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("a: 1\nb: 2\na: 3", "'a'"),
        ("a: {b: 1, c: 2, b: 1}", "'b'"),
        ("a: [{b: 1}, {c: 1, c: 2}]", "'c'"),
        ("1: x\n0x1: y", "'0x1'"),
        ("~: 1\nnull: 2", "'null'"),
        ("a: &x {p: 1}\nb: {<<: *x, q: 1, <<: *x}", "'<<'"),
        ("a: &x {p: 1, p: 2}\nb: {<<: *x}", "'p'"),
    ],
)
def test_a_yaml_key_given_twice_is_named(tmp_path: Path, text: str, key: str) -> None:
    with pytest.raises(ValueError, match=f"line [0-9]+: the key {key} is given twice"):
        parse_yaml(text)
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=f"r.yaml: not readable YAML .*{key} is given twice"):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "- " * 100_000, "{a: " * 3000, "a: !!bool maybe", "a: !!timestamp x"])  # fmt: skip
def test_nesting_without_end_and_odd_tags_are_sentences(tmp_path: Path, text: str, capsys: Any) -> None:
    (tmp_path / "r.yaml").write_text(text)
    assert main(["plan", str(tmp_path / "r.yaml")]) == 1
    assert "not readable YAML" in " ".join(capsys.readouterr().err.split())


DEEP = '{"a":' * 100_000
TWICE = '{"a": {"b": 1, "b": 2}}'


@pytest.mark.parametrize(("text", "part"), [(DEEP, "nested too deeply"), (TWICE, "'b' is given twice")])
def test_no_json_beside_weights_is_read_by_halves(tmp_path: Path, text: str, part: str) -> None:
    folder = save(tmp_path / "model", state(0), {"model_type": "none"})
    shards = save_shards(tmp_path / "shards", state(0))
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for file in (folder / "config.json", shards / "model.safetensors.index.json", bundle / "bundle.json"):
        file.write_text(text)
    for path, opened in ((folder, Checkpoint), (shards, Checkpoint), (bundle, load_bundle)):
        with pytest.raises(CheckpointError, match=rf"\.json: .*{part}"):
            opened(path)


def _parquet(path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, path)


def _npz(path: Path) -> None:
    content = io.BytesIO()
    np.save(content, np.arange(3))
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("text.npy", "text"):  # both are called `text` when they are read
            archive.writestr(name, content.getvalue())


def _delimited(path: Path) -> None:
    with path.open("w", newline="") as handle:
        csv.writer(handle, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([["text", "label", "text"], "abc"])  # fmt: skip


def _rows(path: Path) -> None:
    path.write_text('{"text": "a", "label": 0}\n{"text": "a", "label": 0, "text": "b"}\n')


@pytest.mark.parametrize(("suffix", "write"), [("csv", _delimited), ("tsv", _delimited), ("jsonl", _rows), ("parquet", _parquet), ("npz", _npz)])  # fmt: skip
def test_a_column_that_is_there_twice_is_refused(tmp_path: Path, suffix: str, write: Any) -> None:
    path = tmp_path / f"data.{suffix}"
    write(path)
    with pytest.raises(DataError, match=rf"data\.{suffix}: .*'text' is (there|given) twice"):
        read_table(str(path), tmp_path, ["text"])


def test_a_row_nested_without_end_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n' + DEEP + "\n")
    with pytest.raises(DataError, match="line 2: nested too deeply"):
        read_table("d.jsonl", tmp_path, ["text"])


# Archives


def flip(file: Path, member: str) -> None:
    """Change one bit of a stored member's content, and nothing else."""
    with zipfile.ZipFile(file) as archive:
        info = next(i for i in archive.infolist() if i.filename.endswith(member))
        content = archive.read(info)
    raw = bytearray(file.read_bytes())
    place = raw.find(content, info.header_offset)
    raw[place + len(content) // 2] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize("member", ["data.pkl", "data/0", "data/3", "version"])
def test_one_flipped_bit_of_a_bin_stops_the_merge(tmp_path: Path, member: str, capsys: Any) -> None:
    base, experts = family(1)
    save(tmp_path / "base", base)
    file = save_bin(tmp_path / "a", experts["task0"]) / "pytorch_model.bin"
    assert read_all(Checkpoint(tmp_path / "a"))
    flip(file, member)
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "models": [{"model": "a"}], "device": "cpu", "parameters": {"weight": 1.0}}  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["merge", str(tmp_path / "r.yaml"), str(tmp_path / "out")]) == 1
    assert "pytorch_model.bin: damaged weights file" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_plan_reads_no_tensors_of_an_archive(tmp_path: Path) -> None:
    file = save_bin(tmp_path / "a", state(0)) / "pytorch_model.bin"
    flip(file, "data/0")
    check_archive(file, tensors=False)
    checkpoint = Checkpoint(tmp_path / "a")  # as a plan opens it
    with pytest.raises(CheckpointError, match="CRC"):
        checkpoint.check_bytes()


@pytest.mark.parametrize("member", ["data.pkl", "data/0"])
def test_a_damaged_state_is_refused(tmp_path: Path, member: str) -> None:
    file = tmp_path / "state.pt"
    torch.save({"fingerprint": "x", "learned": torch.randn(50)}, file)
    assert load_saved(file)["fingerprint"] == "x"
    flip(file, member)
    with pytest.raises(RecipeError, match=r"state\.pt: the saved state is damaged \(.*CRC"):
        read_state(file, "x")


def test_an_archive_with_a_member_twice_is_refused(tmp_path: Path) -> None:
    file = save_bin(tmp_path / "a", {"w": torch.ones(2)}) / "pytorch_model.bin"
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(file, "a") as archive:
        archive.writestr(next(n for n in archive.namelist() if n.endswith("data/0")), torch.zeros(2).numpy().tobytes())
    with pytest.raises(CheckpointError, match=r"it holds '.*data/0' twice"):
        Checkpoint(tmp_path / "a")


def test_damaged_statistics_are_taken_anew(tmp_path: Path) -> None:
    Store(tmp_path).keep("task", {"w": torch.randn(40)})
    assert Store(tmp_path).part("task")
    (file,) = tmp_path.iterdir()
    flip(file, "data/0")
    assert Store(tmp_path).part("task") is None


def test_an_axis_of_a_search_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    base, experts = family(1)
    save(tmp_path / "base", base)
    save(tmp_path / "a", experts["task0"])
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "models": [{"model": "a"}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    axes = [parse_axis("weight=0.1,0.2"), parse_axis("weight=0.3")]
    with pytest.raises(RecipeError, match="--over weight: is given twice"):
        search(tmp_path / "r.yaml", tmp_path / "best.yaml", axes)
