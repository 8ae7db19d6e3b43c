"""Spectral bases: what every block of one must be, and the closed form on all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import adarank
from adarank.spectral.bases import BASES, assembled
from adarank.spectral.blocks import scaled_block, task_vector_blocks

shapes = st.tuples(st.integers(2, 9), st.integers(2, 9))


def vectors(shape: tuple[int, int], tasks: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"t{i}": torch.randn(shape, generator=generator, dtype=torch.float64) for i in range(tasks)}


@pytest.mark.parametrize("name", BASES)
@given(shape=shapes, tasks=st.integers(1, 5), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=25)
def test_blocks_have_one_group_each_and_fit_the_matrix(
    name: str, shape: tuple[int, int], tasks: int, seed: int
) -> None:
    deltas = vectors(shape, tasks, seed)
    spectra = BASES[name].spectra(deltas, "w")
    assert len(spectra) == len(BASES[name].groups(list(deltas)))
    for part in spectra:
        assert part.u.shape == (shape[0], part.s.numel())
        assert part.v.shape == (shape[1], part.s.numel())
    if name != "task_vectors":
        assert sum(part.s.numel() for part in spectra) <= min(shape)


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts"])
@given(shape=shapes, tasks=st.integers(1, 4), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=25)
def test_singular_vectors_of_all_groups_are_orthonormal_together(
    name: str, shape: tuple[int, int], tasks: int, seed: int
) -> None:
    spectra = BASES[name].spectra(vectors(shape, tasks, seed), "w")
    for key in "uv":
        columns = torch.cat([getattr(part, key) for part in spectra], dim=1).numpy()
        np.testing.assert_allclose(columns.T @ columns, np.eye(columns.shape[1]), atol=1e-8)


@given(shape=shapes, tasks=st.integers(1, 4), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=25)
def test_iso_c_is_the_polar_factor_times_the_mean_singular_value(shape, tasks: int, seed: int) -> None:
    deltas = vectors(shape, tasks, seed)
    u, s, vh = np.linalg.svd(sum(d.numpy() for d in deltas.values()), full_matrices=False)
    np.testing.assert_allclose(assembled(BASES["iso_c"].spectra(deltas, "w")).numpy(), s.mean() * u @ vh, atol=1e-8)


@pytest.mark.parametrize("name", BASES)
@given(shape=shapes, tasks=st.integers(1, 4), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=20)
def test_the_closed_form_is_autograds_on_every_basis(name: str, shape: tuple[int, int], tasks: int, seed: int) -> None:
    deltas = vectors(shape, tasks, seed)
    blocks = task_vector_blocks(torch.ones(shape, dtype=torch.float64), deltas, "w", BASES[name])
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(blocks.components, generator=generator) < 0.6
    lam = torch.rand(len(blocks.sizes), generator=generator, dtype=torch.float64)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    soft, own = mask.double().requires_grad_(), lam.clone().requires_grad_()
    owner = own.repeat_interleave(torch.tensor(blocks.sizes))
    merged = 1 + (blocks.u * (soft * blocks.s * owner)) @ blocks.v.T
    torch.testing.assert_close(blocks.compose(lam, mask), merged.detach())
    (merged * grad).sum().backward()
    for learn_masks in (True, False):
        found = blocks.gradient(grad, lam, mask, learn_masks)
        torch.testing.assert_close(found.lam, own.grad)
    torch.testing.assert_close(blocks.gradient(grad, lam, mask, True).mask, soft.grad)


@pytest.mark.parametrize("name", BASES)
def test_a_tensor_without_components_takes_the_sum_or_the_mean(name: str) -> None:
    deltas = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 6.0])}
    blocks = scaled_block(torch.zeros(2), deltas, BASES[name])
    merged = blocks.compose(torch.ones(len(blocks.sizes)), torch.zeros(0, dtype=torch.bool))
    assert merged.tolist() == ([4.0, 8.0] if name == "task_vectors" else [2.0, 4.0])
    found = blocks.gradient(torch.ones(2), torch.ones(len(blocks.sizes)), torch.zeros(0, dtype=torch.bool), True)
    assert found.lam[-1] == (0.0 if BASES[name].common else pytest.approx(9 if name == "task_vectors" else 4.5))


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts"])
def test_the_static_method_is_its_basis_with_everything_kept(name: str) -> None:
    torch.manual_seed(0)
    base = {"w": torch.randn(12, 10), "b": torch.randn(12)}
    experts = {task: {k: v + 0.1 * torch.randn_like(v) for k, v in base.items()} for task in "abc"}
    merged = adarank.merge(base, experts, name, {"lambda": 0.7})
    deltas = {task: expert["w"] - base["w"] for task, expert in experts.items()}
    blocks = task_vector_blocks(base["w"], deltas, "w", BASES[name])
    whole = blocks.compose(torch.full((len(blocks.sizes),), 0.7), torch.ones(blocks.components, dtype=torch.bool))
    torch.testing.assert_close(merged["w"], whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts"])
def test_adarank_starts_static_and_its_masks_merge_as_adapted(name: str) -> None:
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3))
    experts = {}
    for task in "abc":
        experts[task] = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3))
        experts[task].load_state_dict({k: v + 0.3 * torch.randn_like(v) for k, v in base.state_dict().items()})
    batches = {task: [torch.randn(8, 6)] for task in experts}
    start = {"basis": name, "lambda": 1.0}
    still = adarank.adapt(base, experts, batches, settings=adarank.AdaptSettings(steps=0), parameters=start)
    static = adarank.merge(base, experts, name)
    for key, value in static.items():
        torch.testing.assert_close(still.state[key], value, atol=1e-5, rtol=1e-4)
    loop = adarank.AdaptSettings(steps=15, lr_masks=0.05, lr_lambda=0.02, keep="last")
    moved = adarank.adapt(base, experts, batches, settings=loop, parameters=start)
    assert moved.masks.kept_share() < 1
    again = adarank.merge(base, experts, "masked", {"masks": moved.masks})
    for key, value in again.items():
        torch.testing.assert_close(value, moved.state[key], atol=1e-5, rtol=1e-4)
    first, last = (sum(losses[i] for losses in moved.history.losses.values()) for i in (0, -1))
    assert last < first


def test_a_basis_about_the_base_takes_no_other_origin() -> None:
    w = torch.nn.Linear(2, 2)
    with pytest.raises(adarank.AdaRankError, match=r"basis.*about the base"):
        adarank.adapt(w, {"a": w}, {"a": [torch.zeros(1, 2)]}, parameters={"basis": "tsv_m", "origin": "average"})


def low_rank(shape: tuple[int, int], rank: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(side, rank, generator=generator, dtype=torch.float64) for side in shape)
    return left @ right.T


def svd_cut(matrix: torch.Tensor, keep: int) -> torch.Tensor:
    u, s, v = np.linalg.svd(matrix.numpy(), full_matrices=False)
    return torch.from_numpy((u[:, :keep] * s[:keep]) @ v[:keep])


@pytest.mark.parametrize("silent", [0, 1])
def test_an_unchanged_layer_takes_no_direction_from_the_other(silent: int) -> None:
    """The zero matrix has singular vectors too, any at all; they must not turn the other's."""
    deltas = vectors((8, 8), 2, 3)
    names = list(deltas)
    deltas[names[silent]] = torch.zeros(8, 8, dtype=torch.float64)
    other = deltas[names[1 - silent]]
    assert torch.allclose(assembled(BASES["tsv_m"].spectra(deltas, "w")), svd_cut(other, 4))
    found = BASES["iso_cts"].spectra(deltas, "w")
    assert float(found[silent].s.abs().sum()) == 0
    assert all(bool(part.u.isfinite().all()) for part in found)


