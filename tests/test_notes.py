"""Notes that `plan`, `merge` and `inspect` print: what a merge leaves out, what its settings change, what comes next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import adarank
from adarank.cli.main import main
from adarank.cli.show import adapted
from image_zoo import make_zoo as make_images
from image_zoo import recipe as of_images
from make import save
from text_zoo import ADAPT, make_zoo, recipe


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(own) for own in arguments]) == 0
    return capsys.readouterr().out


def test_cart_of_two_experts_is_noted_to_be_their_average(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "'cart' gives their average, whatever its settings" in shown(capsys, "plan", recipe(zoo))
    one = recipe(
        zoo, "one.yaml", models=[{"model": "models/mood", "task": {"name": "mood", "kind": "text-classification"}}]
    )
    for other in (recipe(zoo, "tsv.yaml", merge_method="tsv_m"), one, recipe(zoo, "ada.yaml", **ADAPT)):
        assert "note:" not in shown(capsys, "plan", other)
    state = {n: torch.randn(6, 5) for n in "ab"}
    experts = {task: {n: t + 0.1 * torch.randn_like(t) for n, t in state.items()} for task in "xy"}
    found = adarank.merge(state, experts, "cart", {"rank": 0.4, "lambda": 2.0})
    assert all(torch.allclose(own, (experts["x"][n] + experts["y"][n]) / 2, atol=1e-6) for n, own in found.items())


@pytest.mark.parametrize("method", ["cart++", "cart", "iso_c"])
def test_kernels_that_are_taken_whole_are_noted(tmp_path: Path, capsys: Any, method: str) -> None:
    convolutional = make_images(tmp_path / "resnet", "resnet")
    text = shown(capsys, "plan", of_images(convolutional, merge_method=method))
    assert "of the merged numbers are kernels of convolutions" in text
    remedy = yaml.safe_load(text[text.index("select:") :].split("}.")[0] + "}")
    for change in ({"merge_method": method, **remedy}, {"merge_method": method, "select": {"scale": "*.convolution.weight"}}):  # fmt: skip
        assert "kernels" not in shown(capsys, "plan", of_images(convolutional, "chosen.yaml", **change))
    described = json.loads(shown(capsys, "plan", of_images(convolutional, merge_method=method, **remedy), "--json"))
    assert {row["action"] for row in described["tensors"].values() if len(row["shape"]) == 4} == {"decompose"}


def test_methods_and_networks_of_matrices_have_no_such_note(tmp_path: Path, capsys: Any) -> None:
    assert "kernels" not in shown(capsys, "plan", of_images(make_images(tmp_path / "vit"), merge_method="tsv_m"))
    convolutional = make_images(tmp_path / "resnet", "resnet")
    for method in ("average", "adarank"):
        assert "kernels" not in shown(capsys, "plan", of_images(convolutional, merge_method=method))


def test_no_components_are_spoken_of_where_there_are_none(tmp_path: Path, capsys: Any) -> None:
    zoo = make_images(tmp_path, "resnet")
    steps = {"merge_method": "adarank", "adapt": {"steps": 2, "batch_size": 4}}
    whole = {"select": {"scale": "*.convolution.weight"}}
    assert main(["merge", str(of_images(zoo, **steps, **whole)), str(tmp_path / "out")]) == 0
    out, progress = capsys.readouterr()
    assert "start: λ" in out
    assert "components kept" not in out
    assert "kept 100" not in progress
    assert "components_kept" not in json.loads((tmp_path / "out" / "adarank.json").read_text())["adaptation"]


def test_notes_are_said_before_anything_is_learned(tmp_path: Path) -> None:
    zoo, lines = make_images(tmp_path, "resnet"), []
    path = of_images(zoo, merge_method="adarank", adapt={"steps": 1, "batch_size": 4})
    path.write_text(path.read_text() + "name: mine\n")
    record = adarank.merge_recipe(path, tmp_path / "out", note=lines.append)
    before = lines[: lines.index("Hashing the inputs")]
    assert "note: name: 'mine', without effect." in before
    assert {f"note: {text}" for text in record["plan"]["notes"]} == set(before)


@pytest.mark.parametrize(("of_base", "said"), [(0.64375, True), (0.64, False)])
def test_a_start_set_by_hand_keeps_the_origin(capsys: Any, of_base: float, said: bool) -> None:
    """What is set without an origin is about the average, so whoever follows the advice about the base must name it."""
    report = {
        "origins": {"average": 0.640625, "pretrained": of_base}, "start_at_edge": ["lambda"],
        "starts": [{"rank": 1.0, "lambda": 0.05, "value": 0.65}], "components_kept": 0.5, "steps": 2, "rolled_back": False,
        "share_kept": 1, "step_kept": 2, "why_kept": "", "collapsed": [], "largest_class_share": {}, "collapse_seen": {},
    }  # fmt: skip
    adapted(report)
    text = " ".join(capsys.readouterr().out.split())
    assert "set it by hand" in text
    assert ("origin: pretrained" in text) == said
    assert "experts on 64.1% of unlabelled inputs" in text


def test_embeddings_that_experts_changed_are_named_when_kept(tmp_path: Path, capsys: Any) -> None:
    zoo = make_zoo(tmp_path)
    path = recipe(zoo, merge_method="tsv_m")
    assert "note:" not in shown(capsys, "merge", path, tmp_path / "same")
    assert set(json.loads((tmp_path / "same" / "adarank.json").read_text())["kept_though_changed"]) == set()
    file = zoo / "models" / "mood" / "model.safetensors"
    state = load_file(file)
    (key,) = [name for name in state if name.endswith("word_embeddings.weight")]
    state[key] = 1.5 * state[key]
    save_file(state, file, {"format": "pt"})
    text = " ".join(shown(capsys, "merge", path, tmp_path / "out").split())
    name = key.removeprefix("bert.")
    assert f"kept from the base though experts changed them: {name} (by up to 50%)" in text
    assert f'select: {{scale: ["{name}"]}}' in text
    merged = recipe(zoo, "merged.yaml", merge_method="tsv_m", select={"scale": name})  # one pattern needs no list
    assert "note:" not in shown(capsys, "merge", merged, tmp_path / "all")


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "cart", "emr"])
def test_what_is_kept_in_another_shape_is_recorded_and_said(tmp_path: Path, capsys: Any, method: str) -> None:
    """An expert with more tokens: its tables are the base's, as the refusal's remedy says."""
    base = {"model.embed_tokens.weight": torch.randn(8, 4), "model.layers.0.up.weight": torch.randn(4, 4)}
    longer = {**base, "model.embed_tokens.weight": torch.randn(10, 4)}
    for name, own in (("start", base), ("a", longer), ("b", base)):
        save(tmp_path / name, {key: value + 0.1 * (name != "start") for key, value in own.items()})
    path = recipe(tmp_path, merge_method=method, base_model="start", models=[{"model": "a"}, {"model": "b"}])
    assert main(["plan", str(path)]) == 1
    assert "select: keep" in capsys.readouterr().err
    keep = recipe(tmp_path, "keep.yaml", merge_method=method, base_model="start", models=[{"model": "a"}, {"model": "b"}],
                  select={"keep": "*embed_tokens*"})  # fmt: skip
    text = " ".join(shown(capsys, "merge", keep, tmp_path / "out").split())
    assert "another shape: model.embed_tokens.weight ((10, 4) in a)" in text
    assert "select: {scale" not in text  # what would be refused is no remedy
    record = json.loads((tmp_path / "out" / "adarank.json").read_text())
    assert record["kept_though_of_other_shape"] == {"model.embed_tokens.weight": {"a": [10, 4]}}
    assert set(record["kept_though_changed"]) == {"model.embed_tokens.weight"}  # by b, which has the base's shape
    if method != "emr":
        written = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(written, base["model.embed_tokens.weight"])


def test_without_tasks_no_evaluation_is_offered(zoo: Path, tmp_path: Path, capsys: Any) -> None:
    bare = recipe(
        zoo,
        "bare.yaml",
        models=[{"model": "models/mood"}, {"model": "models/colour"}],
        select={"head": ["classifier*"]},
    )
    assert "next:" not in shown(capsys, "merge", bare, tmp_path / "a")
    assert "next: adarank evaluate" in shown(capsys, "merge", recipe(zoo), tmp_path / "b")


def test_a_plan_speaks_of_decomposing_where_the_method_does(zoo: Path, capsys: Any) -> None:
    for method, word in [("tsv_m", "decomposed"), ("ties", "merged as matrices"), ("wemoe", "merged as matrices"),
                         ("twin_merging", "decomposed")]:  # fmt: skip
        parameters = {"density": 0.5} if method == "ties" else {}
        assert word in shown(capsys, "plan", recipe(zoo, "own.yaml", merge_method=method, parameters=parameters))


def test_into_a_pipe_tensor_names_go_whole(zoo: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(capsys, "plan", recipe(zoo), "-v")
    assert "encoder.layer.0.attention.output.LayerNorm.weight" in text
    assert "encoder.layer.0.attention.output.LayerNorm.bias" in shown(capsys, "inspect", zoo / "models" / "mood")


def test_a_relative_change_is_undefined_for_a_zero_base(tmp_path: Path, capsys: Any) -> None:
    for name, fill in (("base", 0.0), ("own", 1.0)):
        (tmp_path / name).mkdir()
        save_file({"b": torch.full((3,), fill), "w": torch.ones(3, 3)}, tmp_path / name / "model.safetensors")
    rows = json.loads(shown(capsys, "inspect", tmp_path / "own", "--base", tmp_path / "base", "--json"))
    assert {row["name"]: row["delta"] for row in rows} == {"b": None, "w": 0.0}


def test_a_plan_without_data_says_what_evaluation_will_miss(tmp_path: Path, capsys: Any) -> None:
    zoo = make_zoo(tmp_path)
    (zoo / "data" / "mood.tsv").unlink()
    text = shown(capsys, "plan", recipe(zoo, merge_method="tsv_m"))
    assert "`evaluate` will not" in text
    assert "mood.tsv: no such data file" in text
