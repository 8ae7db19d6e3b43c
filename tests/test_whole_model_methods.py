"""Merges that look at the whole model first (TIES-Merging, Consensus) and the papers' DARE, with numpy as the oracle."""

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
from adarank.alignment.align import align
from adarank.errors import RecipeError
from adarank.io.checkpoint import MemorySource
from adarank.methods import METHODS, CalibratedMethod, merge_tensors
from adarank.methods.calibrated.base import Statistics
from adarank.methods.task_aware.base import TaskAwareMethod, sites_of, task_parts
from adarank.sparsify.threshold import global_thresholds
from make import SHAPES, State, close, family, floats, network

WHOLE = [name for name, kind in METHODS.items() if kind.passes > 1 and not kind.in_use and not kind.data]
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
Array = np.ndarray[Any, np.dtype[np.float64]]


def coarse(tasks: int, seed: int) -> tuple[State, dict[str, State]]:
    """Task vectors of few distinct values, so that many are equal and many sums are exactly 0."""
    base, experts = family(tasks, seed)
    generator = torch.Generator().manual_seed(seed)
    for name in floats(base):
        base[name] = torch.zeros_like(base[name])
        for own in experts.values():
            own[name] = torch.randint(-3, 4, own[name].shape, generator=generator) / 8
    return base, experts


def flat(base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]]) -> Array:
    """(tasks, entries): all task vectors of the whole model, end to end."""
    rows = [
        np.concatenate([(own[n].float() - base[n].float()).numpy().ravel() for n in floats(base)])
        for own in experts.values()
    ]
    return np.stack(rows)


def entries(base: Mapping[str, Tensor], merged: Mapping[str, Tensor]) -> Array:
    """What was added to the base, end to end."""
    return np.concatenate([(merged[n].double() - base[n].double()).numpy().ravel() for n in floats(base)])


def trimmed(vectors: Array, density: float) -> Array:
    """The largest of each row by a full sort, and all that equal the smallest of them."""
    count = max(1, int(density * vectors.shape[1] + 1e-9))
    bounds = np.sort(np.abs(vectors), axis=1)[:, -count]
    return np.where(np.abs(vectors) >= bounds[:, None], vectors, 0)


def elected(vectors: Array, mean: bool) -> Array:
    winners = np.sign(vectors.astype(float).sum(axis=0))
    agree = (np.sign(vectors) == winners) & (vectors != 0)
    total = np.where(agree, vectors.astype(float), 0).sum(axis=0)
    return total / np.maximum(agree.sum(axis=0), 1) if mean else total


def merge(base: State, experts: Mapping[str, State], name: str, parameters: Mapping[str, Any]) -> State:
    wide = {n: t.float() if t.is_floating_point() else t for n, t in base.items()}
    return adarank.merge(wide, experts, name, parameters)


@given(st.integers(1, 4), st.integers(0, 10**6), st.floats(0.005, 1), DTYPES, st.booleans())
def test_the_global_threshold_is_that_of_a_sort(
    tasks: int, seed: int, density: float, dtype: torch.dtype, few: bool
) -> None:
    base, experts = coarse(tasks, seed) if few else family(tasks, seed, dtype)
    found = global_thresholds(network(base, experts), "pretrained", density, "cpu")
    vectors = flat(base, experts)
    count = max(1, int(density * vectors.shape[1] + 1e-9))
    assert list(found.values()) == np.sort(np.abs(vectors), axis=1)[:, -count].tolist()


@given(st.integers(1, 4), st.integers(0, 10**6), st.floats(0.005, 1), DTYPES, st.booleans(), st.booleans())
def test_ties_merging_is_the_papers_on_the_flattened_model(
    tasks: int, seed: int, density: float, dtype: torch.dtype, few: bool, mean: bool
) -> None:
    base, experts = coarse(tasks, seed) if few else family(tasks, seed, dtype)
    found = merge(
        base, experts, "ties_merging", {"density": density, "combine": "mean" if mean else "sum", "lambda": 0.7}
    )
    wanted = 0.7 * elected(trimmed(flat(base, experts), density), mean)
    np.testing.assert_allclose(entries(base, found), wanted, atol=1e-5)