def test_identical_experts_share_their_directions() -> None:
    one = vectors((9, 6), 1, 5)["t0"]
    deltas = {"a": one, "b": one.clone(), "c": one.clone()}
    assert torch.allclose(assembled(BASES["tsv_m"].spectra(deltas, "w")), svd_cut(one, 2) * 1.0)


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts"])
@pytest.mark.parametrize("shape", [(8, 8), (12, 7), (7, 12)])
def test_low_rank_task_vectors_merge_the_same_in_any_coordinates(name: str, shape: tuple[int, int]) -> None:
    """f(P τ Qᵀ) = P f(τ) Qᵀ for orthogonal P and Q, which arbitrary vectors of vanishing components would break."""
    deltas = {f"t{i}": low_rank(shape, 2, i) for i in range(2)}
    p, q = (torch.linalg.qr(low_rank((side, side), side, 9)).Q for side in shape)
    turned = {task: p @ delta @ q.T for task, delta in deltas.items()}
    merged, other = (assembled(BASES[name].spectra(own, "w")) for own in (deltas, turned))
    assert torch.allclose(other, p @ merged @ q.T, atol=1e-9)
    if name == "iso_c":
        s = torch.linalg.svdvals(merged)
        assert torch.allclose(s[:4], s[0].expand(4))  # flat on the rank of the sum
        assert float(s[4:].max()) < 1e-12
        assert torch.isclose(s.sum(), torch.linalg.svdvals(deltas["t0"] + deltas["t1"]).sum())


@pytest.mark.parametrize("name", BASES)
def test_all_zero_task_vectors_give_zero(name: str) -> None:
    deltas = {task: torch.zeros(5, 4) for task in "ab"}
    assert not assembled(BASES[name].spectra(deltas, "w")).any()
