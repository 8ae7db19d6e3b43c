"""SLERP and its kin, NearSwap, Arcee Fusion, Model Stock, SCE and CART by energy, with numpy in float64 as the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import adarank
from adarank.errors import RecipeError
from make import MATRICES, close, family

SHAPES = st.sampled_from([(6, 7), (11,), (3, 2, 4), ()])
Array = np.ndarray[Any, np.dtype[np.float64]]


def tensors(shape: tuple[int, ...], count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def rotated(a: Array, b: Array, t: float) -> Array:
    """The unit vector of `a` turned towards `b` by t of the angle, by Gram and Schmidt; lengths interpolated as SLERP does."""
    unit_a, unit_b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    cosine = unit_a @ unit_b
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arctan2(np.linalg.norm(unit_b - cosine * unit_a), cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


@given(SHAPES, st.integers(0, 10**6), st.floats(-0.5, 1.5))
def test_slerp_turns_each_tensor_as_one_vector(shape: tuple[int, ...], seed: int, t: float) -> None:
    a, b = tensors(shape, 2, seed)
    found = adarank.merge({"w": a}, {"x": {"w": b}}, "slerp", {"t": t})["w"]
    wanted = rotated(a.double().numpy().ravel(), b.double().numpy().ravel(), t).reshape(shape)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-5)


@given(SHAPES, st.integers(0, 10**6))
def test_slerp_ends_at_its_ends_and_keeps_the_length_of_equals(shape: tuple[int, ...], seed: int) -> None:
    a, b = tensors(shape, 2, seed)
    b = b * a.norm() / b.norm()
    base, experts = {"w": a}, {"x": {"w": b}}
    for t, end in ((0.0, a), (1.0, b)):
        torch.testing.assert_close(adarank.merge(base, experts, "slerp", {"t": t})["w"], end, rtol=1e-5, atol=1e-6)
    if len(shape) > 1:
        half = adarank.merge(base, experts, "slerp", {"t": 0.5})["w"]
        torch.testing.assert_close(half.norm(), a.norm(), rtol=1e-4, atol=0)


def test_slerp_from_a_tensor_of_zeros_is_no_error() -> None:
    found = adarank.merge({"w": torch.zeros(3)}, {"x": {"w": torch.ones(3)}}, "slerp", {"t": 0.5})["w"]
    torch.testing.assert_close(found, torch.full((3,), float(np.sin(np.pi / 4))))


def test_slerps_t_may_run_over_the_layers() -> None:
    a, b = tensors((4, 4), 2, 0)
    base, experts = ({f"layer.{i}.w": x.clone() for i in range(2)} for x in (a, b))
    found = adarank.merge(base, {"x": experts}, "slerp", {"t": [0.0, 1.0]})
    torch.testing.assert_close(found, {"layer.0.w": a, "layer.1.w": b}, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "count", "parameters"), [
    ("slerp", 2, {"t": 0.5}), ("nuslerp", 1, {}), ("nuslerp", 3, {}), ("model_stock", 1, {}),
    ("nearswap", 2, {"t": 0.5}), ("arcee_fusion", 2, {}),
])  # fmt: skip
def test_a_wrong_number_of_experts_is_refused(name: str, count: int, parameters: dict[str, Any]) -> None:
    base, experts = family(count)
    with pytest.raises(RecipeError, match=f"{name}.* got (one|{count})"):
        adarank.merge(base, experts, name, parameters)


@pytest.mark.parametrize("name", ["slerp", "nearswap"])
def test_a_share_that_must_be_given_is_missed(name: str) -> None:
    base, experts = family(1)
    with pytest.raises(RecipeError, match="t: Field required"):
        adarank.merge(base, experts, name)


@given(
    st.integers(0, 10**6),
    st.floats(0.1, 2),
    st.floats(0.1, 2),
    st.booleans(),
    st.sampled_from(["flat", "last", "first"]),
)
def test_nuslerp_turns_task_vectors_or_models(seed: int, u: float, v: float, with_base: bool, along: str) -> None:
    base, a, b = tensors((6, 7), 3, seed)
    settings = {"nuslerp_flatten": along == "flat", "nuslerp_row_wise": along == "first", "weight": {"a": u, "b": v}}
    found = adarank.merge({"w": base} if with_base else None, {"a": {"w": a}, "b": {"w": b}}, "nuslerp", settings)["w"]
    start = base.double().numpy() if with_base else np.zeros((6, 7))
    x, y = (m.double().numpy() - start for m in (a, b))
    if along == "flat":
        wanted = rotated(x.ravel(), y.ravel(), v / (u + v)).reshape(6, 7)
    else:
        x, y = (x.T, y.T) if along == "first" else (x, y)
        rows = np.stack([rotated(p, q, v / (u + v)) for p, q in zip(x, y, strict=True)])
        wanted = rows.T if along == "first" else rows
    np.testing.assert_allclose(found.numpy(), start + wanted, rtol=1e-3, atol=1e-4)


def test_nuslerp_of_opposite_task_vectors_is_finite_and_linear() -> None:
    base, a = torch.zeros(3, 4), torch.arange(1.0, 13).reshape(3, 4)
    experts = {"a": {"w": a}, "b": {"w": -a}}
    found = adarank.merge({"w": base}, experts, "nuslerp", {"weight": {"a": 3.0, "b": 1.0}})["w"]
    torch.testing.assert_close(found, 0.5 * a)


def angles(point: Array, vectors: list[Array]) -> tuple[Array, list[Array]]:
    """The angles at which the vectors stand to a point, and the unit tangents that lead from it to them."""
    unit = point / np.linalg.norm(point)
    cosines = np.array([unit @ v / np.linalg.norm(v) for v in vectors])
    tangents = [v / np.linalg.norm(v) - c * unit for v, c in zip(vectors, cosines, strict=True)]
    return np.arccos(cosines), [t / np.linalg.norm(t) for t in tangents]


def experts_of(models: list[Tensor]) -> dict[str, dict[str, Tensor]]:
    return {f"t{i}": {"w": x} for i, x in enumerate(models)}


@given(SHAPES.filter(len), st.integers(2, 4), st.integers(0, 10**6))
def test_at_karchers_mean_the_ways_to_the_models_cancel(shape: tuple[int, ...], tasks: int, seed: int) -> None:
    """What makes a point the minimum of the summed squared angles; its length is the mean length."""
    shared, *near = tensors(shape, tasks + 1, seed)
    models = [shared + x for x in near]
    found = adarank.merge(None, experts_of(models), "karcher", {"max_iter": 200, "tol": 1e-7})["w"]
    flat = [x.double().numpy().ravel() for x in models]
    point = found.double().numpy().ravel()
    size, ways = angles(point, flat)
    assert np.linalg.norm(sum(a * way for a, way in zip(size, ways, strict=True))) < 1e-4 * tasks
    assert np.linalg.norm(point) == pytest.approx(np.mean([np.linalg.norm(x) for x in flat]), rel=1e-5)


def test_karcher_without_steps_is_the_mean_of_directions() -> None:
    models = tensors((6, 7), 3, 0)
    mean = sum(x / x.norm() for x in models)
    wanted = mean / mean.norm() * sum(x.norm() for x in models) / 3
    found = adarank.merge(None, experts_of(models), "karcher", {"max_iter": 0})["w"]
    torch.testing.assert_close(found, wanted)


def test_karcher_of_two_models_is_slerps_half_way() -> None:
    a, b = tensors((6, 7), 2, 0)
    b = b * a.norm() / b.norm()
    half = adarank.merge({"w": a}, {"b": {"w": b}}, "slerp", {"t": 0.5})["w"]
    torch.testing.assert_close(adarank.merge(None, experts_of([a, b]), "karcher")["w"], half, rtol=1e-5, atol=1e-6)


def test_karcher_gives_zeros_no_direction_opposites_the_first() -> None:
    a = tensors((3, 4), 1, 0)[0]
    zero = torch.zeros_like(a)
    for models, wanted in (([a, zero], a / 2), ([zero, zero], zero), ([a, -a], a), ([a, 3 * a], 2 * a), ([a], a)):
        torch.testing.assert_close(adarank.merge(None, experts_of(models), "karcher")["w"], wanted)


@given(SHAPES.filter(len), st.integers(2, 4), st.integers(0, 10**6), st.booleans(), st.booleans())
def test_multislerp_by_way_of_the_tangents(
    shape: tuple[int, ...], tasks: int, seed: int, with_base: bool, normalised: bool
) -> None:
    """As it is defined: to the tangent space at the mean direction, the weighted mean there, and back."""
    base, shared, *near = tensors(shape, tasks + 2, seed)
    models, given_weights = [base + shared + x for x in near], [0.3 + 0.4 * i for i in range(tasks)]
    settings = {"weight": {f"t{i}": w for i, w in enumerate(given_weights)}, "normalize_weights": normalised}
    found = adarank.merge({"w": base} if with_base else None, experts_of(models), "multislerp", settings)["w"]

    start = base.double().numpy().ravel() if with_base else np.zeros(base.numel())
    vectors = [x.double().numpy().ravel() - start for x in models]
    weights = np.array(given_weights) / (sum(given_weights) if normalised else 1)
    units = [v / np.linalg.norm(v) for v in vectors]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    way = sum(w * (u - (u @ mean) * mean) for w, u in zip(weights, units, strict=True))
    point = np.cos(np.linalg.norm(way)) * mean + np.sinc(np.linalg.norm(way) / np.pi) * way
    wanted = start + point * sum(w * np.linalg.norm(v) for w, v in zip(weights, vectors, strict=True))
    np.testing.assert_allclose(found.numpy().ravel(), wanted, rtol=1e-3, atol=1e-4)


def test_multislerp_without_a_direction_is_the_weighted_mean() -> None:
    base, a = tensors((3, 4), 2, 0)
    same = adarank.merge({"w": base}, experts_of([base, base, base]), "multislerp")["w"]
    assert torch.equal(same, base)
    weights = {"weight": {"t0": 1.0, "t1": 1.0}}
    apart = adarank.merge({"w": torch.zeros_like(a)}, experts_of([a, -3 * a]), "multislerp", weights | {"eps": 1e-6})[
        "w"
    ]
    torch.testing.assert_close(apart, -a)
    alone = adarank.merge({"w": base}, experts_of([a]), "multislerp", {"weight": 0.3})["w"]
    torch.testing.assert_close(alone, a)


def test_multislerps_weights_that_sum_to_zero_are_refused() -> None:
    base, experts = family(2)
    weights = {"weight": {"task0": 1.0, "task1": -1.0}}
    with pytest.raises(RecipeError, match=r"sum to 0.*normalize_weights: false"):
        adarank.merge(base, experts, "multislerp", weights)
    assert adarank.merge(base, experts, "multislerp", {**weights, "normalize_weights": False})


@given(SHAPES, st.integers(0, 10**6), st.floats(0, 2))
def test_nearswap_interpolates_by_nearness(shape: tuple[int, ...], seed: int, t: float) -> None:
    """Its author's form: the weight of the other model is min(1, t / |difference|)."""
    a, b = tensors(shape, 2, seed)
    found = adarank.merge({"w": a}, {"x": {"w": b}}, "nearswap", {"t": t})["w"]
    weight = np.minimum(1, t / np.abs((a - b).double().numpy()))
    np.testing.assert_allclose(
        found.numpy(), (1 - weight) * a.double().numpy() + weight * b.double().numpy(), atol=1e-5
    )


