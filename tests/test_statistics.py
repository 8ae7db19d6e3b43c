"""What RegMean and Fisher merging make of statistics of the experts, against numpy and their formulas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adarank.methods import Fisher, RegMean
from adarank.methods.calibrated.base import Statistics
from make import network, randn

Vectors = Mapping[str, Tensor]


def known(method, statistics: Mapping[str, Tensor], turned: bool = False):
    """The method with one statistic per task of the tensor `w`."""
    names = frozenset({"w"})
    return method.with_statistics(
        Statistics(names, lambda name, task: statistics[task], frozenset() if turned else names)
    )


def merged(method, weights: Vectors, statistics: Vectors, turned: bool = False) -> Tensor:
    """`w` of experts that have nothing else, merged."""
    net = network(None, {task: {"w": weight} for task, weight in weights.items()})
    informed = known(method, statistics, turned).prepare(net, "cpu")
    origin = net.origin("w", "average")
    return informed.merge_matrix("w", origin, net.deltas("w", origin))


def problem(rows: Sequence[int], width: int = 5, out: int = 3, seed: int = 0) -> tuple[Vectors, Vectors, Vectors]:
    """Inputs, weights (in, out) and Gram matrices of a task per entry of `rows`, in float64."""
    inputs = {f"t{i}": randn(seed + i, count, width, dtype=torch.float64) for i, count in enumerate(rows)}
    weights = {task: randn(seed + 50 + i, width, out, dtype=torch.float64) for i, task in enumerate(inputs)}
    return inputs, weights, {task: x.T @ x / len(x) for task, x in inputs.items()}


def least_squares(inputs: Vectors, weights: Vectors, alpha: float) -> Tensor:
    """argmin_W Σ_t α‖X_t(W - W_t)‖²/n_t + (1-α)‖diag(G_t)^½(W - W_t)‖² by numpy, without any Gram matrix of a sum."""
    left, right = [], []
    for task, x in inputs.items():
        x, weight = x.numpy() / np.sqrt(len(x)), weights[task].numpy()
        for part in (np.sqrt(alpha) * x, np.sqrt(1 - alpha) * np.diag(np.sqrt((x**2).sum(0)))):
            left.append(part)
            right.append(part @ weight)
    return torch.from_numpy(np.linalg.lstsq(np.vstack(left), np.vstack(right), rcond=1e-13)[0])


@given(
    rows=st.lists(st.integers(6, 20), min_size=1, max_size=4),
    width=st.integers(1, 6),
    out=st.integers(1, 4),
    alpha=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    seed=st.integers(0, 99),
)
def test_regmean_solves_the_least_squares_problem(rows, width, out, alpha, seed) -> None:
    inputs, weights, grams = problem(rows, width, out, seed)
    found = merged(RegMean(off_diagonal=alpha), weights, grams)
    torch.testing.assert_close(found, least_squares(inputs, weights, alpha), rtol=1e-6, atol=1e-7)


def test_regmean_leaves_no_residual_in_its_normal_equations() -> None:
    _, weights, grams = problem([9, 12, 7])
    found = merged(RegMean(), weights, grams)
    damped = {task: 0.95 * g + 0.05 * g.diagonal().diag() for task, g in grams.items()}
    residual = sum(g @ (found - weights[task]) for task, g in damped.items())
    assert residual.abs().max() < 1e-12


def test_no_other_weight_is_nearer_to_the_experts_outputs() -> None:
    inputs, weights, grams = problem([9, 12, 7])
    best = merged(RegMean(off_diagonal=1.0), weights, grams)

    def distance(weight: Tensor) -> float:
        return float(sum((x @ (weight - weights[task])).square().sum() / len(x) for task, x in inputs.items()))

    assert all(distance(best + 0.01 * randn(i, 5, 3, dtype=torch.float64)) > distance(best) for i in range(50))


@pytest.mark.parametrize("rows", [(2, 1), (3, 3), (1, 1, 1)])
def test_what_few_inputs_leave_open_is_the_limit_of_alpha_to_1(rows: tuple[int, ...]) -> None:
    inputs, weights, grams = problem(rows, width=8)
    method = RegMean(off_diagonal=1.0)
    net = network(None, {task: {"w": weight} for task, weight in weights.items()})
    informed = known(method, {t: g.float().double() for t, g in grams.items()})  # with float32's noise, as measured
    origin = net.origin("w", "average")
    found = informed.merge_matrix("w", origin, net.deltas("w", origin))
    torch.testing.assert_close(found, least_squares(inputs, weights, 1 - 1e-9), rtol=1e-4, atol=1e-4)
    assert informed.undetermined == {"w": f"{sum(rows)} of 8"}
    residual = sum(g @ (found - weights[task]) for task, g in grams.items())
    assert residual.abs().max() < 1e-5


def test_inputs_that_are_always_zero_keep_the_average() -> None:
    inputs, weights, _ = problem([9, 12])
    for x in inputs.values():
        x[:, 2] = 0
    found = merged(RegMean(), weights, {task: x.T @ x / len(x) for task, x in inputs.items()})
    torch.testing.assert_close(found[2], torch.stack([w[2] for w in weights.values()]).mean(0))
    torch.testing.assert_close(found, least_squares(inputs, weights, 0.95) + torch.eye(5)[2][:, None] * found[2])


def test_one_expert_is_itself_and_equal_grams_are_the_average() -> None:
    _, weights, grams = problem([9, 12, 7])
    torch.testing.assert_close(merged(RegMean(), {"t0": weights["t0"]}, grams), weights["t0"])
    same = dict.fromkeys(weights, grams["t0"])
    torch.testing.assert_close(merged(RegMean(), weights, same), torch.stack(list(weights.values())).mean(0))


def test_the_order_of_the_tasks_and_of_the_axes_is_irrelevant() -> None:
    _, weights, grams = problem([9, 12, 7], width=4, out=4)
    found = merged(RegMean(), weights, grams)
    torch.testing.assert_close(merged(RegMean(), dict(reversed(weights.items())), grams), found)
    turned = {task: weight.T.contiguous() for task, weight in weights.items()}
    torch.testing.assert_close(merged(RegMean(), turned, grams, turned=True).T, found)


# Fisher merging


def test_equal_information_is_the_average_and_all_the_expert() -> None:
    weights = {task: randn(i, 3, 2) for i, task in enumerate("abc")}
    same = dict.fromkeys(weights, randn(9, 3, 2).square())
    torch.testing.assert_close(merged(Fisher(), weights, same), torch.stack(list(weights.values())).mean(0))
    only = {task: torch.full((3, 2), float(task == "b")) for task in weights}
    torch.testing.assert_close(merged(Fisher(floor=1e-12), weights, only), weights["b"])
    nothing = dict.fromkeys(weights, torch.zeros(3, 2))
    torch.testing.assert_close(merged(Fisher(), weights, nothing), torch.stack(list(weights.values())).mean(0))


@given(tasks=st.integers(1, 4), seed=st.integers(0, 99), normalise=st.booleans())
def test_fisher_is_the_weighted_mean_of_its_formula(tasks: int, seed: int, normalise: bool) -> None:
    weights = {f"t{i}": randn(seed + i, 4, 3) for i in range(tasks)}
    information = {f"t{i}": (i + 1) * randn(seed + 20 + i, 4, 3).square() for i in range(tasks)}
    found = merged(Fisher(normalise=normalise, floor=0.1), weights, information)
    f = np.stack([information[task].numpy() for task in weights]).astype(np.float64)
    if normalise:
        f /= np.sqrt((f**2).mean(axis=(1, 2), keepdims=True))
    f = np.maximum(f, 0.1)
    wanted = (f * np.stack([w.numpy() for w in weights.values()])).sum(0) / f.sum(0)
    torch.testing.assert_close(found.double(), torch.from_numpy(wanted), rtol=1e-4, atol=1e-5)


def test_normalised_fisher_does_not_depend_on_one_experts_scale() -> None:
    weights = {task: randn(i, 3, 2) for i, task in enumerate("ab")}
    information = {task: randn(5 + i, 3, 2).square() for i, task in enumerate("ab")}
    louder = {**information, "a": 1000 * information["a"]}
    torch.testing.assert_close(merged(Fisher(), weights, louder), merged(Fisher(), weights, information))
    assert not torch.allclose(
        merged(Fisher(normalise=False), weights, louder), merged(Fisher(normalise=False), weights, information)
    )
