"""Model cards of outputs: what the hub reads of them, what they say of licences, and that their code runs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import adarank
from adarank.cli.main import main
from adarank.errors import AdaRankError, DataError, OutputError
from adarank.io.writer import write_record
from text_zoo import TASKS, make_zoo, recipe

KINDS: dict[str, dict[str, Any]] = {
    "one": {"merge_method": "cart", "parameters": {"rank": 0.5}},
    "bundle": {"merge_method": "emr"},
    "lora": {"merge_method": "task_arithmetic", "output": {"lora": {"rank": 2}}},
}
LIBRARIES = {"one": "transformers", "bundle": "adarank", "lora": "peft"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_zoo(tmp_path_factory.mktemp("cards"))
    for name in ("one", "bundle", "lora"):
        adarank.merge_recipe(recipe(folder, f"{name}.yaml", **KINDS[name]), folder / name)
    return folder


@pytest.fixture
def zoo(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "zoo")


def state(folder: Path, text: str) -> None:
    """Give a model's folder a card with this in its YAML."""
    (folder / "README.md").write_text(f"---\n{text}\n---\n# A model\n")


def card(out: Path) -> ModelCard:
    return ModelCard.load(out / "README.md")


@pytest.mark.parametrize("name", ["one", "bundle", "lora"])
def test_the_hub_reads_what_a_card_is_of(made: Path, name: str) -> None:
    data = card(made / name).data.to_dict()
    assert data == {"tags": ["merge", "adarank"], "library_name": LIBRARIES[name]}
    text = card(made / name).text
    inputs = json.loads((made / name / "adarank.json").read_text())["inputs"]
    assert all(digest in text for files in inputs.values() for digest in files.values())
    assert KINDS[name]["merge_method"] in text


@pytest.mark.parametrize("name", ["one", "bundle"])
def test_a_cards_code_loads_each_task(made: Path, name: str) -> None:
    block = re.search(r"```python\n(.*?)```", card(made / name).text, re.DOTALL)
    assert block
    names: dict[str, Any] = {}
    exec(block[1].replace("path/to/this/folder", str(made / name)), names)
    for variable, classes in zip(("model", "model_2"), TASKS.values(), strict=True):
        assert names[variable](input_ids=torch.tensor([[2, 5, 3]])).logits.shape == (1, classes)


def test_an_adapters_card_loads_it_over_the_base(made: Path) -> None:
    block = re.search(r"```python\n(.*?)```", card(made / "lora").text, re.DOTALL)
    assert block
    code = block[1].replace("path/to/this/folder", str(made / "lora"))
    names: dict[str, Any] = {}
    exec(code.replace("path/to/the/base", str(made / "models" / "base")), names)
    out = names["model"](input_ids=torch.tensor([[2, 5, 3]])).last_hidden_state
    assert not torch.equal(out, names["model"].unload()(input_ids=torch.tensor([[2, 5, 3]])).last_hidden_state)


def test_a_tasks_card_loads_it_without_adarank(made: Path, tmp_path: Path) -> None:
    adarank.extract(made / "one", "colour", tmp_path / "colour")
    block = re.search(r"```python\n(.*?)```", card(tmp_path / "colour").text, re.DOTALL)
    assert block
    assert "adarank" not in block[1]
    names: dict[str, Any] = {}
    exec(block[1].replace("path/to/this/folder", str(tmp_path / "colour")), names)
    assert names["model"].config.num_labels == 3
    assert adarank.verify(tmp_path / "colour").ok


def test_ids_are_of_repositories_in_a_cache_of_the_hub(zoo: Path) -> None:
    models = []
    for name in ("base", *TASKS):
        place = zoo / "cache" / f"models--org--{name}-x" / "snapshots" / "0a1b" / ("sub" if name == "mood" else "")
        shutil.copytree(zoo / "models" / name, place)
        models.append(place.relative_to(zoo).as_posix())
    root = zoo / "cache" / "models--org--mood-x" / "snapshots" / "0a1b"
    state(root, "license: mit")  # the card of the whole repository
    entries = [{"model": m, "task": {"kind": "text-classification"}} for m in models[1:]]
    adarank.merge_recipe(recipe(zoo, merge_method="average", base_model=models[0], models=entries), zoo / "first")
    data = card(zoo / "first").data
    assert data.base_model == ["org/base-x", "org/mood-x", "org/colour-x"]
    assert data.license == "mit"
    # a merge of a merge is of the same repositories
    adarank.merge_recipe(recipe(zoo, merge_method="average", base_model="first", models=entries[1:]), zoo / "second")
    assert card(zoo / "second").data.base_model == ["org/base-x", "org/mood-x", "org/colour-x"]
    assert card(zoo / "second").data.license == "mit"
    adarank.merge_recipe(recipe(zoo, "tasks.yaml", base_model=models[0]), zoo / "tasks")
    adarank.extract(zoo / "tasks", "mood", zoo / "mood")
    assert card(zoo / "mood").data.base_model == ["org/base-x"]


