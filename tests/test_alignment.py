"""Pairing base and experts: by name, whole or refused, every key accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adarank.alignment.align import align
from adarank.alignment.selection import Select
from adarank.errors import MismatchError, RecipeError
from adarank.io.checkpoint import Checkpoint, MemorySource, Source
from make import (
    BUFFER,
    State,
    assert_accounted,
    family,
    identical,
    near,
    network,
    permuted,
    prefixed,
    randn,
    save,
    save_bin,
    state,
)

ENCODER = {
    "embeddings.word_embeddings.weight": (11, 6),
    "encoder.layer.0.dense.weight": (6, 6),
    "encoder.layer.0.dense.bias": (6,),
    "encoder.layer.1.dense.weight": (6, 6),
    "encoder.norm.weight": (6,),
}
POOLER = {"pooler.dense.weight": (6, 6), "pooler.dense.bias": (6,)}


def encoder(seed: int = 0, extra: Mapping[str, tuple[int, ...]] | None = None) -> State:
    return state(seed, shapes={**ENCODER, **(extra or {})})


def head(classes: int, seed: int, name: str = "classifier") -> State:
    return {f"{name}.weight": randn(seed, classes, 6), f"{name}.bias": randn(seed + 1, classes)}


def classifiers(
    base: State, classes: Mapping[str, int], prefix: str = "bert.", name: str = "classifier"
) -> dict[str, State]:
    """Experts on copies of `base` inside `prefix`, each with a head."""
    return {
        task: {**prefixed(near(base, 50 + i), prefix), **head(count, 70 + i, name)}
        for i, (task, count) in enumerate(classes.items())
    }


@given(st.integers(0, 10**6))
def test_pairs_are_made_by_name_whatever_the_order_of_the_keys(seed: int) -> None:
    base, experts = family(2)
    net = network(base, {t: permuted(own, seed + i) for i, (t, own) in enumerate(experts.items())})
    assert list(net.tensors) == list(base)
    for task, own in experts.items():
        for name in base:
            assert identical(net.experts[task].source.read(net.experts[task].names[name]), own[name])
    assert_accounted(net)


@given(st.integers(0, 10**6))
def test_the_order_of_the_bases_keys_changes_no_action(seed: int) -> None:
    base = {**prefixed(encoder(), "electra."), "discriminator_predictions.dense.weight": randn(3, 6, 6)}
    experts = classifiers(encoder(), {"a": 2, "b": 3}, "electra.")
    first = network(base, experts, task_heads=True)
    second = network(permuted(base, seed), experts, task_heads=True)
    assert dict(first.choices) == dict(second.choices)
    assert_accounted(second)


@pytest.mark.parametrize("prefix", ["bert.", "model.", "transformer."])
def test_a_bare_base_pairs_with_prefixed_experts(prefix: str) -> None:
    base = encoder()
    net = network(base, classifiers(base, {"a": 2, "b": 3}, prefix), task_heads=True)
    assert list(net.tensors) == list(base)
    assert net.heads == {"a": ("classifier.weight", "classifier.bias"), "b": ("classifier.weight", "classifier.bias")}
    assert {member.backbone for member in net.experts.values()} == {prefix}
    assert_accounted(net)


def test_a_prefixed_base_pairs_with_bare_experts() -> None:
    base = prefixed(encoder(), "bert.")
    bare = {task: {**near(encoder(), seed), **head(2, seed)} for task, seed in (("a", 1), ("b", 2))}
    net = network(base, bare, task_heads=True)
    assert list(net.tensors) == list(base)
    assert set(net.heads["a"]) == {"classifier.weight", "classifier.bias"}
    assert net.experts["a"].names["bert.encoder.norm.weight"] == "encoder.norm.weight"
    assert_accounted(net)


def test_prefixed_and_bare_experts_pair_with_each_other() -> None:
    base = encoder()
    net = network(base, {"a": prefixed(near(base, 1), "bert."), "b": near(base, 2)})
    assert net.experts["a"].names["encoder.norm.weight"] == "bert.encoder.norm.weight"
    assert net.experts["b"].names["encoder.norm.weight"] == "encoder.norm.weight"
    assert_accounted(net)


def test_two_tensors_that_prefixes_would_make_one_are_not_lost() -> None:
    base = {"w": randn(0, 3, 3), "v": randn(1, 3, 3)}
    expert = {"m.w": randn(2, 3, 3), "m.v": randn(3, 3, 3), "w": randn(4, 3, 3)}
    try:
        net = network(base, {"a": expert})
    except MismatchError:
        return
    assert_accounted(net)


def test_all_mismatches_are_listed_with_shapes_and_files() -> None:
    base, experts = family(2)
    del experts["task0"]["norm.weight"]
    experts["task1"]["extra.weight"] = randn(0, 2, 9)
    experts["task1"]["layer.0.dense.weight"] = randn(0, 6, 5)
    with pytest.raises(MismatchError, match="3 tensor") as caught:
        network(base, experts)
    lines = {line.strip().split(":")[0]: line for line in str(caught.value).splitlines()[1:]}
    assert "(5,)" in lines["norm.weight"]
    assert "file of task0" in lines["norm.weight"]
    assert "(2, 9)" in lines["extra.weight"]
    assert "file of task1" in lines["extra.weight"]
    for part in ("(6, 4) in base", "(6, 5) in file of task1"):
        assert part in lines["layer.0.dense.weight"]
    assert "keep" in str(caught.value)
    assert "head" in str(caught.value)


def test_a_tensor_that_is_integer_in_one_input_is_refused() -> None:
    base, experts = family(2)
    experts["task1"]["norm.weight"] = torch.ones(5, dtype=torch.int64)
    with pytest.raises(MismatchError, match=r"norm\.weight"):
        network(base, experts)


@pytest.mark.parametrize("classes", [{"a": 2, "b": 3}, {"a": 2, "b": 2}, {"a": 6, "b": 6}])
@pytest.mark.parametrize("name", ["classifier", "score", "qa_outputs", "pre_classifier"])
def test_heads_are_found_whatever_their_shapes(classes: dict[str, int], name: str) -> None:
    base = encoder()
    net = network(base, classifiers(base, classes, name=name), task_heads=True)
    wanted = {f"{name}.weight", f"{name}.bias"}
    assert {task: set(heads) for task, heads in net.heads.items()} == dict.fromkeys(classes, wanted)
    assert_accounted(net)


@pytest.mark.parametrize("classes", [{"a": 2, "b": 3}, {"a": 4, "b": 4}])
def test_a_head_that_the_base_has_too_stays_with_each_task(classes: dict[str, int]) -> None:
    base = {**prefixed(encoder(), "bert."), **head(4, 9)}
    experts = classifiers(encoder(), classes)
    net = network(base, experts, task_heads=True)
    assert net.choices["classifier.weight"].action == "keep"
    assert identical(net.kept("classifier.weight"), base["classifier.weight"])
    assert all(identical(net.head(t)["classifier.weight"], experts[t]["classifier.weight"]) for t in classes)
    assert_accounted(net)


def test_heads_keep_the_names_of_the_experts_own_files() -> None:
    base = encoder()
    experts = classifiers(base, {"a": 2})
    own = network(base, experts, task_heads=True).head("a")
    assert set(own) == {"classifier.weight", "classifier.bias"}
    assert identical(own["classifier.bias"], experts["a"]["classifier.bias"])


def test_without_tasks_a_head_that_the_base_lacks_is_refused() -> None:
    base = encoder()
    with pytest.raises(MismatchError, match=r"classifier\.weight"):
        network(base, classifiers(base, {"a": 2, "b": 2}))


def test_a_head_without_a_base_belongs_to_its_task() -> None:
    net = network(None, classifiers(encoder(), {"a": 2, "b": 3}), task_heads=True)
    assert set(net.heads["b"]) == {"classifier.weight", "classifier.bias"}
    assert_accounted(net)


def test_a_differing_tensor_inside_the_backbone_is_no_head() -> None:
    base = encoder()
    experts = classifiers(base, {"a": 2, "b": 2})
    experts["b"]["bert.encoder.norm.weight"] = randn(0, 7)
    with pytest.raises(MismatchError) as caught:
        network(base, experts, task_heads=True)
    assert all(part in str(caught.value) for part in ("encoder.norm.weight", "(6,) in base", "(7,) in file of b"))


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_parts_that_only_the_base_has_are_kept(prefix: str) -> None:
    base = {**prefixed(encoder(extra=POOLER), prefix), "lm_head.weight": randn(4, 11, 6), "lm_head.bias": randn(5, 11)}
    net = network(base, classifiers(encoder(), {"a": 2, "b": 3}), task_heads=True)
    kept = {f"{prefix}{name}" for name in POOLER} | {"lm_head.weight", "lm_head.bias"}
    assert {n for n, c in net.choices.items() if c.action == "keep"} == {*kept, prefix + BUFFER}
    assert all(identical(net.kept(name), base[name]) for name in kept)
    assert_accounted(net)


@pytest.mark.parametrize("task_heads", [True, False])
def test_a_pooler_that_the_base_lacks_is_a_tasks_head(task_heads: bool) -> None:
    """Without tasks there are no heads, and it is refused as any tensor is that the base lacks."""
    base = encoder()
    experts = {
        task: {**expert, **prefixed(state(7, shapes=POOLER), "bert.")}
        for task, expert in classifiers(base, {"a": 2, "b": 3}).items()
    }
    if not task_heads:
        with pytest.raises(MismatchError, match=r"pooler\.dense\.weight"):
            network(base, experts, task_heads=False)
        return
    net = network(base, experts, task_heads=True)
    assert all(set(names) >= set(POOLER) for names in net.heads.values())
    assert not set(POOLER) & set(net.tensors)
    assert_accounted(net)


def test_a_backbone_tensor_that_all_experts_lack_is_refused() -> None:
    base = encoder(extra={"encoder.layer.2.dense.weight": (6, 6)})
    with pytest.raises(MismatchError, match=r"encoder\.layer\.2\.dense\.weight"):
        network(base, classifiers(encoder(), {"a": 2, "b": 3}), task_heads=True)


def test_integer_buffers_are_kept_and_may_be_missing_anywhere() -> None:
    base, experts = family(3)
    del experts["task0"][BUFFER]
    experts["task1"]["token_type_ids"] = torch.zeros(1, 3, dtype=torch.int64)
    net = network(base, experts)
    assert net.choices[BUFFER].action == "keep"
    assert identical(net.kept(BUFFER), base[BUFFER])
    assert "token_type_ids" in net.experts["task1"].dropped
    assert_accounted(net)


# Tied weights


def language_model(seed: int, tied: bool = True) -> State:
    own = {"wte.weight": randn(seed, 11, 6), "h.0.attn.weight": randn(seed + 1, 6, 6), "ln.bias": randn(seed + 2, 6)}
    return {**own, "lm_head.weight": own["wte.weight"].clone()} if tied else own


STORED = [(True, False, False), (False, True, False), (False, True, True), (True, False, True), (True, True, True)]


@pytest.mark.parametrize("twice", STORED)
@pytest.mark.parametrize("task_heads", [False, True])
def test_a_tied_weight_stored_twice_in_some_is_accounted_for(twice: tuple[bool, ...], task_heads: bool) -> None:
    base, a, b = (language_model(10 * i, tied) for i, tied in enumerate(twice))
    net = network(base, {"a": a, "b": b}, task_heads=task_heads)
    assert "wte.weight" in net.tensors
    assert_accounted(net)


@pytest.mark.parametrize("twice", [(True, False), (False, True)])
def test_a_tied_weight_stored_twice_needs_no_base(twice: tuple[bool, ...]) -> None:
    net = network(None, {t: language_model(10 * i, tied) for i, (t, tied) in enumerate(zip("ab", twice, strict=True))})
    assert "wte.weight" in net.tensors
    assert_accounted(net)


def test_a_weight_that_one_expert_untied_is_not_lost_silently() -> None:
    """The base stores one tensor twice, one expert trained the second apart, the other stores it once."""
    untied = {**language_model(10), "lm_head.weight": randn(77, 11, 6)}
    try:
        net = network(language_model(0), {"a": untied, "b": language_model(20, tied=False)})
    except MismatchError:
        return
    assert_accounted(net)


@pytest.mark.parametrize("expert_order", [("wte.weight", "lm_head.weight"), ("lm_head.weight", "wte.weight")])
@pytest.mark.parametrize("base_order", [("wte.weight", "lm_head.weight"), ("lm_head.weight", "wte.weight")])
def test_shared_storage_pairs_in_whatever_order_its_names_come(
    tmp_path: Path, base_order: tuple[str, ...], expert_order: tuple[str, ...]
) -> None:
    def source(name: str, order: tuple[str, ...], seed: int) -> Source:
        shared = randn(seed, 11, 6)
        return Checkpoint(save_bin(tmp_path / name, {**dict.fromkeys(order, shared), "w": randn(seed + 1, 6, 6)}))

    net = align(source("base", base_order, 0), {"a": source("a", expert_order, 5)})
    assert {"wte.weight", "lm_head.weight"} & set(net.tensors)
    assert_accounted(net)


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_a_bin_with_shared_storage_pairs_with_one_stored_once(tmp_path: Path, form: str) -> None:
    shared = randn(0, 11, 6)
    legacy = {"wte.weight": shared, "w": randn(1, 6, 6), "lm_head.weight": shared}
    once = {"wte.weight": randn(2, 11, 6), "w": randn(3, 6, 6)}
    first, second = Checkpoint(save_bin(tmp_path / "tied", legacy)), Checkpoint(save(tmp_path / "once", once))
    net = align(first, {"a": second}) if form == "bin" else align(second, {"a": first})
    assert set(net.tensors) == {"wte.weight", "w"}
    assert_accounted(net)


# What happens to each tensor


@pytest.mark.parametrize("actions", [("keep", "decompose"), ("keep", "scale"), ("scale", "decompose"), ("keep", "head"),
                                     ("head", "scale")])  # fmt: skip
def test_patterns_that_contradict_each_other_are_refused(actions: tuple[str, str]) -> None:
    base, experts = family(2)
    select = Select(**{actions[0]: ("layer.0.dense.*",), actions[1]: ("*.0.dense.weight",)})
    with pytest.raises(RecipeError, match=r"layer\.0\.dense\.weight"):
        network(base, experts, select)


@pytest.mark.parametrize(("select", "name"), [(Select(scale=("position_ids",)), BUFFER), (Select(decompose=(BUFFER,)), BUFFER), (Select(average=(BUFFER,)), BUFFER),
                                              (Select(decompose=("norm.*",)), "norm.weight")])  # fmt: skip
def test_an_action_that_the_tensor_cannot_take_is_refused(select: Select, name: str) -> None:
    base, experts = family(2)
    with pytest.raises(RecipeError, match=name):
        network(base, experts, select)


def test_keep_excuses_whatever_does_not_fit() -> None:
    base, experts = family(2)
    del experts["task0"]["norm.weight"]
    experts["task1"]["layer.0.dense.weight"] = randn(0, 9, 9)
    experts["task1"]["extra.weight"] = randn(0, 2, 2)
    net = network(base, experts, Select(keep=("norm.*", "layer.0.*", "extra.*")))
    assert all(identical(net.kept(name), base[name]) for name in ("norm.weight", "layer.0.dense.weight"))
    assert "extra.weight" in net.experts["task1"].dropped
    assert_accounted(net)


def test_head_gives_each_task_its_own_even_inside_the_backbone() -> None:
    base, experts = family(2)
    experts["task1"]["norm.weight"] = randn(0, 9)
    net = network(base, experts, Select(head=("norm.*",)))
    assert net.head("task1")["norm.weight"].shape == (9,)
    assert identical(net.kept("norm.weight"), base["norm.weight"])
    assert_accounted(net)


def test_no_experts_are_refused() -> None:
    with pytest.raises(RecipeError, match="at least one"):
        align(MemorySource(state(0), "base"), {})


def test_without_a_base_the_embeddings_of_text_models_merge() -> None:
    """There is none to keep them from, and the first expert's would make the order of the experts matter."""
    experts = {task: MemorySource(encoder(seed), task) for seed, task in enumerate("ab")}
    name = "embeddings.word_embeddings.weight"
    assert align(None, experts, text_tasks=True).choices[name].action == "scale"
    assert align(MemorySource(encoder(9), "base"), experts, text_tasks=True).choices[name].action == "keep"