def softmax(rows: Array) -> Array:
    grown = np.exp(rows - rows.max(axis=-1, keepdims=True))
    return np.asarray(grown / grown.sum(axis=-1, keepdims=True))


@given(st.sampled_from([(6, 7), (40,), (3, 2, 4), (5, 4, 3, 2)]), st.integers(0, 10**6))
def test_arcee_fusion_takes_what_is_outstanding(shape: tuple[int, ...], seed: int) -> None:
    a, b = tensors(shape, 2, seed)
    found = adarank.merge({"w": a}, {"x": {"w": b}}, "arcee_fusion")["w"]
    p, q = (softmax(x.double().numpy()) for x in (b, a))
    importance = np.abs((b - a).double().numpy()) * (p * np.log(p / q)).sum(axis=-1, keepdims=True)
    low, median, high = np.quantile(importance, [0.25, 0.5, 0.75], method="lower")
    bound = median + 1.5 * (high - low)
    sure = np.abs(importance - bound) > 1e-4 * bound  # an entry at the threshold may fall to either side by rounding
    wanted = np.where(importance >= bound, b.numpy(), a.numpy())
    np.testing.assert_allclose(found.numpy()[sure], wanted[sure], atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 4), (), (0, 3)])
def test_arcee_fusion_of_rows_moved_as_a_whole_is_the_other(shape: tuple[int, ...]) -> None:
    """Softmax does not see a constant: all importances are 0, and all are as large as the threshold."""
    base, other = ({"w": made(shape), "b": made(2)} for made in (torch.zeros, torch.ones))
    merged = adarank.merge(base, {"x": other}, "arcee_fusion")
    assert torch.equal(merged["w"], torch.ones(shape))


