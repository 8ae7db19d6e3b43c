"""Names: whatever prefix or wrapper a checkpoint's names carry, its tensors meet the base's, or it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import adarank
from adarank.alignment.naming import named_as
from adarank.alignment.selection import Select
from adarank.errors import MismatchError
from adarank.methods import TaskArithmetic, merge_tensors
from adarank.settings import parse
from make import State, assert_accounted, close, identical, near, network, prefixed, randn, state
from text_zoo import ADAPT, make_zoo, recipe

LAYERS = [f"layers.{i}.{part}.weight" for i in range(3) for part in ("attn.q", "attn.v", "mlp.up")]
TEXT = [*(f"model.{name}" for name in (*LAYERS, "norm.weight")), "lm_head.weight"]
VISION = [f"layers.{i}.{part}.weight" for i in range(4) for part in ("attn.q", "fc")]
# A model of images and text, as an older release of transformers calls its tensors, and as a newer one does.
OLDER = [*(f"language_model.{name}" for name in TEXT), *(f"vision_tower.{name}" for name in VISION),
         "multi_modal_projector.linear.weight"]  # fmt: skip
NEWER = [*(f"model.language_model.{name}" for name in (*LAYERS, "norm.weight")), "lm_head.weight",
         *(f"model.vision_tower.{name}" for name in VISION), "model.multi_modal_projector.linear.weight"]  # fmt: skip
NEWER_OF = dict(zip(OLDER, NEWER, strict=True))


def tensors(names: list[str], seed: int = 0) -> State:
    """A tensor of its own values under every name, all of one shape: shapes tell nothing apart."""
    return {name: randn(seed + i, 3, 3) for i, name in enumerate(names)}


def called(own: State, new: dict[str, str]) -> State:
    return {new[name]: tensor for name, tensor in own.items()}


def merged(base: State, experts: dict[str, State], lam: float = 0.5) -> State:
    """Task arithmetic of models without tasks: no heads."""
    return dict(merge_tensors(parse(TaskArithmetic, {"lambda": lam}, "parameters"), network(base, experts)))


def half(base: State, experts: dict[str, State]) -> State:
    """Task arithmetic with λ = ½, by hand."""
    return {n: w + 0.5 * sum(own[n] - w for own in experts.values()) for n, w in base.items()}


PREFIXES = ["base_model.model.", "module.", "_orig_mod.", "module.module._orig_mod.", "0.auto_model.", "a.b.c.d.e."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("side", ["expert", "base"])
def test_a_prefix_of_any_length_is_taken_off_or_put_on(prefix: str, side: str) -> None:
    base = tensors(TEXT)
    experts = {task: near(base, seed) for seed, task in enumerate("ab")}
    wanted = half(base, experts)
    if side == "expert":
        found = merged(base, {**experts, "a": prefixed(experts["a"], prefix)})
    else:
        found = merged(prefixed(base, prefix), experts)
        wanted = prefixed(wanted, prefix)
    close(found, wanted)


@given(st.lists(st.sampled_from(["model", "x", "net", "module", "enc"]), min_size=1, max_size=5))
def test_every_tensor_is_named_once_whatever_the_prefix(parts: list[str]) -> None:
    prefix = ".".join(parts) + "."
    names = named_as({prefix + n: (2, 2) for n in LAYERS}, dict.fromkeys(LAYERS, (2, 2)), "a").names
    assert names == {prefix + n: n for n in LAYERS}


@pytest.mark.parametrize("wrap", [
    lambda n: n.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
    lambda n: "_fsdp_wrapped_module." + n.replace("layers.", "layers._fsdp_wrapped_module."),
    lambda n: "module._orig_mod." + n.replace("attn.", "attn._orig_mod."),
])  # fmt: skip
def test_wrappers_inside_of_names_are_taken_out(wrap: Callable[[str], str]) -> None:
    base = tensors(TEXT)
    own = near(base, 1)
    net = network(base, {"a": {wrap(name): tensor for name, tensor in own.items()}})
    assert list(net.tensors) == TEXT
    assert all(identical(net.experts["a"].read(name), own[name]) for name in TEXT)
    back = network({wrap(name): tensor for name, tensor in base.items()}, {"a": own})
    assert all(identical(back.experts["a"].read(wrap(name)), own[name]) for name in TEXT)


@pytest.mark.parametrize("older_base", [True, False])
@pytest.mark.parametrize("prefix", ["", "bert."])
def test_older_spellings_of_norms_pair_with_newer_ones(older_base: bool, prefix: str) -> None:
    """As the first BERT's files have them: LayerNorm.gamma and .beta; and convolutions under a weight norm."""
    spelled = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias", "conv.weight_g": "conv.parametrizations.weight.original0",
               "conv.weight_v": "conv.parametrizations.weight.original1", "dense.weight": "dense.weight"}  # fmt: skip
    older, newer = (
        {f"encoder.{name}": randn(i, 3, 3) for i, name in enumerate(names)} for names in (spelled, spelled.values())
    )
    base, own = (older, prefixed(near(newer, 1), prefix)) if older_base else (newer, prefixed(near(older, 1), prefix))
    close(merged(base, {"a": own}, 1.0), dict(zip(base, own.values(), strict=True)))


