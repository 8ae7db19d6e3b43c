"""Identities that tie the data-free methods to plain formulas and to each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adarank.alignment.selection import Select
from adarank.errors import CheckpointError, RecipeError
from adarank.io.checkpoint import file_sha256
from adarank.io.writer import write_checkpoint
from adarank.methods import CART, Linear, Method, SVDk, TaskArithmetic, WeightAverage, merge_tensors
from adarank.methods.per_tensor import TensorWeights
from adarank.settings import parse
from make import (
    BUFFER,
    MATRICES,
    SHAPES,
    State,
    close,
    family,
    floats,
    identical,
    masked,
    merged,
    network,
    on_disk,
    same,
)

LAM = 0.37
METHODS: dict[str, Method] = {
    "average": WeightAverage(),
    "linear": Linear(),
    "task_arithmetic": TaskArithmetic(scale=LAM),
    "svd_k": SVDk(rank=0.5, scale=LAM),
    "cart": CART(rank=0.5, scale=1.7),
}
Experts = Mapping[str, State]


def each(base: State, formula: Callable[[str], Tensor]) -> State:
    """`formula` for every float tensor, and the base's buffer."""
    return {n: base[n] if n == BUFFER else formula(n).double() for n in base}


def mean(experts: Experts, name: str) -> Tensor:
    return torch.stack([own[name].double() for own in experts.values()]).mean(0)


def cut(delta: Tensor, share: float) -> Tensor:
    """The best approximation of a share of the rank, by numpy in float64."""
    flat = delta.double().reshape(delta.shape[0], -1).numpy()
    u, s, vh = np.linalg.svd(flat, full_matrices=False)
    k = max(1, math.floor(share * len(s) + 1e-9))
    return torch.from_numpy((u[:, :k] * s[:k]) @ vh[:k]).reshape(delta.shape)


@given(st.integers(1, 5), st.integers(0, 10**6), st.sampled_from([1e-3, 1.0, 1e3]))
def test_average_is_the_mean_of_the_experts(tasks: int, seed: int, scale: float) -> None:
    base, experts = family(tasks, seed, scale=scale)
    found = merged(WeightAverage(), network(base, experts))
    close(found, each(base, lambda n: mean(experts, n)), atol=1e-6 * scale)


@given(st.integers(1, 5), st.integers(0, 10**6))
def test_linear_without_weights_is_the_average(tasks: int, seed: int) -> None:
    base, experts = family(tasks, seed)
    close(merged(Linear(), network(base, experts)), merged(WeightAverage(), network(base, experts)))


@given(st.lists(st.floats(0.1, 3), min_size=3, max_size=3), st.booleans())
def test_linear_is_the_weighted_sum(weights: list[float], normalize: bool) -> None:
    base, experts = family(3)
    net = network(base, experts)
    method = Linear(normalize=normalize, weight=TensorWeights(dict(zip(experts, weights, strict=True)), net.merged()))
    divisor = sum(weights) if normalize else 1.0
    wanted = each(base, lambda n: sum(w * own[n].double() for w, own in zip(weights, experts.values(), strict=True)) / divisor)  # type: ignore[arg-type]  # fmt: skip
    close(merged(method, net), wanted)


def test_linear_needs_no_base() -> None:
    base, experts = family(3)
    close(merged(Linear(), network(None, experts)), merged(Linear(), network(base, experts)))


@pytest.mark.parametrize("weights", [(1.0, -1.0, 0.0), (0.0, 0.0, 0.0)])
def test_weights_that_sum_to_zero_are_refused(weights: tuple[float, ...]) -> None:
    base, experts = family(3)
    net = network(base, experts)
    given_weights = TensorWeights(dict(zip(experts, weights, strict=True)), net.merged())
    with pytest.raises(RecipeError, match="sum to 0"):
        Linear(weight=given_weights).check(net)
    Linear(weight=given_weights, normalize=False).check(net)


def test_weights_that_sum_to_zero_in_one_layer_name_it() -> None:
    base, experts = family(2)
    net = network(base, experts)
    weights = TensorWeights({"task0": [{"filter": "layer.1", "value": -1.0}, 1.0]}, net.merged())
    with pytest.raises(RecipeError, match=r"layer\.1\.dense"):
        Linear(weight=weights).check(net)