def test_the_threshold_is_the_whole_models_and_not_each_tensors() -> None:
    base = {"a": torch.zeros(2, 5), "b": torch.zeros(2, 5)}
    expert = {"a": torch.arange(1.0, 11).reshape(2, 5), "b": torch.arange(101.0, 111).reshape(2, 5)}
    found = adarank.merge(base, {"t": expert}, "ties_merging", {"density": 0.5, "lambda": 1.0})
    assert torch.equal(found["a"], base["a"])
    assert torch.equal(found["b"], expert["b"])


def test_lambda_is_three_tenths_of_the_sum_and_one_of_the_mean() -> None:
    base, experts = family(3)
    for combine, lam in (("sum", 0.3), ("mean", 1.0)):
        given_lambda = merge(base, experts, "ties_merging", {"combine": combine, "lambda": lam})
        close(merge(base, experts, "ties_merging", {"combine": combine}), given_lambda)


def claims(vectors: Array, total: Array, tall: list[float]) -> Array:
    """How many tasks claim each entry, task by task and entry by entry."""
    counts = np.zeros(vectors.shape[1])
    for vector, factor in zip(vectors.astype(float), tall, strict=True):
        for position, (own, whole) in enumerate(zip(vector, total, strict=True)):
            counts[position] += abs(own) >= factor * abs(whole - own)
    return counts


@pytest.mark.parametrize("name", ["consensus_ta", "consensus_ties"])
@given(st.integers(2, 4), st.integers(0, 10**6), st.integers(0, 4))
def test_consensus_keeps_what_enough_tasks_claim(name: str, tasks: int, seed: int, agree: int) -> None:
    base, experts = family(tasks, seed)
    agree, tall = min(agree, tasks), [0.2, 0.5, 0.6, 1.0][:tasks]
    vectors = flat(base, experts)
    total = vectors.astype(float).sum(axis=0) if name == "consensus_ta" else elected(trimmed(vectors, 0.5), mean=False)
    kept = claims(vectors, total, tall) >= agree
    density = {"density": 0.5} if name == "consensus_ties" else {}
    parameters = {"tall": dict(zip(experts, tall, strict=True)), "agree": agree, "lambda": 0.9, **density}
    found = merge(base, experts, name, parameters)
    wrong = ~np.isclose(entries(base, found), np.where(kept, 0.9 * total, 0), atol=1e-5)
    assert wrong.sum() <= 1  # an entry on the edge of a claim may fall to either side by rounding


@pytest.mark.parametrize(("name", "whole"), [("consensus_ta", "task_arithmetic"), ("consensus_ties", "ties_merging")])
def test_consensus_of_no_task_is_the_whole_merge(name: str, whole: str) -> None:
    base, experts = family(3)
    close(merge(base, experts, name, {"agree": 0}), merge(base, experts, whole, {}))


@pytest.mark.parametrize("name", ["consensus_ta", "consensus_ties"])
def test_a_consensus_of_more_tasks_than_there_are_is_refused(name: str) -> None:
    base, experts = family(2)
    with pytest.raises(RecipeError, match="at most the number of experts, 2, got 3"):
        adarank.merge(base, experts, name, {"agree": 3})


def test_ties_merging_of_equal_signs_is_task_arithmetic() -> None:
    base, experts = family(3)
    grown = {
        t: {n: base[n] + (own[n] - base[n]).abs() if n in SHAPES else own[n] for n in own} for t, own in experts.items()
    }
    close(merge(base, grown, "ties_merging", {"density": 1.0}), merge(base, grown, "task_arithmetic", {}))


@pytest.mark.parametrize(("name", "plain"), [("dare", "task_arithmetic"), ("dare_ties_merging", "ties_merging")])
def test_dare_that_drops_nothing_changes_nothing(name: str, plain: str) -> None:
    base, experts = family(3)
    close(merge(base, experts, name, {"drop": 0.0}), merge(base, experts, plain, {}))