@given(st.floats(0.0, 0.95), st.integers(2, 5), st.integers(0, 10**6))
def test_model_stock_of_equal_angles_has_the_papers_closed_form(cosine: float, tasks: int, seed: int) -> None:
    """Vectors √c·shared + √(1-c)·own, with all of these orthonormal, have cosine c pairwise."""
    generator = torch.Generator().manual_seed(seed)
    frame = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64))[0]
    offsets = [cosine**0.5 * frame[0] + (1 - cosine) ** 0.5 * frame[i + 1] for i in range(tasks)]
    base = torch.randn(4, 6, generator=generator)
    experts = {f"t{i}": {"w": (base + own.reshape(4, 6)).float()} for i, own in enumerate(offsets)}
    share = tasks * cosine / (1 + (tasks - 1) * cosine)
    wanted = base + share * torch.stack(offsets).mean(0).reshape(4, 6)
    torch.testing.assert_close(
        adarank.merge({"w": base}, experts, "model_stock")["w"], wanted.float(), rtol=1e-4, atol=1e-5
    )


@given(st.integers(2, 4), st.integers(0, 10**6), st.booleans())
def test_model_stock_by_numpy(tasks: int, seed: int, filter_wise: bool) -> None:
    base, shared, *own = tensors((5, 8), tasks + 2, seed)
    experts = [base + 0.1 * (shared + x) for x in own]
    found = adarank.merge(
        {"w": base}, {f"t{i}": {"w": x} for i, x in enumerate(experts)}, "model_stock", {"filter_wise": filter_wise}
    )["w"]
    offsets = np.stack([(x - base).double().numpy() for x in experts])
    rows = offsets if filter_wise else offsets.reshape(tasks, 1, -1)
    units = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    gram = np.einsum("arx,brx->rab", units, units)
    cosine = (gram.sum(axis=(1, 2)) - tasks) / (tasks * (tasks - 1))
    share = (tasks * cosine / (1 + (tasks - 1) * cosine))[:, None]
    np.testing.assert_allclose(
        (found - base).numpy(), share * offsets.mean(axis=0), atol=2e-4 * max(1, np.abs(share).max())
    )