def test_a_filter_weighs_the_tensors_whose_name_holds_it() -> None:
    base, experts = family(2)
    net = network(base, experts)
    weights = TensorWeights({"task0": [{"filter": "bias", "value": 3.0}, {"value": 1.0}]}, net.merged())
    found = merged(Linear(weight=weights), net)

    def formula(name: str) -> Tensor:
        own = 3.0 if "bias" in name else 1.0
        return (own * experts["task0"][name].double() + experts["task1"][name].double()) / (own + 1)

    close(found, each(base, formula))


@pytest.mark.parametrize(("layer", "values", "wanted"), [
    (0, [0, 1], 0.0), (1, [0, 1], 0.25), (4, [0, 1], 1.0), (2, [0, 1], 0.5), (1, [0, 4, 8], 2.0), (3, [0, 4, 2], 3.0),
    (2, [5], 5.0), (2, [1, 7, 3], 7.0),
])  # fmt: skip
def test_a_gradient_is_interpolated_over_the_layers(layer: int, values: list[float], wanted: float) -> None:
    names = [f"encoder.layer.{i}.weight" for i in range(5)] + ["norm.weight"]
    weights = TensorWeights({"a": values}, names)
    assert weights.of("a", f"encoder.layer.{layer}.weight") == pytest.approx(wanted)
    assert weights.of("a", "norm.weight") == values[0]


@pytest.mark.parametrize("setting", ["half", True, None, [], {}, [{"filter": "x"}], [{"value": 1, "filtre": "x"}],
                                     [{"filter": "nothing", "value": 1}]])  # fmt: skip
def test_a_weight_that_is_none_is_refused_at_once(setting: Any) -> None:
    with pytest.raises(RecipeError, match="'a'"):
        TensorWeights({"a": setting}, ["w.0.weight"])


@given(st.integers(1, 4), st.integers(0, 10**6), st.floats(-2, 2))
def test_task_arithmetic_adds_the_scaled_task_vectors(tasks: int, seed: int, lam: float) -> None:
    base, experts = family(tasks, seed)
    wanted = each(base, lambda n: base[n].double() + lam * sum(e[n].double() - base[n].double() for e in experts.values()))  # type: ignore[arg-type]  # fmt: skip
    close(merged(TaskArithmetic(scale=lam), network(base, experts)), wanted)


@pytest.mark.parametrize(("normalize", "divisor"), [(False, 1.0), (True, 2.5)])
def test_task_arithmetic_with_weights_scales_each_task_vector(normalize: bool, divisor: float) -> None:
    base, experts = family(2)
    net = network(base, experts)
    weights = TensorWeights({"task0": 0.5, "task1": 2.0}, net.merged())
    found = merged(TaskArithmetic(weight=weights, normalize=normalize), net)

    def formula(name: str) -> Tensor:
        first, second = (experts[t][name].double() - base[name].double() for t in experts)
        return base[name].double() + (0.5 * first + 2.0 * second) / divisor

    close(found, each(base, formula))


def test_lambda_is_one_with_weights_and_three_tenths_without() -> None:
    base, experts = family(2)
    net = network(base, experts)
    ones = TensorWeights({"task0": 1.0, "task1": 1.0}, net.merged())
    close(merged(TaskArithmetic(weight=ones), net), merged(TaskArithmetic(scale=1.0), net))
    close(merged(TaskArithmetic(), net), merged(TaskArithmetic(scale=0.3), net))


@given(st.floats(0.05, 1), st.floats(-1, 2), st.integers(0, 10**6))
def test_svd_k_adds_the_cut_task_vectors(rank: float, lam: float, seed: int) -> None:
    base, experts = family(2, seed)

    def formula(name: str) -> Tensor:
        deltas = [own[name].double() - base[name].double() for own in experts.values()]
        return base[name].double() + lam * sum(cut(d, rank) if len(d.shape) == 2 else d for d in deltas)  # type: ignore[return-value]

    net = network(base, experts, Select(decompose=("embeddings.*",)))
    close(merged(SVDk(rank=rank, scale=lam), net), each(base, formula))


