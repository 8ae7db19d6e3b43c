"""Recipes of LoRA adapters: how they are named, what is refused and why, what is noted. Most are written by hand, without peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import adarank
from adarank.alignment.adapters import with_adapter
from adarank.alignment.align import align
from adarank.errors import AdaRankError, CheckpointError
from adarank.io.adapter import Adapter
from adarank.io.checkpoint import Checkpoint
from adarank.methods import merge_tensors
from adarank.recipe.job import Job, open_job
from adarank.recipe.reader import parse_recipe
from adarank.workflow.inspect import inspect_checkpoint
from adarank.workflow.merge import merge
from lora_zoo import KINDS, Kind, agree, llama, merged_by_peft, save_adapter, save_base
from make import SHAPES, family, prefixed, randn, save


def by_hand(
    folder: Path, seed: int, layers: tuple[str, ...] = ("layer.0.dense", "layer.1.dense"), **changes: Any
) -> Path:
    """An adapter of rank 2 over the states of `make`."""
    folder.mkdir(parents=True)
    tensors = {}
    for number, layer in enumerate(layers):
        rows, columns = SHAPES[f"{layer}.weight"]
        tensors[f"base_model.model.{layer}.lora_A.weight"] = randn(10 * seed + number, 2, columns)
        tensors[f"base_model.model.{layer}.lora_B.weight"] = randn(10 * seed + number + 5, rows, 2)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "base_model_name_or_path": "base", **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    base, experts = family(1)
    save(tmp_path / "base", base)
    save(tmp_path / "full", experts["task0"])
    for seed, name in enumerate(("one", "two"), 1):
        by_hand(tmp_path / name, seed)
    return tmp_path


def opened(folder: Path, *models: Any, method: str = "task_arithmetic", base: str | None = "base", **more: Any) -> Job:
    entries = [each if isinstance(each, dict) else {"model": each} for each in models]
    return open_job(
        parse_recipe({"merge_method": method, "base_model": base, "models": entries, "device": "cpu", **more}, folder)
    )


def weights(job: Job) -> dict[str, Tensor]:
    return dict(merge_tensors(job.method, job.network))


def test_every_way_to_name_an_adapter_is_one(place: Path) -> None:
    alone = weights(opened(place, "one", "two"))
    for first, second in (
        ("base+one", "base+two"),
        ({"model": "base", "lora": "one"}, {"model": {"model": "base", "lora": "two"}}),
    ):
        other = weights(opened(place, first, second))
        assert all(torch.equal(alone[name], other[name]) for name in alone)


def test_adapters_mix_with_whole_experts(place: Path) -> None:
    job = opened(place, "one", "full", "base+two", method="tsv_m")
    assert [job.network.change_rank(task, "layer.0.dense.weight") for task in job.network.tasks] == [2, None, 2]
    for name in ("one", "two"):
        expert = job.experts[name]
        save(place / f"{name}-whole", {n: expert.read(n).clone() for n in expert.tensors})
    agree(weights(job), weights(opened(place, "one-whole", "full", "two-whole", method="tsv_m")))
    cart = weights(opened(place, "one", "full", "two", method="cart"))
    agree(cart, weights(opened(place, "one-whole", "full", "two-whole", method="cart")))


def test_an_adapter_over_another_model_is_counted_from_the_base(place: Path) -> None:
    job = opened(place, "full+one", "two")
    base, full = (load_file(place / name / "model.safetensors") for name in ("base", "full"))
    name = "layer.0.dense.weight"
    assert job.network.change_rank("one", name) is None
    one, two = (Adapter(place / each).weights for each in ("one", "two"))
    deltas = [
        each.read("base_model.model.layer.0.dense.lora_B.weight")
        @ each.read("base_model.model.layer.0.dense.lora_A.weight")
        / 2
        for each in (one, two)
    ]
    torch.testing.assert_close(weights(job)[name], base[name] + 0.3 * (full[name] - base[name] + deltas[0] + deltas[1]))


def test_the_base_may_have_an_adapter(place: Path) -> None:
    job = opened(place, "one", base="base+two")
    merged_base = opened(place, "base+two").experts["two"]
    assert torch.equal(
        job.network.origin("layer.0.dense.weight", "pretrained"), merged_base.read("layer.0.dense.weight")
    )


def test_a_tensor_that_no_adapter_changes_stays_as_stored(place: Path) -> None:
    base, _ = family(1, dtype=torch.bfloat16)
    save(place / "half", base)
    result = weights(opened(place, "one", "two", base="half", method="cart"))
    assert torch.equal(result["conv.weight"], base["conv.weight"])
    assert result["conv.weight"].dtype == torch.bfloat16
    assert result["layer.0.dense.weight"].dtype == torch.float32


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, "kind IA3.*merge_and_unload"), ({"peft_type": "VERA"}, "kind VERA"), ({"peft_type": "LOHA"}, "kind LOHA"),
    ({"peft_type": "ADALORA"}, "kind ADALORA"), ({"peft_type": "PROMPT_TUNING"}, "changes no weights"), ({"peft_type": None}, r"\(NO PEFT_TYPE\)"),
    ({"init_lora_weights": "pissa"}, "'pissa'.*path_initial_model_for_weight_conversion"), ({"init_lora_weights": "olora"}, "olora"),
    ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"), ({"init_lora_weights": "loftq"}, "loftq"), ({"init_lora_weights": ["x"]}, "init_lora_weights"),
    ({"lora_bias": True}, "lora_bias"), ({"megatron_config": {"a": 1}}, "Megatron"), ({"arrow_config": {"top_k": 1}}, "Arrow"),
    ({"alora_invocation_tokens": [1]}, "aLoRA"), ({"use_qalora": True}, "QA-LoRA"), ({"layer_replication": [[0, 1]]}, "other layers"),
    ({"of_next_year": {"x": 1}}, "of_next_year.*not known here"), ({"r": 0}, "no whole number"), ({"lora_alpha": "x"}, "no number"),
    ({"rank_pattern": {"(": 2}}, "no pattern"), ({"alpha_pattern": [1]}, "no mapping"), ({"trainable_token_indices": "x"}, "no rows"),
    ({"target_parameters": "x"}, "no list"), ({"use_dora": True}, "magnitude_vector"), ({"r": 4}, "r = 4"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "text"), REFUSED)
def test_what_is_no_plain_lora_is_refused_by_its_name(changes: dict[str, Any], text: str, place: Path) -> None:
    by_hand(place / "odd", 3, **changes)
    with pytest.raises(CheckpointError, match=f"(?s)odd.*{text}"):
        opened(place, "odd")


def test_all_reasons_are_told_at_once(place: Path) -> None:
    by_hand(place / "odd", 3, lora_bias=True, init_lora_weights="pissa")
    with pytest.raises(CheckpointError, match=r"(?s)lora_bias.*pissa"):
        opened(place, "odd")


def test_settings_of_training_change_nothing(place: Path) -> None:
    by_hand(
        place / "same",
        1,
        lora_dropout=0.1,
        target_modules=["dense"],
        layers_to_transform=[0],
        revision=None,
        eva_config={"rho": 2},
    )
    agree(weights(opened(place, "same")), weights(opened(place, "one")), 0)


def test_an_adapter_of_another_model_is_refused_by_its_shapes(place: Path) -> None:
    base, _ = family(1)
    wide = {**base, "layer.0.dense.weight": torch.zeros(6, 9)}
    save(place / "wide", wide)
    save(place / "lacking", {n: t for n, t in base.items() if "layer.0" not in n})
    with pytest.raises(
        CheckpointError, match=r"(?s)does not fit wide .*trained on 'base'.*layer.0.dense: factors \(2, 4\)"
    ):
        opened(place, "one", base="wide")
    with pytest.raises(
        CheckpointError, match=r"(?s)does not fit lacking.*layer.0.dense.weight: the model has no such tensor"
    ):
        opened(place, "one", base="lacking")


def test_another_name_of_the_base_is_noted(place: Path) -> None:
    assert not opened(place, "one").notes
    by_hand(place / "three", 3, base_model_name_or_path="org/other-base")
    (note,) = opened(place, "three").notes
    assert "expert 'three'" in note
    assert "'org/other-base'" in note
    by_hand(place / "four", 4, base_model_name_or_path="/elsewhere/Base/")
    assert not opened(place, "four").notes


def test_an_adapter_without_a_model_says_what_to_give(place: Path) -> None:
    with pytest.raises(CheckpointError, match=r"one: an adapter, and the recipe names no base_model.*'base\+one'"):
        opened(place, "one", "two", method="average", base=None)
    with pytest.raises(CheckpointError, match=r"MODEL\+ADAPTER"):
        Checkpoint(place / "one")
    assert weights(opened(place, "base+one", "base+two", method="average", base=None))


def test_damaged_adapters_are_told_in_sentences(place: Path) -> None:
    (place / "one" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="an adapter without weights"):
        opened(place, "one")
    file = place / "two" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "base_model.model.layer.0.dense.lora_E.weight": torch.ones(2)}, file)
    with pytest.raises(CheckpointError, match=r"lora_E.weight: not known here"):
        opened(place, "two")
    save_file({n: t for n, t in tensors.items() if "layer.1.dense.lora_B" not in n}, file)
    with pytest.raises(CheckpointError, match=r"layer.1.dense: A where A, B are needed"):
        opened(place, "two")
    save_file({n: t * float("nan") for n, t in tensors.items()}, file)
    with pytest.raises(AdaRankError, match="NaN"):
        weights(opened(place, "two"))


@pytest.mark.parametrize(("name", "shape", "text"), [
    ("lora_A.weight", (8,), "gather shards"), ("lora_B.weight", (0, 2), "gather shards"), ("lora_A.weight", (), "gather shards"),
    ("lora_magnitude_vector", (5,), "5 magnitudes for 6 outputs"), ("lora_A.weight", (2, 7), r"\(2, 7\)"), ("lora_B.weight", (6, 2, 3), r"\(6, 2, 3\)"),
])  # fmt: skip
def test_factors_of_other_shapes_are_refused(name: str, shape: tuple[int, ...], text: str, place: Path) -> None:
    by_hand(place / "odd", 3, ("layer.0.dense",), use_dora=True)
    file, stem = place / "odd" / "adapter_model.safetensors", "base_model.model.layer.0.dense."
    tensors = {**load_file(file), f"{stem}lora_magnitude_vector": torch.ones(6), f"{stem}{name}": torch.ones(shape)}
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=f"(?s)layer.0.dense.*{text}"):
        opened(place, "odd")


def test_older_files_are_read(place: Path) -> None:
    """Names with the adapter's name in them, and a pickled file."""
    file = place / "one" / "adapter_model.safetensors"
    tensors = {name.replace(".weight", ".default.weight"): tensor for name, tensor in load_file(file).items()}
    (place / "old").mkdir()
    torch.save(tensors, place / "old" / "adapter_model.bin")
    (place / "old" / "adapter_config.json").write_bytes((place / "one" / "adapter_config.json").read_bytes())
    agree(weights(opened(place, "old")), weights(opened(place, "one")), 0)


