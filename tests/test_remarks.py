"""What a user is told unasked, and mistakes that are refused before anything is spent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import adarank
from adarank.cli.main import main
from adarank.data.spec import TaskSpec
from adarank.errors import CheckpointError, DataError, RecipeError
from adarank.models.text import TextClassifiers
from adarank.recipe.reader import parse_recipe
from adarank.workflow.search import Point, edges, level
from make import save
from text_zoo import ADAPT, make_zoo, recipe


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(own) for own in arguments]) == 0
    return capsys.readouterr().out


def test_cart_of_two_experts_is_told_to_be_their_average(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_embeddings_that_experts_changed_are_not_dropped_in_silence(tmp_path: Path, capsys: Any) -> None:
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
    record = json.loads((tmp_path / "out" / "adarank.json").read_text())
    assert record["kept_though_of_other_shape"] == {"model.embed_tokens.weight": {"a": [10, 4]}}
    assert set(record["kept_though_changed"]) == {"model.embed_tokens.weight"}  # by b, which has the base's shape
    if method != "emr":
        written = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(written, base["model.embed_tokens.weight"])


def test_a_network_with_a_table_of_another_shape_is_not_run(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path)
    file = zoo / "models" / "base" / "model.safetensors"
    state = load_file(file)
    name = "embeddings.word_embeddings.weight"
    save_file({**state, name: state[name][:-3].contiguous()}, file, {"format": "pt"})
    path = recipe(zoo, **{**ADAPT, "select": {"keep": name}})
    with pytest.raises(
        adarank.AdaRankError, match=r"word_embeddings.weight: \(\d+, 16\) is kept from the base, and the model"
    ):
        adarank.merge_recipe(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize(
    ("device", "text"),
    [
        ("gpu", "'gpu' is not a valid device"),
        ("mps", "'mps' is not supported"),
        ("cuda:99", "PyTorch sees [0-9]+ CUDA"),
    ],
)
def test_a_device_that_is_not_there_is_refused_at_once(device: str, text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        parse_recipe({"merge_method": "average", "models": [{"model": "a"}], "device": device}, Path("."))


def test_two_tasks_of_one_name_are_refused_and_nested_problems_counted_once() -> None:
    models = [{"model": m, "task": {"name": "mood", "data": "x.tsv"}} for m in "ab"]
    with pytest.raises(RecipeError, match=r"1 problem\(s\)\.\n  models: 2 tasks are called 'mood'"):
        parse_recipe({"merge_method": "average", "models": models}, Path("."))
    models = [{"model": m, "task": {"name": m, "data": "x.tsv"}} for m in "ab"]
    with pytest.raises(RecipeError, match=r"1 problem\(s\)\.\n  parameters of 'adarank': rank"):
        parse_recipe({"merge_method": "adarank", "base_model": "base", "models": models, "parameters": {"rank": "high"}}, Path("."))  # fmt: skip


def test_a_label_beyond_two_classes_that_no_configuration_names_is_refused(tmp_path: Path, capsys: Any) -> None:
    zoo = make_zoo(tmp_path)
    config = zoo / "models" / "mood" / "config.json"
    values = json.loads(config.read_text())
    del values["id2label"], values["label2id"]  # as transformers writes a configuration of two classes
    config.write_text(json.dumps(values))
    (zoo / "data" / "mood.tsv").write_text("text\tlabel\n" + "".join(f"good {i}\t{i % 3}\n" for i in range(30)))
    with pytest.raises(DataError, match="row 3 has label '2'; the expert knows 0 to 1"):
        adarank.evaluate_recipe(recipe(zoo))


def test_some_rows_without_labels_are_counted(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path)
    rows = "".join(f"good {'red ' * (i + 1)}\t{-1 if i < 2 else i % 2}\n" for i in range(8))
    (zoo / "data" / "mood.tsv").write_text("text\tlabel\n" + rows)
    with pytest.raises(DataError, match=r"of [0-9]+ rows carry no labels.*or take the rows with label -1 out"):
        adarank.evaluate_recipe(recipe(zoo, data={"adapt": 0.0, "select": 0.0, "test": 1.0}))


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path)
    (zoo / "data" / "mood.jsonl").write_text('{"text": "good", "label": 0}\n' * 4 + "{oops\n")
    models = [{"model": "models/mood", "task": {"name": "mood", "data": "data/mood.jsonl"}}]
    with pytest.raises(DataError, match="line 5: "):
        adarank.evaluate_recipe(recipe(zoo, models=models))


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path)
    adapter = zoo / "models" / "lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"lora: an adapter .* merge_and_unload"):
        adarank.open_job(adarank.load_recipe(recipe(zoo, models=[{"model": "models/lora"}])))


@pytest.mark.parametrize(("architecture", "most"), [("bert", 12), ("roberta", 15), ("gpt2", 12)])
def test_inputs_are_cut_to_the_models_own_positions(tmp_path: Path, architecture: str, most: int) -> None:
    """RoBERTa numbers positions after its padding's id, 0 here: of 16 it can use 15."""
    folder = make_zoo(tmp_path, architecture) / "models" / "mood"
    values = json.loads((folder / "config.json").read_text())
    values["n_positions" if architecture == "gpt2" else "max_position_embeddings"] = (
        16 if architecture == "roberta" else 12
    )
    (folder / "config.json").write_text(json.dumps(values))
    table = {"text": ["good " * 40, "bad"]}
    examples, notes = TextClassifiers().encode(table, TaskSpec(name="mood", data="x.tsv"), folder)
    assert examples.lengths[0] == most
    assert notes == [f"1 of 2 inputs reach the limit of {most} tokens, which is the model's own, and are cut there"]


