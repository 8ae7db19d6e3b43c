"""Recipes of several stages in one file: merged in order, all checked first, and gone on from where a run was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor

from adarank.cli.main import main
from adarank.errors import AdaRankError, CheckpointError, Interrupted, OutputError, RecipeError
from adarank.io.checkpoint import Checkpoint
from adarank.recipe.job import open_job
from adarank.recipe.planned import open_stages
from adarank.recipe.reader import load_recipe
from adarank.workflow.merge import merge
from adarank.workflow.verify import verify
from make import family, read_all, same, save

CONFIG = {"num_hidden_layers": 2, "model_type": "mine"}
FIRST = {
    "name": "first",
    "merge_method": "slerp",
    "base_model": "task0",
    "models": [{"model": "task1"}],
    "parameters": {"t": 0.3},
}
SECOND = {
    "name": "second",
    "merge_method": "linear",
    "models": [{"model": "first"}, {"model": "task2"}],
    "parameters": {"weight": 0.5},
}
LAST = {
    "merge_method": "ties", "base_model": "start", "parameters": {"density": 0.6, "weight": 1.0},
    "models": [{"model": "second"}, {"model": "first"}, {"model": "task2"}],
}  # fmt: skip
STATE = ".out.state"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base, experts = family(3)
    for name, state in {"start": base, **experts}.items():
        save(tmp_path / name, state, CONFIG)
    return tmp_path


def stages(folder: Path, *documents: dict[str, Any]) -> Path:
    """A recipe file of these documents."""
    file = folder / "stages.yaml"
    file.write_text("---\n".join(yaml.safe_dump(document, sort_keys=False) for document in documents))
    return file


def apart(folder: Path, *documents: dict[str, Any]) -> dict[str, Tensor]:
    """The last of merges in files of their own, each in a folder of its name."""
    for document in documents:
        name = document.get("name", "last")
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump({key: value for key, value in document.items() if key != "name"}))
        merge(load_recipe(file), folder / name)
    return read_all(Checkpoint(folder / "last"))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_stages_are_merged_in_the_order_of_their_names(order: tuple[int, ...], folder: Path) -> None:
    documents = [FIRST, SECOND, LAST]
    merge(stages(folder, *(documents[n] for n in order)), folder / "out")
    assert same(read_all(Checkpoint(folder / "out")), apart(folder, *documents))


def test_the_output_alone_is_left_and_its_record_has_all(folder: Path) -> None:
    before = set(folder.iterdir())
    record = merge(stages(folder, FIRST, SECOND, LAST), folder / "out")
    assert set(folder.iterdir()) - before == {folder / "stages.yaml", folder / "out"}
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "README.md",
        "adarank.json",
        "config.json",
        "model.safetensors",
    ]
    written = json.loads((folder / "out" / "adarank.json").read_text())
    assert list(written["stages"]) == ["first", "second"]
    for name, document in (("first", FIRST), ("second", SECOND)):
        entry = written["stages"][name]
        assert {key: entry["recipe"][key] for key in document if key != "name"} == {
            k: v for k, v in document.items() if k != "name"
        }
        assert (
            entry["inputs"]["task1" if name == "first" else "task2"]
            == Checkpoint(folder / ("task1" if name == "first" else "task2")).sha256()
        )
    assert written["recipe"]["models"][0]["model"] == "second"
    assert record["stages"].keys() == written["stages"].keys()


def test_of_named_stages_the_last_is_the_output(folder: Path) -> None:
    merge(stages(folder, FIRST, {**LAST, "models": LAST["models"][1:], "name": "whole"}), folder / "out")
    assert same(read_all(Checkpoint(folder / "out")), apart(folder, FIRST, {**LAST, "models": LAST["models"][1:]}))


def test_a_stage_that_nobody_names_is_not_merged_and_said(folder: Path) -> None:
    record = merge(stages(folder, FIRST, {**LAST, "models": LAST["models"][2:]}), folder / "out")
    assert "stages" not in record
    assert record["plan"]["notes"] == ["stage 'first' is named by no other, and is not merged."]


WRONG: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "a circle": ([{**FIRST, "models": [{"model": "second"}]}, SECOND, LAST], ["in a circle", "first → second → first"]),
    "itself": ([{**FIRST, "base_model": "first"}, LAST], ["in a circle (first → first)"]),
    "two of one name": ([FIRST, {**SECOND, "name": "first"}, LAST], ["2 stages are called 'first'"]),
    "two without a name": ([LAST, FIRST, LAST], ["stages 1, 3 have none", "Only one may be without"]),
    "a number": ([{**FIRST, "name": 3}, LAST], ["name: 3 is no text"]),
    "a mistyped stage": ([FIRST, SECOND, {**LAST, "models": [{"model": "secnd"}]}], ["'secnd' is neither a stage", "Did you mean 'second'?"]),
    "two bad stages": ([{**FIRST, "merge_method": "slrp"}, {**SECOND, "modls": 1}, LAST], ["stage 1 ('first')", "'slerp'", "stage 2 ('second')", "modls"]),
    "models that are not there": (
        [{**FIRST, "base_model": "./nope"}, {**SECOND, "models": [{"model": "./nix"}]}, LAST],
        ["2 stages cannot be merged", "stage 'first'", "nope", "stage 'second'", "nix"],
    ),
    "networks for each task": ([{**LAST, "name": "first", "models": SECOND["models"][1:], "merge_method": "tall_masks", "parameters": {}}, SECOND, LAST],
                               ["stage 'first': 'tall_masks' writes a network for each task"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_stages_are_named_before_anything_is_spent(name: str, folder: Path) -> None:
    documents, texts = WRONG[name]
    file = stages(folder, *documents)
    before = set(folder.iterdir())
    with pytest.raises(AdaRankError) as caught:
        merge(file, folder / "out")
    assert all(text in str(caught.value) for text in texts), caught.value
    assert set(folder.iterdir()) == before


def test_what_does_not_fit_a_stages_output_is_found_first(folder: Path) -> None:
    """Its tensors are known before it is merged."""
    base, experts = family(1)
    save(folder / "longer", {**experts["task0"], "norm.weight": base["norm.weight"].repeat(2)}, CONFIG)
    said: list[str] = []
    with pytest.raises(AdaRankError, match=r"norm.weight: \(5,\) in stage 'first', \(10,\) in"):
        merge(
            stages(folder, FIRST, {**LAST, "base_model": "first", "models": [{"model": "longer"}]}),
            folder / "out",
            note=said.append,
        )
    assert said == []


def test_a_stage_to_come_is_known_as_it_will_be(folder: Path) -> None:
    half = {**FIRST, "dtype": "bfloat16"}
    planned = open_stages(load_recipe(stages(folder, half, {**LAST, "models": [{"model": "first"}]}))).output.experts[
        "first"
    ]
    file = folder / "half.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in half.items() if key != "name"}))
    merge(load_recipe(file), folder / "half")
    written = Checkpoint(folder / "half")
    assert {n: (i.shape, i.dtype) for n, i in planned.tensors.items()} == {
        n: (i.shape, i.dtype) for n, i in written.tensors.items()
    }
    assert {key: planned.config[key] for key in CONFIG} == {key: written.config[key] for key in CONFIG}


class Stop:
    """Stops a run when it says this, and keeps what it said."""

    def __init__(self, at: str, error: type[BaseException]) -> None:
        self.at, self.error, self.said = at, error, list[str]()

    def __call__(self, text: str) -> None:
        self.said.append(text)
        if self.at and text.startswith(self.at):
            raise self.error("stopped")


@pytest.mark.parametrize(("error", "raised"), [(KeyboardInterrupt, Interrupted), (OutputError, OutputError)])
def test_a_stopped_run_goes_on_after_its_last_whole_stage(
    error: type[BaseException], raised: type[BaseException], folder: Path
) -> None:
    file = stages(folder, FIRST, SECOND, LAST)
    with pytest.raises(raised):
        merge(file, folder / "out", note=Stop("Stage 3", error))
    assert (folder / STATE).is_dir()
    assert not (folder / "out").exists()
    said = Stop("", error)
    merge(file, folder / "out", note=said)
    assert [text for text in said.said if text.startswith("Stage")] == [
        "Stage 1 of 3, first: merged already", "Stage 2 of 3, second: merged already", "Stage 3 of 3, the output",
    ]  # fmt: skip
    assert not (folder / STATE).exists()
    assert same(read_all(Checkpoint(folder / "out")), apart(folder, FIRST, SECOND, LAST))


def test_what_is_stopped_in_its_first_stage_leaves_nothing(folder: Path) -> None:
    file = stages(folder, FIRST, LAST | {"models": LAST["models"][1:]})
    before = set(folder.iterdir())
    with pytest.raises(KeyboardInterrupt):
        merge(file, folder / "out", note=Stop("Writing", KeyboardInterrupt))
    assert set(folder.iterdir()) == before


@pytest.mark.parametrize("changed", ["recipe", "input"])
def test_a_stage_of_another_recipe_or_input_is_merged_anew(changed: str, folder: Path) -> None:
    with pytest.raises(Interrupted):
        merge(stages(folder, FIRST, SECOND, LAST), folder / "out", note=Stop("Stage 3", KeyboardInterrupt))
    second = {**SECOND, "parameters": {"weight": [1.0, 0.2]}} if changed == "recipe" else SECOND
    if changed == "input":
        save(folder / "task2", family(1, seed=9)[1]["task0"], CONFIG)
    said = Stop("", KeyboardInterrupt)
    merge(stages(folder, FIRST, second, LAST), folder / "out", note=said)
    assert "Stage 1 of 3, first: merged already" in said.said
    assert "Stage 2 of 3, second" in said.said
    assert same(read_all(Checkpoint(folder / "out")), apart(folder, FIRST, second, LAST))


@pytest.mark.parametrize("file", ["adarank.json", "model.safetensors", "config.json"])
def test_a_damaged_stage_is_merged_anew(file: str, folder: Path) -> None:
    recipe = stages(folder, FIRST, SECOND, LAST)
    with pytest.raises(Interrupted):
        merge(recipe, folder / "out", note=Stop("Stage 3", KeyboardInterrupt))
    (folder / STATE / "stages" / "2" / file).write_text("{}")
    said = Stop("", KeyboardInterrupt)
    merge(recipe, folder / "out", note=said)
    assert "Stage 2 of 3, second" in said.said
    assert not (folder / STATE).exists()
    assert same(read_all(Checkpoint(folder / "out")), apart(folder, FIRST, SECOND, LAST))


def test_a_plan_shows_every_stage(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = stages(folder, FIRST, SECOND, LAST)
    assert main(["plan", str(file)]) == 0
    shown = capsys.readouterr().out
    assert [shown.index(text) for text in ("stage first:", "slerp of", "stage second:", "linear of", "the output:", "ties of")] == sorted(
        shown.index(text) for text in ("stage first:", "slerp of", "stage second:", "linear of", "the output:", "ties of")
    )  # fmt: skip
    assert main(["plan", str(file), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert {name: stage["merge_method"] for name, stage in described["stages"].items()} == {
        "first": "slerp",
        "second": "linear",
    }
    assert main(["merge", str(file), str(folder / "out")]) == 0


def test_stages_may_be_of_slices(folder: Path) -> None:
    cut = [
        {"sources": [{"model": "task0", "layer_range": [0, 1]}]},
        {"sources": [{"model": "task1", "layer_range": [0, 1]}]},
    ]
    again = [{"sources": [{"model": "deep", "layer_range": [n, n + 1]}]} for n in (1, 0)]
    documents = (
        {"name": "deep", "merge_method": "passthrough", "slices": cut},
        {"merge_method": "passthrough", "slices": again},
    )
    merge(stages(folder, *documents), folder / "out")
    found = read_all(Checkpoint(folder / "out"))
    assert found["layer.0.dense.weight"].equal(read_all(Checkpoint(folder / "task1"))["layer.0.dense.weight"])
    assert found["layer.1.dense.weight"].equal(read_all(Checkpoint(folder / "task0"))["layer.0.dense.weight"])


def test_only_plan_and_merge_take_several_stages(folder: Path) -> None:
    with pytest.raises(RecipeError, match="it has 3 stages, and only plan and merge take several"):
        open_job(load_recipe(stages(folder, FIRST, SECOND, LAST)))


def test_a_file_of_stages_may_extend_and_not_be_extended(folder: Path) -> None:
    (folder / "common.yaml").write_text(yaml.safe_dump({"dtype": "float16"}))
    file = stages(folder, {**FIRST, "extends": "common.yaml"}, {**LAST, "models": LAST["models"][1:]})
    assert load_recipe(file).stages["first"].dtype == "float16"
    (folder / "more.yaml").write_text("extends: stages.yaml\n")
    with pytest.raises(RecipeError, match=r"stages\.yaml, which has 2 stages"):
        load_recipe(folder / "more.yaml")


def test_a_damaged_model_of_a_later_stage_is_found_first(folder: Path) -> None:
    (folder / "task2" / "model.safetensors").write_bytes(b"no weights")
    said: list[str] = []
    with pytest.raises(CheckpointError):
        merge(stages(folder, FIRST, SECOND, LAST), folder / "out", note=said.append)
    assert said == []


def test_an_output_of_stages_is_verified_as_far_as_it_goes(folder: Path) -> None:
    merge(load_recipe(stages(folder, FIRST, SECOND, LAST)), folder / "out")
    for place in (None, folder):
        verified = verify(folder / "out", place)
        assert verified.ok
        assert "stages" in verified.notes[0]