def test_model_stocks_angle_is_exact_on_large_tensors() -> None:
    a, b = (torch.randn(2000, 2000, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    b = a + 0.1 * b
    x, y = (m.flatten().double() for m in (a, b))
    cosine = float(x @ y / (x @ x * (y @ y)).sqrt())
    found = adarank.merge({"w": torch.zeros_like(a)}, {"a": {"w": a}, "b": {"w": b}}, "model_stock")["w"]
    torch.testing.assert_close(found, 2 * cosine / (1 + cosine) * (a + b) / 2, rtol=1e-5, atol=1e-5)


def test_model_stock_of_equal_and_of_orthogonal_experts() -> None:
    base, experts = family(1)
    twice = {"a": experts["task0"], "b": experts["task0"]}
    close(adarank.merge(base, twice, "model_stock"), experts["task0"])
    apart = {"a": {"w": torch.tensor([1.0, 0, 0])}, "b": {"w": torch.tensor([0, 2.0, 0])}}
    assert torch.equal(adarank.merge({"w": torch.zeros(3)}, apart, "model_stock")["w"], torch.zeros(3))


def sce(base: Array, experts: list[Array], share: float) -> Array:
    """Entry by entry, with a full sort of the variances."""
    vectors = np.stack([x - base for x in experts]).reshape(len(experts), -1)
    if share < 1:
        variance = vectors.var(axis=0).astype(np.float32)
        order = sorted(range(variance.size), key=lambda i: (-variance[i], i))
        chosen = order[: int(np.float32((variance > 0).sum()) * np.float32(share))]
        vectors = np.where(np.isin(np.arange(variance.size), chosen), vectors, 0)
    weights = (vectors**2).mean(axis=1)
    weights = weights / weights.sum() if weights.sum() >= 1e-6 else np.full(len(experts), 1 / len(experts))
    out = []
    for column in vectors.T:
        sign = 1 if column.sum() >= 0 else -1
        agree = np.sign(column) == sign
        out.append((weights * column)[agree].sum() / max(weights[agree].sum(), 1e-6))
    return base + np.array(out).reshape(base.shape)


@given(SHAPES, st.integers(1, 4), st.integers(0, 10**6), st.sampled_from([0.1, 0.5, 0.7, 1.0]))
def test_sce_by_numpy(shape: tuple[int, ...], tasks: int, seed: int, share: float) -> None:
    base, *experts = tensors(shape, tasks + 1, seed)
    found = adarank.merge(
        {"w": base}, {f"t{i}": {"w": x} for i, x in enumerate(experts)}, "sce", {"select_topk": share}
    )["w"]
    wanted = sce(base.double().numpy(), [x.double().numpy() for x in experts], share)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "parameters"), [
    ("model_stock", {}), ("sce", {"select_topk": 0.5}), ("nuslerp", {}), ("karcher", {}), ("multislerp", {}), ("ram", {}),
    ("ramplus_tl", {}),
])  # fmt: skip
def test_the_order_of_the_tasks_is_irrelevant(name: str, parameters: dict[str, Any]) -> None:
    base, experts = family(2 if name == "nuslerp" else 4)
    turned = dict(reversed(experts.items()))
    close(adarank.merge(base, experts, name, parameters), adarank.merge(base, turned, name, parameters))


