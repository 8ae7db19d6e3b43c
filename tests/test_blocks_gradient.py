"""Blocks and live weights against plain formulas and torch.autograd in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from adarank.adapt.live_weights import Learn, LiveWeights
from adarank.adapt.objectives import entropy
from adarank.adapt.settings import AdaptSettings
from adarank.spectral.blocks import Blocks, scaled_block, task_vector_blocks
from adarank.spectral.masks import MaskKind, pace, straight_through
from make import generator, randn

F64 = torch.float64
SHAPES = [(5, 3), (3, 6), (4, 4), (1, 4), (3, 2, 2, 2), (2, 5, 1, 1)]
FLAT_SHAPES = [(6,), (), (1,), (2, 3), (2, 2, 3)]


class Keep(torch.autograd.Function):
    """Exactly 0 or 1 forward, the slope of σ(logit/τ) backward."""

    @staticmethod
    def forward(ctx, logits: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.temperature = temperature
        return (torch.sigmoid(logits / temperature) >= 0.5).to(logits)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        soft = torch.sigmoid(logits / ctx.temperature)
        return grad * soft * (1 - soft) / ctx.temperature, None


def task_vectors(shape: tuple[int, ...], tasks: int, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    origin = randn(seed, *shape, dtype=F64)
    return origin, {f"t{t}": randn(seed + 10 + t, *shape, dtype=F64) for t in range(tasks)}


def spectral_sum(origin: Tensor, deltas: Mapping[str, Tensor], lam: Tensor, mask: Tensor) -> Tensor:
    """origin + Σ_t λ_t Σ_r b_r s_r u_r v_rᵀ, one outer product at a time."""
    total = origin.reshape(origin.shape[0], -1)
    place = 0
    for task, delta in enumerate(deltas.values()):
        u, s, vh = torch.linalg.svd(delta.reshape(delta.shape[0], -1), full_matrices=False)
        for r in range(s.numel()):
            total = total + lam[task] * mask[place] * s[r] * torch.outer(u[:, r], vh[r])
            place += 1
    return total.reshape(origin.shape)


def scaled_sum(origin: Tensor, deltas: Mapping[str, Tensor], lam: Tensor) -> Tensor:
    return origin + sum(lam[task] * delta for task, delta in enumerate(deltas.values()))


def masks_of(blocks: Blocks, kind: str, seed: int = 5) -> Tensor:
    """Some kinds of binary masks, and soft ones: of any number, and with most components at exactly zero."""
    if kind.startswith("soft"):
        values = randn(seed, blocks.components, dtype=F64)
        return values if kind == "soft" else values * (torch.rand(blocks.components, generator=generator(seed)) < 0.2)
    share = {"all": 2.0, "none": -1.0, "majority": 0.8, "minority": 0.2, "half": 0.5}[kind]
    return torch.rand(blocks.components, generator=generator(seed)) < share


@pytest.mark.parametrize("kept", ["all", "none", "majority", "minority", "half", "soft", "soft, few"])
@pytest.mark.parametrize("shape", SHAPES)
def test_compose_is_the_spectral_sum(shape: tuple[int, ...], kept: str) -> None:
    origin, deltas = task_vectors(shape, 3)
    blocks = task_vector_blocks(origin, deltas)
    lam, mask = randn(7, 3, dtype=F64), masks_of(blocks, kept)
    torch.testing.assert_close(
        blocks.compose(lam, mask), spectral_sum(origin, deltas, lam, mask.to(F64)), rtol=0, atol=1e-12
    )


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(0, 10**6))
def test_compose_is_the_spectral_sum_for_any_mask(rows: int, columns: int, tasks: int, seed: int) -> None:
    origin, deltas = task_vectors((rows, columns), tasks, seed)
    blocks = task_vector_blocks(origin, deltas)
    mask = torch.rand(blocks.components, generator=generator(seed)) < 0.5
    lam = randn(seed, tasks, dtype=F64)
    torch.testing.assert_close(
        blocks.compose(lam, mask), spectral_sum(origin, deltas, lam, mask.to(F64)), rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("shape", FLAT_SHAPES)
def test_a_scaled_tensor_is_the_scaled_sum(shape: tuple[int, ...]) -> None:
    origin, deltas = task_vectors(shape, 3)
    lam = randn(7, 3, dtype=F64)
    merged = scaled_block(origin, deltas).compose(lam, torch.zeros(0, dtype=torch.bool))
    assert merged.shape == origin.shape
    torch.testing.assert_close(merged, scaled_sum(origin, deltas, lam), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_an_empty_scaled_tensor_stays_empty(shape: tuple[int, ...]) -> None:
    origin, deltas = task_vectors(shape, 2)
    blocks = scaled_block(origin, deltas)
    assert blocks.compose(torch.ones(2, dtype=F64), torch.zeros(0, dtype=torch.bool)).shape == shape


def test_compose_leaves_the_origin_untouched() -> None:
    origin, deltas = task_vectors((4, 3), 2)
    before = origin.clone()
    blocks = task_vector_blocks(origin, deltas)
    blocks.compose(torch.ones(2, dtype=F64), masks_of(blocks, "all"))
    assert torch.equal(origin, before)


def autograd_gradients(
    origin: Tensor, deltas: Mapping[str, Tensor], lam: Tensor, mask: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    lam, mask = lam.clone().requires_grad_(), mask.to(F64).requires_grad_()
    return torch.autograd.grad((spectral_sum(origin, deltas, lam, mask) * grad).sum(), (lam, mask))


@pytest.mark.parametrize("kept", ["all", "none", "majority", "minority", "soft", "soft, few"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_masks_and_lambda_is_autograds(shape: tuple[int, ...], kept: str) -> None:
    origin, deltas = task_vectors(shape, 3)
    blocks = task_vector_blocks(origin, deltas)
    lam, mask, grad = randn(7, 3, dtype=F64), masks_of(blocks, kept), randn(8, *shape, dtype=F64)
    found = blocks.gradient(grad, lam, mask, learn_masks=True)
    by_lam, by_mask = autograd_gradients(origin, deltas, lam, mask, grad)
    torch.testing.assert_close(found.lam, by_lam, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.mask, by_mask, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kept", ["all", "none", "majority", "minority"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_lambda_alone_is_autograds(shape: tuple[int, ...], kept: str) -> None:
    origin, deltas = task_vectors(shape, 3)
    blocks = task_vector_blocks(origin, deltas)
    lam, mask, grad = randn(7, 3, dtype=F64), masks_of(blocks, kept), randn(8, *shape, dtype=F64)
    found = blocks.gradient(grad, lam, mask, learn_masks=False)
    torch.testing.assert_close(found.lam, autograd_gradients(origin, deltas, lam, mask, grad)[0], rtol=0, atol=1e-12)
    assert not found.mask.any()


@pytest.mark.parametrize("learn_masks", [True, False])
@pytest.mark.parametrize("shape", FLAT_SHAPES)
def test_gradient_of_a_scaled_tensor_is_autograds(shape: tuple[int, ...], learn_masks: bool) -> None:
    origin, deltas = task_vectors(shape, 3)
    lam, grad = randn(7, 3, dtype=F64), randn(8, *shape, dtype=F64)
    found = scaled_block(origin, deltas).gradient(grad, lam, torch.zeros(0, dtype=torch.bool), learn_masks)
    free = lam.clone().requires_grad_()
    (wanted,) = torch.autograd.grad((scaled_sum(origin, deltas, free) * grad).sum(), free)
    torch.testing.assert_close(found.lam, wanted, rtol=0, atol=1e-12)
    assert found.mask.numel() == 0


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=9), st.sampled_from([0.5, 1.0, 10.0]))
def test_straight_through_slope_is_autograds_of_the_sigmoid(values: list[float], temperature: float) -> None:
    logits = torch.tensor(values, dtype=F64, requires_grad=True)
    upstream = randn(3, len(values), dtype=F64)
    (wanted,) = torch.autograd.grad((torch.sigmoid(logits / temperature) * upstream).sum(), logits)
    torch.testing.assert_close(straight_through(upstream, logits.detach(), temperature), wanted, rtol=1e-9, atol=1e-15)


class Body(nn.Module):
    """A kernel, a matrix, a bias and a factor, all merged, under a head that is the task's own."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(3, 2, 2, 2, dtype=F64))
        self.weight = nn.Parameter(torch.zeros(5, 12, dtype=F64))
        self.bias = nn.Parameter(torch.zeros(5, dtype=F64))
        self.factor = nn.Parameter(torch.zeros((), dtype=F64))
        self.head = nn.Parameter(randn(classes, 5, classes, dtype=F64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.conv2d(x, self.kernel).flatten(1).tanh()
        return self.factor * (torch.tanh(hidden @ self.weight.T + self.bias) @ self.head)


MERGED = {"kernel": (3, 2, 2, 2), "weight": (5, 12), "bias": (5,), "factor": ()}
SPECTRAL = ("kernel", "weight")
LOGIT = 0.4


class Toy:
    """Two tasks over one body, with everything needed to do it again by autograd alone."""

    def __init__(self, learn: Learn) -> None:
        self.modules = {"a": Body(3), "b": Body(4)}
        self.inputs = {"a": randn(1, 6, 2, 3, 3, dtype=F64), "b": randn(2, 4, 2, 3, 3, dtype=F64)}
        first = self.modules["a"]
        for name in MERGED:
            setattr(self.modules["b"], name, getattr(first, name))
        self.vectors = {name: task_vectors(shape, 2, i * 50) for i, (name, shape) in enumerate(MERGED.items())}
        blocks = {n: task_vector_blocks(*v) if n in SPECTRAL else scaled_block(*v) for n, v in self.vectors.items()}
        self.live = LiveWeights({n: getattr(first, n) for n in MERGED}, blocks, learn, scale=0.4, logit=LOGIT)
        self.live.lam.copy_(0.5 + 0.6 * randn(21, *self.live.lam.shape, dtype=F64))
        self.live.logits.copy_(randn(22, *self.live.logits.shape, dtype=F64))

    def loss(self, task: str) -> Tensor:
        return entropy(self.modules[task](self.inputs[task]))

    def closed_form(self, tasks: str = "ab") -> None:
        self.live.write()
        self.live.zero_grad()
        for task in tasks:
            self.loss(task).backward()
        self.live.pull_back()

    def by_autograd(self, tasks: str = "ab") -> tuple[Tensor, Tensor]:
        """Gradients of λ and logits with the whole sum inside the graph."""
        lam, logits = self.live.lam.clone().requires_grad_(), self.live.logits.clone().requires_grad_()
        learn = self.live.learn
        used = lam.clamp(*learn.clamp) if learn.clamp else lam
        if learn.mask == "binary":
            mask = Keep.apply(logits, learn.temperature)
        else:
            moved = logits - LOGIT  # all components are kept at the start
            mask = 1 + moved * self.paces() / (2 * LOGIT)
        place, weights = 0, {}
        for row, (name, (origin, deltas)) in enumerate(self.vectors.items()):
            if name in SPECTRAL:
                count = 2 * min(origin.shape[0], origin.numel() // origin.shape[0])
                weights[name] = spectral_sum(origin, deltas, used[row], mask[place : place + count])
                place += count
            else:
                weights[name] = scaled_sum(origin, deltas, used[row])
        total = sum(entropy(functional_call(self.modules[t], weights, (self.inputs[t],))) for t in tasks)
        return torch.autograd.grad(total, (lam, logits))

    def paces(self) -> Tensor:
        """rms(s)/s of each task's matrix, at most 20, from NumPy's SVDs."""
        paces = []
        for name in SPECTRAL:
            for delta in self.vectors[name][1].values():
                s = np.linalg.svd(delta.flatten(1).numpy(), compute_uv=False)
                paces.append(np.minimum(np.sqrt(np.mean(s**2)) / s, 20))
        return torch.from_numpy(np.concatenate(paces))


SOFT = {
    "soft": Learn(mask="soft"),
    "soft, clamped": Learn(mask="soft", clamp=(0.2, 0.8)),
}


@pytest.mark.parametrize("learn", [Learn(temperature=0.7), Learn(temperature=10.0), *SOFT.values()])
def test_live_gradients_are_those_of_full_autograd(learn: Learn) -> None:
    toy = Toy(learn)
    toy.closed_form()
    by_lam, by_logits = toy.by_autograd()
    torch.testing.assert_close(toy.live.lam.grad, by_lam, rtol=0, atol=1e-11)
    torch.testing.assert_close(toy.live.logits.grad, by_logits, rtol=0, atol=1e-11)
    assert by_lam.abs().max() > 1e-3
    assert by_logits.abs().max() > 1e-5


def test_live_gradient_of_lambda_alone_is_that_of_full_autograd() -> None:
    toy = Toy(Learn(masks=False))
    toy.closed_form()
    torch.testing.assert_close(toy.live.lam.grad, toy.by_autograd()[0], rtol=0, atol=1e-11)
    assert toy.live.logits.grad is None


@pytest.mark.parametrize("mask", ["binary", "soft"])
def test_live_gradient_of_masks_alone_is_that_of_full_autograd(mask: MaskKind) -> None:
    toy = Toy(Learn(lam=False, mask=mask))
    toy.closed_form()
    torch.testing.assert_close(toy.live.logits.grad, toy.by_autograd()[1], rtol=0, atol=1e-11)
    assert toy.live.lam.grad is None


def test_clamped_lambda_has_no_gradient_outside_its_range() -> None:
    toy = Toy(Learn(clamp=(0.2, 0.8)))
    toy.closed_form()
    by_lam, by_logits = toy.by_autograd()
    outside = (toy.live.lam < 0.2) | (toy.live.lam > 0.8)
    assert outside.any()
    assert not outside.all()
    assert not toy.live.lam.grad[outside].any()
    torch.testing.assert_close(toy.live.lam.grad, by_lam, rtol=0, atol=1e-11)
    torch.testing.assert_close(toy.live.logits.grad, by_logits, rtol=0, atol=1e-11)


def test_gradients_of_several_tasks_add_up() -> None:
    toy, parts = Toy(Learn()), []
    for tasks in ("a", "b", "ab"):
        toy.closed_form(tasks)
        parts.append((toy.live.lam.grad.clone(), toy.live.logits.grad.clone()))
    for kind in range(2):
        torch.testing.assert_close(parts[0][kind] + parts[1][kind], parts[2][kind], rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask", ["binary", "soft"])
def test_written_weights_are_the_spectral_sum(mask: MaskKind) -> None:
    toy = Toy(Learn(clamp=(0.0, 1.0), mask=mask))
    toy.live.write()
    masks = toy.live.masks()
    for row, (name, (origin, deltas)) in enumerate(toy.vectors.items()):
        lam = toy.live.lam[row].clamp(0, 1)
        wanted = (
            spectral_sum(origin, deltas, lam, masks[name].to(F64))
            if name in SPECTRAL
            else scaled_sum(origin, deltas, lam)
        )
        torch.testing.assert_close(toy.live.parameters[name].detach(), wanted, rtol=0, atol=1e-12)


def test_a_tensor_without_gradient_leaves_its_lambda_alone() -> None:
    toy = Toy(Learn())
    toy.live.write()
    toy.live.zero_grad()
    toy.modules["a"].bias.sum().backward()
    toy.live.pull_back()
    moved = toy.live.lam.grad.abs().sum(dim=1) > 0
    assert moved.tolist() == [name == "bias" for name in MERGED]
    assert not toy.live.logits.grad.any()


@pytest.mark.parametrize("mask", ["binary", "soft"])
@pytest.mark.parametrize("rank", [0.01, 0.34, 1.0])
def test_the_start_keeps_the_top_components_of_each_task(rank: float, mask: MaskKind) -> None:
    origin, deltas = task_vectors((6, 9), 3)
    blocks = {"w": task_vector_blocks(origin, deltas)}
    live = LiveWeights({"w": nn.Parameter(origin.clone())}, blocks, Learn(mask=mask), scale=1.5, rank=rank, logit=0.3)
    live.write()
    count = max(1, int(rank * 6))
    cut = []
    for delta in deltas.values():
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        cut.append((u[:, :count] * s[:count]) @ vh[:count])
    torch.testing.assert_close(live.parameters["w"].detach(), origin + 1.5 * sum(cut), rtol=0, atol=1e-12)
    assert torch.allclose(live.logits.abs(), torch.tensor(0.3, dtype=F64), rtol=1e-6)
    assert live.kept_share() == pytest.approx(count / 6)


def test_soft_masks_that_are_not_to_return_stay_zero() -> None:
    """Components pruned at the start have no gradient, so the loop's optimiser cannot move them."""
    toy = Toy(Learn(mask="soft", returnable=False))
    toy.live.reset(0.4, 0.5)
    toy.closed_form()
    pruned = toy.live.logits < 0
    assert pruned.any()
    assert not toy.live.logits.grad[pruned].any()
    assert toy.live.logits.grad[~pruned].all()
    assert not torch.cat(list(toy.live.masks().values()))[pruned].any()


@pytest.mark.parametrize("learn", SOFT.values(), ids=SOFT)
def test_a_step_moves_all_components_of_a_matrix_alike(learn: Learn) -> None:
    toy = Toy(learn)
    toy.live.reset(0.4, 0.5)
    before = toy.live.masks()
    toy.live.logits += 0.01
    for name, mask in toy.live.masks().items():
        if name not in SPECTRAL:
            continue
        block = toy.live.blocks[name]
        moved = mask - before[name]
        for own, s in zip(moved.split(block.sizes), block.s.split(block.sizes), strict=True):
            assert s[0] / s[-1] > 1.5
            scale = s / s.square().mean().sqrt()
            torch.testing.assert_close(own * scale, torch.full_like(s, 0.01 / (2 * LOGIT)), rtol=1e-9, atol=0)


def test_paces_of_small_and_undetermined_components_are_bounded() -> None:
    s = torch.tensor([3.0, 1.0, 1e-2, 1e-9, 0.0])
    rms = math.sqrt((9 + 1 + 1e-4) / 3)
    torch.testing.assert_close(pace(s), torch.tensor([rms / 3, rms, 20.0, 1.0, 1.0]))
    assert pace(torch.zeros(4)).tolist() == [1.0] * 4
    assert pace(torch.zeros(0)).shape == (0,)


def test_where_masks_are_not_learned_soft_ones_are_binary() -> None:
    toy = Toy(Learn(masks=False, mask="soft"))
    assert all(mask.dtype == torch.bool for mask in toy.live.masks().values())


@pytest.mark.parametrize(
    ("learn", "given", "wanted"),
    [
        (Learn(mask="soft"), "auto", 0.01),
        (Learn(), "auto", 0.005),
        (Learn(mask="soft"), 0.3, 0.3),
        (Learn(), 0.3, 0.3),
    ],
)
def test_auto_is_a_step_in_its_own_unit(learn: Learn, given: float | str, wanted: float) -> None:
    toy = Toy(learn)
    settings = AdaptSettings(lr_masks=given, lr_lambda=0.07)
    lam, logits = toy.live.optimiser(settings).param_groups
    assert (lam["lr"], logits["lr"], logits["start"]) == (0.07, wanted, wanted)
