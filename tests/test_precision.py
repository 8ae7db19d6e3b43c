"""Steps with factors in bfloat16 beside the plain formula, and what is written after them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adarank.adapt.live_weights import Learn, LiveWeights
from adarank.spectral.blocks import task_vector_blocks
from adarank.spectral.half import HalfFactors
from make import randn


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (16, 4, 2, 2)])
def test_bfloat16_products_are_the_plain_ones_to_rounding(shape: tuple[int, ...]) -> None:
    origin, deltas = randn(0, *shape), {f"t{t}": 0.01 * randn(10 + t, *shape) for t in range(3)}
    blocks = task_vector_blocks(origin, deltas)
    half = HalfFactors.of(blocks)
    lam, mask, grad = randn(7, 3), randn(8, blocks.components), randn(9, *shape)
    plain = blocks.compose(lam, mask)
    moved = (plain - origin).norm()
    assert (half.compose(lam, mask) - plain).norm() < 2**-6 * moved
    wanted, found = blocks.gradient(grad, lam, mask, True), half.gradient(grad, lam, mask)
    assert (found.mask - wanted.mask).norm() < 2**-6 * wanted.mask.norm()
    assert (found.lam - wanted.lam).norm() < 2**-5 * wanted.lam.norm()


def test_weights_that_settle_are_those_of_the_mask_file() -> None:
    origin, deltas = randn(0, 24, 16), {f"t{t}": 0.1 * randn(10 + t, 24, 16) for t in range(2)}
    blocks = {"w": task_vector_blocks(origin, deltas)}
    parameter = nn.Parameter(origin.clone())
    live = LiveWeights({"w": parameter}, blocks, Learn(mask="soft", precision="bfloat16"), 0.7, 0.5)
    with torch.no_grad():
        live.logits += 0.01 * randn(3, live.logits.numel())
    live.write()
    stepped = parameter.detach().clone()
    live.settle()
    assert torch.equal(parameter, blocks["w"].compose(live.used_lam()[0], live.masks()["w"]))
    assert not torch.equal(parameter, stepped)
    torch.testing.assert_close(parameter.detach(), stepped, rtol=0, atol=0.01)
