"""Slices: layers of several models in a new order, each slice a merge of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from adarank.alignment.layers import layer_number
from adarank.cli.main import main
from adarank.errors import AdaRankError
from adarank.io.checkpoint import Checkpoint
from adarank.methods import METHODS
from adarank.models.layer_settings import with_layers
from adarank.recipe.job import open_job
from adarank.recipe.plan import describe
from adarank.recipe.reader import parse_recipe
from adarank.workflow.merge import merge
from make import read_all, same, save

LAYERS = {"a": 4, "b": 4, "c": 6, "start": 4}
FIRST, LAST = ("model.embed_tokens.weight",), ("model.norm.weight", "lm_head.weight")
State = dict[str, Tensor]


def state(seed: int, layers: int) -> State:
    """A Llama's tensors, all random."""
    source = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (7, 4)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.self_attn.{part}_proj.weight": (4, 4) for part in "qo"}
        shapes |= {
            f"model.layers.{layer}.mlp.up_proj.weight": (6, 4),
            f"model.layers.{layer}.mlp.down_proj.weight": (4, 6),
        }
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (4,)
    shapes |= {"model.norm.weight": (4,), "lm_head.weight": (7, 4)}
    return {name: torch.randn(shape, generator=source) for name, shape in shapes.items()}


STATES = {name: state(seed, layers) for seed, (name, layers) in enumerate(LAYERS.items())}


def config(layers: int) -> dict[str, Any]:
    return {"model_type": "llama", "num_hidden_layers": layers, "hidden_size": 4, "tie_word_embeddings": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models")
    for name, layers in LAYERS.items():
        save(made / name, STATES[name], config(layers))
    return made


def part(*sources: tuple[Any, ...], **more: Any) -> dict[str, Any]:
    """A slice of (model, first layer, the one after the last[, parameters])."""
    entries = [{"model": m, "layer_range": [start, stop], **({"parameters": given[0]} if given else {})}
               for m, start, stop, *given in sources]  # fmt: skip
    return {"sources": entries, **more}


def passthrough(*slices: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"merge_method": "passthrough", "slices": list(slices), **more}


def merged(values: Mapping[str, Any], folder: Path, tmp_path: Path) -> State:
    merge(parse_recipe(values, folder), tmp_path / "out")
    return read_all(Checkpoint(tmp_path / "out"))


def cut(model: str, start: int, stop: int, first: bool, last: bool) -> State:
    """Some layers of a model, numbered from 0, with what stands before and after them."""
    taken = {f"model.layers.{layer}.": f"model.layers.{layer - start}." for layer in range(start, stop)}
    kept = {new + name.removeprefix(old): tensor for old, new in taken.items()
            for name, tensor in STATES[model].items() if name.startswith(old)}  # fmt: skip
    return kept | {name: STATES[model][name] for name in (*(FIRST if first else ()), *(LAST if last else ()))}


def placed(state: Mapping[str, Tensor], at: int) -> State:
    """The same with its layers numbered from `at`."""
    return {
        re.sub(r"layers\.(\d+)", lambda m: f"layers.{int(m[1]) + at}", name): tensor for name, tensor in state.items()
    }


def test_layers_are_copied_in_the_order_of_the_slices(folder: Path, tmp_path: Path) -> None:
    found = merged(passthrough(part(("a", 0, 3)), part(("c", 2, 6)), part(("a", 1, 2))), folder, tmp_path)
    wanted = (
        cut("a", 0, 3, True, False) | placed(cut("c", 2, 6, False, False), 3) | placed(cut("a", 1, 2, False, True), 7)
    )
    assert same(found, wanted)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config(8)


def test_a_slice_of_no_layers_gives_what_stands_around_them(folder: Path, tmp_path: Path) -> None:
    found = merged(passthrough(part(("b", 0, 0)), part(("a", 0, 4)), part(("c", 6, 6))), folder, tmp_path)
    wanted = STATES["a"] | {name: STATES["b"][name] for name in FIRST} | {name: STATES["c"][name] for name in LAST}
    assert same(found, wanted)


# method -> settings of the first slice's models, of the second's, and of each slice.
SETTINGS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "linear": ([{"weight": [0.2, 0.9]}, {"weight": 0.4}], {"normalize": [True, False]}),
    "task_arithmetic": ([{"weight": [0.2, 0.9]}, {"weight": 0.4}], {"lambda": [1.0, 0.3, 0.7]}),
    "ties": ([{"weight": 0.7, "density": [0.3, 0.9]}, {"weight": 0.5, "density": 0.6}], {}),
    "breadcrumbs": ([{"weight": 0.7, "density": 0.6, "gamma": 0.1}, {"weight": 0.5, "density": 0.7, "gamma": [0.1, 0.2]}], {}),
    "nuslerp": ([{"weight": [0.2, 0.9]}, {"weight": 0.4}], {"nuslerp_flatten": [True, False]}),
    "model_stock": ([{}, {}], {"filter_wise": [False, True]}),
    "sce": ([{}, {}], {"select_topk": [0.4, 0.9]}),
    "cart": ([{}, {}], {"lambda": 0.8}),
    "svd_k": ([{}, {}], {}),
    "average": ([{}, {}], {}),
}  # fmt: skip
RANGES = (({"start": (0, 2), "a": (0, 2), "c": (3, 5)}, True, False), ({"start": (1, 4), "b": (1, 4), "c": (0, 3)}, False, True))  # fmt: skip


