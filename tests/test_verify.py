"""Verifying outputs: what differs from the record is found and named, and what is as it was merges to the same bytes."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

import adarank
from adarank.cli.main import main
from adarank.errors import CheckpointError
from text_zoo import ADAPT, make_zoo, recipe

ADAPTED = {**ADAPT, "adapt": {"steps": 2, "batch_size": 4, "learn_heads": False}}
KINDS: dict[str, dict[str, Any]] = {
    "one": {"merge_method": "cart", "parameters": {"rank": 0.5}},
    "adapted": ADAPTED,
    "bundle": {"merge_method": "emr"},
    "statistics": {"merge_method": "fisher"},
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_zoo(tmp_path_factory.mktemp("verify"))
    for name, changes in KINDS.items():
        adarank.merge_recipe(recipe(folder, f"{name}.yaml", **changes), folder / name)
    return folder


@pytest.fixture(params=KINDS)
def output(request: pytest.FixtureRequest, zoo: Path, tmp_path: Path) -> Path:
    return shutil.copytree(zoo / request.param, tmp_path / "out")


def test_one_bit_in_any_file_is_named(output: Path) -> None:
    drawn = random.Random(0)
    for file in sorted(path for path in output.rglob("*") if path.is_file()):
        whole = file.read_bytes()
        for place in [0, len(whole) - 1, *(drawn.randrange(len(whole)) for _ in range(4))]:
            changed = bytearray(whole)
            changed[place] ^= 1 << drawn.randrange(8)
            file.write_bytes(changed)
            name = file.relative_to(output).as_posix()
            assert any(text.startswith(f"{name}: ") for text in adarank.verify(output).problems), (name, place)
        file.write_bytes(whole)
    assert adarank.verify(output).ok


def test_missing_and_added_files_are_named(output: Path) -> None:
    (output / "config.json").unlink()
    (output / "notes.txt").write_text("mine")
    problems = adarank.verify(output).problems
    assert [text.partition(":")[0] for text in problems] == ["notes.txt", "config.json"]


@pytest.mark.parametrize("name", KINDS)
def test_merging_again_gives_the_same_bytes(zoo: Path, name: str) -> None:
    verified = adarank.verify(zoo / name)  # the recipe's paths count from the output's parent
    assert verified.ok
    assert verified.inputs == 6  # weights and configuration of a base and two experts
    weights = {path.relative_to(zoo / name).as_posix() for path in (zoo / name).rglob("*.safetensors")}
    assert weights - set(verified.remade) == ({"masks.safetensors"} if name == "adapted" else set())
    written = {path.relative_to(zoo / name).as_posix() for path in (zoo / name).rglob("*") if path.is_file()}
    assert written == {*verified.remade, *verified.not_remade}
    assert {"adarank.json", "README.md"} <= set(verified.not_remade)
    assert verified.files == len(verified.remade) + len(verified.not_remade)


def test_weights_that_merging_does_not_give_are_named(zoo: Path, tmp_path: Path) -> None:
    """Files and record agree with each other, and not with the recipe."""
    shutil.copytree(zoo / "models", tmp_path / "models")
    changed = {"merge_method": "cart", "parameters": {"rank": 0.25}}
    record = adarank.merge_recipe(recipe(tmp_path, **changed), tmp_path / "out")
    record["recipe"]["parameters"]["rank"] = 0.5
    _record_again(tmp_path / "out", record)
    verified = adarank.verify(tmp_path / "out")
    assert [text.partition(":")[0] for text in verified.problems] == ["model.safetensors"]


def _record_again(out: Path, record: dict[str, Any]) -> None:
    from adarank.io.writer import write_record

    (out / "adarank.json").unlink()
    write_record(out, record)


def test_changed_and_missing_inputs_are_named(zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(zoo / "models", tmp_path / "models")
    adarank.merge_recipe(recipe(tmp_path, **KINDS["one"]), tmp_path / "out")
    config = tmp_path / "models" / "mood" / "config.json"
    config.write_text(config.read_text() + " ")
    (tmp_path / "models" / "base" / "config.json").unlink()
    problems = adarank.verify(tmp_path / "out").problems
    assert any(text.startswith("input mood: config.json: has changed") for text in problems)
    assert any(text.startswith("input base: config.json: is missing") for text in problems)


def test_inputs_elsewhere_are_left_out_unless_named(zoo: Path, tmp_path: Path) -> None:
    out = shutil.copytree(zoo / "one", tmp_path / "deep" / "out")
    verified = adarank.verify(out)
    assert verified.ok
    assert verified.notes
    assert not verified.remade
    assert not verified.not_remade
    assert adarank.verify(out, zoo).remade
    assert not adarank.verify(out, tmp_path).ok


def test_learned_heads_are_not_made_again(zoo: Path) -> None:
    path = recipe(zoo, "heads.yaml", merge_method="average", heads="learn")
    record = adarank.merge_recipe(path, zoo / "heads")
    verified = adarank.verify(zoo / "heads")
    assert verified.ok
    kept = {task for task, head in record["learned_heads"]["heads"].items() if head["kept"]}
    assert not [name for name in verified.remade if name.startswith(tuple(f"heads/{task}/" for task in kept))]
    assert "model.safetensors" in verified.remade


def test_the_exit_code_says_whether_it_is_as_recorded(zoo: Path, tmp_path: Path, capsys: Any) -> None:
    out = shutil.copytree(zoo / "one", tmp_path / "out")
    assert main(["verify", str(out), "--from", str(zoo), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    (out / "config.json").write_text("{}")
    assert main(["verify", str(out)]) == 1
    assert "config.json" in capsys.readouterr().out


def test_without_a_list_of_files_nothing_is_verified(zoo: Path, tmp_path: Path) -> None:
    out = shutil.copytree(zoo / "one", tmp_path / "out")
    (out / "adarank.json").write_text("{}")
    assert not adarank.verify(out).ok
    (out / "adarank.json").unlink()
    with pytest.raises(CheckpointError, match="no adarank"):
        adarank.verify(out)