def test_a_merge_of_adapters_records_every_file_of_theirs(place: Path) -> None:
    values = {
        "merge_method": "cart",
        "base_model": "base",
        "models": [{"model": "one"}, {"model": str(place / "base") + "+" + str(place / "two")}, {"model": "full"}],
    }
    (place / "recipe.yaml").write_text(json.dumps(values))
    record = adarank.merge_recipe(place / "recipe.yaml", place / "out")
    assert {"adapter_model.safetensors", "adapter_config.json", "model.safetensors"} == set(record["inputs"]["one"])
    assert record["recipe"]["models"][1]["model"] == "base+two"
    agree(
        load_file(place / "out" / "model.safetensors"),
        weights(opened(place, "one", "two", "full", method="cart")),
        1e-7,
    )


def test_an_adapter_trained_under_a_head_is_put_on_a_bare_body(tmp_path: Path) -> None:
    kind = KINDS["all biases"]
    save_base(kind, tmp_path / "whole")
    save_adapter(kind, tmp_path / "adapter", 1)
    state = load_file(tmp_path / "whole" / "model.safetensors")
    (tmp_path / "base").mkdir()
    save_file(
        {n.removeprefix("bert."): t for n, t in state.items() if n.startswith("bert.")},
        tmp_path / "base" / "model.safetensors",
    )
    expert = with_adapter(Checkpoint(tmp_path / "base"), Adapter(tmp_path / "adapter"))
    states = merged_by_peft(kind, tmp_path / "adapter")
    assert set(states) - {"classifier.original_module.bias"} == set(expert.tensors)
    agree({n: expert.read(n) for n in expert.tensors}, {n: states[n] for n in expert.tensors}, 1e-6)
    network = align(Checkpoint(tmp_path / "base"), {"task": expert}, task_heads=True)
    assert set(network.heads["task"]) == {"classifier.weight", "classifier.bias"}