@pytest.mark.parametrize("drop", [0.3, 0.9])
def test_dares_mean_over_seeds_is_task_arithmetic(drop: float) -> None:
    """Each entry is τ/(1-p) with probability 1-p: mean τ, standard deviation |τ|·√(p/(1-p))."""
    base, experts, seeds = {"w": torch.zeros(6, 4)}, {"t": {"w": torch.arange(1.0, 25).reshape(6, 4)}}, 600
    runs = [adarank.merge(base, experts, "dare", {"drop": drop, "lambda": 1.0, "seed": s})["w"] for s in range(seeds)]
    whole = experts["t"]["w"]
    assert all(
        set((run / whole).unique().tolist()) <= {0.0, *(whole / (1 - drop) / whole).unique().tolist()}
        for run in runs[:20]
    )
    error = (torch.stack(runs).mean(0) - whole) / whole
    assert error.abs().max() < 5 * (drop / (1 - drop) / seeds) ** 0.5


@pytest.mark.parametrize("name", [*WHOLE, "dare", "consensus_ta"])
def test_the_order_of_the_tasks_is_irrelevant(name: str) -> None:
    base, experts = family(4)
    close(merge(base, experts, name, {}), merge(base, dict(reversed(experts.items())), name, {}))


@pytest.mark.parametrize("name", WHOLE)
def test_two_merges_at_once_keep_their_own_thresholds(name: str) -> None:
    method = METHODS[name]()
    first, second = network(*family(2, seed=1)), network(*family(2, seed=2, spread=10.0))
    alone = [dict(merge_tensors(method, net)) for net in (first, second)]
    pairs = list(zip(merge_tensors(method, first), merge_tensors(method, second), strict=True))
    for own, together in zip(alone, zip(*pairs, strict=True), strict=True):
        close(dict(together), own, atol=0)


def test_a_merge_in_progress_leaves_gradients_on_for_its_caller() -> None:
    net = network(*family(2))
    for _ in merge_tensors(METHODS["ties_merging"](), net):
        assert torch.is_grad_enabled()


def test_neighbours_of_the_threshold_fall_to_its_sides() -> None:
    """The largest number below the threshold is cut, the threshold and its equals stay."""
    below, at = torch.nextafter(torch.tensor(0.7), torch.tensor(0.0)), torch.tensor(0.7)
    expert = {"w": torch.stack([below, at, -at, torch.tensor(2.0), below])}
    found = adarank.merge({"w": torch.zeros(5)}, {"t": expert}, "ties_merging", {"density": 0.4, "lambda": 1.0})
    assert found["w"].tolist() == [0.0, at.item(), -at.item(), 2.0, 0.0]


class _Watched(MemorySource):
    """Writes down what is read."""

    def read(self, name: str) -> Tensor:
        self.seen = [*getattr(self, "seen", []), name]
        return super().read(name)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"masked"}))
def test_a_method_reads_the_checkpoints_as_often_as_it_says(name: str) -> None:
    base, experts = family(1 if name in ("passthrough", "slerp", "nearswap", "arcee_fusion") else 2)
    watched = {task: _Watched(own, task) for task, own in experts.items()}
    parameters = {"t": 0.5} if name in ("slerp", "nearswap") else {}
    net = align(MemorySource(base, "base"), watched)
    for own in watched.values():
        own.seen = []
    method = METHODS[name](**parameters)
    known = method.with_statistics(Statistics()) if isinstance(method, CalibratedMethod) else method
    list(task_parts(known, net, sites_of(net)) if isinstance(known, TaskAwareMethod) else merge_tensors(known, net))
    for own in watched.values():
        first = own.seen[0]
        passes = sum(now == first and before != first for now, before in zip(own.seen, [None, *own.seen], strict=False))
        assert passes == METHODS[name].passes
