"""ESM against its steps written out in numpy, on the outputs themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import adarank
from make import randn


def experts(out: int, tasks: int, seed: int, depth: int = 2) -> tuple[nn.Module, dict[str, nn.Module], dict]:
    """Stacks of square linear layers without biases, and inputs."""

    def made(number: int) -> nn.Module:
        torch.manual_seed(seed + number)
        return nn.Sequential(*(nn.Linear(out, out, bias=False) for _ in range(depth))).double()

    base = made(0)
    fine = {f"t{i}": made(i + 1) for i in range(tasks)}
    inputs = {task: randn(seed + i, 5 * out, out, dtype=torch.float64) for i, task in enumerate(fine)}
    return base, fine, inputs


def polar(matrix: np.ndarray) -> np.ndarray:
    p, s, q = np.linalg.svd(matrix, full_matrices=False)
    return s.mean() * p @ q


def by_hand(deltas: list[np.ndarray], given: list[np.ndarray]) -> np.ndarray:
    """One layer's Δ from what it is given in each expert: PCA of the outputs' shift by an SVD of the shift."""
    count = len(deltas[0]) // len(deltas)
    lefts, rights = [], []
    for delta, x in zip(deltas, given, strict=True):
        _, s, p = np.linalg.svd(x @ delta.T, full_matrices=False)
        scale = (s[:count] ** 2 / np.mean(s[:count] ** 2)) ** 0.15
        scale /= scale.mean()
        lefts.append(p[:count].T * scale)
        rights.append(np.linalg.norm(delta) ** 2 * scale[:, None] * (p[:count] @ delta))
    v = np.vstack(rights) / np.mean([np.linalg.norm(delta) for delta in deltas]) ** 2
    columns = np.linalg.norm(v, axis=0)
    return 2 * polar(np.hstack(lefts)) @ polar(v * (columns / columns.mean()) ** 2)


@given(tasks=st.integers(1, 3), seed=st.integers(0, 99))
def test_esm_by_numpy(tasks: int, seed: int) -> None:
    base, fine, inputs = experts(6, tasks, seed)
    result = adarank.merge(base, fine, "esm", {"lambda": 0.7}, batches={t: [x.float()] for t, x in inputs.items()})
    merged = []
    for layer in range(2):
        origin = base[layer].weight.detach().numpy()
        deltas = [module[layer].weight.detach().numpy() - origin for module in fine.values()]
        given = [module[:layer](inputs[task]).detach().numpy() for task, module in fine.items()]
        merged.append(by_hand(deltas, given))
    sizes = [np.linalg.norm(m) for m in merged]
    for layer, (delta, size) in enumerate(zip(merged, sizes, strict=True)):
        wanted = base[layer].weight.detach().numpy() + 0.7 * (size / np.mean(sizes)) ** 2 * delta
        np.testing.assert_allclose(result[f"{layer}.weight"].numpy(), wanted, rtol=2e-3, atol=2e-3)


def merged(base: nn.Module, fine: dict, inputs: dict, **settings) -> dict[str, Tensor]:
    return adarank.merge(base, fine, "esm", settings, batches={task: [x.float()] for task, x in inputs.items()})


def test_output_projections_are_merged_as_tsv_m() -> None:
    base, fine, inputs = experts(6, 2, 3, depth=1)
    plain = adarank.merge(base, fine, "tsv_m")
    as_tsv_m = merged(base, fine, inputs, as_tsv_m=("0.*",))
    torch.testing.assert_close(as_tsv_m["0.weight"], plain["0.weight"])
    assert not torch.allclose(merged(base, fine, inputs)["0.weight"], plain["0.weight"], atol=1e-2)


def test_the_order_of_the_tasks_is_irrelevant_to_esm() -> None:
    base, fine, inputs = experts(6, 3, 4)
    first, second = merged(base, fine, inputs), merged(base, dict(reversed(fine.items())), inputs)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-5, atol=1e-6)


def test_experts_that_never_moved_leave_the_base() -> None:
    base, _, inputs = experts(4, 2, 5)
    result = merged(base, dict.fromkeys(inputs, base), inputs)
    for name, tensor in base.state_dict().items():
        assert torch.equal(result[name], tensor)


@pytest.mark.parametrize("setting", ["spread", "polarise"])
def test_without_its_scalings_esm_is_level(setting: str) -> None:
    """Two layers of unequal task vectors: `polarise: 0` compares no layers; `spread: 0` leaves directions alike."""
    base, fine, inputs = experts(6, 2, 6)
    level = merged(base, fine, inputs, **{setting: 0.0})
    usual = merged(base, fine, inputs)
    assert any(not torch.allclose(level[name], tensor, atol=1e-3) for name, tensor in usual.items())
    if setting == "polarise":
        delta = (level["0.weight"] - base[0].weight).detach().numpy()
        s = np.linalg.svd(delta, compute_uv=False)
        assert np.allclose(s, s[0], rtol=1e-3)  # a product of two orthogonal matrices


def test_conv1d_and_linear_layers_merge_alike() -> None:
    from transformers.pytorch_utils import Conv1D

    def turned(module: nn.Module) -> nn.Module:
        layer = Conv1D(6, 6).double()
        layer.weight.data, layer.bias.data = module[0].weight.data.T.contiguous(), torch.zeros(6).double()
        return nn.Sequential(layer)

    base, fine, inputs = experts(6, 2, 7, depth=1)
    plain = merged(base, fine, inputs)["0.weight"]
    other = merged(turned(base), {t: turned(m) for t, m in fine.items()}, inputs)["0.weight"]
    torch.testing.assert_close(other.T, plain, rtol=1e-4, atol=1e-5)
