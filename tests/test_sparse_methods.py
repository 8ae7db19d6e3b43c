"""mergekit's sparse merges and RAM against a plain, entry-by-entry reckoning in numpy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import adarank
from adarank.alignment.selection import Select
from adarank.errors import RecipeError
from adarank.methods import METHODS
from adarank.methods.sparse.base import SparseSum
from adarank.sparsify.drop import by_rank, largest, middle, noise, norm_ratio, smallest
from adarank.sparsify.threshold import kth_largest

FAMILY = [name for name, kind in METHODS.items() if issubclass(kind, SparseSum)]
RANDOM = ["dare_linear", "dare_ties", "della", "della_linear"]
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
Experts = Mapping[str, Mapping[str, Tensor]]
Array = np.ndarray[Any, np.dtype[np.float64]]


def problem(
    shape: tuple[int, ...], tasks: int, seed: int, coarse: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """A base and experts of one tensor; coarse ones differ by few distinct values, so that many magnitudes are equal."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(-16, 17, shape, generator=generator) / 16

    def moved() -> Tensor:
        if coarse:
            return base + torch.randint(-3, 4, shape, generator=generator) / 16
        return base + 0.1 * torch.randn(shape, generator=generator)

    return {"w": base.to(dtype)}, {f"t{i}": {"w": moved().to(dtype)} for i in range(tasks)}


def order(delta: Array, sign: int) -> list[int]:
    """Positions by magnitude, largest (sign -1) or smallest (1) first, of equals the first first."""
    flat = np.abs(delta.astype(np.float32)).ravel()
    return sorted(range(flat.size), key=lambda i: (sign * flat[i], i))


def mask(positions: list[int], shape: tuple[int, ...]) -> Array:
    found = np.zeros(int(np.prod(shape)))
    found[positions] = 1
    return found.reshape(shape)


def keep(name: str, delta: Array, density: float, more: Mapping[str, float], draw: Array) -> Array:
    """Which entries are kept, by sorting everything."""
    if name == "ties":
        return mask(order(delta, -1)[: max(1, int(density * delta.size))], delta.shape)
    if name.startswith("breadcrumbs"):
        count = int(density * delta.size)
        start = max(0, delta.size - count - int(more["gamma"] * delta.size))
        return mask(order(delta, 1)[start : start + count], delta.shape)
    if name.startswith("dare"):
        return (draw < density).astype(float)
    rows = delta.reshape(1, -1) if delta.ndim < 2 else delta
    probability = np.zeros_like(rows)
    for row, of in zip(rows, probability, strict=True):
        for rank, position in enumerate(order(row, 1)):
            of[position] = density + more["epsilon"] * (2 * rank / (len(row) - 1) - 1)
    return (draw < probability.reshape(delta.shape)).astype(float)


def expected(
    name: str, base: Mapping[str, Tensor], experts: Experts, weights: list[float], densities: list[float],
    settings: Mapping[str, Any], more: Mapping[str, float],
) -> Array:  # fmt: skip
    kind = METHODS[name].model_fields
    normalize, rescale = (settings.get(key, kind[key].default.plain()) for key in ("normalize", "rescale"))
    cuts = []
    for (task, own), density in zip(experts.items(), densities, strict=True):
        precision = torch.promote_types(own["w"].dtype, torch.float32)
        delta = (own["w"].to(precision) - base["w"].to(precision)).numpy().astype(float)
        if density < 1:
            kept = delta * keep(name, delta, density, more, noise(own["w"], 0, task, "w").numpy())
            if rescale and np.abs(kept).sum() > 1e-7:
                kept = kept * np.abs(delta).sum() / np.abs(kept).sum()
            delta = kept
        cuts.append(delta)
    out = base["w"].double().numpy().copy()
    for position in np.ndindex(out.shape):
        terms = [(w, w * cut[position]) for w, cut in zip(weights, cuts, strict=True)]
        if METHODS[name].elects:  # type: ignore[attr-defined]
            winner = 1 if sum(np.float32(v) for _, v in terms) >= 0 else -1
            terms = [(w, v) for w, v in terms if np.sign(v) == winner]
        divisor = sum(w for w, _ in terms) if normalize else 1.0
        out[position] += settings.get("lambda", 1.0) * sum(v for _, v in terms) / (divisor or 1.0)
    return out


