"""AdaMerging, task-wise and on what TIES leaves of the task vectors, against numpy and against the static methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import adarank
from adarank.adapt import ADAPTIVE, AdaptSettings, LiveWeights
from adarank.adapt.presets import with_preset
from adarank.errors import CheckpointError
from adarank.methods import METHODS, Masked, merge_tensors
from adarank.recipe.reader import load_recipe
from adarank.settings import parse
from adarank.sparsify.sign_election import Agreeing
from adarank.spectral.mask_file import FILE, MaskFile
from make import State, family, floats, network, permuted
from test_whole_model_methods import DTYPES, coarse, flat, trimmed
from text_zoo import ADAPT, make_zoo, recipe

Array = np.ndarray[Any, Any]


def start(base: State, experts: Mapping[str, State], name: str, parameters: Mapping[str, Any]) -> LiveWeights:
    """An adaptive method's weights before the first step, over parameters of its own."""
    net = network(base, experts)
    method = parse(ADAPTIVE[name], parameters, name)
    shared = {n: nn.Parameter(torch.zeros(net.tensors[n].shape)) for n in net.merged()}
    live = method.start(net, shared, AdaptSettings(), "cpu")
    live.write()
    return live


def written(live: LiveWeights) -> State:
    return {name: parameter.detach() for name, parameter in live.parameters.items()}


def static(base: State, experts: Mapping[str, State], name: str, parameters: Mapping[str, Any]) -> State:
    method = parse(METHODS[name], parameters, name)
    return {n: t for n, t in merge_tensors(method, network(base, experts)) if t.is_floating_point()}


# Task-wise AdaMerging


def entropy_step(x: Array, weight: Array, bias: Array) -> tuple[float, Array, Array]:
    """Mean entropy of softmax(x Wᵀ + b) and its gradients, by hand."""
    z = x @ weight.T + bias
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    each = -(p * log_p).sum(axis=1, keepdims=True)
    slope = -p * (log_p + each) / len(x)
    return float(each.mean()), slope.T @ x, slope.sum(axis=0)


def by_hand(
    base: Mapping[str, Array], deltas: list[dict[str, Array]], inputs: list[Array], steps: int, lam: float, rate: float
) -> tuple[Array, list[float]]:
    """λ per task after so many steps of Adam on the summed entropies, clamped to [0, 1] where it is used."""
    own = np.full(len(deltas), lam)
    first, second, totals = np.zeros_like(own), np.zeros_like(own), []
    for step in range(1, steps + 1):
        used = own.clip(0, 1)
        w, b = (base[n] + sum(k * d[n] for k, d in zip(used, deltas, strict=True)) for n in ("weight", "bias"))
        found = [entropy_step(x, w, b) for x in inputs]
        totals.append(sum(value for value, _, _ in found))
        dw, db = sum(f[1] for f in found), sum(f[2] for f in found)
        grad = np.array([(d["weight"] * dw).sum() + (d["bias"] * db).sum() for d in deltas]) * ((own >= 0) & (own <= 1))
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
        own = own - rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return own.clip(0, 1), totals


@pytest.mark.parametrize("lam", [0.3, 0.97, 0.02])
def test_taskwise_adamerging_is_a_plain_loop_over_two_numbers(lam: float) -> None:
    torch.manual_seed(3)
    base, experts = nn.Linear(5, 4), {t: nn.Linear(5, 4) for t in "ab"}
    batches = {t: [torch.randn(9, 5)] for t in experts}
    plain = {n: p.detach().double().numpy() for n, p in base.named_parameters()}
    deltas = [
        {n: p.detach().double().numpy() - plain[n] for n, p in own.named_parameters()} for own in experts.values()
    ]
    inputs = [own[0].double().numpy() for own in batches.values()]
    given = {"lambda": lam, "lambda_per": "task", "clamp": (0.0, 1.0)}
    last = None
    for steps in range(1, 9):
        loop = AdaptSettings(
            steps=steps,
            lr_lambda=0.02,
            objective="entropy",
            keep="last",
            schedule="constant",
        )
        found = adarank.adapt(base, experts, batches, "adamerging", given, loop)
        wanted, totals = by_hand(plain, deltas, inputs, steps, lam, 0.02)
        for own in found.masks.lam.values():
            np.testing.assert_allclose(own.numpy(), wanted, atol=2e-6)
        got = [sum(values) for values in zip(*found.history.losses.values(), strict=True)]
        np.testing.assert_allclose(got, totals, atol=1e-5)
        last = wanted
    assert lam != 0.97 or last.max() == 1
    assert not np.allclose(last, lam, atol=1e-3)


