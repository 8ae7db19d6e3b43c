"""Identities of TSV-M, Iso-C, Iso-CTS, STAR, SVC and DC-Merge, with numpy as the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adarank.methods import METHODS
from adarank.spectral.bases import own_components

SHAPES = st.sampled_from([(12, 8), (8, 12), (9, 9), (6, 2, 2, 2)])


def problem(shape: tuple[int, ...], tasks: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    origin = torch.randn(shape, generator=generator)
    return origin, {f"t{i}": 0.3 * torch.randn(shape, generator=generator) for i in range(tasks)}


def merged(name: str, origin: Tensor, deltas: dict[str, Tensor], **settings: float | str) -> np.ndarray:
    """The merged task vector as a float64 matrix."""
    result = METHODS[name](**settings).merge_matrix("w", origin, deltas)
    return (result - origin).flatten(1).double().numpy()


def total(deltas: dict[str, Tensor]) -> np.ndarray:
    return sum(delta.flatten(1).double().numpy() for delta in deltas.values())


@given(SHAPES, st.integers(1, 4), st.integers(0, 99))
def test_iso_c_has_a_flat_spectrum_with_the_sums_nuclear_norm(shape: tuple[int, ...], tasks: int, seed: int) -> None:
    origin, deltas = problem(shape, tasks, seed)
    s = np.linalg.svd(merged("iso_c", origin, deltas), compute_uv=False)
    assert np.allclose(s, s[0], rtol=1e-3)
    assert np.isclose(s.sum(), np.linalg.svd(total(deltas), compute_uv=False).sum(), rtol=1e-3)


@given(SHAPES, st.integers(1, 4), st.integers(0, 99), st.sampled_from([0.3, 0.5, 0.8, 1.0]))
def test_iso_cts_has_a_flat_spectrum_of_full_rank(shape: tuple[int, ...], tasks: int, seed: int, common: float) -> None:
    origin, deltas = problem(shape, tasks, seed)
    s = np.linalg.svd(merged("iso_cts", origin, deltas, common=common), compute_uv=False)
    assert np.allclose(s, s[0], rtol=1e-3)
    assert s[0] > 0


@given(SHAPES, st.integers(1, 4), st.integers(0, 99))
def test_iso_cts_all_common_is_iso_c(shape: tuple[int, ...], tasks: int, seed: int) -> None:
    origin, deltas = problem(shape, tasks, seed)
    assert np.allclose(merged("iso_cts", origin, deltas, common=1.0), merged("iso_c", origin, deltas), atol=1e-4)


@given(SHAPES, st.integers(1, 6), st.integers(0, 99), st.sampled_from([0.1, 0.5, 0.8]))
def test_iso_cts_by_numpy(shape: tuple[int, ...], tasks: int, seed: int, common: float) -> None:
    origin, deltas = problem(shape, tasks, seed)
    u, s, vh = np.linalg.svd(total(deltas), full_matrices=False)
    own = min(round((len(s) - int(common * len(s))) / tasks), len(s) // tasks)
    first = len(s) - own * tasks
    parts = [(u[:, :first], s[:first], vh[:first])]
    for delta in deltas.values():
        left = delta.flatten(1).double().numpy()
        left = left - u[:, :first] @ (u[:, :first].T @ left)
        parts.append(
            tuple(np.take(x, range(own), axis) for x, axis in zip(np.linalg.svd(left), (1, 0, 0), strict=True))
        )
    bases = [
        np.linalg.svd(np.concatenate(x, axis), full_matrices=False)
        for x, axis in ((([p[0] for p in parts]), 1), ([p[2] for p in parts], 0))
    ]
    wanted = np.concatenate([p[1] for p in parts]).mean() * (bases[0][0] @ bases[0][2]) @ (bases[1][0] @ bases[1][2])
    np.testing.assert_allclose(merged("iso_cts", origin, deltas, common=common), wanted, atol=2e-3)


@pytest.mark.parametrize(("rank", "tasks", "own"), [(768, 8, 19), (768, 14, 11), (768, 20, 8), (16, 4, 1), (5, 3, 0)])
def test_iso_cts_gives_each_task_a_whole_number_of_components(rank: int, tasks: int, own: int) -> None:
    assert own_components(rank, tasks, 0.8) == own


@given(SHAPES, st.integers(0, 99))
def test_tsv_m_of_one_task_is_its_task_vector(shape: tuple[int, ...], seed: int) -> None:
    origin, deltas = problem(shape, 1, seed)
    assert np.allclose(merged("tsv_m", origin, deltas), total(deltas), atol=1e-4)


@given(st.integers(2, 4), st.integers(0, 99))
def test_tsv_m_of_tasks_that_do_not_meet_is_their_cut_sum(tasks: int, seed: int) -> None:
    """Task vectors in orthogonal row and column spaces are orthogonal already."""
    size = 3
    origin = torch.zeros(size * tasks, size * tasks)
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for task in range(tasks):
        delta = origin.clone()
        block = slice(task * size, (task + 1) * size)
        delta[block, block] = torch.randn(size, size, generator=generator)
        deltas[f"t{task}"] = delta
    assert np.allclose(merged("tsv_m", origin, deltas), total(deltas), atol=1e-4)


@given(SHAPES, st.integers(2, 4), st.integers(0, 99))
def test_tsv_ms_singular_values_are_those_it_kept(shape: tuple[int, ...], tasks: int, seed: int) -> None:
    origin, deltas = problem(shape, tasks, seed)
    singular = [np.linalg.svd(d.flatten(1).double().numpy(), compute_uv=False) for d in deltas.values()]
    k = len(singular[0]) // tasks
    kept = np.sort(np.concatenate([s[:k] for s in singular]))[::-1]
    found = np.linalg.svd(merged("tsv_m", origin, deltas), compute_uv=False)[: len(kept)]
    assert np.allclose(found, kept, rtol=1e-3, atol=1e-4)


@given(SHAPES, st.integers(0, 99), st.floats(0.1, 1.0))
def test_star_keeps_the_nuclear_norm_of_one_task(shape: tuple[int, ...], seed: int, share: float) -> None:
    origin, deltas = problem(shape, 1, seed)
    own, found = (
        np.linalg.svd(m, compute_uv=False) for m in (total(deltas), merged("star", origin, deltas, share=share))
    )
    assert np.isclose(own.sum(), found.sum(), rtol=1e-3)
    assert (found > 1e-4).sum() == min(len(own), 1 + (own.cumsum() < share * own.sum() * (1 - 1e-6)).sum())


@given(SHAPES, st.integers(1, 4), st.integers(0, 99))
def test_star_of_everything_is_the_mean_task_vector(shape: tuple[int, ...], tasks: int, seed: int) -> None:
    origin, deltas = problem(shape, tasks, seed)
    assert np.allclose(merged("star", origin, deltas, share=1.0), total(deltas) / tasks, atol=1e-4)


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts", "star", "svc", "dc_merge"])
def test_the_order_of_the_tasks_is_irrelevant_and_scale_scales(name: str) -> None:
    origin, deltas = problem((10, 8), 3, 1)
    turned = dict(reversed(deltas.items()))
    one = merged(name, origin, deltas)
    assert np.allclose(one, merged(name, origin, turned), atol=1e-4)
    assert np.allclose(2 * one, merged(name, origin, deltas, scale=2.0), atol=1e-4)


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts", "star", "svc", "dc_merge"])
def test_other_tensors_take_the_mean(name: str) -> None:
    origin, deltas = problem((7, 1), 3, 2)
    flat = {task: delta.reshape(-1) for task, delta in deltas.items()}
    found = METHODS[name](scale=0.5).merge_other("b", origin.reshape(-1), flat)
    torch.testing.assert_close(found, origin.reshape(-1) + 0.5 * torch.stack(list(flat.values())).mean(0))


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts", "star", "svc", "dc_merge"])
def test_task_vectors_of_zero_leave_the_base(name: str) -> None:
    origin = torch.randn(6, 5)
    assert torch.allclose(METHODS[name]().merge_matrix("w", origin, {t: torch.zeros(6, 5) for t in "ab"}), origin)


@given(SHAPES, st.integers(1, 4), st.integers(0, 99), st.sampled_from(["auto", 0.3, 1.0]))
def test_svc_by_numpy(shape: tuple[int, ...], tasks: int, seed: int, alpha: float | str) -> None:
    origin, deltas = problem(shape, tasks, seed)
    matrices = [delta.flatten(1).double().numpy() for delta in deltas.values()]
    u, s, vh = np.linalg.svd(sum(matrices), full_matrices=False)
    least = 1 / tasks if alpha == "auto" else alpha
    wanted = 0
    for r, sigma in enumerate(s):
        whole = u[:, r] @ sum(matrices)
        ratios = [whole @ (u[:, r] @ m) / np.sum((u[:, r] @ m) ** 2) for m in matrices]
        gamma = tasks / sum(max(least, ratio) for ratio in ratios)
        wanted = wanted + gamma * sigma * np.outer(u[:, r], vh[r])
    np.testing.assert_allclose(merged("svc", origin, deltas, alpha=alpha), wanted, atol=2e-3)


@pytest.mark.parametrize("basis", ["tsv_m", "iso_c", "iso_cts"])
def test_svc_keeps_the_directions_of_the_merge_it_is_put_on(basis: str) -> None:
    origin, deltas = problem((9, 7), 3, 4)
    plain, calibrated = merged(basis, origin, deltas), merged("svc", origin, deltas, basis=basis)
    both = plain.T @ calibrated  # V σ (γσ) Vᵀ: symmetric if the singular vectors are the same
    np.testing.assert_allclose(both, both.T, atol=1e-3)
    assert not np.allclose(plain, calibrated, atol=1e-2)


@given(SHAPES, st.integers(1, 4), st.integers(0, 99))
def test_svc_counts_what_all_experts_have_in_common_once(shape: tuple[int, ...], tasks: int, seed: int) -> None:
    origin, deltas = problem(shape, 1, seed)
    alike = {f"t{i}": deltas["t0"] for i in range(tasks)}
    assert np.allclose(merged("svc", origin, alike), total(deltas), atol=1e-3)


def test_svc_leaves_what_tasks_do_apart() -> None:
    """Task vectors in orthogonal row spaces exaggerate nothing, and an expert that never moved has no say."""
    origin, _ = problem((9, 9), 1, 0)
    deltas = {f"t{t}": torch.zeros(9, 9) for t in range(4)}
    for t in range(3):
        deltas[f"t{t}"][:, 3 * t : 3 * t + 3] = problem((9, 3), 1, t)[1]["t0"]
    assert np.allclose(merged("svc", origin, deltas), total(deltas), atol=1e-4)


@given(SHAPES, st.integers(1, 4), st.integers(0, 99), st.sampled_from([0.001, 0.05, 0.3]))
def test_dc_merge_by_numpy(shape: tuple[int, ...], tasks: int, seed: int, density: float) -> None:
    origin, deltas = problem(shape, tasks, seed)
    svds = [np.linalg.svd(d.flatten(1).double().numpy(), full_matrices=False) for d in deltas.values()]
    rank = len(svds[0][1])
    k = max(1, rank // tasks)
    cover = []
    for columns in (np.hstack([u[:, :k] for u, _, _ in svds]), np.hstack([vh[:k].T for _, _, vh in svds])):
        p, _, q = np.linalg.svd(columns, full_matrices=False)
        cover.append(p @ q)
    coordinates = []
    for u, s, vh in svds:
        m = cover[0].T @ (u[:, :k] * s[:k]) @ vh[:k] @ cover[1]
        smallest = np.sort(np.abs(m), axis=None)[::-1][min(m.size, max(1, int(density * rank**2))) - 1]
        coordinates.append(np.where(np.abs(m) >= smallest, m, 0.0))
    core = np.zeros((k * tasks, k * tasks))
    for i, j in np.ndindex(core.shape):
        column = np.array([m[i, j] for m in coordinates])
        agreeing = column[np.sign(column) == np.sign(column.sum())]
        if i // k == j // k and column.sum() != 0:
            core[i, j] = agreeing.mean()
    wanted = cover[0] @ core @ cover[1].T
    np.testing.assert_allclose(merged("dc_merge", origin, deltas, density=density), wanted, atol=2e-3)


@given(st.integers(1, 4), st.integers(0, 99))
def test_dc_merge_of_tasks_that_do_not_meet_is_their_sum(tasks: int, seed: int) -> None:
    origin = torch.zeros(3 * tasks, 3 * tasks)
    deltas = {}
    for task in range(tasks):
        delta = origin.clone()
        block = slice(task * 3, (task + 1) * 3)
        delta[block, block] = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed + task))
        deltas[f"t{task}"] = delta
    assert np.allclose(merged("dc_merge", origin, deltas, density=1.0), total(deltas), atol=1e-4)


def test_dc_merge_drops_all_but_the_largest_coordinates() -> None:
    origin, deltas = problem((10, 10), 1, 3)
    largest = np.linalg.svd(total(deltas), compute_uv=False)[0]
    s = np.linalg.svd(merged("dc_merge", origin, deltas, density=0.001), compute_uv=False)
    assert np.isclose(s[0], largest, rtol=1e-4)
    assert s[1] < 1e-4