@pytest.mark.parametrize("newer_base", [True, False])
def test_towers_move_to_where_the_base_has_them(newer_base: bool) -> None:
    """Four prefixes at once, each another one: `language_model.model.` -> `model.language_model.`, ..."""
    older = tensors(OLDER)
    experts = {task: near(older, seed) for seed, task in enumerate("ab")}
    wanted = half(older, experts)
    if newer_base:
        found = merged(called(older, NEWER_OF), experts)
        wanted = called(wanted, NEWER_OF)
    else:
        found = merged(older, {task: called(own, NEWER_OF) for task, own in experts.items()})
    close(found, wanted)


@pytest.mark.parametrize("names", [OLDER, NEWER])
def test_a_text_base_takes_the_text_tower_alone(names: list[str]) -> None:
    """The tower of images is extra and refused, unless the recipe says to leave it out."""
    base, expert = tensors(TEXT), tensors(names, 50)
    with pytest.raises(MismatchError, match=r"9 tensor\(s\) cannot be merged: 9 missing from the base"):
        network(base, {"a": expert})
    net = network(base, {"a": expert}, Select(keep=("*vision_tower*", "*multi_modal_projector*")))
    first = next(name for name in names if name.endswith(LAYERS[0]))
    assert identical(net.experts["a"].read(TEXT[0]), expert[first])
    assert_accounted(net)


@pytest.mark.parametrize(("base", "expert"), [
    ([f"{tower}.{n}" for tower in ("query", "passage") for n in LAYERS], LAYERS),
    (LAYERS, [f"{tower}.{n}" for tower in ("query", "passage") for n in LAYERS]),
    ([f"model.{tower}.{n}" for tower in ("query", "passage") for n in LAYERS], [f"model.{n}" for n in LAYERS]),
])  # fmt: skip
def test_towers_that_fit_as_well_as_each_other_are_no_guess(base: list[str], expert: list[str]) -> None:
    with pytest.raises(MismatchError, match=r"two ways .* 'query.* '(model\.)?passage|two ways .*query.*passage"):
        network(tensors(base), {"a": tensors(expert)})


def test_equal_names_go_before_prefixes_that_fit_as_well() -> None:
    towers = [f"{tower}.{n}" for tower in ("query", "passage") for n in LAYERS]
    net = network(tensors(towers), {"a": tensors(towers[:9], 9), "b": tensors(towers, 30)}, Select(keep=("passage*",)))
    assert net.experts["a"].names == {name: name for name in towers[:9]}


@pytest.mark.parametrize(("one", "other"), [("bert.", "roberta."), ("vision.", "audio."), ("encoder.", "decoder.")])
def test_one_part_does_not_stand_for_another(one: str, other: str) -> None:
    with pytest.raises(MismatchError, match="9 missing from experts, 9 missing from the base"):
        network(tensors([one + n for n in LAYERS]), {"a": tensors([other + n for n in LAYERS])})


def test_heads_of_equal_shape_are_not_taken_for_each_other() -> None:
    """A classifier's and a language model's: what is called alike inside of them is not the same."""
    body = [f"roberta.{n}" for n in LAYERS]
    base = tensors([*body, "lm_head.dense.weight", "lm_head.decoder.weight"])
    experts = {task: tensors([*body, "classifier.dense.weight"], 40 * seed) for seed, task in enumerate("ab", 1)}
    net = network(base, experts, task_heads=True)
    assert net.heads == dict.fromkeys("ab", ("classifier.dense.weight",))
    assert net.choices["lm_head.dense.weight"].action == "keep"
    assert_accounted(net)