def whole(states: Mapping[str, State], values: Mapping[str, Any], given: Mapping[str, Any], place: Path) -> State:
    """An ordinary merge of whole models: the base, if it is called `start`, and the others with their parameters."""
    for name, tensors in states.items():
        save(place / name, tensors, config(max(layer_number(n) or 0 for n in tensors) + 1))
    models = [{"model": name, "parameters": given.get(name, {})} for name in states if name != "start"]
    base = {"base_model": "start"} if "start" in states else {}
    return merged({**values, **base, "models": models}, place, place)


@pytest.mark.parametrize("method", SETTINGS)
def test_each_slice_is_a_merge_of_its_layers(method: str, folder: Path, tmp_path: Path) -> None:
    """Gradients run over the slice's layers."""
    models, parameters = SETTINGS[method]
    needs_base = METHODS[method].needs_base()
    values = {"merge_method": method, "parameters": parameters}
    slices, wanted = [], State()
    for ranges, first, last in RANGES:
        sources = {model: at for model, at in ranges.items() if needs_base or model != "start"}
        given = dict(zip([model for model in sources if model != "start"], models, strict=True))
        slices.append(part(*((model, *at, given.get(model, {})) for model, at in sources.items())))
        states = {model: cut(model, *at, first, last) for model, at in sources.items()}
        wanted |= placed(whole(states, values, given, tmp_path / f"{first}"), 0 if first else 2)
    found = merged({**values, "slices": slices} | ({"base_model": "start"} if needs_base else {}), folder, tmp_path)
    assert same(found, wanted)


def test_filters_see_a_models_own_names_and_the_outputs(folder: Path, tmp_path: Path) -> None:
    """Those of one model's settings the former, those of all models' the latter."""
    own = {"weight": [{"filter": "layers.5.", "value": 3.0}, {"value": 1.0}]}
    values = {
        "merge_method": "task_arithmetic",
        "base_model": "start",
        "slices": [part(("start", 0, 2), ("c", 4, 6, own))],
        "parameters": {"lambda": [{"filter": "layers.1.", "value": 0.5}, {"value": 2.0}]},
    }
    found = merged(values, folder, tmp_path)
    for layer, factor in ((0, 1.0 * 2.0), (1, 3.0 * 0.5)):
        end = "mlp.up_proj.weight"
        base, expert = STATES["start"][f"model.layers.{layer}.{end}"], STATES["c"][f"model.layers.{layer + 4}.{end}"]
        torch.testing.assert_close(found[f"model.layers.{layer}.{end}"], base + factor * (expert - base))


def test_what_a_slices_filters_leave_out_is_the_recipes(folder: Path, tmp_path: Path) -> None:
    slices = [part(("a", 0, 1), parameters={"scale": [{"filter": "up_proj", "value": 3.0}]}), part(("a", 1, 2))]
    found = merged(passthrough(*slices, parameters={"scale": 0.5}), folder, tmp_path)
    factors = {name: found[name] / STATES["a"][name] for name in found}
    assert {name for name, factor in factors.items() if factor.mean().isclose(torch.tensor(3.0))} == {"model.layers.0.mlp.up_proj.weight"}  # fmt: skip
    assert sum(bool(factor.mean().isclose(torch.tensor(0.5))) for factor in factors.values()) == len(factors) - 1