@pytest.mark.parametrize("method", ["adamerging", "adamerging++"])
def test_the_preset_is_the_papers(method: str) -> None:
    layerwise, taskwise = (with_preset(ADAPTIVE[method], {}, {}, name) for name in ("adamerging", "adamerging-task"))
    assert (layerwise[0].lambda_per, taskwise[0].lambda_per) == ("tensor", "task")
    for own, loop in (layerwise, taskwise):
        assert own.scale == 0.3
        assert own.clamp == (0, 1)
        assert (loop.steps, loop.batch_size, loop.lr_lambda) == (500, 32, 1e-3)


# TIES' processing of each task vector


@given(st.integers(1, 4), st.integers(0, 10**6), st.floats(0.005, 1), DTYPES, st.booleans())
def test_adamerging_plus_plus_adds_entries_of_the_elected_sign(
    tasks: int, seed: int, density: float, dtype: torch.dtype, few: bool
) -> None:
    """Entry by entry, exactly: blocks about a trimmed and elected model flattened in numpy."""
    base, experts = coarse(tasks, seed) if few else family(tasks, seed, dtype)
    live = start(base, experts, "adamerging++", {"density": density})
    found = np.stack([
        np.concatenate([live.blocks[n].wholes[task].numpy().ravel() for n in floats(base)]) for task in range(tasks)
    ])  # fmt: skip
    cut = trimmed(flat(base, experts), density)
    sign = np.sign(np.add.reduce(cut.astype(np.float32), axis=0))
    np.testing.assert_array_equal(found, np.where(np.sign(cut) == sign, cut, 0))


@given(st.integers(1, 4), st.integers(0, 10**6), st.floats(0.005, 1), st.sampled_from([0.25, 0.5, 1.0]))
def test_its_start_is_ties_merging_where_sums_are_exact(tasks: int, seed: int, density: float, scale: float) -> None:
    base, experts = coarse(tasks, seed)
    given = {"density": density, "lambda": scale}
    found = written(start(base, experts, "adamerging++", given))
    for name, value in static(base, experts, "ties_merging", given).items():
        assert torch.equal(found[name], value)


@given(st.integers(1, 4), st.integers(0, 10**6), st.floats(0.005, 1), DTYPES)
def test_its_start_is_ties_merging_to_rounding_elsewhere(
    tasks: int, seed: int, density: float, dtype: torch.dtype
) -> None:
    base, experts = family(tasks, seed, dtype)
    given = {"density": density, "lambda": 0.3}
    found = written(start(base, experts, "adamerging++", given))
    for name, value in static(base, experts, "ties_merging", given).items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)


def test_the_order_of_the_tensors_and_tasks_is_irrelevant() -> None:
    base, experts = coarse(3, 7)
    given = {"density": 0.3, "lambda": 0.5}  # sums are exact
    found = written(start(base, experts, "adamerging++", given))
    other = written(start(permuted(base, 1), {t: experts[t] for t in reversed(experts)}, "adamerging++", given))
    assert all(torch.equal(found[name], other[name]) for name in found)


def agreeing_models() -> tuple[nn.Module, dict[str, nn.Module]]:
    """Experts that all lie on the same side of the base in every entry."""
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    side = {k: torch.randn_like(v).sign() for k, v in base.state_dict().items()}
    experts = {}
    for task in "abc":
        experts[task] = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        moved = {k: v + side[k] * (0.1 + torch.rand_like(v)) for k, v in base.state_dict().items()}
        experts[task].load_state_dict(moved)
    return base, experts


@pytest.mark.parametrize("per", ["tensor", "task"])
def test_where_all_signs_agree_density_one_is_adamerging(per: str) -> None:
    base, experts = agreeing_models()
    batches = {t: [torch.randn(8, 6)] for t in experts}
    loop = AdaptSettings(steps=10, lr_lambda=0.02, keep="last", schedule="constant")
    one = adarank.adapt(base, experts, batches, "adamerging", {"lambda_per": per}, loop)
    two = adarank.adapt(base, experts, batches, "adamerging++", {"lambda_per": per, "density": 1.0}, loop)
    assert one.history.losses == two.history.losses
    assert all(torch.equal(one.state[name], two.state[name]) for name in one.state)


def test_what_disagrees_makes_another_merge() -> None:
    base, experts = family(3)
    one, two = (written(start(base, experts, name, {})) for name in ("adamerging", "adamerging++"))
    assert not torch.equal(one["norm.weight"], two["norm.weight"])


# The masks file and recipes


