"""Outputs, bundles, records, configurations and points of a search whose files hold what nobody wrote there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import adarank
from adarank.errors import CheckpointError, DataError
from adarank.workflow.build_networks import build_models
from adarank.workflow.load_tasks import load_tasks
from adarank.workflow.search import try_points
from text_zoo import ADAPT, make_zoo, recipe


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo with a merged model and a bundle of it."""
    zoo = make_zoo(tmp_path_factory.mktemp("outputs"))
    adarank.merge_recipe(recipe(zoo), zoo / "out")
    adarank.merge_recipe(recipe(zoo, "b.yaml", merge_method="emr", parameters={}), zoo / "bundle")
    return zoo


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("heads/mood/config.json", "[1"),
        ("heads/mood/config.json", "[1]"),
        ("heads/mood/config.json", '{"model_type": "bert", "hidden_size": "wide"}'),
        ("heads/mood/head.safetensors", ""),
        ("adarank.json", "["),
        ("adarank.json", '{"plan": {"kind": "nothing"}}'),
    ],
)
def test_an_output_with_a_spoilt_file_is_told(outputs: Path, tmp_path: Path, file: str, content: str) -> None:
    shutil.copytree(outputs / "out", tmp_path / "out")
    (tmp_path / "out" / file).write_text(content)
    with pytest.raises(CheckpointError):
        adarank.load_task(tmp_path / "out", "mood")


@pytest.mark.parametrize("content", ["[", "[]", '{"adaptation": 3}', '{"adaptation": {"protocol": "disjoint"}}'])
def test_a_spoilt_record_is_told_before_scoring(outputs: Path, tmp_path: Path, content: str) -> None:
    shutil.copytree(outputs / "out", tmp_path / "out")
    (tmp_path / "out" / "adarank.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"adarank\.json"):
        adarank.evaluate_recipe(outputs / "recipe.yaml", [tmp_path / "out"])


PLACES = ["kind", "bytes.bundle", "tensors.embeddings", "tasks.mood.prefix"]
ODD: list[Any] = [None, -1, 0.5, ["x"], {"shape": ["x"], "dtype": "F32"}]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", ODD)
def test_a_manifest_of_wrong_types_is_damaged(outputs: Path, tmp_path: Path, place: str, value: Any) -> None:
    shutil.copytree(outputs / "bundle", tmp_path / "bundle")
    content = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    *path, key = place.split(".")
    holder = content
    for part in path:
        holder = holder[part]
    holder[key] = value
    (tmp_path / "bundle" / "bundle.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"bundle\.json: damaged"):
        adarank.load_bundle(tmp_path / "bundle")


@pytest.mark.parametrize(
    "changes", [{"label2id": [1]}, {"label2id": {"x": "y"}}, {"id2label": 3, "label2id": None}, {"architectures": [3]}]
)
def test_a_configuration_of_wrong_types_is_told(outputs: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    shutil.copytree(outputs / "models", tmp_path / "models")
    shutil.copytree(outputs / "data", tmp_path / "data")
    file = tmp_path / "models" / "mood" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    kind = {"kind": "text-classification"} if "architectures" in changes else {}
    models = [{"model": "models/mood", "task": {"name": "mood", "data": "data/mood.tsv", **kind}}]
    path = recipe(tmp_path, models=models, **ADAPT)
    if "architectures" in changes:
        adarank.open_job(adarank.load_recipe(path))  # the kind is given: nothing is asked of it
    else:
        with pytest.raises(DataError, match="names no classes that can be read"):
            adarank.merge_recipe(path, tmp_path / "out")


@pytest.mark.parametrize("content", ["[", "{}", '{"mood": "x", "colour": 1.0}', '{"mood": NaN, "colour": 1.0}'])
def test_spoilt_points_of_a_search_are_scored_anew(outputs: Path, tmp_path: Path, content: str) -> None:
    job = adarank.open_job(adarank.load_recipe(recipe(outputs, "s.yaml", merge_method="average")))
    assert job.method is not None
    given = (job, build_models(job), load_tasks(job), [({}, job.method)], tmp_path / "state")
    wanted = try_points(*given)
    for file in (tmp_path / "state").glob("*.json"):
        file.write_text(content)
    assert try_points(*given) == wanted


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path)
    (zoo / "data" / "mood.jsonl").write_text('{"text": "good", "label": 0}\n' * 4 + "{oops\n")
    models = [{"model": "models/mood", "task": {"name": "mood", "data": "data/mood.jsonl"}}]
    with pytest.raises(DataError, match="line 5: "):
        adarank.evaluate_recipe(recipe(zoo, models=models))


def test_an_adapter_of_no_kind_is_refused(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path)
    adapter = zoo / "models" / "lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"lora/adapter_config.json: an adapter of kind .* merge_and_unload"):
        adarank.open_job(adarank.load_recipe(recipe(zoo, models=[{"model": "models/lora"}])))