def test_the_base_alone_in_a_slice_is_copied(folder: Path, tmp_path: Path) -> None:
    slices = [part(("start", 0, 2)), part(("start", 2, 4), ("b", 2, 4, {"weight": 1.0}))]
    found = merged({"merge_method": "task_arithmetic", "base_model": "start", "slices": slices}, folder, tmp_path)
    assert same(
        placed({n: t for n, t in found.items() if ".0." in n or ".1." in n}, 0), cut("start", 0, 2, False, False)
    )
    torch.testing.assert_close(found["lm_head.weight"], STATES["b"]["lm_head.weight"])


def test_one_model_may_be_merged_with_its_own_other_layers(folder: Path, tmp_path: Path) -> None:
    values = {"merge_method": "linear", "slices": [part(("a", 0, 2, {"weight": 1.0}), ("a", 2, 4, {"weight": 3.0}))]}
    found = merged(values, folder, tmp_path)
    name = "model.layers.1.self_attn.q_proj.weight"
    wanted = 0.25 * STATES["a"][name] + 0.75 * STATES["a"][name.replace("1", "3")]
    torch.testing.assert_close(found[name], wanted)


def test_a_selection_is_of_the_outputs_names(folder: Path, tmp_path: Path) -> None:
    slices = [part(("start", 0, 2), ("a", 0, 2)), part(("start", 1, 4), ("c", 1, 4))]
    values = {
        "merge_method": "task_arithmetic",
        "base_model": "start",
        "slices": slices,
        "select": {"keep": ["model.layers.3.*"]},
    }
    found = merged(values, folder, tmp_path)
    assert same({n: t for n, t in found.items() if ".3." in n}, placed(cut("start", 2, 3, False, False), 3))
    assert not torch.equal(
        found["model.layers.2.input_layernorm.weight"], STATES["start"]["model.layers.1.input_layernorm.weight"]
    )


def test_what_the_base_lacks_may_be_left_out(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "body", {n: t for n, t in STATES["start"].items() if n != "lm_head.weight"}, config(4))
    slices = [part((str(tmp_path / "body"), at, at + 2), (str(folder / "a"), at, at + 2)) for at in (0, 2)]
    values = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "body"), "slices": slices}
    with pytest.raises(AdaRankError, match=r"lm_head.weight: \(7, 4\) in"):
        open_job(parse_recipe(values, folder))
    found = merged({**values, "select": {"keep": ["lm_head.*"]}}, folder, tmp_path)
    assert found.keys() == STATES["a"].keys() - {"lm_head.weight"}


def test_names_may_differ_by_a_prefix(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "wrapped", {f"module.{name}": tensor for name, tensor in STATES["c"].items()}, config(6))
    values = passthrough(part((str(folder / "a"), 0, 1)), part((str(tmp_path / "wrapped"), 5, 6)))
    found = merged(values, folder, tmp_path)
    assert same(found, cut("a", 0, 1, True, False) | placed(cut("c", 5, 6, False, True), 1))


