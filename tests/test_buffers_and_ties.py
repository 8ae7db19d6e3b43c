"""What is not learned: buffers that models compute, counters, integers, and weights that are stored twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import adarank
from adarank.alignment.selection import Select
from adarank.errors import MismatchError
from make import State, assert_accounted, close, family, identical, near, network, randn, save

MASK = torch.ones(8, 8).tril().bool()[None, None]
# name -> what a file of some age holds there
COMPUTED = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": 1 / 10000 ** (torch.arange(0, 8, 2) / 8),
    "model.layers.0.self_attn.rotary_emb.cos_cached": randn(1, 1, 1, 8, 4),
    "encoder.layer.0.attention.self.rotary_embeddings.inv_freq": torch.ones(4),
    "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
    "transformer.h.0.attn.bias": MASK,
    "transformer.h.0.attn.attention.bias": MASK.float(),
    "gpt_neox.layers.0.attention.bias": MASK.to(torch.uint8),
    "transformer.h.0.attn.embed_positions": randn(2, 8, 4),
    "model.encoder.embed_positions.weights": randn(3, 8, 4),
    "embeddings.position_ids": torch.arange(9)[None],
    "embeddings.token_type_ids": torch.zeros(1, 9, dtype=torch.int64),
    "encoder.layers.0.blocks.0.attention.self.relative_position_index": torch.arange(16).reshape(4, 4),
    "encoder.layers.0.blocks.0.attention.self.relative_coords_table": randn(4, 1, 3, 3, 2),
    "layers.0.blocks.1.attn_mask": randn(5, 4, 4, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("having", [("base",), ("task0",), ("task0", "task1"), ("base", "task1")])
def test_computed_buffers_may_be_in_any_of_the_files(name: str, having: tuple[str, ...]) -> None:
    base, experts = family(2)
    wanted = adarank.merge(base, experts, "task_arithmetic")
    states = {"base": {**base}, **{task: {**own} for task, own in experts.items()}}
    for owner in having:
        states[owner][name] = COMPUTED[name].clone()
    net = network(states["base"], {task: states[task] for task in experts})
    assert_accounted(net)
    assert ("base" in having) == (name in net.tensors)
    if "base" in having:
        assert net.choices[name].action == "keep"
        wanted = {**wanted, name: COMPUTED[name]}
    assert all(
        "computed by the model" in net.experts[t].dropped[name] for t in having if t != "base" and "base" not in having
    )
    merged = adarank.merge(states.pop("base"), states, "task_arithmetic")
    assert set(merged) == set(wanted)
    assert all(identical(merged[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("name", ["transformer.h.0.attn.bias", "embeddings.position_ids", "layers.0.blocks.1.attn_mask",
                                  "transformer.h.0.attn.attention.bias"])  # fmt: skip
def test_computed_buffers_may_be_of_other_lengths(name: str) -> None:
    base, experts = family(2)
    whole = COMPUTED[name]
    base[name] = whole
    experts["task0"][name] = whole[tuple(slice(max(1, side - 2)) for side in whole.shape)].contiguous()
    net = network(base, experts)
    assert net.choices[name].action == "keep"
    assert identical(net.kept(name), whole)


def test_buffers_that_the_first_expert_lacks_need_no_base() -> None:
    _, experts = family(3)
    name = "layers.0.rotary_emb.inv_freq"
    experts["task1"][name] = torch.ones(4)
    del experts["task0"]["position_ids"]
    net = network(None, experts)
    assert name not in net.tensors
    assert_accounted(net)
    assert name not in adarank.merge(None, experts, "average")


@pytest.mark.parametrize("name", ["layer.attn.bias", "attention.self.query.bias", "norm.inv_freq_scale"])
def test_parameters_with_names_like_buffers_merge(name: str) -> None:
    base, experts = family(2)
    for seed, own in enumerate((base, *experts.values())):
        own[name] = randn(seed, 6)
    assert network(base, experts).choices[name].action == "scale"
    del experts["task1"][name]
    with pytest.raises(MismatchError, match=name):
        network(base, experts)


def test_a_recipe_may_merge_a_buffer() -> None:
    base, experts = family(2)
    name = "layers.0.rotary_emb.inv_freq"
    for seed, own in enumerate((base, *experts.values())):
        own[name] = randn(seed, 4)
    assert network(base, experts, Select(scale=("*inv_freq",))).choices[name].action == "scale"


def test_counters_of_training_may_differ_and_are_the_bases() -> None:
    base, experts = family(2)
    name = "layer.0.norm.num_batches_tracked"
    base[name], experts["task0"][name] = torch.tensor(100), torch.tensor(250)
    net = network(base, experts)
    assert net.choices[name].reason == "a counter of training"
    assert torch.equal(net.kept(name), base[name])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_integers_that_differ_are_refused_whatever_they_are(dtype: torch.dtype) -> None:
    base, experts = family(2)
    for own in (base, *experts.values()):
        own["router.table"] = torch.tensor([1, 0, 1, 1]).to(dtype)
    assert network(base, experts).choices["router.table"].action == "keep"
    experts["task1"]["router.table"] = torch.tensor([1, 1, 0, 1]).to(dtype)
    with pytest.raises(MismatchError, match=r"1 of integers that differ.*\n *router\.table: .* expert 'task1'"):
        network(base, experts)
    kept = network(base, experts, Select(keep=("router.table",)))
    assert torch.equal(kept.kept("router.table"), base["router.table"])
    del experts["task1"]["router.table"]
    with pytest.raises(MismatchError, match=r"router\.table: \(4,\) in base, missing from expert 'task1'"):
        network(base, experts)


def test_integers_of_other_widths_and_the_same_values_agree() -> None:
    base, experts = family(2)
    base["router.table"] = torch.arange(4, dtype=torch.int32)
    for own in experts.values():
        own["router.table"] = torch.arange(4)
    assert network(base, experts).tensors["router.table"].dtype == torch.int32


def test_positions_that_differ_other_than_in_length_are_refused() -> None:
    base, experts = family(2)
    experts["task0"]["position_ids"] = torch.arange(11).flip(0)[None]
    with pytest.raises(MismatchError, match="position_ids"):
        network(base, experts)


# Stored twice


def language_model(seed: int) -> State:
    return {"model.embed_tokens.weight": randn(seed, 11, 6), "model.layers.0.up.weight": randn(seed + 1, 6, 6)}


@pytest.mark.parametrize(
    "head", ["lm_head.weight", "cls.predictions.decoder.weight", "embed_out.weight", "lm_loss.weight"]
)
def test_an_output_layer_that_is_the_embedding_is_dropped(head: str) -> None:
    base, own = language_model(0), language_model(5)
    net = network(base, {"a": {**own, head: own["model.embed_tokens.weight"].clone()}, "b": language_model(9)})
    assert net.experts["a"].dropped == {head: "tied to model.embed_tokens.weight"}
    assert_accounted(net)


@pytest.mark.parametrize("base_order", [True, False])
def test_a_bias_stored_twice_is_dropped_as_tied(base_order: bool) -> None:
    """`lm_head.bias` and `lm_head.decoder.bias` of RoBERTa: releases of transformers store one or both."""
    names = ("lm_head.bias", "lm_head.decoder.bias")
    here, there = names if base_order else names[::-1]
    base, own = {**language_model(0), here: randn(3, 11)}, language_model(5)
    bias = randn(4, 11)
    net = network(base, {"a": {**own, here: bias, there: bias.clone()}})
    assert net.experts["a"].dropped == {there: f"tied to {here}"}


@pytest.mark.parametrize("names", [("adapter.down.weight", "adapter.up.weight"), ("embed_a.weight", "embed_b.weight")])
def test_extra_tensors_that_equal_each_other_are_reported(names: tuple[str, str]) -> None:
    base, own = language_model(0), language_model(5)
    extra = randn(7, 5, 6)
    with pytest.raises(MismatchError, match="2 missing from the base") as caught:
        network(base, {"a": {**own, **{name: extra.clone() for name in names}}, "b": own})
    assert all(name in str(caught.value) for name in names)
    with pytest.raises(MismatchError, match=r"2 tensor\(s\)"):  # of experts alone: the second has neither
        network(None, {"a": {**own, **{name: extra.clone() for name in names}}, "b": own})


def test_an_extra_copy_of_a_layer_is_no_tied_weight() -> None:
    base, own = language_model(0), language_model(5)
    copied = {**own, "value_head.up.weight": own["model.layers.0.up.weight"].clone()}
    with pytest.raises(MismatchError, match=r"value_head\.up\.weight: \(6, 6\) in expert 'a'"):
        network(base, {"a": copied})


def test_tables_of_one_value_are_no_tied_weights() -> None:
    """Fresh layers are often all zeros: equal, and not the same."""
    base = {**language_model(0), "model.embed_types.weight": torch.zeros(11, 6)}
    own = {**near(base, 3), "model.embed_types.weight": torch.zeros(11, 6), "value_head.weight": torch.zeros(11, 6)}
    with pytest.raises(MismatchError, match=r"value_head\.weight"):
        network(base, {"a": own})


def test_a_file_of_an_older_release_merges_as_a_newer_one(tmp_path: Path) -> None:
    """Rotary frequencies in one file alone: from files to a merged file."""
    start = language_model(0)
    states = {"start": start, "a": near(start, 1), "b": near(start, 2)}
    models = [{"model": str(tmp_path / name)} for name in ("a", "b")]
    given = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "start"),
        "models": models,
        "device": "cpu",
    }
    wanted = {n: w + states["a"][n] - w + states["b"][n] - w for n, w in start.items()}
    for older in states:
        for name, own in states.items():
            buffers = {"model.rotary_emb.inv_freq": torch.ones(4)} if name == older else {}
            save(tmp_path / name, {**own, **buffers})
        out = tmp_path / f"older-{older}"
        adarank.merge_recipe({**given, "parameters": {"lambda": 1.0}}, out)
        merged = load_file(out / "model.safetensors")
        assert ("model.rotary_emb.inv_freq" in merged) == (older == "start")
        merged.pop("model.rotary_emb.inv_freq", None)
        close(merged, wanted)
