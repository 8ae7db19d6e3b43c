"""WUDI, SWUDI and ACTMat against least squares by numpy, the matrix exponential of their flow, and each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import adarank
from adarank.alignment.layers import inputs_first
from adarank.methods import METHODS
from make import randn

SHAPES = st.sampled_from([(7, 5), (5, 7), (6, 6)])
NAMES = ["wudi", "swudi", "actmat"]
Vectors = dict[str, Tensor]


def task_vectors(shape: tuple[int, ...], tasks: int, seed: int) -> Vectors:
    return {f"t{i}": (1 + i) * randn(seed + i, *shape, dtype=torch.float64) for i in range(tasks)}


def merged(name: str, deltas: Vectors, settings: dict | None = None) -> Tensor:
    """The merged task vector of a model that has nothing but `w.weight`, about a base of zeros."""
    base = {"w.weight": torch.zeros_like(next(iter(deltas.values())))}
    experts = {task: {"w.weight": delta} for task, delta in deltas.items()}
    return adarank.merge(base, experts, name, settings or {}, select=adarank.Select(decompose="*"))["w.weight"]


def least_squares(deltas: Vectors, normalised: bool) -> Tensor:
    """argmin_Δ Σ_t w_t ‖(Δ - τ_t) τ_tᵀ‖², the smallest of them, by numpy, without any Gram matrix."""
    left, right = [], []
    for delta in deltas.values():
        matrix = delta.flatten(1).numpy()
        size = np.linalg.norm(matrix) if normalised else 1.0
        left.append(matrix / size)
        right.append(matrix @ matrix.T / size)
    solution = np.linalg.lstsq(np.vstack(left), np.vstack(right), rcond=1e-13)[0]
    return torch.from_numpy(solution.T).reshape(next(iter(deltas.values())).shape)


@given(shape=SHAPES, tasks=st.integers(1, 4), seed=st.integers(0, 99))
def test_actmat_and_wudi_solve_the_least_squares_problem(shape: tuple[int, int], tasks: int, seed: int) -> None:
    deltas = task_vectors(shape, tasks, seed)
    torch.testing.assert_close(merged("actmat", deltas), least_squares(deltas, False), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged("wudi", deltas), least_squares(deltas, True), rtol=1e-3, atol=1e-3)


@given(shape=SHAPES, tasks=st.integers(1, 4), seed=st.integers(0, 99), time=st.sampled_from([0.1, 1.0, 20.0]))
def test_swudi_is_the_flow_from_the_summed_task_vectors(shape, tasks: int, seed: int, time: float) -> None:
    """dΔ/dη = (C - Δ A) / ā by the exponential of one matrix that holds both A and C."""
    deltas = task_vectors(shape, tasks, seed)
    grams = {task: d.T @ d / d.square().sum() for task, d in deltas.items()}
    gram, cross = sum(grams.values()), sum(d @ grams[task] for task, d in deltas.items())
    out, width = shape
    system = torch.zeros(width + out, width + out, dtype=torch.float64)
    system[:width, :width], system[width:, :width] = -gram, cross
    flow = torch.matrix_exp(time / (gram.trace() / width) * system)
    wanted = sum(deltas.values()) @ flow[:width, :width] + flow[width:, :width]
    result = merged("swudi", deltas, {"time": time, "rank": 1.0})
    torch.testing.assert_close(result, wanted, rtol=1e-6, atol=1e-6)


def test_swudi_leaves_the_sum_where_eigenvalues_are_small() -> None:
    deltas = task_vectors((7, 6), 3, 1)
    gram = sum(d.T @ d / d.square().sum() for d in deltas.values())
    values, vectors = np.linalg.eigh(gram.numpy())
    total, result = sum(deltas.values()), merged("swudi", deltas, {"rank": 0.5, "time": 1e9})
    small, large = (torch.from_numpy(vectors[:, part]) for part in (slice(0, 3), slice(3, 6)))
    assert values[2] < values[3]
    torch.testing.assert_close(result @ small, total @ small)
    torch.testing.assert_close(result @ large, least_squares(deltas, True) @ large)


@pytest.mark.parametrize("name", NAMES)
def test_one_task_is_its_task_vector(name: str) -> None:
    deltas = task_vectors((6, 5), 1, 3)
    torch.testing.assert_close(merged(name, deltas), deltas["t0"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_tasks_with_inputs_of_their_own_are_summed(name: str) -> None:
    """Rows in orthogonal spaces: nothing of a task is to be seen on what another was trained on."""
    deltas = {}
    for task in range(3):
        delta = torch.zeros(4, 9, dtype=torch.float64)
        delta[:, 3 * task : 3 * task + 3] = randn(task, 4, 3, dtype=torch.float64)
        deltas[f"t{task}"] = delta
    torch.testing.assert_close(merged(name, deltas), sum(deltas.values()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_turn_of_the_coordinates_turns_the_merge(name: str) -> None:
    deltas = task_vectors((6, 5), 3, 4)
    p, q = (torch.linalg.qr(randn(side, side, side, dtype=torch.float64)).Q for side in (6, 5))
    turned = {task: p @ delta @ q.T for task, delta in deltas.items()}
    torch.testing.assert_close(merged(name, turned), p @ merged(name, deltas) @ q.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_order_and_unmoved_experts_change_nothing(name: str) -> None:
    deltas = task_vectors((6, 5), 3, 5)
    result = merged(name, deltas)
    torch.testing.assert_close(merged(name, dict(reversed(deltas.items()))), result)
    torch.testing.assert_close(merged(name, deltas, {"lambda": 0.5}), 0.5 * result)
    still = {**deltas, "still": torch.zeros(6, 5, dtype=torch.float64)}
    torch.testing.assert_close(merged(name, still), result)
    assert not merged(name, {"a": torch.zeros(6, 5)}).any()


@pytest.mark.parametrize("name", NAMES)
def test_other_tensors_take_the_mean_task_vector(name: str) -> None:
    origin, deltas = torch.ones(4), {"a": torch.arange(4.0), "b": torch.ones(4)}
    torch.testing.assert_close(METHODS[name](scale=2.0).merge_other("b", origin, deltas), 2 + torch.arange(4.0))


def test_scale_of_one_expert_is_lost_in_wudi_but_not_in_actmat() -> None:
    """The direction that two experts share goes to the louder one, unless every task counts alike."""
    quiet, loud = torch.tensor([[1.0, 0.0]]), torch.tensor([[10.0, 0.0]])
    assert float(merged("wudi", {"a": quiet, "b": loud})[0, 0]) == pytest.approx(5.5, rel=1e-4)
    assert float(merged("actmat", {"a": quiet, "b": loud})[0, 0]) == pytest.approx(1001 / 101, rel=1e-4)


def test_weights_of_actmat_are_the_models_own() -> None:
    base = {"w.weight": torch.zeros(3, 2)}
    experts = {task: {"w.weight": randn(i, 3, 2)} for i, task in enumerate("ab")}
    select = adarank.Select(decompose="*")
    only = adarank.merge(base, experts, "actmat", {"weight": {"a": 1.0, "b": 0.0}}, select=select)
    torch.testing.assert_close(only["w.weight"], experts["a"]["w.weight"])


@pytest.mark.parametrize("name", NAMES)
def test_matrices_stored_inputs_first_are_merged_turned(name: str) -> None:
    """The same network written as Conv1D does, bias beside, gives the same merge written so."""
    shapes = {"0.weight": (4, 6), "0.bias": (4,), "1.weight": (4, 4), "1.bias": (4,)}
    base = {n: torch.zeros(shape) for n, shape in shapes.items()}
    experts = {t: {n: randn(i + 9 * j, *s) for j, (n, s) in enumerate(shapes.items())} for i, t in enumerate("ab")}
    plain = adarank.merge(base, experts, name)

    def turned(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: tensor.T.contiguous() if tensor.dim() == 2 else tensor for n, tensor in state.items()}

    other = adarank.merge(turned(base), {t: turned(state) for t, state in experts.items()}, name)
    for n, tensor in plain.items():
        torch.testing.assert_close(other[n].T if tensor.dim() == 2 else other[n], tensor)


def test_what_is_stored_inputs_first_is_read_off_the_biases() -> None:
    gpt2 = {"h.0.attn.c_attn.weight": (4, 12), "h.0.attn.c_attn.bias": (12,), "h.0.attn.c_proj.weight": (4, 4),
            "h.0.attn.c_proj.bias": (4,), "wte.weight": (9, 4), "ln.weight": (4,), "ln.bias": (4,)}  # fmt: skip
    assert inputs_first(gpt2) == {"h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight"}
    bert = {"q.weight": (4, 4), "q.bias": (4,), "up.weight": (8, 4), "up.bias": (8,), "o.weight": (4, 8)}
    assert not inputs_first(bert)
    mixed = {**bert, "c.weight": (4, 12), "c.bias": (12,)}
    assert inputs_first(mixed) == {"c.weight"}
