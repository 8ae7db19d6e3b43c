"""What lies in an output: the side files that a model needs, no link out of its folder, a record of every file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import adarank
import text_zoo
from adarank.errors import CheckpointError, OutputError, RecipeError
from adarank.io.side_files import side_files
from adarank.io.writer import RECORD
from adarank.recipe.reader import load_recipe
from adarank.recipe.sizes import shard_bytes
from make import randn, same, save, state, write_index


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_zoo.make_zoo(tmp_path_factory.mktemp("outputs"))


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def model(folder: Path, *others: str) -> Path:
    save(folder, state(0), {"model_type": "bert"})
    for name in others:
        (folder / name).write_text(f"content of {name}")
    return folder


KEPT = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
        "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "chat_template.jinja", "generation_config.json",
        "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")  # fmt: skip


LEFT = ("trainer_state.json", "all_results.json", "training_args.bin", "optimizer.pt", "notes.txt", "README.md", "modeling.py",
        "secrets.json", "wandb-summary.json", "model.safetensors.index.json.bak", "adarank.json", "requirements.txt")  # fmt: skip


def test_only_what_a_model_needs_goes_along(tmp_path: Path) -> None:
    model(tmp_path, *KEPT, *LEFT)
    assert {file.name for file in side_files(tmp_path)} == {"config.json", *KEPT}


def test_side_files_keep_their_permissions(tmp_path: Path) -> None:
    zoo = text_zoo.make_zoo(tmp_path / "zoo")
    tokenizer = zoo / "models" / "base" / "tokenizer.json"
    tokenizer.chmod(0o640)
    adarank.merge_recipe(text_zoo.recipe(zoo), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("where", ["models/base", "models/mood"])
def test_a_link_out_of_a_models_folder_is_refused(tmp_path: Path, where: str) -> None:
    zoo = text_zoo.make_zoo(tmp_path / "zoo")
    (tmp_path / "secret").write_text("{}")
    file = zoo / where / "tokenizer_config.json"
    file.unlink()
    file.symlink_to(tmp_path / "secret")
    path = text_zoo.recipe(zoo, merge_method="emr")  # of a bundle the experts' files go along, too
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: leads to .*secret"):
        adarank.merge_recipe(path, tmp_path / "out")
    assert names(tmp_path) == {"zoo", "secret"}


def test_links_within_a_hub_cache_are_followed(tmp_path: Path) -> None:
    root = tmp_path / "hub" / "models--org--name"
    snapshot, blobs = root / "snapshots" / "0a1b", root / "blobs"
    model(blobs, "tokenizer.json")
    snapshot.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    (tmp_path / "short").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "short"):
        assert [file.name for file in side_files(folder)] == ["config.json", "tokenizer.json"]
    (snapshot / "vocab.txt").symlink_to(tmp_path / "hub" / "elsewhere.txt")
    (tmp_path / "hub" / "elsewhere.txt").write_text("secret")
    with pytest.raises(CheckpointError, match=r"vocab\.txt: leads to"):
        side_files(snapshot)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/model.safetensors", "a/../../model.safetensors",
                                  "..\\other\\model.safetensors", "C:\\model.safetensors"])  # fmt: skip
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    save(tmp_path / "other", state(0))
    (tmp_path / "model").mkdir()
    write_index(tmp_path / "model", dict.fromkeys(state(0), name))
    with pytest.raises(CheckpointError, match="files outside of its folder"):
        adarank.io.checkpoint.Checkpoint(tmp_path / "model")


def test_a_bundle_that_names_files_outside_is_refused(zoo: Path, tmp_path: Path) -> None:
    adarank.merge_recipe(text_zoo.recipe(zoo, "emr.yaml", merge_method="emr"), tmp_path / "bundle")
    file = tmp_path / "bundle" / "bundle.json"
    content = json.loads(file.read_text())
    content["files"]["../secret.json"] = {"bytes": 3, "sha256": "0"}
    (tmp_path / "secret.json").write_text("key")
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="outside of the folder"):
        adarank.load_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("method", ["cart", "regmean", "adarank", "emr"])
def test_a_record_names_no_place_and_merges_again(tmp_path: Path, method: str) -> None:
    zoo = text_zoo.make_zoo(tmp_path / "zoo")
    models = [{"model": str(zoo / "models" / t), "task": {"name": t, "data": str(zoo / "data" / f"{t}.tsv")}} for t in text_zoo.TASKS]  # fmt: skip
    changes = {**text_zoo.ADAPT, "adapt": {"steps": 1, "batch_size": 4}} if method == "adarank" else {"merge_method": method}  # fmt: skip
    path = text_zoo.recipe(zoo, models=models, base_model=str(zoo / "models" / "base"), **changes)
    out = tmp_path / "out"
    adarank.merge_recipe(path, out)
    assert str(tmp_path) not in (out / RECORD).read_text()
    again = zoo / "again.yaml"
    again.write_text(json.dumps(json.loads((out / RECORD).read_text())["recipe"]))
    adarank.merge_recipe(load_recipe(again), tmp_path / "again")
    first, second = contents(out), contents(tmp_path / "again")
    assert {n: c for n, c in first.items() if n != RECORD} == {n: c for n, c in second.items() if n != RECORD}


def test_a_record_lists_every_file_beside_it(zoo: Path, tmp_path: Path) -> None:
    adarank.merge_recipe(text_zoo.recipe(zoo), tmp_path / "out")
    listed = json.loads((tmp_path / "out" / RECORD).read_text())["files"]
    found = contents(tmp_path / "out")
    assert {name: entry["bytes"] for name, entry in listed.items()} == {n: len(c) for n, c in found.items() if n != RECORD}  # fmt: skip
    assert load_file(tmp_path / "out" / "model.safetensors")


SIZED = {f"layer.{i}.weight": (4, 8) for i in range(6)}  # 128 bytes each, and their headers


@pytest.fixture
def sized(tmp_path: Path) -> dict[str, object]:
    for seed, name in enumerate(("base", "a")):
        save(tmp_path / name, {n: randn(seed + i, *shape) for i, (n, shape) in enumerate(SIZED.items())})
    models = [{"model": str(tmp_path / "a")}]
    return {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base"), "models": models, "device": "cpu"}


@pytest.mark.parametrize("limit", [500, 800, "0.8KB", 10**9])
def test_files_of_weights_keep_to_max_shard_size(limit: int | str, sized: dict[str, object], tmp_path: Path) -> None:
    """Headers count too; the whole is that of one file, and nothing else is there."""
    adarank.merge_recipe(sized, tmp_path / "whole")
    adarank.merge_recipe({**sized, "max_shard_size": limit}, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    most = limit if isinstance(limit, int) else 800
    assert all(file.stat().st_size <= most for file in files)
    assert (len(files) > 1) == (most < 10**9) == (tmp_path / "out" / "model.safetensors.index.json").exists()
    sharded = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert same(sharded, load_file(tmp_path / "whole" / "model.safetensors"))


def test_a_tensor_beyond_max_shard_size_is_named(sized: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"6 tensor\(s\) do not fit in a file of that size: 'layer\.0\.weight'"):
        adarank.merge_recipe({**sized, "max_shard_size": 128}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["5", "5B", "big", "-1GB", 0, -3, True, 1.5])
def test_a_size_that_is_none_is_refused(size: object, sized: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="such as 5GB, 500MB or 2GiB"):
        adarank.merge_recipe({**sized, "max_shard_size": size}, tmp_path / "out")


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("2 GiB", 2**31), ("1.5kb", 1500), ("3TiB", 3 * 2**40)])
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert shard_bytes(text) == size