def test_grouped_convolutions_are_refused(place: Path) -> None:
    file = place / "one" / "adapter_model.safetensors"
    save_file(
        {
            "base_model.model.conv.lora_A.weight": torch.ones(2, 4, 2, 2),
            "base_model.model.conv.lora_B.weight": torch.ones(3, 1, 1, 1),
        },
        file,
    )
    with pytest.raises(CheckpointError, match="conv: factors"):
        opened(place, "one")


@pytest.mark.parametrize("changes", [
    {"target_modules": ["embed_tokens", "lm_head"]}, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
])  # fmt: skip
def test_what_unties_a_tied_table_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    kind = Kind({"r": 4, **changes}, lambda: llama(tie_word_embeddings=True))
    save_base(kind, tmp_path / "base")
    save_adapter(kind, tmp_path / "one", 1)
    with pytest.raises(CheckpointError, match="tie_word_embeddings: false"):
        opened(tmp_path, "one")


def test_tables_saved_as_tied_are_read(tmp_path: Path) -> None:
    settings = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    kind = Kind(settings, lambda: llama(tie_word_embeddings=True))
    save_base(kind, tmp_path / "base")
    save_adapter(kind, tmp_path / "one", 1)
    result = weights(opened(tmp_path, "one", parameters={"lambda": 1.0}))
    whole = merged_by_peft(kind, tmp_path / "one")
    agree(result, {name: whole[name] for name in result}, 1e-6)
    assert "lm_head.weight" not in result


