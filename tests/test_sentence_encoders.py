"""Sentence encoders: modules after the transformer merge with it, and what they need beside weights travels along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adarank
from adarank import extract
from adarank.errors import AdaRankError, CheckpointError, MismatchError
from adarank.io.checkpoint import Checkpoint
from adarank.recipe.reader import parse_recipe
from make import State, close, identical, near, randn, save
from text_zoo import make_zoo, recipe

BODY = {
    "embeddings.word_embeddings.weight": (11, 6),
    "encoder.layer.0.dense.weight": (6, 6),
    "encoder.layer.0.dense.bias": (6,),
}
DENSE = {"linear.weight": (4, 6), "linear.bias": (4,)}
POOLING = {"word_embedding_dimension": 6, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
ACTIVATION = {
    "in_features": 6,
    "out_features": 4,
    "bias": True,
    "activation_function": "torch.nn.modules.activation.Tanh",
}
SIDE = {"config_sentence_transformers.json": {"prompts": {}}, "sentence_bert_config.json": {"max_seq_length": 16}}


def tensors(seed: int, shapes: dict[str, tuple[int, ...]]) -> State:
    return {name: randn(seed + i, *shape) for i, (name, shape) in enumerate(shapes.items())}


def encoder(folder: Path, body: State, dense: State | None = None, form: str = "safetensors", **pooling: Any) -> Path:
    """A folder as `SentenceTransformer.save` lays it out; without `dense` it has a pooling alone."""
    save(folder, body, {"model_type": "bert"})
    modules = ["Transformer", "Pooling", *(["Dense"] if dense else []), "Normalize"]
    paths = ["" if kind == "Transformer" else f"{number}_{kind}" for number, kind in enumerate(modules)]
    listed = [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
              for i, (kind, path) in enumerate(zip(modules, paths, strict=True))]  # fmt: skip
    for name, content in {"modules.json": listed, **SIDE, "1_Pooling/config.json": {**POOLING, **pooling}}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    if dense:
        place = folder / "2_Dense"
        place.mkdir(exist_ok=True)
        (place / "config.json").write_text(json.dumps(ACTIVATION))
        if form == "safetensors":
            save_file(dense, place / "model.safetensors", {"format": "pt"})
        else:
            torch.save(dense, place / "pytorch_model.bin")
    return folder


def zoo(folder: Path, dense: bool = True, **given: Any) -> tuple[dict[str, State], dict[str, State]]:
    """Encoders `start`, `a` and `b`, and their states; `given` are differences of one of them."""
    body, top = tensors(0, BODY), tensors(20, DENSE)
    bodies = {name: near(body, seed, 0.1 * bool(seed)) for seed, name in enumerate(("start", "a", "b"))}
    tops = {name: near(top, 9 + seed, 0.1 * bool(seed)) for seed, name in enumerate(("start", "a", "b"))}
    for name, own in bodies.items():
        encoder(folder / name, own, tops[name] if dense else None, **given.get(name, {}))
    return bodies, tops


def merged(folder: Path, out: Path, **changes: Any) -> dict[str, Any]:
    given = {
        "merge_method": "task_arithmetic",
        "base_model": "start",
        "models": [{"model": "a"}, {"model": "b"}],
        "device": "cpu",
    }
    asked = {key: value for key, value in {**given, **changes}.items() if value is not None}
    return adarank.merge_recipe(parse_recipe(asked, folder), out)


def half(states: dict[str, State]) -> State:
    return {n: w + 0.5 * sum(states[t][n] - w for t in ("a", "b")) for n, w in states["start"].items()}


def files(folder: Path) -> set[str]:
    return {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()} - {"adarank.json", "README.md"}


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_dense_module_merges_and_the_folder_is_whole(tmp_path: Path, form: str) -> None:
    bodies, tops = zoo(tmp_path, **{name: {"form": form} for name in ("start", "a", "b")})
    record = merged(tmp_path, tmp_path / "out", parameters={"lambda": 0.5})
    out = tmp_path / "out"
    close(load_file(out / "model.safetensors"), half(bodies))
    close(load_file(out / "2_Dense" / "model.safetensors"), half(tops))
    assert files(out) == {name.replace("pytorch_model.bin", "model.safetensors") for name in files(tmp_path / "start")}
    for name in files(out) - {"model.safetensors", "2_Dense/model.safetensors"}:
        assert (out / name).read_bytes() == (tmp_path / "start" / name).read_bytes()
    assert record["plan"]["tensors"]["2_Dense/linear.weight"]["action"] == "decompose"
    assert len(record["inputs"]["a"]) == 3  # two files of weights and the configuration
    assert Checkpoint(out).tensors.keys() == Checkpoint(tmp_path / "a").tensors.keys()


def test_a_merge_of_a_merge_reads_the_modules_again(tmp_path: Path) -> None:
    _, tops = zoo(tmp_path)
    merged(tmp_path, tmp_path / "once", parameters={"lambda": 0.5})
    merged(tmp_path, tmp_path / "twice", models=[{"model": "once"}], parameters={"lambda": 1.0})
    close(load_file(tmp_path / "twice" / "2_Dense" / "model.safetensors"), half(tops))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_modules_take_the_output_dtype(tmp_path: Path, dtype: str) -> None:
    zoo(tmp_path)
    merged(tmp_path, tmp_path / "out", dtype=dtype)
    assert load_file(tmp_path / "out" / "2_Dense" / "model.safetensors")["linear.weight"].dtype == getattr(torch, dtype)


@pytest.mark.parametrize("with_base", [True, False])
def test_pooling_travels_from_experts_where_the_base_has_none(tmp_path: Path, with_base: bool) -> None:
    """A base that is no sentence encoder, or none at all: what the experts agree on is the output's."""
    bodies, _ = zoo(tmp_path, dense=False)
    save(tmp_path / "start", bodies["start"], {"model_type": "bert"})
    for name in ("modules.json", *SIDE, "1_Pooling/config.json"):
        (tmp_path / "start" / name).unlink()
    base = {} if with_base else {"base_model": None, "merge_method": "linear"}
    merged(tmp_path, tmp_path / "out", **base)
    assert files(tmp_path / "out") == files(tmp_path / "a")