def test_a_plan_says_where_layers_come_from(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = passthrough(part(("a", 0, 3)), part(("c", 4, 6)))
    described = describe(open_job(parse_recipe(values, folder)))
    assert described["slices"] == [
        {"layers": [0, 3], "of": [{"model": "a", "layers": [0, 3]}]}, {"layers": [3, 5], "of": [{"model": "c", "layers": [4, 6]}]},
    ]  # fmt: skip
    unused = described["dropped"]["c"]
    assert set(unused.values()) == {"in none of the slices"}
    assert set(unused) == STATES["c"].keys() - {f"model.layers.{n}.{name.split('.', 3)[3]}" for n in (4, 5) for name in STATES["c"] if ".4." in name} - set(LAST)  # fmt: skip
    (folder / "plan.yaml").write_text(json.dumps(values))
    assert main(["plan", str(folder / "plan.yaml")]) == 0
    assert "layers 3 to 4: c (layers 4 to 5)" in capsys.readouterr().out


def test_a_slice_holds_one_tensor_at_a_time(folder: Path) -> None:
    """The predicted memory is that of the largest tensor, however many layers there are."""
    few, many = (parse_recipe(passthrough(*[part(("a", 0, 4))] * count), folder) for count in (2, 9))
    assert describe(open_job(few))["peak_bytes"] == describe(open_job(many))["peak_bytes"]


def test_models_with_some_of_their_layers_are_one_slice(folder: Path, tmp_path: Path) -> None:
    models = [{"model": "a", "layer_range": [1, 3]}, {"model": "c", "layer_range": [1, 3]}]
    values = {"merge_method": "linear", "parameters": {"weight": [1.0, 0.5]}}
    found = merged({**values, "models": models}, folder, tmp_path)
    wanted = whole({m: cut(m, 1, 3, True, True) for m in "ac"}, values, {}, tmp_path / "whole")
    assert same(found, wanted)


TWO = part(("start", 0, 2), ("a", 0, 2))
TA = {"merge_method": "task_arithmetic", "base_model": "start"}


@pytest.mark.parametrize(("values", "texts"), [
    (passthrough(part(("a", 0, 2)), models=[{"model": "a"}]), ["slices: given beside models"]),
    (passthrough({"sources": [{"model": "a"}]}, part(("c", 0, 2))), ["slices.0: layer_range of a is needed"]),
    (passthrough({"sources": []}, part(("c", 0, 2))), ["slices.0: no source is given"]),
    (passthrough(part(("a", -1, 2)), part(("c", 4, 2))), ["[-1, 2] is not a valid range", "slices.1: sources: layer_range [4, 2]"]),
    (passthrough(part(("a", 0, 2), ("b", 0, 2)), part(("c", 0, 1))), ["takes the tensors of one model, got 2 (a, b)"]),
    (passthrough(part(("a", 0, 2)), part(("b", 2, 6))), ["slices.1: layers 2 to 5 of b were asked for, and it has 4"]),
    (passthrough(part(("a", 0, 2, {"sclae": 1})), part(("c", 0, 1))), ["slices.0", "'sclae'", "Did you mean 'scale'?"]),
    ({**TA, "slices": [TWO, part(("start", 0, 2), ("c", 0, 3))]}, ["slices.1", "equally many layers, got 2 of start, 3 of c"]),
    ({**TA, "slices": [TWO, part(("a", 0, 2), ("c", 0, 2))]}, ["slices.1: base_model 'start' is not among the sources"]),
    ({**TA, "slices": [TWO, part(("start", 0, 2), ("start", 2, 4), ("c", 0, 2))]}, ["is 2 times among the sources"]),
    ({**TA, "slices": [TWO, TWO], "select": {"keep": ["*.9.*"]}}, ["keep '*.9.*' matches no tensor"]),
    ({**TA, "slices": [TWO, TWO], "select": {"head": ["lm_head*"]}}, ["select: head is for tasks"]),
    ({**TA, "merge_method": "adarank", "slices": [TWO, TWO]}, ["'adarank' merges whole models alone", "ties"]),
    ({**TA, "merge_method": "ties_merging", "slices": [TWO, TWO]}, ["'ties_merging' merges whole models alone"]),
    ({**TA, "merge_method": "tall_masks", "slices": [TWO, TWO]}, ["'tall_masks' merges whole models alone"]),
    ({**TA, "models": [{"model": "a", "layer_range": [0, 2]}, {"model": "b"}]}, ["layer_range is given for some"]),
    ({**TA, "models": [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 2]}]}, ["'start' is not among the sources"]),
    (passthrough({"sources": [{"model": "a", "layer_range": [0, 2], "task": {"name": "t", "data": "t.tsv"}}]}, part(("c", 0, 1))), ["a has a task, and models of slices have none"]),
])  # fmt: skip
def test_slices_that_make_no_model_are_refused(values: dict[str, Any], texts: list[str], folder: Path) -> None:
    with pytest.raises(AdaRankError) as caught:
        open_job(parse_recipe(values, folder))
    assert all(text in str(caught.value) for text in texts), caught.value


def test_layers_of_other_models_do_not_fit(folder: Path, tmp_path: Path) -> None:
    wide = {name: torch.cat([tensor, tensor]) for name, tensor in STATES["b"].items()}
    biased = STATES["b"] | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(4)}
    headless = {name: tensor for name, tensor in STATES["b"].items() if name != "lm_head.weight"}
    for name, other, text in (("wide", wide, "(8,) in"), ("biased", biased, "q_proj.bias: (4,) in"), ("headless", headless, "lm_head.weight: (7, 4) in")):  # fmt: skip
        save(tmp_path / name, other, config(4))
        values = passthrough(part((str(folder / "a"), 0, 2)), part((str(tmp_path / name), 0, 2)))
        with pytest.raises(AdaRankError, match=re.escape(text)):
            open_job(parse_recipe(values, folder))


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32,
         "max_position_embeddings": 32, "num_hidden_layers": 4}  # fmt: skip