@given(st.floats(0.05, 0.99), st.integers(0, 10**6))
def test_cart_by_energy_keeps_the_fewest_components_that_hold_it(energy: float, seed: int) -> None:
    base, experts = family(3, seed)
    found = adarank.merge(base, experts, "cart", {"energy": energy})
    for name in MATRICES:
        stack = np.stack([own[name].double().numpy() for own in experts.values()])
        wanted = stack.mean(axis=0)
        for delta in stack - stack.mean(axis=0):
            u, s, vh = np.linalg.svd(delta, full_matrices=False)
            held = [(s[:k] ** 2).sum() / (s**2).sum() for k in range(len(s) + 1)]
            k = next(k for k, share in enumerate(held) if share >= energy)
            wanted = wanted + (u[:, :k] * s[:k]) @ vh[:k]
        np.testing.assert_allclose(found[name].numpy(), wanted, atol=1e-4)


def test_cart_of_all_energy_is_the_average_and_given_once() -> None:
    base, experts = family(3)
    close(adarank.merge(base, experts, "cart", {"energy": 1.0}), adarank.merge(base, experts, "average"))
    with pytest.raises(RecipeError, match=r"rank \(0\.1\) and energy \(0\.9\).*Give one"):
        adarank.merge(base, experts, "cart", {"rank": 0.1, "energy": 0.9})