@pytest.mark.parametrize("rank", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_merges_what_was_trimmed_and_elected_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, rank: float
) -> None:
    base, experts = family(3, 4, dtype)
    net = network(base, experts)
    live = start(base, experts, "adamerging++", {"density": 0.3, "rank": rank})
    live.lam += 0.1 * torch.randn(live.lam.shape, generator=torch.Generator().manual_seed(0))
    live.write()
    live.mask_file(net.tasks, "pretrained", {}).save(tmp_path / FILE)
    again = dict(merge_tensors(Masked(masks=MaskFile.load(tmp_path / FILE)), net))
    for name, value in written(live).items():
        assert torch.equal(again[name], value), name
    untrimmed = replace(MaskFile.load(tmp_path / FILE), thresholds={})
    assert not torch.equal(dict(merge_tensors(Masked(masks=untrimmed), net))["norm.weight"], again["norm.weight"])


def test_thresholds_that_leave_a_task_out_are_a_damaged_file(tmp_path: Path) -> None:
    file = MaskFile("pretrained", ("a", "b"), {"w": torch.ones(2)}, {}, {}, {}, thresholds={"a": 0.1, "b": 0.2})
    file.save(tmp_path / FILE)
    assert MaskFile.load(tmp_path / FILE).thresholds == {"a": 0.1, "b": 0.2}
    replace(file, thresholds={"a": 0.1}).save(tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"damaged masks file.*thresholds for 1 of 2"):
        MaskFile.load(tmp_path / FILE)


def test_a_file_without_thresholds_says_nothing_of_them(tmp_path: Path) -> None:
    file = MaskFile("pretrained", ("a",), {"w": torch.ones(1)}, {}, {}, {})
    file.save(tmp_path / FILE)
    assert b"thresholds" not in (tmp_path / FILE).read_bytes()
    assert MaskFile.load(tmp_path / FILE).thresholds == {}


def test_processed_task_vectors_do_not_touch_what_they_are_of() -> None:
    deltas = {"a": torch.tensor([1.0, -3.0, 0.5]), "b": torch.tensor([2.0, 1.0, -0.5])}
    before = {t: d.clone() for t, d in deltas.items()}
    found = Agreeing(deltas, {"a": 0.5, "b": 0.75})
    assert (list(found), len(found)) == (["a", "b"], 2)
    assert torch.equal(found["a"], torch.tensor([1.0, -3.0, 0.5]))
    assert torch.equal(found["b"], torch.tensor([2.0, 0.0, 0.0]))
    assert all(torch.equal(deltas[t], before[t]) for t in deltas)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "task-wise": ("adamerging", {"lambda_per": "task"}),
    "layer by layer": ("adamerging", {"lambda_per": "layer"}),
    "plus plus": ("adamerging++", {}),
    "plus plus, task-wise, low rank": ("adamerging++", {"lambda_per": "task", "density": 0.4, "rank": 0.5}),
    "adarank, top-k only": ("adarank", {"returnable": False}),
    "adarank, one λ": ("adarank", {"basis": "iso_cts", "lambda_per": "model"}),
}


class Killed(BaseException):
    """As a power cut: nothing of the program catches it."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_recipe_resumes_and_its_masks_merge_to_the_same_bytes(zoo: Path, tmp_path: Path, variant: str) -> None:
    name, parameters = VARIANTS[variant]
    loop = {**ADAPT["adapt"], "steps": 8, "keep": "last", "objective": "entropy"}
    path = recipe(zoo, f"{variant}.yaml", merge_method=name, parameters=parameters, adapt=loop)

    def cut(history: Any, steps: int) -> None:
        if history.step == 5:
            raise Killed

    with pytest.raises(Killed):
        adarank.merge_recipe(load_recipe(path), tmp_path / "out", progress=cut)
    record = adarank.merge_recipe(load_recipe(path), tmp_path / "out")
    adarank.merge_recipe(load_recipe(path), tmp_path / "whole")
    assert record["adaptation"]["resumed_from"] == [4]
    for file in (FILE, "model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    again = recipe(zoo, "masked.yaml", merge_method="masked", parameters={"masks": str(tmp_path / "out" / FILE)})
    adarank.merge_recipe(load_recipe(again), tmp_path / "again")
    adapted, merged = (load_file(tmp_path / own / "model.safetensors") for own in ("out", "again"))
    assert adapted.keys() == merged.keys()
    assert all(torch.equal(adapted[n], merged[n]) for n in adapted)
    lams = torch.stack(list(MaskFile.load(tmp_path / "out" / FILE).lam.values()))
    if parameters.get("lambda_per") in ("task", "model"):
        assert lams.unique(dim=0).shape[0] == 1
    if parameters.get("lambda_per") == "layer":
        assert 1 < lams.unique(dim=0).shape[0] < lams.shape[0]
    assert record["settings"]["parameters"]["lambda_per"] == parameters.get("lambda_per", "tensor")
