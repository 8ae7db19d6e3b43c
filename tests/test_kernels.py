"""Kernels of convolutions: when they are decomposed as matrices, by default and on demand, and what is done with them then."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import adarank
from adarank.errors import RecipeError
from adarank.recipe.reader import load_recipe
from adarank.spectral.mask_file import FILE
from image_zoo import ADAPT, TASKS, expert, make_zoo, recipe


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("resnet"), "resnet")


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


KERNEL = "encoder.stages.0.layers.0.layer.0.convolution.weight"  # 8 × 8 × 3 × 3


def kernel_of(folder: Path, model: str) -> np.ndarray:
    state = weights(folder / "models" / model)
    return next(t for n, t in state.items() if n.endswith(KERNEL)).double().numpy()


def low_rank(kernel: np.ndarray, keep: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(kernel.reshape(kernel.shape[0], -1), full_matrices=False)
    return ((u[:, :keep] * s[:keep]) @ vt[:keep]).reshape(kernel.shape)


@pytest.mark.parametrize(("method", "about_average"), [("svd_k", False), ("cart", True)])
def test_kernels_are_decomposed_on_demand(resnet: Path, tmp_path: Path, method: str, about_average: bool) -> None:
    # of two experts CART's cut task vectors cancel out, so the base is a third here
    experts = [kernel_of(resnet, model) for model in (*TASKS, "base")]
    third = {"model": "models/base", "task": {"name": "third", "kind": "image-classification"}}
    origin = np.mean(experts, axis=0) if about_average else kernel_of(resnet, "base")
    models = [*map(expert, TASKS), third]
    given = {"merge_method": method, "parameters": {"rank": 0.25, "lambda": 0.7}, "models": models}
    asked = {"select": {"decompose": ["*.convolution.weight"]}}
    adarank.merge_recipe(load_recipe(recipe(resnet, **given)), tmp_path / "whole")
    adarank.merge_recipe(load_recipe(recipe(resnet, **given, **asked)), tmp_path / "cut")
    whole = origin + 0.7 * sum(own - origin for own in experts)  # about the average the deltas sum to zero
    np.testing.assert_allclose(weights(tmp_path / "whole")[KERNEL].numpy(), whole, atol=1e-6)
    cut = origin + 0.7 * sum(low_rank(own - origin, 2) for own in experts)  # ⌊0.25 · 8⌋ components
    assert np.abs(cut - whole).max() > 1e-3
    np.testing.assert_allclose(weights(tmp_path / "cut")[KERNEL].numpy(), cut, atol=1e-6)


def test_adarank_masks_the_components_of_kernels(resnet: Path, tmp_path: Path) -> None:
    asked = {"select": {"decompose": ["*.convolution.weight"]}, "adapt": {"steps": 3, "batch_size": 4, "lr_masks": 0.2}}
    record = adarank.merge_recipe(load_recipe(recipe(resnet, **{**ADAPT, **asked})), tmp_path / "out")
    masks = adarank.MaskFile.load(tmp_path / "out" / FILE)
    assert masks.sizes[KERNEL] == (8, 8)
    assert len(masks.sizes) == 6
    assert len(set(record["adaptation"]["kept"])) > 1
    again = {"merge_method": "masked", "parameters": {"masks": str(tmp_path / "out" / FILE)}, "select": asked["select"]}
    adarank.merge_recipe(load_recipe(recipe(resnet, **again)), tmp_path / "again")
    found, repeated = weights(tmp_path / "out"), weights(tmp_path / "again")
    assert all(torch.equal(found[name], repeated[name]) for name in found)


def test_adarank_decomposes_kernels_by_default(resnet: Path, tmp_path: Path) -> None:
    steps = {**ADAPT, "adapt": {"steps": 3, "batch_size": 4, "lr_masks": 0.2}}
    asked = {"select": {"decompose": ["*.convolution.weight"]}}
    record = adarank.merge_recipe(load_recipe(recipe(resnet, **steps)), tmp_path / "out")
    adarank.merge_recipe(load_recipe(recipe(resnet, **steps, **asked)), tmp_path / "asked")
    masked = {"merge_method": "masked", "parameters": {"masks": str(tmp_path / "out" / FILE)}}
    adarank.merge_recipe(load_recipe(recipe(resnet, **masked)), tmp_path / "again")
    for same in ("asked", "again"):
        other = weights(tmp_path / same)
        assert all(torch.equal(tensor, other[name]) for name, tensor in weights(tmp_path / "out").items())
    kernels = [row for row in record["plan"]["tensors"].values() if len(row["shape"]) == 4]
    assert {(row["action"], row["reason"].split(":")[0]) for row in kernels} == {("decompose", "kernel of a convolution")}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "change"),
    [
        ("resnet", {"select": {"scale": "*.weight"}}),
        ("resnet", {"adapt": {"preset": "paper"}}),
        ("resnet", {"parameters": {"learn_masks": False}}),
        ("resnet", {"merge_method": "cart", "adapt": None}),
        ("resnet", {"merge_method": "adamerging"}),
        ("vit", {}),
        ("convnext", {}),
    ],
)
def test_kernels_stay_scaled_elsewhere(architecture: str, change: dict[str, Any], tmp_path: Path) -> None:
    given = {"merge_method": "adarank", "adapt": {"steps": 2, "batch_size": 4}, **change}
    given = {key: value for key, value in given.items() if value is not None}
    network = adarank.open_job(load_recipe(recipe(make_zoo(tmp_path, architecture), **given))).network
    assert {network.choices[n].action for n, info in network.tensors.items() if len(info.shape) == 4} == {"scale"}


def test_what_surgery_is_put_on_decomposes_kernels_as_alone(resnet: Path) -> None:
    adapt = {"steps": 2, "batch_size": 4}
    starts = {"decompose": {"merge_method": "adarank", "adapt": adapt}, "scale": {"merge_method": "task_arithmetic"}}
    for action, start in starts.items():
        given = {"merge_method": "surgery", "parameters": {"start": start}, "adapt": adapt}
        network = adarank.open_job(load_recipe(recipe(resnet, **given))).network
        actions = {network.choices[n].action for n, info in network.tensors.items() if len(info.shape) == 4}
        assert actions == {action}
    for start in ("adarank", {"merge_method": ["adarank"]}, {"merge_method": "adarank", "parameters": 3}):
        with pytest.raises(RecipeError, match="start"):
            adarank.open_job(load_recipe(recipe(resnet, merge_method="surgery", parameters={"start": start})))


@pytest.mark.parametrize("pattern", ["*embedder*", "*encoder*"])  # few of the kernels, and nearly all
def test_a_pattern_for_some_kernels_leaves_the_others(resnet: Path, pattern: str) -> None:
    def actions(**change: Any) -> dict[str, str]:
        given = {"merge_method": "adarank", "adapt": {"steps": 2, "batch_size": 4}, **change}
        network = adarank.open_job(load_recipe(recipe(resnet, **given))).network
        return {n: network.choices[n].action for n, info in network.tensors.items() if len(info.shape) == 4}

    default = actions()
    assert set(default.values()) == {"decompose"}
    assert actions(select={"decompose": f"{pattern}.convolution.weight"}) == default
    scaled = actions(select={"scale": f"{pattern}.convolution.weight"})
    assert {n for n, action in scaled.items() if action == "scale"} == {n for n in default if fnmatchcase(n, f"{pattern}.convolution.weight")}  # fmt: skip