LICENSES = [
    ({"base": "license: mit", "mood": "license: mit"}, "mit", None),
    ({"mood": "license: apache-2.0"}, "apache-2.0", None),
    ({"base": "license: [mit]", "mood": "license: unknown"}, "mit", None),
    ({"base": "license: other\nlicense_name: gemma"}, "other", "gemma"),
    ({"base": "license: mit", "mood": "license: cc-by-nc-4.0"}, None, None),
    ({"base": "license: other\nlicense_name: a", "mood": "license: other\nlicense_name: b"}, None, None),
    ({"base": "tags: [x]", "mood": "- a list", "colour": "license: [unclosed"}, None, None),
]


@pytest.mark.parametrize(("stated", "license", "name"), LICENSES)
def test_a_license_is_what_the_inputs_agree_on(
    zoo: Path, stated: dict[str, str], license: str | None, name: str | None
) -> None:
    for model, text in stated.items():
        state(zoo / "models" / model, text)
    adarank.merge_recipe(recipe(zoo, merge_method="average"), zoo / "out")
    data = card(zoo / "out").data.to_dict()
    assert data.get("license") == license
    assert data.get("license_name") == name


def test_licenses_that_differ_are_named_before_and_after(zoo: Path, capsys: Any) -> None:
    state(zoo / "models" / "base", "license: mit")
    state(zoo / "models" / "mood", "license: cc-by-nc-4.0")
    path = recipe(zoo, merge_method="average")
    for command in (["plan", str(path)], ["merge", str(path), str(zoo / "out"), "--no-report"]):
        assert main(command) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "different licences (base mit; mood cc-by-nc-4.0; colour none)" in said
    assert "different licences" in card(zoo / "out").text


def scores(rows: dict[str, Any]) -> dict[str, Any]:
    metrics = {"mood": "matthews", "colour": "loss"}
    return {"split": "test", "protocol": "disjoint", "counts": {"mood": 30, "colour": 20}, "metrics": metrics, "rows": rows}  # fmt: skip


def test_scores_go_into_a_cards_index(zoo: Path, capsys: Any) -> None:
    out = zoo / "one"
    before = {path: path.read_bytes() for path in out.rglob("*.safetensors")}
    rows = {"experts": {"mood": 90.0, "colour": 0.5}, f"{out} [adapted]": {"mood": -12.5, "colour": 0.75}}
    (zoo / "scores.json").write_text(json.dumps(scores({**rows, "other": {}})))
    assert main(["card", str(out), str(zoo / "scores.json")]) == 0
    assert "2 task(s)" in capsys.readouterr().out
    results = card(out).data.eval_results
    assert results is not None
    assert {(r.task_type, r.dataset_name, r.dataset_split, r.metric_type, r.metric_value) for r in results} == {
        ("text-classification", "mood", "test", "matthews_correlation", -0.125),
        ("text-classification", "colour", "test", "loss", 0.75),
    }
    assert card(out).data.model_name == "one"
    assert "| -12.5 | 90.0 |" in card(out).text
    assert {path: path.read_bytes() for path in out.rglob("*.safetensors")} == before
    assert adarank.verify(out).ok
    again = adarank.score_card(out, scores({"merged": {"mood": 1, "colour": 2}}))
    assert again["scores"]["tasks"]["mood"]["expert"] is None


def test_scores_that_are_not_the_outputs_are_refused(zoo: Path) -> None:
    row = {"mood": 1.0, "colour": 1.0}
    before = (zoo / "one" / "README.md").read_bytes()
    for wrong, words in [
        (scores({"a": row, "b": row}), "Name it"),
        (scores({"experts": row}), "Name it"),
        (scores({"a": {"mood": 1.0}}), "evaluate --json"),
        ({}, "evaluate --json"),
    ]:
        with pytest.raises(DataError, match=words):
            adarank.score_card(zoo / "one", wrong)
    with pytest.raises(DataError, match="Did you mean 'aaa'"):
        adarank.score_card(zoo / "one", scores({"aaa": row}), "aab")
    write_record(zoo / "models", {"converted": {}, "versions": {}})
    with pytest.raises(AdaRankError, match="no merge"):
        adarank.score_card(zoo / "models", scores({"a": row}))
    (zoo / "models" / "adarank.json").unlink()
    with pytest.raises(AdaRankError, match=r"no adarank\.json"):
        adarank.score_card(zoo / "models", scores({"a": row}))
    assert (zoo / "one" / "README.md").read_bytes() == before


def edits(out: Path) -> Iterator[None]:
    (out / "README.md").write_text((out / "README.md").read_text() + "mine\n")
    yield
    assert (out / "README.md").read_text().endswith("mine\n")


def test_a_card_that_was_edited_is_not_overwritten(zoo: Path) -> None:
    path = recipe(zoo, "one.yaml", **KINDS["one"])
    adarank.merge_recipe(path, zoo / "one", force=True)  # as it was written it may be replaced
    for _ in edits(zoo / "one"):
        with pytest.raises(OutputError, match=r"README\.md: is not as adarank wrote it"):
            adarank.merge_recipe(path, zoo / "one", force=True)
        with pytest.raises(OutputError, match=r"README\.md: is not as adarank wrote it"):
            adarank.score_card(zoo / "one", scores({"a": {"mood": 1.0, "colour": 1.0}}))
        problems = adarank.verify(zoo / "one").problems
        assert [text.partition(":")[0] for text in problems] == ["README.md"]