def test_tied_embeddings_are_noted(tmp_path: Path) -> None:
    kind = Kind({"r": 4, "target_modules": ["embed_tokens"]}, lambda: llama(tie_word_embeddings=True))
    save_base(kind, tmp_path / "base")
    save_adapter(kind, tmp_path / "one", 1)
    (note,) = [note for note in opened(tmp_path, "one").notes if "acts on both" in note]
    assert "model.embed_tokens" in note


def test_attention_of_pytorch_is_refused(place: Path) -> None:
    save(place / "joint", {"block.attn.in_proj_weight": randn(1, 12, 4), "block.attn.out_proj.weight": randn(2, 4, 4)})
    file = place / "one" / "adapter_model.safetensors"
    save_file(
        {
            "base_model.model.block.attn.lora_A.weight": torch.ones(2, 4),
            "base_model.model.block.attn.lora_B.weight": torch.ones(12, 2),
        },
        file,
    )
    with pytest.raises(CheckpointError, match=r"block.attn: a multi-head attention .* merge_and_unload"):
        opened(place, "one", base="joint")


def test_an_adapter_of_a_body_is_put_on_a_model_around_it(place: Path) -> None:
    base = load_file(place / "base" / "model.safetensors")
    save(place / "around", {**prefixed(base, "model."), "lm_head.weight": torch.ones(3, 4)})
    one, other = weights(opened(place, "one", base="around")), weights(opened(place, "one"))
    assert torch.equal(one["lm_head.weight"], torch.ones(3, 4))
    agree({n.removeprefix("model."): t for n, t in one.items() if n != "lm_head.weight"}, other, 0)


def test_an_adapter_is_inspected_with_its_base(place: Path) -> None:
    rows = {row.name: row for row in inspect_checkpoint(place / "one", place / "base")}
    assert rows["layer.0.dense.weight"].rank95 in (1, 2)
    assert rows["conv.weight"].delta == 0
    with pytest.raises(CheckpointError, match=r"MODEL\+ADAPTER"):
        inspect_checkpoint(place / "one")


@pytest.mark.parametrize("model", ["one", "base+one"])
def test_an_output_of_adapters_is_verified_with_its_inputs(model: str, place: Path) -> None:
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "models": [{"model": model}, {"model": "full"}]}
    merge(parse_recipe(recipe, place), place / "out")
    verified = adarank.verify(place / "out", place)
    assert verified.ok
    assert not verified.notes
    assert "model.safetensors" in verified.remade
    with (place / "one" / "adapter_model.safetensors").open("ab") as file:
        file.write(b" ")
    changed = adarank.verify(place / "out", place).problems
    assert [text.split(" (")[0] for text in changed] == [
        "input one: adapter_model.safetensors: has changed since the merge"
    ]