def test_a_tensor_that_is_there_under_two_names_is_refused() -> None:
    expert = {**prefixed(tensors(LAYERS), "m."), LAYERS[0]: randn(99, 3, 3)}
    with pytest.raises(MismatchError, match=r"twice, such as 'layers\.0\.attn\.q\.weight'"):
        network(tensors(LAYERS), {"a": expert})


@pytest.mark.parametrize("wrapper", ["module.", "base_model.model."])
@pytest.mark.parametrize("bare_base", [True, False])
def test_a_wrapped_classifier_has_its_head_found(wrapper: str, bare_base: bool) -> None:
    body = state(0)
    base = body if bare_base else prefixed(body, "bert.")
    heads = {task: {"classifier.weight": randn(i, 2 + i, 6)} for i, task in enumerate("ab")}
    experts = {task: prefixed({**prefixed(near(body, 5), "bert."), **heads[task]}, wrapper) for task in "ab"}
    net = network(base, experts, task_heads=True)
    assert list(net.tensors) == list(base)
    assert all(list(net.head(task)) == [f"{wrapper}classifier.weight"] for task in "ab")
    assert all(identical(*net.head(task).values(), *heads[task].values()) for task in "ab")


def test_wrapped_names_that_share_memory_pair_with_the_bases() -> None:
    """Of two names of one tensor the base has one, whatever the prefix, and whichever comes first in the file."""
    base = {"wte.weight": randn(0, 11, 6), "h.0.attn.weight": randn(1, 6, 6)}
    table, inner = randn(2, 11, 6), randn(3, 6, 6)
    for order in (("lm_head.weight", "wte.weight"), ("wte.weight", "lm_head.weight")):
        own = {**{f"module.{name}": table for name in order}, "module.h.0.attn.weight": inner}
        net = network(base, {"a": own})
        assert torch.equal(net.experts["a"].read("wte.weight"), table)
        assert net.experts["a"].dropped == {"module.lm_head.weight": "tied to module.wte.weight"}


def test_a_table_that_is_shared_in_one_input_alone_merges_twice() -> None:
    """The base has two tables apart, one expert has one memory under both names."""
    base = {"wte.weight": randn(0, 11, 6), "lm_head.weight": randn(1, 11, 6)}
    shared = randn(2, 11, 6)
    close(merged(base, {"a": dict.fromkeys(base, shared)}, 1.0), dict.fromkeys(base, shared))


@pytest.mark.parametrize("spell", [
    lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
    lambda n: f"base_model.model.{n}",
])  # fmt: skip
def test_a_base_of_other_names_adapts_and_is_scored_the_same(tmp_path: Path, spell: Callable[[str], str]) -> None:
    """Classifiers over a base whose file calls its tensors otherwise score as over the base itself."""
    zoo = make_zoo(tmp_path)
    short = {**ADAPT, "adapt": {"steps": 2, "batch_size": 4}}
    path = recipe(zoo, **short)
    adarank.merge_recipe(path, tmp_path / "plain")
    wanted = adarank.evaluate_recipe(path, [tmp_path / "plain"]).rows[str(tmp_path / "plain")]
    file = zoo / "models" / "base" / "model.safetensors"
    save_file({spell(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    adarank.merge_recipe(path, tmp_path / "out")
    assert adarank.evaluate_recipe(path, [tmp_path / "out"]).rows[str(tmp_path / "out")] == pytest.approx(wanted)
    if "gamma" in " ".join(load_file(file)):  # wrapped names are none that transformers loads
        plain, other = (adarank.load_task(tmp_path / out, "mood").state_dict() for out in ("plain", "out"))
        close(other, plain)


PARTS = st.sampled_from(["m", "model", "x", "_orig_mod", "0", "1", "weight", "bias", "gamma", "head", "lm_head"])
ANY = st.dictionaries(
    st.lists(PARTS, min_size=1, max_size=5).map(".".join), st.sampled_from([(2,), (2, 2)]), max_size=7
)


@given(ANY, ANY)
def test_no_two_tensors_get_one_name_and_none_is_lost(stored: dict[str, Any], root: dict[str, Any]) -> None:
    try:
        names = named_as(stored, root, "a").names
    except MismatchError:
        return
    assert list(names) == list(stored)
    assert len(set(names.values())) == len(names)