def test_a_recipe_may_be_given_by_its_file(zoo: Path, tmp_path: Path) -> None:
    adarank.merge_recipe(str(recipe(zoo)), str(tmp_path / "out"))
    table = adarank.evaluate_recipe(str(recipe(zoo)), [str(tmp_path / "out")])
    assert str(tmp_path / "out") in table.rows
    shutil.rmtree(tmp_path / "out")


def test_a_recipe_may_be_a_mapping(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every kind of method, from Python alone: paths count from the working folder."""
    monkeypatch.chdir(zoo)
    written = yaml.safe_load(recipe(zoo).read_text())
    once, again = tmp_path / "once", tmp_path / "again"
    adarank.merge_recipe(written, once)
    adarank.merge_recipe(adarank.load_recipe(written), again)
    assert (once / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert str(once) in adarank.evaluate_recipe(written, [once]).rows
    few = {"steps": 2, "batch_size": 2}
    for method, own in (("regmean", {}), ("multitask", {"parameters": few}), ("surgery", {"adapt": few})):
        record = adarank.merge_recipe({**written, "merge_method": method, **own}, tmp_path / method)
        assert record["recipe"]["merge_method"] == method
    with pytest.raises(adarank.AdaRankError, match="merge_method"):
        adarank.load_recipe({**written, "merge_metod": "cart"})


def test_a_share_of_nothing_is_no_number(tmp_path: Path, capsys: Any) -> None:
    for name, fill in (("base", 0.0), ("own", 1.0)):
        (tmp_path / name).mkdir()
        save_file({"b": torch.full((3,), fill), "w": torch.ones(3, 3)}, tmp_path / name / "model.safetensors")
    rows = json.loads(shown(capsys, "inspect", tmp_path / "own", "--base", tmp_path / "base", "--json"))
    assert {row["name"]: row["delta"] for row in rows} == {"b": None, "w": 0.0}


def test_a_search_in_which_nothing_changes_has_no_edge() -> None:
    kind = adarank.api.METHODS["cart"]
    same, other = ([Point({"rank": r}, {"a": s}) for r, s in zip((0.1, 0.2, 0.4), scores, strict=True)]
                   for scores in ((50.0, 50.0, 50.0), (50.0, 51.0, 52.0)))  # fmt: skip
    assert level(same)
    assert not level(other)
    assert edges(kind, same) == {}
    assert set(edges(kind, other)) == {"rank"}


def test_a_plan_without_need_of_data_says_what_evaluation_will_miss(tmp_path: Path, capsys: Any) -> None:
    zoo = make_zoo(tmp_path)
    (zoo / "data" / "mood.tsv").unlink()
    text = shown(capsys, "plan", recipe(zoo, merge_method="tsv_m"))
    assert "`evaluate` will not" in text
    assert "mood.tsv: no such data file" in text


def test_a_loose_tensor_is_no_list_of_batches_and_settings_may_be_a_mapping() -> None:
    base, own = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    x = torch.randn(8, 4)
    with pytest.raises(DataError, match="of 'a' there is one Tensor"):
        adarank.adapt(base, {"a": own}, {"a": x})
    with pytest.raises(RecipeError, match=r"stps: unknown key\. Did you mean 'steps'"):
        adarank.adapt(base, {"a": own}, {"a": [x]}, settings={"stps": 1})
    assert adarank.adapt(base, {"a": own}, {"a": [x]}, settings={"steps": 1}).history.step == 1


def test_wrong_kinds_are_told_in_a_users_words(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"models\.0\.task: a mapping of settings is needed, got 'sentiment'"):
        parse_recipe({"merge_method": "average", "models": [{"model": "a", "task": "sentiment"}]}, tmp_path)
    with pytest.raises(RecipeError, match="models: a list is needed, got 'a'"):
        parse_recipe({"merge_method": "average", "models": "a"}, tmp_path)
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        adarank.load_task(tmp_path / "nowhere", "a")
