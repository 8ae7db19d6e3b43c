"""Problems of the recipe, the checkpoints, the tokenizers and the data come in one list, before anything is spent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import adarank
from adarank.cli.main import main
from adarank.errors import AdaRankError, DataError, MismatchError, Problems, RecipeError
from adarank.workflow.plan import plan
from adarank.workflow.search import parse_axis, search
from text_zoo import ADAPT, TASKS, make_zoo

Spoil = Callable[[Path, dict[str, Any]], None]
ONE, *_ = TASKS


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture
def zoo(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may spoil, with an expert more for each thing that is to be wrong."""
    shutil.copytree(made, tmp_path / "zoo")
    folder = tmp_path / "zoo"
    for name in ("of_other_shape", "of_other_tokens", "quantised", "in_odd_dtype"):
        shutil.copytree(folder / "models" / ONE, folder / "models" / name)
    monkeypatch.chdir(folder)
    return folder


def wrong_key(folder: Path, recipe: dict[str, Any]) -> None:
    recipe["sede"] = 3


def wrong_setting(folder: Path, recipe: dict[str, Any]) -> None:
    recipe["adapt"]["steps"] = -1


def lost_checkpoint(folder: Path, recipe: dict[str, Any]) -> None:
    add(recipe, "lost")


def other_shape(folder: Path, recipe: dict[str, Any]) -> None:
    change(folder / "models" / "of_other_shape", lambda state: {n: widened(n, t) for n, t in state.items()})
    add(recipe, "of_other_shape")