@pytest.mark.parametrize("name", FAMILY)
@given(
    st.sampled_from([(7, 9), (31,), (3, 4, 2, 2)]), st.integers(1, 4), st.integers(0, 10**6), st.booleans(), DTYPES,
    st.lists(st.sampled_from([0.25, 0.4, 0.6, 1.0]), min_size=4, max_size=4), st.sampled_from([None, True, False]),
    st.sampled_from([None, True, False]),
)  # fmt: skip
def test_the_family_is_what_it_says_entry_by_entry(
    name: str, shape: tuple[int, ...], tasks: int, seed: int, coarse: bool, dtype: torch.dtype,
    densities: list[float], normalize: bool | None, rescale: bool | None,
) -> None:  # fmt: skip
    if name.startswith("della") and len(shape) > 2:
        shape = (8, 3)
    base, experts = problem(shape, tasks, seed, coarse, dtype)
    weights = [0.5, 1.0, 0.25, 2.0][:tasks]
    more = {"gamma": 0.1} if "bread" in name else {"epsilon": 0.2} if "della" in name else {}
    given_settings = {k: v for k, v in {"normalize": normalize, "rescale": rescale}.items() if v is not None}
    settings = {**given_settings, "lambda": 0.7}
    per_model = {
        "weight": dict(zip(experts, weights, strict=True)),
        "density": dict(zip(experts, densities, strict=False)),
    }
    found = adarank.merge({"w": base["w"]}, experts, name, {**settings, **more, **per_model})["w"]
    wanted = expected(name, base, experts, weights, densities[:tasks], settings, more)
    torch.testing.assert_close(found.double(), torch.from_numpy(wanted).to(dtype).double(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("name", FAMILY)
def test_nothing_cut_and_signs_alike_is_the_weighted_sum(name: str) -> None:
    base, experts = problem((5, 6), 3, 1)
    grown = {t: {"w": base["w"] + (own["w"] - base["w"]).abs()} for t, own in experts.items()}
    settings = {"weight": {"t0": 0.5, "t1": 2.0, "t2": 1.0}, "normalize": False}
    found = adarank.merge(base, grown, name, settings)
    torch.testing.assert_close(found, adarank.merge(base, grown, "task_arithmetic", settings))


@pytest.mark.parametrize("name", FAMILY)
def test_the_order_of_the_tasks_is_irrelevant(name: str) -> None:
    base, experts = problem((6, 8), 4, 2)
    parameters = {"density": 0.5}
    turned = dict(reversed(experts.items()))
    torch.testing.assert_close(
        adarank.merge(base, experts, name, parameters), adarank.merge(base, turned, name, parameters)
    )


@pytest.mark.parametrize("name", [*RANDOM, "dare", "dare_ties_merging"])
def test_what_is_dropped_depends_on_seed_task_and_tensor_alone(name: str) -> None:
    base, experts = problem((9, 9), 2, 3)
    pair, both = {**base, "a": base["w"] * 2}, {t: {**own, "a": own["w"] * 2} for t, own in experts.items()}
    cut = {} if name.startswith("dare_ties_m") or name == "dare" else {"density": 0.5}
    alone = adarank.merge(pair, both, name, {**cut, "seed": 4}, Select(keep=("a",)))["w"]
    if name != "dare_ties_merging":  # its threshold is the whole model's
        assert torch.equal(alone, adarank.merge(pair, both, name, {**cut, "seed": 4})["w"])
    assert torch.equal(alone, adarank.merge(pair, both, name, {**cut, "seed": 4}, Select(keep=("a",)))["w"])
    assert not torch.equal(alone, adarank.merge(pair, both, name, {**cut, "seed": 5}, Select(keep=("a",)))["w"])


def test_noise_is_uniform_and_differs_by_seed_task_and_tensor() -> None:
    like = torch.zeros(200, 200)
    drawn = [noise(like, *key) for key in ((0, "a", "w"), (1, "a", "w"), (0, "b", "w"), (0, "a", "v"), (0, "aw", ""))]
    for i, own in enumerate(drawn):
        assert abs(float(own.mean()) - 0.5) < 0.01
        assert abs(float((own < 0.2).float().mean()) - 0.2) < 0.01
        for other in drawn[:i]:
            assert abs(float(torch.corrcoef(torch.stack([own.flatten(), other.flatten()]))[0, 1])) < 0.03


def test_della_keeps_large_entries_more_often() -> None:
    row = torch.tensor([[0.1, -0.4, 0.2, -0.3, 0.5]])
    often = torch.stack([by_rank(row, 0.5, 0.3, seed, "t", "w")[0].float() for seed in range(2000)]).mean(0)
    torch.testing.assert_close(often, torch.tensor([0.2, 0.65, 0.35, 0.5, 0.8]), atol=0.06, rtol=0)


def test_ranks_of_long_rows_are_found_block_by_block() -> None:
    rows = torch.randn(300, 5000, generator=torch.Generator().manual_seed(0))
    whole = by_rank(rows, 0.5, 0.3, 0, "t", "w")
    draw = noise(rows, 0, "t", "w")
    for index in (0, 208, 209, 210, 299):
        rank = rows[index].abs().argsort().argsort() / 4999
        assert torch.equal(whole[index], draw[index] < 0.5 + 0.3 * (2 * rank - 1))


@given(st.lists(st.sampled_from([0.0, 0.5, -0.5, 1e-40, 3e38, -2.0, 1.5]), min_size=1, max_size=30), st.integers(0, 31))
def test_masks_keep_exactly_what_was_asked_the_first_of_equals(values: list[float], count: int) -> None:
    tensor, array = torch.tensor(values), np.array(values)
    for function, sign in ((largest, -1), (smallest, 1)):
        assert torch.equal(function(tensor, count), torch.from_numpy(mask(order(array, sign)[:count], array.shape) > 0))


def test_rescaling_is_exact_on_large_tensors() -> None:
    whole = torch.randn(4_000_000, generator=torch.Generator().manual_seed(0))
    part = whole * (whole.abs() > 1)
    assert norm_ratio(whole, part) == pytest.approx(
        float(whole.double().abs().sum() / part.double().abs().sum()), rel=1e-6
    )


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 40))
def test_breadcrumbs_keeps_its_share_whatever_gamma_is(density: float, gamma: float, size: int) -> None:
    assert int(middle(torch.randn(size), density, gamma).sum()) == int(density * size)


