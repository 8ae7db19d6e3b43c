"""A recipe file of every method that mergekit has and adarank has too, unchanged, and the numbers that mergekit gives.

They are those of mergekit 0.1.5 (torch 2.13.0) from the same recipes and models;
`python benchmarks/mergekit_compare.py --venv VENV --values tests/mergekit_zoo.py` prints them anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import adarank
from adarank.io.checkpoint import Checkpoint
from adarank.methods import METHODS, merge_tensors
from adarank.recipe.job import open_job
from adarank.recipe.reader import load_recipe, parse_recipe
from adarank.workflow.merge import merge
from mergekit_zoo import FILES, LAYERS, RECIPES, picked, write_models

EXPECTED = {
    "linear": [-0.079138, -1.029611, -0.229469, -0.639156, -0.616718, -0.24464],
    "slerp": [0.8314, -2.012917, -0.458657, -0.516579, 1.174007, 1.336358],
    "nuslerp": [0.70461, -0.69561, -0.762279, -1.129278, -0.440956, 0.837154],
    "task_arithmetic": [0.64514, -1.653596, -0.591849, -0.956545, 0.094957, 1.141709],
    "ties": [0.187144, -1.434694, -0.645414, -2.542878, -0.750336, -0.256071],
    "dare_linear": [1.199578, 0.843187, -1.11489, -1.17414, -0.287016, 1.606167],
    "dare_ties": [-1.037335, 0.468813, -1.020204, -0.490952, -0.881352, -0.966773],
    "breadcrumbs": [0.889463, 0.582204, -2.55381, -2.536481, -0.435665, 1.118778],
    "breadcrumbs_ties": [2.638144, 2.712559, 0.054099, 0.947619, -1.035847, 2.959236],
    "della": [-0.532768, 0.984613, -0.269977, -0.981788, -0.999901, 0.633606],
    "della_linear": [1.254315, 1.49453, -1.293326, -1.29762, -0.60066, 1.410962],
    "model_stock": [0.212135, -1.169135, -0.179837, -0.508056, -0.307752, 0.663468],
    "sce": [-0.091266, -0.786648, -0.492218, -1.402593, 1.620152, 1.481113],
    "karcher": [0.093614, -0.304305, -0.293862, -0.918245, -0.683143, 0.010094],
    "multislerp": [-0.683774, -0.081521, -0.294907, -0.671724, -0.814449, -1.146259],
    "nearswap": [1.019369, -2.772044, 0.260525, 0.224529, 0.994914, 2.160362],
    "arcee_fusion": [0.520166, -3.686881, -2.259939, -4.436824, -0.131409, 2.227528],
    "ram": [-0.872082, 0.836611, -0.801983, -0.012946, -0.656174, -1.322372],
    "passthrough": [0.187144, -2.012917, -0.693216, 0.546419, -0.750336, -0.256071],
    "ramplus_tl": [-0.799335, -0.023329, -1.669887, -0.154967, -0.726109, -0.005261],
    "linear-weights": [-0.465895, -0.15962, 0.318923, -0.014207, -0.523503, -0.409225],
    "linear-sum": [-0.792021, -0.271354, 0.542169, -0.024152, -0.889954, -0.695683],
    "linear-gradient": [0.574831, 0.983771, -0.107256, -0.554575, -0.144765, 1.164712],
    "linear-filters": [-0.397154, -0.700165, 0.212382, -0.361782, -0.54738, -0.393104],
    "ta": [-1.261863, 2.054849, 0.581911, 0.337453, -1.796394, -2.254953],
    "ta-lambda": [-0.102024, -1.171949, 0.1987, -0.174966, 0.058391, 0.434536],
    "ta-normalised": [-1.034443, 1.422144, 0.506771, 0.236978, -1.432711, -1.727602],
    "ta-filters": [-0.952699, 1.712979, 0.352343, -0.219368, -1.505373, -1.755833],
    "ta-gradient": [0.526646, 3.13723, -0.119876, -0.573573, -0.864605, 0.633304],
    "ta-switch": [-1.261863, 2.054849, 0.318923, 0.337453, -1.796394, -2.254953],
    "linear-switch": [-0.465895, -0.15962, 0.542169, -0.024152, -0.523503, -0.409225],
    "ties-switch": [-0.521515, 0.758775, -0.503768, 0.368318, -0.023565, -0.881526],
    "stock-switch": [-0.054205, -0.71191, -0.489896, -0.508056, -0.307752, 0.469502],
    "nuslerp-switch": [1.29998, 1.147377, -1.151896, -1.085354, -0.1082, 1.791675],
    "multislerp-switch": [-1.265898, -0.099319, 0.911491, -0.105778, -1.19985, -1.406363],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("mergekit")
    write_models(made)
    return made


@pytest.mark.parametrize("name", RECIPES)
def test_same_numbers_as_mergekit(name: str, folder: Path) -> None:
    file = folder / f"{name}.yaml"
    file.write_text(FILES.get(name) or yaml.safe_dump(RECIPES[name]))
    merge(load_recipe(file), folder / f"{name}-merged")
    assert picked(Checkpoint(folder / f"{name}-merged")) == pytest.approx(EXPECTED[name], abs=1e-5)


def test_every_method_that_is_mergekits_has_a_file() -> None:
    assert {name for name, kind in METHODS.items() if "mergekit" in kind.source} <= set(FILES)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_a_file_that_drops_at_random_gives_what_python_gives(name: str, folder: Path) -> None:
    values = {**RECIPES[name], "seed": 3, "tokenizer_source": "base", "out_dtype": "bfloat16"}
    own = {Path(m["model"]).name: {**m["parameters"], "density": 0.53} for m in values["models"] if "parameters" in m}
    values["models"] = [{"model": f"./{task}", "parameters": given} for task, given in own.items()]
    values["parameters"] = {k: v for k, v in values["parameters"].items() if k != "density"}
    file = folder / f"{name}-random.yaml"
    file.write_text(yaml.safe_dump(values))
    merge(load_recipe(file), folder / f"{name}-random")
    states = {model: load_file(folder / model / "model.safetensors") for model in ("base", *own)}
    per_model = {key: {task: given[key] for task, given in own.items()} for key in ("weight", "density")}
    experts, settings = {task: states[task] for task in own}, {**values["parameters"], **per_model, "seed": 3}
    wanted = adarank.merge(states["base"], experts, name, settings)
    del wanted["lm_head.weight"]  # from Python a task's head, kept
    found = load_file(folder / f"{name}-random" / "model.safetensors")
    assert all(torch.equal(found[key], tensor.bfloat16()) for key, tensor in wanted.items())
    assert not any(torch.equal(found[key], states["base"][key].bfloat16()) for key in wanted)


def by_slice(layers: list[int]) -> dict[str, Any]:
    """mergekit's README writes slerp like this."""
    sources = [{"model": model, "layer_range": layers} for model in ("base", "a")]
    t = [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": 0.5}]
    return {
        "slices": [{"sources": sources}],
        "merge_method": "slerp",
        "base_model": "base",
        "parameters": {"t": t},
    }


def test_one_slice_of_all_layers_is_the_models_whole(folder: Path) -> None:
    sliced = by_slice([0, LAYERS])
    whole = {key: value for key, value in sliced.items() if key != "slices"} | {
        "models": [{"model": "base"}, {"model": "a"}]
    }
    found, wanted = (open_job(parse_recipe(values, folder)) for values in (sliced, whole))
    assert found.method is not None
    assert wanted.method is not None
    pairs = zip(merge_tensors(found.method, found.network), merge_tensors(wanted.method, wanted.network), strict=True)
    assert all(name == other and torch.equal(own, same) for (name, own), (other, same) in pairs)