@given(st.floats(0.05, 1), st.floats(-1, 2), st.integers(0, 10**6))
def test_cart_adds_the_cut_deviations_from_the_mean(rank: float, lam: float, seed: int) -> None:
    base, experts = family(3, seed)

    def formula(name: str) -> Tensor:
        origin = mean(experts, name)
        if name not in MATRICES:
            return origin
        return origin + lam * sum(cut(own[name].double() - origin, rank) for own in experts.values())  # type: ignore[return-value]

    close(merged(CART(rank=rank, scale=lam), network(base, experts)), each(base, formula))


@given(st.integers(1, 5), st.floats(-3, 3), st.integers(0, 10**6))
def test_cart_at_full_rank_is_the_average(tasks: int, lam: float, seed: int) -> None:
    base, experts = family(tasks, seed)
    net = network(base, experts)
    close(merged(CART(rank=1.0, scale=lam), net), merged(WeightAverage(), net))


@given(st.integers(1, 4), st.floats(-2, 2), st.integers(0, 10**6))
def test_svd_k_at_full_rank_is_task_arithmetic(tasks: int, lam: float, seed: int) -> None:
    base, experts = family(tasks, seed)
    net = network(base, experts)
    close(merged(SVDk(rank=1.0, scale=lam), net), merged(TaskArithmetic(scale=lam), net))


ONE = {**METHODS, "task_arithmetic": TaskArithmetic(scale=1.0), "svd_k": SVDk(rank=1.0, scale=1.0),
       "cart": CART(rank=0.3, scale=1.0)}  # fmt: skip


@pytest.mark.parametrize("name", ONE)
def test_one_expert_with_lambda_one_is_returned(name: str) -> None:
    base, experts = family(1)
    close(merged(ONE[name], network(base, experts)), experts["task0"])


@pytest.mark.parametrize("method", [TaskArithmetic(scale=0.0), SVDk(scale=0.0)])
def test_lambda_zero_is_the_base(method: Method) -> None:
    base, experts = family(3)
    assert same(merged(method, network(base, experts)), base)


@pytest.mark.parametrize("name", METHODS)
def test_experts_that_equal_the_base_give_the_base(name: str) -> None:
    base, _ = family(1)
    close(merged(METHODS[name], network(base, {"a": base, "b": base, "c": base})), base, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0), (2, 1, 0)])
def test_the_order_of_the_tasks_is_irrelevant(name: str, order: tuple[int, ...]) -> None:
    base, experts = family(3)
    shuffled = {f"task{t}": experts[f"task{t}"] for t in order}
    close(merged(METHODS[name], network(base, experts)), merged(METHODS[name], network(base, shuffled)))


@given(st.floats(-2, 2), st.integers(1, 3), st.integers(0, 10**6))
def test_all_ones_masks_about_the_base_are_task_arithmetic(lam: float, tasks: int, seed: int) -> None:
    base, experts = family(tasks, seed)
    net = network(base, experts)
    close(merged(masked(net, "pretrained", lam, 1.0), net), merged(TaskArithmetic(scale=lam), net))


@given(st.floats(0.05, 1), st.floats(-2, 2), st.integers(0, 10**6))
def test_top_masks_about_the_base_are_svd_k(share: float, lam: float, seed: int) -> None:
    base, experts = family(3, seed)
    net = network(base, experts)
    close(merged(masked(net, "pretrained", lam, share), net), merged(SVDk(rank=share, scale=lam), net))


@given(st.floats(0.05, 1), st.floats(-2, 2), st.integers(0, 10**6))
def test_top_masks_about_the_average_are_cart(share: float, lam: float, seed: int) -> None:
    base, experts = family(3, seed)
    net = network(base, experts)
    close(merged(masked(net, "average", lam, share), net), merged(CART(rank=share, scale=lam), net))


def test_decomposed_kernels_merge_as_their_flattened_matrices() -> None:
    base, experts = family(2)
    kernels = Select(decompose=("conv.weight",))
    flat = {t: {**own, "conv.weight": own["conv.weight"].flatten(1)} for t, own in experts.items()}
    flat_base = {**base, "conv.weight": base["conv.weight"].flatten(1)}
    for method in (SVDk(rank=0.4, scale=0.8), CART(rank=0.4, scale=0.8)):
        whole, matrix = merged(method, network(base, experts, kernels)), merged(method, network(flat_base, flat))
        assert whole["conv.weight"].shape == base["conv.weight"].shape
        torch.testing.assert_close(whole["conv.weight"].flatten(1), matrix["conv.weight"])