@given(st.integers(0, 10**6), st.integers(1, 500), st.sampled_from([1e-42, 1e-3, 1.0, 1e30]))
def test_the_kth_largest_is_that_of_a_sort(seed: int, size: int, scale: float) -> None:
    values = (torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale).abs()
    for rank in {1, (size + 1) // 2, size}:
        assert kth_largest(values, rank) == np.sort(values.numpy())[-rank]


@pytest.mark.parametrize(("name", "parameters", "part"), [
    ("ties", {"density": 1.5}, "density"), ("ties", {"density": {"t0": -0.1}}, "density"),
    ("ties", {"density": [0.5, 2.0]}, "density"), ("breadcrumbs", {"gamma": 2}, "gamma"), ("ties", {"gamma": 0.1}, "gamma"),
    ("della", {"density": 0.9}, "epsilon"), ("della_linear", {"density": 0.5, "epsilon": 0.5}, "Lower epsilon"),
    ("ties", {"lambda": "much"}, "lambda"), ("ties", {"density": [{"filter": "x"}]}, "density"),
])  # fmt: skip
def test_settings_out_of_range_are_refused_with_their_name(name: str, parameters: dict[str, Any], part: str) -> None:
    base, experts = problem((4, 4), 2, 0)
    with pytest.raises(RecipeError, match=part):
        adarank.merge({"layer.0.w": base["w"], "layer.1.w": base["w"]},
                      {t: {"layer.0.w": own["w"], "layer.1.w": own["w"]} for t, own in experts.items()}, name, parameters)  # fmt: skip


def test_density_and_lambda_run_over_layers_and_filters() -> None:
    base, experts = problem((6, 6), 2, 5)
    deep = {f"layer.{i}.w": base["w"].clone() for i in range(3)}  # one tensor under many names would be a tied one
    deep_experts = {t: {n: own["w"].clone() for n in deep} for t, own in experts.items()}
    density = {"t0": [0.2, 0.6], "t1": [{"filter": "layer.1", "value": 0.5}]}
    found = adarank.merge(deep, deep_experts, "ties", {"density": density, "lambda": [1.0, 0.0]})
    for i, (first, second, lam) in enumerate([(0.2, 1.0, 1.0), (0.4, 0.5, 0.5), (0.6, 1.0, 0.0)]):
        plain = adarank.merge(base, experts, "ties", {"density": {"t0": first, "t1": second}, "lambda": lam})["w"]
        torch.testing.assert_close(found[f"layer.{i}.w"], plain)


def test_switches_go_over_the_layers_in_steps_and_by_filter() -> None:
    """normalize is on where the first filter that fits says so, or the last step of a list up to the layer."""
    base = {f"layer.{i}.{part}": torch.zeros(3) for i in range(3) for part in ("up", "down")}
    experts = {task: {name: torch.full((3,), 1.0) for name in base} for task in "ab"}
    switch = [{"filter": "up", "value": True}, {"value": [False, True, False]}]
    for method in ("task_arithmetic", "dare_linear"):
        found = adarank.merge(base, experts, method, {"weight": 2.0, "normalize": switch})
        whole = {name: 1.0 if "up" in name or "1" in name else 4.0 for name in base}
        assert {name: float(tensor[0]) for name, tensor in found.items()} == whole
    with pytest.raises(RecipeError, match=r"parameters: normalize must be true or false, a list of these .* got 0\.5"):
        adarank.merge(base, experts, "task_arithmetic", {"normalize": 0.5})


def ram(base: Array, experts: list[Array], epsilon: float, r: float, alpha: float) -> Array:
    """Entry by entry; with r = 0 it is RAM."""
    vectors = [np.ravel(x - base) for x in experts]
    changed = [[t for t, v in enumerate(vectors) if abs(v[i]) > epsilon] for i in range(base.size)]
    out = np.ravel(base).copy()
    for i, who in enumerate(changed):
        if len(who) == 1:
            lone = sum(others == who for others in changed)
            shared = sum(who[0] in others for others in changed) - lone
            out[i] += (1 + r * min(shared / lone, alpha)) * vectors[who[0]][i]
        elif who:
            out[i] += sum(vectors[t][i] for t in who) / len(who)
    return out.reshape(base.shape)


@given(st.sampled_from([(6, 7), (11,), (3, 2, 4), ()]), st.integers(1, 4), st.integers(0, 10**6), DTYPES)
def test_ram_averages_over_those_that_changed_an_entry(
    shape: tuple[int, ...], tasks: int, seed: int, dtype: torch.dtype
) -> None:
    base, experts = problem(shape, tasks, seed, coarse=True, dtype=dtype)
    states = [own["w"].double().numpy() for own in experts.values()]
    given_numbers = {"epsilon": 0.1, "r": 0.7, "alpha": 1.5}
    for name, r, settings in (("ram", 0.0, {"epsilon": 0.1}), ("ramplus_tl", 0.7, given_numbers)):
        found = adarank.merge(base, experts, name, settings)["w"]
        wanted = torch.from_numpy(ram(base["w"].double().numpy(), states, 0.1, r, 1.5)).to(dtype)
        torch.testing.assert_close(found, wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_ram_of_changes_in_different_places_is_their_sum() -> None:
    base = {"w": torch.zeros(4, 3)}
    experts = {str(i): {"w": torch.zeros(4, 3).index_fill(0, torch.tensor(i), i + 1.0)} for i in range(4)}
    whole = adarank.merge(base, experts, "task_arithmetic", {"lambda": 1.0})["w"]
    assert torch.equal(adarank.merge(base, experts, "ram")["w"], whole)
    assert torch.equal(adarank.merge(base, experts, "ramplus_tl")["w"], whole)


@pytest.mark.parametrize("name", FAMILY)
def test_task_vectors_are_not_written_to(name: str) -> None:
    base, experts = problem((5, 5), 2, 6)
    method = METHODS[name](density=0.5)
    deltas = {t: own["w"] - base["w"] for t, own in experts.items()}
    before, origin = {t: d.clone() for t, d in deltas.items()}, base["w"].clone()
    method.merge_matrix("w", origin, deltas)
    assert torch.equal(origin, base["w"])
    assert all(torch.equal(before[t], deltas[t]) for t in deltas)
