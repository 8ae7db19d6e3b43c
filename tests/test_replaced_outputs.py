"""What --force replaces: what adarank wrote, as it wrote it, and nothing that the run reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import adarank
import text_zoo
from adarank.errors import OutputError
from adarank.io.writer import RECORD, atomic_folder, write_record
from adarank.workflow.search import Axis, search
from test_output_folders import contents, fill, made, names

AXES = [Axis("lambda", (0.5, 1.0))]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_zoo.make_zoo(tmp_path_factory.mktemp("replaced"))


def add(out: Path) -> None:
    (out / "notes.txt").write_text("precious")


def change(out: Path) -> None:
    (out / "model.safetensors").write_text("edited by hand")


def same_length(out: Path) -> None:
    (out / "model.safetensors").write_text("OLD")


def link(out: Path) -> None:
    (out / "elsewhere").symlink_to(out.parent)


def folder(out: Path) -> None:
    (out / "runs").mkdir()


def deep(out: Path) -> None:
    (out / "heads" / "mood").mkdir(parents=True)
    (out / "heads" / "mood" / "mine.txt").write_text("precious")


@pytest.mark.parametrize(("damage", "named"), [(add, "notes.txt: is not in"), (change, "model.safetensors: is not as"),
    (same_length, "model.safetensors: is not as"), (link, "elsewhere: is a link"), (folder, "runs: is a folder"),
    (deep, "heads/mood/mine.txt: is not in")])  # fmt: skip
def test_force_refuses_what_the_record_does_not_list(tmp_path: Path, damage: Callable, named: str) -> None:
    out = made(tmp_path / "out")
    damage(out)
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=named), atomic_folder(out, force=True):
        pass
    assert contents(tmp_path) == before


@pytest.mark.parametrize("record", ["{}", "not JSON", '{"files": {}}', '{"versions": {}, "files": ["a"]}', "[]"])
def test_force_refuses_a_record_that_lists_nothing(tmp_path: Path, record: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / RECORD).write_text(record)
    (out / "precious.txt").write_text("precious")
    with pytest.raises(OutputError, match="does not list the files of an output"), atomic_folder(out, force=True):
        pass
    assert names(out) == {RECORD, "precious.txt"}


def test_what_is_added_while_a_run_goes_on_is_not_replaced(tmp_path: Path) -> None:
    out = made(tmp_path / "out")

    def replaced() -> None:
        with atomic_folder(out, force=True) as folder:
            fill(folder)
            add(out)

    with pytest.raises(OutputError, match=r"notes\.txt"):
        replaced()
    assert (out / "notes.txt").exists()
    assert names(tmp_path) == {"out"}


def test_a_replaced_output_keeps_its_folders_permissions(tmp_path: Path) -> None:
    out = made(tmp_path / "out")
    out.chmod(0o750)
    with atomic_folder(out, force=True) as folder:
        fill(folder)
    assert out.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("read", ["base", "file", "masks", "data"])
def test_an_output_is_not_replaced_by_what_reads_it(tmp_path: Path, read: str) -> None:
    zoo = text_zoo.make_zoo(tmp_path / "zoo")
    out = zoo / "out"
    short = {**text_zoo.ADAPT, "adapt": {"steps": 1, "batch_size": 4}}
    adarank.merge_recipe(text_zoo.recipe(zoo, **short), out)
    models = [{"model": f"models/{t}", "task": {"name": t, "data": f"data/{t}.tsv"}} for t in text_zoo.TASKS]
    changes: dict[str, Any] = {}
    if read == "base":
        changes = {"base_model": "out"}
    if read == "masks":
        changes = {"merge_method": "masked", "parameters": {"masks": str(out / "adarank_masks.safetensors")}}
        changes["parameters"]["masks"] = str(next(out.glob("*mask*")))
    if read == "file":  # a folder outside, whose weights lead into the output
        (zoo / "linked").mkdir()
        (zoo / "linked" / "model.safetensors").symlink_to(out / "model.safetensors")
        (zoo / "linked" / "config.json").write_text((out / "config.json").read_text())
        changes = {"base_model": "linked"}
    if read == "data":
        (out / "adarank.json").rename(out / "old.json")
        (out / "mood.tsv").write_text((zoo / "data" / "mood.tsv").read_text())
        write_record(out, json.loads((out / "old.json").read_text()))
        models[0]["task"]["data"] = "linked.tsv"  # type: ignore[index]
        (zoo / "linked.tsv").symlink_to(out / "mood.tsv")
    before = contents(out)
    with pytest.raises(OutputError, match="lies inside its own output"):
        adarank.merge_recipe(text_zoo.recipe(zoo, "again.yaml", models=models, **changes), out, force=True)
    assert contents(out) == before


def test_a_bundle_is_not_replaced_by_its_extract(zoo: Path, tmp_path: Path) -> None:
    adarank.merge_recipe(text_zoo.recipe(zoo, "emr.yaml", merge_method="emr"), tmp_path / "bundle")
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="lies inside its own output"):
        adarank.extract(tmp_path / "bundle", "mood", tmp_path / "bundle", force=True)
    assert contents(tmp_path) == before


def test_a_method_called_like_the_output_is_no_input(zoo: Path) -> None:
    """`cart` names a method in the recipe, and a folder beside it."""
    path = text_zoo.recipe(zoo, "named.yaml", merge_method="cart")
    adarank.merge_recipe(path, zoo / "cart")
    adarank.merge_recipe(path, zoo / "cart", force=True)


def test_a_forced_search_replaces_only_what_a_search_wrote(zoo: Path) -> None:
    path, best = text_zoo.recipe(zoo, "found.yaml"), zoo / "found.best.yaml"
    search(path, best, AXES)
    search(path, best, AXES, force=True)
    best.write_text(best.read_text() + "seed: 3  # mine\n")
    with pytest.raises(OutputError, match=r"found\.best\.yaml: is not as a search wrote it"):
        search(path, best, AXES, force=True)
    other = zoo / "mine.yaml"
    other.write_text("mine")
    with pytest.raises(OutputError, match=r"mine\.yaml: is not as a search wrote it"):
        search(path, other, AXES, force=True)
    assert other.read_text() == "mine"
    assert not list(zoo.glob(".found*"))
