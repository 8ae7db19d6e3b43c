"""EMR, TALL-masks, TSV-C and CART-indexing: each task's weights against numpy, and what must hold whatever the numbers."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import adarank
from adarank.errors import RecipeError
from adarank.io.bits import packed_size, unpack
from adarank.io.bundle import WHOLE
from adarank.io.writer import layout_bytes
from adarank.methods import METHODS
from adarank.methods.task_aware.base import Site, TaskAwareMethod, in_memory, layouts, sites_of, task_parts
from make import BUFFER, MATRICES, SHAPES, State, close, family, identical, network

NAMES = [name for name, kind in METHODS.items() if issubclass(kind, TaskAwareMethod)]
EXACT: dict[str, dict[str, Any]] = {"emr": {}, "tall_masks": {}, "tsv_c": {"rank": 1.0}, "cart_indexing": {"rank": 1.0}}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
Array = np.ndarray[Any, np.dtype[np.float32]]


def vectors(base: State, experts: Mapping[str, State]) -> dict[str, dict[str, Array]]:
    """Task -> tensor name -> float32 task vector."""
    return {
        task: {name: (own[name].float() - base[name].float()).numpy() for name in SHAPES}
        for task, own in experts.items()
    }


def parts(base: State, experts: Mapping[str, State], method: TaskAwareMethod) -> tuple[Any, Any]:
    net = network(base, experts)
    return in_memory(method, net, sites_of(net))


def truncated(matrix: Array, count: int) -> Array:
    flat = matrix.reshape(matrix.shape[0], -1).astype(np.float64)
    u, s, vh = np.linalg.svd(flat, full_matrices=False)
    return ((u[:, :count] * s[:count]) @ vh[:count]).reshape(matrix.shape)


@pytest.mark.parametrize("name", NAMES)
@given(dtype=DTYPES, seed=st.integers(0, 10**6), spread=st.sampled_from([1e-4, 0.1, 3.0]))
def test_one_task_has_its_expert(name: str, dtype: torch.dtype, seed: int, spread: float) -> None:
    """Up to the rounding of W₀ + (W - W₀): each of the two operations errs by half a unit of its own result, and
    neither result is larger than |W₀| + |W|. What is written in fewer bits errs by half a unit of those too."""
    base, experts = family(1, seed, dtype, spread)
    found = adarank.merge_each(base, experts, name, EXACT[name])["task0"]
    for tensor in SHAPES:
        start, wanted = base[tensor].double(), experts["task0"][tensor].double()
        bound = 2.0**-23 * (start.abs() + wanted.abs()) + torch.finfo(dtype).eps * wanted.abs() * (
            dtype != torch.float32
        )
        assert found[tensor].dtype == dtype
        assert bool(((found[tensor].double() - wanted).abs() <= bound).all())


@pytest.mark.parametrize("name", NAMES)
def test_equal_experts_are_each_tasks_weights(name: str) -> None:
    base, experts = family(1)
    each = adarank.merge_each(base, dict.fromkeys("abc", experts["task0"]), name, EXACT[name])
    for found in each.values():
        for tensor in SHAPES:
            # TALL's sum of equal task vectors is three times one of them: it is made for tasks that differ
            wanted = base[tensor] + (3 if name == "tall_masks" else 1) * (experts["task0"][tensor] - base[tensor])
            torch.testing.assert_close(found[tensor], wanted, atol=1e-5, rtol=1e-5)


@given(tasks=st.integers(2, 5), seed=st.integers(0, 10**6), dtype=DTYPES)
def test_emr_is_its_definition(tasks: int, seed: int, dtype: torch.dtype) -> None:
    base, experts = family(tasks, seed, dtype)
    tau = vectors(base, experts)
    shared, own = parts(base, experts, METHODS["emr"]())  # type: ignore[arg-type]
    means = {task: [0.0, 0.0] for task in tau}
    for name in SHAPES:
        stack = np.stack([tau[task][name] for task in tau])
        positive = stack.astype(np.float64).sum(axis=0) > 0
        agree = np.where(positive, stack > 0, stack < 0)
        unified = np.where(positive, 1, -1) * np.where(agree, np.abs(stack), 0).max(axis=0)
        assert np.array_equal(shared.of(name)["unified"].numpy(), unified)
        for number, task in enumerate(tau):
            assert np.array_equal(unpack(own[task].of(name)["mask"], SHAPES[name]).numpy(), agree[number])
            means[task][0] += np.abs(stack[number]).mean(dtype=np.float64)
            means[task][1] += np.abs(unified * agree[number]).mean(dtype=np.float64)
    each = adarank.merge_each(base, experts, "emr")
    for number, task in enumerate(tau):
        rescaler = means[task][0] / means[task][1]
        assert float(own[task].of()["rescaler"]) == pytest.approx(rescaler, rel=1e-6)
        for name in SHAPES:
            mask = unpack(own[task].of(name)["mask"], SHAPES[name]).numpy()
            wanted = base[name].double().numpy() + rescaler * mask * shared.of(name)["unified"].double().numpy()
            tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
            np.testing.assert_allclose(each[task][name].double().numpy(), wanted, rtol=tolerance, atol=tolerance)
        assert number < tasks


def test_emr_by_hand() -> None:
    """Where task vectors cancel the negative sign is taken; ρ sums means of tensors, whatever their sizes."""
    base = {"w": torch.zeros(4), "v": torch.zeros(1)}
    experts = {
        "a": {"w": torch.tensor([1.0, -1.0, 2.0, 0.0]), "v": torch.tensor([6.0])},
        "b": {"w": torch.tensor([-1.0, 1.0, 3.0, 0.0]), "v": torch.tensor([-2.0])},
    }
    each = adarank.merge_each(base, experts, "emr")
    # u = (-1, -1, 3, 0) and 6; a: masks 0110 and 1, ρ = (1 + 6) / (1 + 6); b: masks 1010 and 0, ρ = (5/4 + 2) / (1 + 0)
    assert torch.allclose(each["a"]["w"], torch.tensor([0.0, -1.0, 3.0, 0.0]))
    assert torch.allclose(each["a"]["v"], torch.tensor([6.0]))
    assert torch.allclose(each["b"]["w"], 3.25 * torch.tensor([-1.0, 0.0, 3.0, 0.0]))
    assert torch.equal(each["b"]["v"], torch.zeros(1))


def test_emr_of_an_expert_that_is_the_base_is_the_base() -> None:
    base, experts = family(1)
    close(adarank.merge_each(base, {**experts, "same": base}, "emr")["same"], base, atol=0)


@given(tasks=st.integers(1, 4), seed=st.integers(0, 10**6), dtype=DTYPES)
def test_tall_masks_are_their_definition(tasks: int, seed: int, dtype: torch.dtype) -> None:
    base, experts = family(tasks, seed, dtype)
    tau = vectors(base, experts)
    tall = dict(zip(tau, [0.2, 0.4, 0.6, 1.0], strict=False))
    each = adarank.merge_each(base, experts, "tall_masks", {"lambda_mask": tall})
    wrong = 0
    for name in SHAPES:
        total = sum(tau[task][name].astype(np.float64) for task in tau)
        for task in tau:
            mask = np.abs(tau[task][name]) > tall[task] * np.abs(total - tau[task][name])
            wanted = base[name].double().numpy() + mask * total
            tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
            wrong += (~np.isclose(each[task][name].double().numpy(), wanted, rtol=tolerance, atol=tolerance)).sum()
    assert wrong <= 1  # an entry on the edge of a mask may fall to either side by rounding


@pytest.mark.parametrize("tall", [0.0, 1e-20])
def test_without_a_threshold_a_tall_mask_has_what_the_task_moved(tall: float) -> None:
    base, experts = family(3)
    for number, own in enumerate(experts.values()):
        for name in SHAPES:
            own[name].view(-1)[number::2] = base[name].view(-1)[number::2]
    _, own_parts = parts(base, experts, METHODS["tall_masks"](lambda_mask=tall))  # type: ignore[arg-type]
    for task, own in experts.items():
        for name, shape in SHAPES.items():
            assert torch.equal(unpack(own_parts[task].of(name)["mask"], shape), own[name] != base[name])


@pytest.mark.parametrize("rank", [None, 0.5])
@given(tasks=st.integers(2, 6), seed=st.integers(0, 10**6))
def test_tsv_c_keeps_the_top_components_of_each_task(rank: float | None, tasks: int, seed: int) -> None:
    base, experts = family(tasks, seed)
    tau = vectors(base, experts)
    each = adarank.merge_each(base, experts, "tsv_c", {} if rank is None else {"rank": rank})
    for task, found in each.items():
        for name in SHAPES:
            count = max(1, int(min(SHAPES[name]) * (rank or 1 / tasks) + 1e-9)) if name in MATRICES else None
            moved = tau[task][name] if count is None else truncated(tau[task][name], count)
            np.testing.assert_allclose(found[name].numpy(), base[name].numpy() + moved, atol=2e-5)


@given(tasks=st.integers(2, 4), seed=st.integers(0, 10**6))
def test_cart_indexing_at_full_rank_is_each_expert(tasks: int, seed: int) -> None:
    _, experts = family(tasks, seed)
    each = adarank.merge_each(None, experts, "cart_indexing", {"rank": 1.0})
    for task, own in experts.items():
        close(each[task], own)


@pytest.mark.parametrize("tasks", [2, 6])
def test_cart_indexing_cuts_the_deviation_from_the_average(tasks: int) -> None:
    _, experts = family(tasks)
    each = adarank.merge_each(None, experts, "cart_indexing", {"rank": 0.25, "lambda": 1.3})
    for name in SHAPES:
        mean = np.mean([own[name].double().numpy() for own in experts.values()], axis=0)
        for task, own in experts.items():
            deviation = own[name].double().numpy() - mean
            moved = truncated(deviation, max(1, min(SHAPES[name]) // 4)) if name in MATRICES else deviation
            np.testing.assert_allclose(each[task][name].numpy(), mean + 1.3 * moved, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_tasks_is_irrelevant(name: str) -> None:
    base, experts = family(4)
    one = adarank.merge_each(base, experts, name)
    other = adarank.merge_each(base, dict(reversed(experts.items())), name)
    for task in experts:
        close(one[task], other[task], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_is_the_bases_for_every_task(name: str) -> None:
    base, experts = family(2)
    experts["task0"][BUFFER] = experts["task0"][BUFFER] + 1  # integers that differ are kept only if a recipe says so
    each = adarank.merge_each(base, experts, name, select=adarank.Select(keep=("layer.0.*", BUFFER)))
    for found in each.values():
        assert identical(found[BUFFER], base[BUFFER])
        assert identical(found["layer.0.dense.weight"], base["layer.0.dense.weight"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tasks", [1, 2, 7])
def test_layouts_are_what_comes(name: str, dtype: torch.dtype, tasks: int) -> None:
    net = network(*family(tasks, dtype=dtype))
    method, sites = METHODS[name](), sites_of(net)
    assert isinstance(method, TaskAwareMethod)
    shared, own = layouts(method, sites, net.tasks)
    came: dict[str | None, dict[str, tuple[int, ...]]] = {None: {}, **{task: {} for task in net.tasks}}
    for task, key, tensor in task_parts(method, net, sites):
        came[task][key] = tuple(tensor.shape)
    for task, layout in {None: shared, **own}.items():
        assert [(key, shape) for key, (shape, _) in layout.items()] == list(came[task].items())


def test_masks_take_a_bit_per_entry() -> None:
    net = network(*family(3))
    for name in ("emr", "tall_masks"):
        _, own = layouts(METHODS[name](), sites_of(net), net.tasks)  # type: ignore[arg-type]
        bits = sum(packed_size(torch.Size(SHAPES[tensor]).numel()) for tensor in SHAPES)
        assert layout_bytes(own["task0"]) == bits + (4 if name == "emr" else 0)


@pytest.mark.parametrize("name", ["tsv_c", "cart_indexing"])
@given(
    rows=st.integers(2, 40),
    columns=st.integers(2, 40),
    tasks=st.integers(1, 9),
    rank=st.sampled_from([0.05, 0.2, 0.6, 1.0]),
)
def test_factors_are_stored_where_they_take_less_room(
    name: str, rows: int, columns: int, tasks: int, rank: float
) -> None:
    method = METHODS[name](rank=rank)
    assert isinstance(method, TaskAwareMethod)
    slots = method.slots(Site("w", (rows, columns), torch.float32, torch.float32, "decompose", tasks))
    stored = layout_bytes(slots.shared) + tasks * layout_bytes(slots.per_task)
    k = max(1, int(rank * min(rows, columns) + 1e-9))
    assert stored == 4 * min(tasks * rows * columns, rows * columns + tasks * k * (rows + columns + 1))
    assert (WHOLE in slots.per_task) == (not slots.shared)


def test_negative_variances_are_refused() -> None:
    def model(*values: float) -> State:
        return {"bn.weight": torch.ones(2), "bn.running_var": torch.tensor(values)}

    experts = {"a": model(0.1, 1.0), "b": model(0.1, 1.0)}
    with pytest.raises(RecipeError, match=r"bn.running_var: 'tall_masks' gives task 'a' negative variances"):
        adarank.merge_each(model(1.0, 1.0), experts, "tall_masks", {"lambda_mask": 0.0})
    kept = adarank.merge_each(model(1.0, 1.0), experts, "tall_masks", select=adarank.Select(keep=("*.running_var",)))
    assert torch.equal(kept["a"]["bn.running_var"], torch.ones(2))


def test_one_model_and_one_per_task_are_told_apart() -> None:
    base, experts = family(2)
    with pytest.raises(RecipeError, match=r"'emr' gives each task weights of its own.*merge_each"):
        adarank.merge(base, experts, "emr")
    with pytest.raises(RecipeError, match=r"'cart' gives one model for all tasks.*adarank.merge\."):
        adarank.merge_each(base, experts, "cart")


def test_a_bad_mask_threshold_is_refused() -> None:
    base, experts = family(2)
    with pytest.raises(RecipeError, match="lambda_mask"):
        adarank.merge_each(base, experts, "tall_masks", {"lambda_mask": {"task0": -1, "task1": 0.2}})


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_held_between_parts(name: str) -> None:
    """When the parts of the next tensor come, those of the last one are gone if the caller let them go."""
    net = network(*family(3))
    alive: list[tuple[str, weakref.ref[Tensor]]] = []
    for _, key, tensor in task_parts(METHODS[name](), net, sites_of(net)):  # type: ignore[arg-type]
        here = key.partition(":")[2]
        assert not [before for before, ref in alive if before != here and ref() is not None]
        alive.append((here, weakref.ref(tensor)))
        del tensor
    assert len(alive) > len(SHAPES)