@pytest.mark.parametrize("name", METHODS)
def test_a_kept_tensor_is_the_bases_own(name: str) -> None:
    base, experts = family(3)
    found = merged(METHODS[name], network(base, experts, Select(keep=("layer.0.*",))))
    assert identical(found["layer.0.dense.weight"], base["layer.0.dense.weight"])
    assert identical(found[BUFFER], base[BUFFER])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", METHODS)
def test_every_dtype_is_merged_in_at_least_float32(name: str, dtype: torch.dtype) -> None:
    base, experts = family(3, dtype=dtype, spread=0.5)
    wide = {t: {n: v.double() if v.is_floating_point() else v for n, v in own.items()} for t, own in experts.items()}
    wide_base = {n: v.double() if v.is_floating_point() else v for n, v in base.items()}
    found = merged(METHODS[name], network(base, experts))
    wanted = merged(METHODS[name], network(wide_base, wide))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert all(found[n].dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for n in floats(found))
    assert all((found[n] - wanted[n]).abs().max() < tolerance for n in floats(found))


def test_float64_experts_are_averaged_in_float64() -> None:
    """Against plain float64 arithmetic: not through the code under test on both sides."""
    base, experts = family(3, dtype=torch.float64)
    net = network(base, experts)
    for method in (WeightAverage(), Linear()):
        found = merged(method, net)
        assert all((found[n] - mean(experts, n)).abs().max() < 1e-14 for n in floats(found)), method.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_a_merge_from_disk_is_the_merge_from_memory(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    base, experts, net = on_disk(tmp_path, 2, dtype)
    assert same(merged(METHODS[name], net), merged(METHODS[name], network(base, experts)))


@pytest.mark.parametrize("name", METHODS)
def test_a_merge_done_again_gives_the_same_bytes(tmp_path: Path, name: str) -> None:
    hashes = []
    for run in ("first", "second"):
        _, _, net = on_disk(tmp_path / run, 3, torch.float32)
        layout = {n: (info.shape, info.dtype) for n, info in net.tensors.items()}
        (file,) = write_checkpoint(tmp_path / run, layout, merge_tensors(METHODS[name], net))
        hashes.append(file_sha256(file))
    assert hashes[0] == hashes[1]


def test_a_nan_in_an_input_is_refused_with_key_and_file() -> None:
    base, experts = family(2)
    experts["task1"]["layer.0.dense.weight"][0, 0] = math.nan
    with pytest.raises(CheckpointError, match=r"file of task1.*layer\.0\.dense\.weight.* 1 NaN"):
        merged(WeightAverage(), network(base, experts))


def test_an_overflow_of_the_merge_is_refused() -> None:
    base, experts = family(2, scale=1e30)
    with pytest.raises(CheckpointError, match="task_arithmetic"):
        merged(TaskArithmetic(scale=1e30), network(base, experts))


@pytest.mark.parametrize(("kind", "values", "hint"), [
    (CART, {"rnk": 0.1}, "Did you mean 'rank'"), (SVDk, {"lamda": 0.1}, "Did you mean 'lambda'"),
    (Linear, {"normalise": True}, "Did you mean 'normalize'"), (CART, {"rank": 0}, "rank"), (CART, {"rank": 1.5}, "rank"),
    (SVDk, {"lambda": "much"}, "lambda"), (WeightAverage, {"rank": 0.5}, "unknown key"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused_with_a_hint(
    kind: type[Method], values: dict[str, Any], hint: str
) -> None:
    with pytest.raises(RecipeError, match=hint):
        parse(kind, values, "parameters")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", [CART, SVDk, TaskArithmetic])
def test_a_lambda_that_is_no_number_is_refused(kind: type[Method], value: float) -> None:
    with pytest.raises(RecipeError, match="lambda"):
        parse(kind, {"lambda": value}, "parameters")


def test_every_shape_of_the_fixture_is_merged() -> None:
    """Guards the other tests: their network has matrices, other floats and one kept buffer."""
    base, experts = family(2)
    net = network(base, experts)
    assert set(net.merged()) == set(SHAPES)
    assert {n for n in net.tensors if net.choices[n].action == "decompose"} == set(MATRICES)