def widened(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return (
        torch.cat([tensor, tensor]) if name.endswith("layer.0.output.dense.bias") or "ffn.lin1.bias" in name else tensor
    )


def odd_dtype(folder: Path, recipe: dict[str, Any]) -> None:
    change(folder / "models" / "in_odd_dtype", lambda state: {n: t.to(torch.complex64) for n, t in state.items()})
    add(recipe, "in_odd_dtype")


def quantised(folder: Path, recipe: dict[str, Any]) -> None:
    file = folder / "models" / "quantised" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    add(recipe, "quantised")


def other_tokens(folder: Path, recipe: dict[str, Any]) -> None:
    file = folder / "models" / "of_other_tokens" / "tokenizer.json"
    content = json.loads(file.read_text())
    ids = content["model"]["vocab"]
    first, second = list(ids)[-2:]
    ids[first], ids[second] = ids[second], ids[first]
    file.write_text(json.dumps(content))
    add(recipe, "of_other_tokens")


def lost_column(folder: Path, recipe: dict[str, Any]) -> None:
    recipe["models"][0]["task"]["columns"] = {"text": "sentence"}


def label_out_of_range(folder: Path, recipe: dict[str, Any]) -> None:
    file = folder / "data" / f"{list(TASKS)[1]}.tsv"
    lines = file.read_text().splitlines()
    lines[1] = "99\t" + lines[1].partition("\t")[2]  # the label comes first
    file.write_text("\n".join(lines) + "\n")


PROBLEMS: dict[Spoil, str] = {
    wrong_key: "sede: unknown key. Did you mean 'seed'?",
    wrong_setting: "steps: Input should be greater than or equal to 0",
    lost_checkpoint: "models/lost: ",
    other_shape: "(16,)",
    odd_dtype: "models/in_odd_dtype/model.safetensors: tensor",
    quantised: "models/quantised: quantised (gptq)",
    other_tokens: "Vocabularies differ",
    lost_column: "no column 'sentence'",
    label_out_of_range: "has label '99'",
}


def add(recipe: dict[str, Any], name: str) -> None:
    task = {**recipe["models"][0]["task"], "name": name, "columns": {"text": "text"}}
    recipe["models"].append({"model": f"models/{name}", "task": task})


def change(folder: Path, of: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "model.safetensors"
    state = of(load_file(file))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file, metadata={"format": "pt"})


def write(folder: Path, *spoils: Spoil) -> Path:
    models = [
        {"model": f"models/{task}", "task": {"name": task, "kind": "text-classification", "data": f"data/{task}.tsv"}}
        for task in TASKS
    ]
    recipe = {**json.loads(json.dumps(ADAPT)), "base_model": "models/base", "models": models, "device": "cpu"}
    for spoil in spoils:
        spoil(folder, recipe)
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def forbid_work(patch: pytest.MonkeyPatch) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("something was spent")

    for name in ("merge.Job.inputs", "evaluate.build_models", "search.build_models"):
        patch.setattr(f"adarank.workflow.{name}", work)


@pytest.mark.parametrize(
    "command", [("plan", "r.yaml"), ("merge", "r.yaml", "out"), ("evaluate", "r.yaml", "nowhere")], ids=lambda c: c[0]
)
def test_one_run_tells_a_problem_of_every_kind(
    command: tuple[str, ...], zoo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(zoo, *PROBLEMS)
    forbid_work(monkeypatch)
    assert main(list(command)) == 1
    text = capsys.readouterr().err
    missing = [spoil.__name__ for spoil, sentence in PROBLEMS.items() if sentence not in text]
    assert not missing, text
    assert "Traceback" not in text
    assert not (zoo / "out").exists()
    assert not list(zoo.glob(".out*"))


@pytest.mark.parametrize(
    "call",
    [plan, lambda r: adarank.merge_recipe(r, "out"), adarank.evaluate_recipe],
    ids=["plan", "merge_recipe", "evaluate_recipe"],
)
def test_python_raises_the_same_list(call: Callable[[Any], Any], zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(zoo, *PROBLEMS)
    forbid_work(monkeypatch)
    for given in (path, yaml.safe_load(path.read_text())):
        with pytest.raises(AdaRankError) as caught:
            call(given)
        assert all(sentence in str(caught.value) for sentence in PROBLEMS.values())


FIRST: tuple[Spoil, ...] = (wrong_key, lost_checkpoint, other_shape, lost_column)
LAST: tuple[Spoil, ...] = (odd_dtype, quantised, other_tokens, label_out_of_range)


def write_stages(folder: Path, first: Sequence[Spoil], last: Sequence[Spoil]) -> Path:
    """A recipe of a stage that is merged first, and of an output that it is the base of."""
    of_first = {**yaml.safe_load(write(folder, *first).read_text()), "name": "first"}
    of_last = {**yaml.safe_load(write(folder, *last).read_text()), "base_model": "first"}
    path = folder / "r.yaml"
    path.write_text("---\n".join(yaml.safe_dump(values) for values in (of_first, of_last)))
    return path


@pytest.mark.parametrize("command", [("plan", "r.yaml"), ("merge", "r.yaml", "out")], ids=lambda c: c[0])
def test_every_stages_problems_come_in_one_run(
    command: tuple[str, ...], zoo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_stages(zoo, FIRST, LAST)
    forbid_work(monkeypatch)
    assert main(list(command)) == 1
    text = " ".join(capsys.readouterr().err.split())
    missing = [spoil.__name__ for spoil in (*FIRST, *LAST) if PROBLEMS[spoil] not in text]
    assert not missing, text
    assert "stage 1 ('first')" in text
    assert "stage 'first': " in text
    assert "the output's stage: " in text
    assert not list(zoo.glob("*out*"))


@pytest.mark.parametrize("spoil", [*FIRST, *LAST], ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("of_first", [True, False], ids=["first", "last"])
def test_one_stages_problem_is_told_without_others(spoil: Spoil, of_first: bool, zoo: Path) -> None:
    path = write_stages(zoo, *([[spoil], []] if of_first else [[], [spoil]]))
    with pytest.raises(AdaRankError) as caught:
        plan(path)
    assert PROBLEMS[spoil] in str(caught.value)
    others = [text for other, text in PROBLEMS.items() if other is not spoil]
    assert not any(text in str(caught.value) for text in others)
    if spoil is not label_out_of_range:  # in the data of both
        assert "things are wrong" not in str(caught.value)


@pytest.mark.parametrize("spoil", PROBLEMS, ids=lambda spoil: spoil.__name__)
def test_one_problem_alone_is_told_without_others(spoil: Spoil, zoo: Path) -> None:
    path = write(zoo, spoil)
    with pytest.raises(AdaRankError) as caught:
        adarank.merge_recipe(path, "out")
    assert PROBLEMS[spoil] in str(caught.value)
    assert "things are wrong" not in str(caught.value)
    others = [text for other, text in PROBLEMS.items() if other is not spoil]
    assert not any(text in str(caught.value) for text in others)


def test_a_search_tells_its_axes_problems_with_the_others(zoo: Path) -> None:
    path = write(zoo, lost_checkpoint, label_out_of_range)
    values = yaml.safe_load(path.read_text())
    values = {key: value for key, value in values.items() if key not in ("adapt", "parameters")}
    path.write_text(yaml.safe_dump({**values, "merge_method": "task_arithmetic", "parameters": {"lambda": 0.3}}))
    with pytest.raises(AdaRankError) as caught:
        search(path, zoo / "best.yaml", [parse_axis("lamda=1,2")])
    for sentence in ("--over lamda: ", PROBLEMS[lost_checkpoint], PROBLEMS[label_out_of_range]):
        assert sentence in str(caught.value)


def test_every_wrong_output_is_told_before_scoring(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_work(monkeypatch)
    with pytest.raises(AdaRankError) as caught:
        adarank.evaluate_recipe(write(zoo), ["nowhere", "data"])
    assert "nowhere" in str(caught.value)
    assert "data: no weights" in str(caught.value)


def test_an_unknown_method_keeps_no_other_problem_back(zoo: Path) -> None:
    path = write(zoo, lost_checkpoint, other_tokens, lost_column)
    path.write_text(path.read_text().replace("merge_method: adarank", "merge_method: adarnak"))
    with pytest.raises(AdaRankError) as caught:
        adarank.merge_recipe(path, "out")
    for sentence in ("adarnak", *(PROBLEMS[spoil] for spoil in (lost_checkpoint, other_tokens, lost_column))):
        assert sentence in str(caught.value)


def test_nothing_is_downloaded_for_a_recipe_that_is_wrong(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise AssertionError("a model was downloaded")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: ["model.safetensors"])
    path = write(zoo, wrong_key, lost_column)
    path.write_text(path.read_text().replace("models/base", "org/base"))
    with pytest.raises(AdaRankError) as caught:
        adarank.merge_recipe(path, "out")
    assert PROBLEMS[wrong_key] in str(caught.value)
    assert PROBLEMS[lost_column] in str(caught.value)


def test_models_and_method_given_to_python_are_told_together() -> None:
    base, fine, other = ({"w": torch.zeros(size, 3)} for size in (2, 2, 4))
    with pytest.raises(AdaRankError) as caught:
        adarank.merge(base, {"a": fine, "b": other}, "task_arithmetic", {"lamda": 1})
    assert "(4, 3)" in str(caught.value)
    assert "Did you mean 'lambda'?" in str(caught.value)
    with pytest.raises(AdaRankError) as caught:
        adarank.merge(base, {"a": {}, "b": {}}, "task_arithmetik")
    assert all(text in str(caught.value) for text in ("expert 'a'", "expert 'b'", "'task_arithmetic'"))


@pytest.mark.parametrize(
    ("errors", "kinds"),
    [
        ([DataError("one")], [DataError]),
        ([DataError("one"), DataError("two")], [DataError]),
        ([AdaRankError("one"), DataError("two")], [DataError]),
        ([DataError("one"), RecipeError("two"), MismatchError("three")], [DataError, RecipeError, MismatchError]),
    ],
)
def test_gathered_errors_are_of_all_their_kinds(errors: list[AdaRankError], kinds: list[type[AdaRankError]]) -> None:
    problems = Problems()
    for error in errors:
        with problems.noted():
            raise error
    for kind in kinds:
        with pytest.raises(kind) as caught:
            problems.refuse()
        assert all(str(error) in str(caught.value) for error in errors)
    others = {DataError, RecipeError, MismatchError} - set(kinds)
    assert not isinstance(caught.value, tuple(others))
    Problems().refuse()  # nothing was noted
