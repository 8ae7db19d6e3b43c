"""The SVD of task vectors: what it multiplies out to, what a cut loses, what is counted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adarank.errors import AdaptationError
from adarank.sparsify.threshold import top_count
from adarank.spectral import svd
from adarank.spectral.svd import as_matrix, decompose, effective_rank, energy
from make import randn

EPS = {torch.float32: 3e-5, torch.float64: 1e-12}


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Tall, wide, square; of any rank, zero included; over six orders of magnitude."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rank = draw(st.integers(0, min(rows, columns)))
    seed, scale = draw(st.integers(0, 10**6)), draw(st.sampled_from([1e-3, 1.0, 1e3]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    product = randn(seed, rows, rank, dtype=torch.float64) @ randn(seed + 1, rank, columns, dtype=torch.float64)
    return (scale * product).to(dtype)


def tolerance(matrix: Tensor) -> float:
    return EPS[matrix.dtype] * max(1e-30, float(matrix.double().norm()))


def singular_values(matrix: Tensor) -> np.ndarray[Any, Any]:
    return np.linalg.svd(matrix.double().numpy(), compute_uv=False)


@given(matrices())
def test_all_components_multiply_out_to_the_matrix(matrix: Tensor) -> None:
    error = (decompose(matrix).reconstruct().double() - matrix.double()).norm()
    assert float(error) <= tolerance(matrix)


@given(matrices())
def test_singular_values_alone_are_the_decompositions(matrix: Tensor) -> None:
    alone = svd.singular_values({"task": matrix}, "task", "matrix")
    assert alone.dtype == matrix.dtype
    assert np.allclose(alone.double().numpy(), singular_values(matrix), atol=tolerance(matrix))


@given(matrices(), st.data())
def test_residual_of_a_cut_is_the_energy_cut(matrix: Tensor, data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, min(matrix.shape)))
    residual = float((matrix.double() - decompose(matrix).reconstruct(keep).double()).norm())
    lost = math.sqrt(float((singular_values(matrix)[keep:] ** 2).sum()))
    assert residual == pytest.approx(lost, abs=tolerance(matrix))


@given(matrices())
def test_singular_vectors_are_orthonormal(matrix: Tensor) -> None:
    spectrum = decompose(matrix)
    identity = torch.eye(min(matrix.shape), dtype=matrix.dtype)
    for vectors in (spectrum.u, spectrum.v):
        torch.testing.assert_close(vectors.T @ vectors, identity, rtol=0, atol=EPS[matrix.dtype])


@given(matrices())
def test_singular_values_descend_and_agree_with_numpy(matrix: Tensor) -> None:
    s = decompose(matrix).s
    assert (s[:-1] >= s[1:]).all()
    assert (s >= 0).all()
    np.testing.assert_allclose(s.double().numpy(), singular_values(matrix), rtol=0, atol=tolerance(matrix))


@given(matrices())
def test_energy_is_the_squared_frobenius_norm(matrix: Tensor) -> None:
    assert energy(decompose(matrix).s) == pytest.approx(float(matrix.double().square().sum()), rel=1e-4, abs=1e-30)


@pytest.mark.parametrize("shape", [(6, 2, 3, 3), (2, 3, 2, 2), (5,), (), (1, 4), (4, 1)])
def test_any_shape_is_taken_as_out_by_rest(shape: tuple[int, ...]) -> None:
    tensor = randn(3, *shape)
    spectrum = decompose(tensor)
    rows = shape[0] if shape else 1
    assert spectrum.u.shape == (rows, min(rows, tensor.numel() // rows))
    torch.testing.assert_close(spectrum.reconstruct().reshape(shape), tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)])
def test_an_empty_tensor_is_an_empty_matrix(shape: tuple[int, ...]) -> None:
    assert as_matrix(torch.zeros(shape)).numel() == 0
    assert as_matrix(torch.zeros(shape)).dim() == 2


@given(st.floats(1e-6, 1.0), st.integers(1, 2000))
def test_top_count_lies_between_one_and_the_share(share: float, rank: int) -> None:
    count = top_count(share, rank)
    assert 1 <= count <= rank
    assert count == 1 or count <= share * rank + 1e-6
    assert count + 1 > share * rank


@given(st.integers(1, 400), st.data())
def test_top_count_of_k_over_r_is_k(rank: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, rank))
    assert top_count(count / rank, rank) == count


@given(matrices(), st.floats(0.05, 0.99))
def test_effective_rank_is_the_fewest_components_with_the_share(matrix: Tensor, share: float) -> None:
    s = decompose(matrix.double()).s
    count = effective_rank(s, share)
    squares = s.square()
    total = float(squares.sum())
    assert float(squares[:count].sum()) >= share * total * (1 - 1e-9)
    assert count == 0 or float(squares[: count - 1].sum()) < share * total


@pytest.mark.parametrize("shape", [(4, 4), (7, 2), (2, 7)])
def test_a_zero_matrix_has_no_energy_and_no_rank(shape: tuple[int, int]) -> None:
    spectrum = decompose(torch.zeros(shape))
    assert energy(spectrum.s) == 0
    assert effective_rank(spectrum.s) == 0
    assert torch.equal(spectrum.reconstruct(), torch.zeros(shape))


def test_a_rank_one_matrix_is_its_first_component() -> None:
    matrix = torch.outer(randn(1, 5), randn(2, 8))
    spectrum = decompose(matrix)
    assert effective_rank(spectrum.s, 0.999) == 1
    torch.testing.assert_close(spectrum.reconstruct(1), matrix, rtol=0, atol=1e-5)


def failing_svd(monkeypatch: pytest.MonkeyPatch, failures: int, message: str) -> list[torch.dtype]:
    """Let the first `failures` decompositions raise; returns the dtypes that were tried."""
    real, tried = torch.linalg.svd, []

    def svd(matrix: Tensor, **options: Any) -> Any:
        tried.append(matrix.dtype)
        if len(tried) <= failures:
            raise torch.linalg.LinAlgError(message)
        return real(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    return tried


def test_a_failing_fast_driver_falls_back_to_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = failing_svd(monkeypatch, 1, "linalg.svd: the algorithm failed to converge")
    matrix = randn(0, 5, 3)
    spectrum = decompose(matrix)
    assert tried == [torch.float32, torch.float64]
    assert {spectrum.u.dtype, spectrum.s.dtype, spectrum.v.dtype} == {torch.float32}
    torch.testing.assert_close(spectrum.reconstruct(), matrix, rtol=0, atol=1e-5)


def test_a_matrix_that_never_converges_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    failing_svd(monkeypatch, 9, "linalg.svd: the algorithm failed to converge")
    with pytest.raises(AdaptationError, match=r"layer\.weight"):
        decompose(randn(0, 5, 3), "layer.weight")


def test_other_errors_of_the_driver_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    failing_svd(monkeypatch, 1, "out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        decompose(randn(0, 5, 3))