ARCHITECTURES = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=2),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SMALL, head_dim=8, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[1]),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, head_dim=8, sliding_window=4),
    "gpt2": lambda: transformers.GPT2Config(n_embd=16, n_layer=4, n_head=2, vocab_size=32, n_positions=32),
    "gpt_neo": lambda: transformers.GPTNeoConfig(hidden_size=16, num_layers=4, num_heads=2, attention_types=[[["global", "local"], 2]], vocab_size=32, max_position_embeddings=32, window_size=4),
    "mpt": lambda: transformers.MptConfig(d_model=16, n_layers=4, n_heads=2, vocab_size=32, max_seq_len=32),
}  # fmt: skip


def logits(network: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = network.eval()(input_ids=torch.arange(12).unsqueeze(0)).logits
    return result


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_an_output_loads_as_the_layers_that_it_is_of(kind: str, tmp_path: Path) -> None:
    """Cut up and put together again it computes the same; with layers twice it has them twice, in their kinds."""
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[kind]())
    network.save_pretrained(tmp_path / "m")
    orders = {"same": [(0, 1), (1, 3), (3, 4)], "longer": [(0, 3), (1, 4)]}
    for name, ranges in orders.items():
        merge(parse_recipe(passthrough(*(part(("m", *at)) for at in ranges)), tmp_path), tmp_path / name)
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        if name == "same":
            assert torch.equal(logits(loaded), logits(network))
    order = [layer for at in orders["longer"] for layer in range(*at)]
    assert loaded.config.num_hidden_layers == len(order)
    for key in ("layer_types", "attention_layers"):
        if hasattr(loaded.config, key) and getattr(network.config, key):
            assert list(getattr(loaded.config, key)) == [getattr(network.config, key)[layer] for layer in order]


def test_layers_of_another_kind_are_not_merged_with_these(tmp_path: Path) -> None:
    transformers.AutoModelForCausalLM.from_config(ARCHITECTURES["qwen2"]()).save_pretrained(tmp_path / "m")
    values = {"merge_method": "linear", "slices": [part(("m", 0, 2, {"weight": 1}), ("m", 2, 4, {"weight": 1}))]}
    with pytest.raises(
        AdaRankError, match="layer_types is 'full_attention' of layer 0 and 'sliding_attention' of layer 2"
    ):
        open_job(parse_recipe(values, tmp_path))


def test_a_tied_output_layer_is_not_taken_of_the_last_slice(folder: Path, tmp_path: Path) -> None:
    """Files may hold it though it is the embedding table, which is that of the first slice."""
    for name in "ac":
        tied = STATES[name] | {"lm_head.weight": STATES[name]["model.embed_tokens.weight"].clone()}
        save(tmp_path / name, tied, config(LAYERS[name]) | {"tie_word_embeddings": True})
    found = merged(passthrough(part(("a", 0, 2)), part(("c", 4, 6))), tmp_path, tmp_path)
    assert "lm_head.weight" not in found
    assert torch.equal(found["model.embed_tokens.weight"], STATES["a"]["model.embed_tokens.weight"])


def test_settings_of_single_layers_follow_them() -> None:
    one = {"num_layers": 3, "layer_types": ["x", "y", "z"], "mlp_only_layers": [0, 2], "other_layers": [5, 6]}
    two = {"num_layers": 2, "layer_types": ["u", "v"], "mlp_only_layers": [1]}
    assert with_layers(one, [(one, range(1, 3)), (two, range(0, 2))]) == {
        "num_layers": 4, "layer_types": ["y", "z", "u", "v"], "mlp_only_layers": [1, 3], "other_layers": [5, 6],
    }  # fmt: skip


def test_models_of_two_stacks_have_no_slices(tmp_path: Path) -> None:
    both = {f"{part}.block.{n}.weight": torch.zeros(2, 2) for part in ("encoder", "decoder") for n in range(2)}
    save(tmp_path / "t5", both, {"model_type": "t5", "num_layers": 2})
    with pytest.raises(AdaRankError, match=r"not one stack.*2 of decoder.block, 2 of encoder.block"):
        open_job(parse_recipe(passthrough(part(("t5", 0, 1)), part(("t5", 1, 2))), tmp_path))