@pytest.mark.parametrize(("name", "difference", "words"), [
    ("b", {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "1_Pooling has pooling_mode_cls_token True, and start has False"),
    ("b", {"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens True, and start has None"),
    ("start", {"word_embedding_dimension": 7}, "word_embedding_dimension 6, and start has 7"),
])  # fmt: skip
def test_encoders_that_pool_in_other_ways_are_refused(
    tmp_path: Path, name: str, difference: dict[str, Any], words: str
) -> None:
    zoo(tmp_path, **{name: difference})
    with pytest.raises(MismatchError, match="modules after the transformer differ") as caught:
        merged(tmp_path, tmp_path / "out")
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_encoders_with_other_modules_are_refused(tmp_path: Path) -> None:
    bodies, _ = zoo(tmp_path)
    for file in sorted((tmp_path / "b").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    encoder(tmp_path / "b", bodies["b"])
    with pytest.raises(
        MismatchError, match=r"b: has 1_Pooling \(Pooling\), 2_Normalize .* start has .*2_Dense \(Dense\)"
    ):
        merged(tmp_path, tmp_path / "out")


def test_a_module_with_other_shapes_is_a_mismatch(tmp_path: Path) -> None:
    _, tops = zoo(tmp_path)
    save_file({**tops["b"], "linear.weight": randn(0, 5, 6)}, tmp_path / "b" / "2_Dense" / "model.safetensors")
    with pytest.raises(MismatchError, match=r"2_Dense/linear\.weight: \(4, 6\) in .*\(5, 6\) in .*b/2_Dense"):
        merged(tmp_path, tmp_path / "out")


def test_a_module_that_one_expert_lost_is_refused(tmp_path: Path) -> None:
    zoo(tmp_path)
    (tmp_path / "b" / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(MismatchError, match=r"2_Dense/linear\.weight: .* missing from expert 'b'"):
        merged(tmp_path, tmp_path / "out")


def test_experts_without_modules_leave_the_bases_as_they_are(tmp_path: Path) -> None:
    """Classifiers fine-tuned from a sentence encoder, saved by transformers: they cannot have changed its modules."""
    models = make_zoo(tmp_path) / "models"
    top = tensors(3, {"linear.weight": (4, 16), "linear.bias": (4,)})
    encoder(models / "base", load_file(models / "base" / "model.safetensors"), top)
    config = json.loads((models / "mood" / "config.json").read_text())
    (models / "base" / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    record = adarank.merge_recipe(recipe(tmp_path), tmp_path / "out")
    assert record["plan"]["tensors"]["2_Dense/linear.weight"]["reason"] == "in the base only: no expert has it"
    written = load_file(tmp_path / "out" / "2_Dense" / "model.safetensors")
    assert all(identical(written[name], top[name]) for name in top)
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/config.json"} <= files(tmp_path / "out")


def test_a_bundle_gives_whole_sentence_encoders(tmp_path: Path) -> None:
    _, tops = zoo(tmp_path)
    merged(tmp_path, tmp_path / "bundle", merge_method="tall_masks")
    extract(tmp_path / "bundle", "a", tmp_path / "a-again")
    assert files(tmp_path / "a-again") == files(tmp_path / "a")
    found = load_file(tmp_path / "a-again" / "2_Dense" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: own.shape for name, own in tops["a"].items()
    }


@pytest.mark.parametrize("path", ["../start", "/etc", "a/../../start"])
def test_modules_outside_of_the_folder_are_refused(tmp_path: Path, path: str) -> None:
    zoo(tmp_path)
    listed = json.loads((tmp_path / "a" / "modules.json").read_text())
    (tmp_path / "a" / "modules.json").write_text(json.dumps([*listed, {"path": path, "type": "x.Dense"}]))
    with pytest.raises(CheckpointError, match="is outside of the folder"):
        Checkpoint(tmp_path / "a")


@pytest.mark.parametrize("content", ["{", "{}", "[3]", '[{"path": 3, "type": "x"}]', '[{"path": "1_x"}]', "\x00"])
def test_a_damaged_list_of_modules_is_refused(tmp_path: Path, content: str) -> None:
    zoo(tmp_path)
    (tmp_path / "a" / "modules.json").write_text(content)
    with pytest.raises(AdaRankError, match=r"modules\.json"):
        Checkpoint(tmp_path / "a")


def test_weights_in_a_folder_inside_are_pointed_at(tmp_path: Path) -> None:
    """As the first releases of sentence-transformers saved: the transformer in `0_Transformer`."""
    save(tmp_path / "old" / "0_Transformer", tensors(0, BODY))
    with pytest.raises(
        CheckpointError, match=r"old: no weights, but in folders inside: 0_Transformer\. Give that folder"
    ):
        Checkpoint(tmp_path / "old")
