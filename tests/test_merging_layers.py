"""Layers that merge input by input give what a layer with that input's own merged weights gives."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adarank.errors import MismatchError
from adarank.modular.layers import Route, StackedDeltas, mounted
from make import generator, randn

LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "linear over positions": (lambda: nn.Linear(5, 4), (3, 7, 5)),
    "linear over pixels": (lambda: nn.Linear(5, 4), (3, 2, 6, 5)),
    "linear without bias": (lambda: nn.Linear(5, 4, bias=False), (3, 7, 5)),
    "conv1d": (lambda: Conv1D(4, 5), (3, 7, 5)),
    "conv2d": (lambda: nn.Conv2d(5, 4, 3, stride=2, padding=1), (3, 5, 8, 8)),
    "grouped conv2d": (lambda: nn.Conv2d(4, 4, 3, groups=4), (3, 4, 8, 8)),
    "layer norm": (lambda: nn.LayerNorm(5), (3, 7, 5)),
}


class Expanding(nn.Module):
    """As image networks begin: a class token and positions, expanded over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 5))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 4, 5))
        self.inner = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.cls_token.expand(len(x), -1, -1), self.inner(x)], dim=1) + self.position_embeddings


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found


def stirred(net: nn.Module, seed: int = 0) -> nn.Module:
    source = generator(seed)
    net = net.double()
    with torch.no_grad():
        for own in net.parameters():
            own.copy_(torch.randn(own.shape, generator=source, dtype=torch.float64))
    return net


def by_hand(net: nn.Module, deltas: Mapping[str, Tensor], weights: Tensor, x: Tensor) -> Tensor:
    """Each input alone, through a copy whose weights are W₀ + Σ_t λ_t τ_t for it."""
    rows = []
    for number, own in enumerate(weights):
        merged = copy.deepcopy(net)
        with torch.no_grad():
            for name, parameter in merged.named_parameters():
                if name in deltas:
                    parameter += torch.einsum("t,t...->...", own, deltas[name])
        rows.append(merged(x[number : number + 1]))
    return torch.cat(rows)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("tasks", [1, 3])
@torch.no_grad()
def test_a_merged_layer_is_the_layer_with_each_inputs_weights(kind: str, tasks: int) -> None:
    make, shape = LAYERS[kind]
    net = stirred(Net(make()))
    full = {name: randn(7, tasks, *own.shape, dtype=torch.float64) for name, own in net.named_parameters()}
    keys = {name: name for name in full}
    route = Route()
    reference = copy.deepcopy(net)
    found = mounted(net, keys, {name: StackedDeltas(own) for name, own in full.items()}, route, ())
    assert not found.left
    found.attach(net, keys)
    x = randn(3, *shape, dtype=torch.float64)
    torch.testing.assert_close(net(x), reference(x), rtol=0, atol=0)  # no route: the layer itself
    route.weights = randn(4, len(x), tasks, dtype=torch.float64)
    torch.testing.assert_close(net(x), by_hand(reference, full, route.weights, x), rtol=1e-10, atol=1e-10)
    route.weights = torch.zeros(len(x), tasks, dtype=torch.float64)
    torch.testing.assert_close(net(x), reference(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "linear over positions", "conv1d", "conv2d"])
@torch.no_grad()
def test_factors_are_the_matrix_that_they_multiply_to(kind: str) -> None:
    make, shape = LAYERS[kind]
    net = stirred(Net(make()))
    matrix = net.get_parameter("layer.weight")
    rows = matrix.shape[0]
    u, v = (randn(i, 3, n, 2, dtype=torch.float64) for i, n in ((1, rows), (2, matrix.numel() // rows)))
    full = {"layer.weight": (u @ v.mT).reshape(3, *matrix.shape)}
    reference, route = copy.deepcopy(net), Route()
    keys = {"layer.weight": "layer.weight"}
    mounted(net, keys, {"layer.weight": StackedDeltas(u=u, v=v)}, route, ()).attach(net, keys)
    x = randn(3, *shape, dtype=torch.float64)
    route.weights = randn(4, len(x), 3, dtype=torch.float64)
    torch.testing.assert_close(net(x), by_hand(reference, full, route.weights, x), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_parameters_expanded_over_the_batch_are_each_inputs_own() -> None:
    net = stirred(Net(Expanding()))
    full = {name: randn(7, 2, *own.shape, dtype=torch.float64) for name, own in net.named_parameters()}
    keys, route, reference = {name: name for name in full}, Route(), copy.deepcopy(net)
    deltas = {name: StackedDeltas(own) for name, own in full.items()}
    found = mounted(net, keys, deltas, route, ("cls_token", "position_embeddings"))
    assert not found.left
    found.attach(net, keys)
    x = randn(3, 6, 3, 5, dtype=torch.float64)
    route.weights = randn(4, 6, 2, dtype=torch.float64)
    torch.testing.assert_close(net(x), by_hand(reference, full, route.weights, x), rtol=1e-10, atol=1e-10)
    with pytest.raises(RuntimeError):
        net(x[:, :2])  # three positions were needed
    assert dict(net.named_parameters()).keys() == dict(reference.named_parameters()).keys()
    assert torch.equal(net.get_parameter("layer.cls_token"), reference.get_parameter("layer.cls_token"))
    assert mounted(reference, keys, deltas, route, ()).left == ("layer.cls_token", "layer.position_embeddings")


def test_a_copy_has_merges_of_its_own() -> None:
    net = stirred(Net(nn.Linear(5, 4)))
    keys, route = {"layer.weight": "layer.weight"}, Route()
    mounted(net, keys, {"layer.weight": StackedDeltas(torch.ones(1, 4, 5).double())}, route, ()).attach(net, keys)
    route.weights = torch.ones(2, 1).double()
    twin, x = copy.deepcopy(net), randn(1, 2, 5, dtype=torch.float64)
    before = twin(x)
    route.weights = None
    assert torch.equal(twin(x), before)
    assert not torch.equal(net(x), before)


@torch.no_grad()
def test_windows_have_their_inputs_weights_others_are_refused() -> None:
    net = stirred(Net(nn.Linear(5, 4)))
    keys, route, reference = {"layer.weight": "layer.weight"}, Route(), copy.deepcopy(net)
    full = {"layer.weight": randn(2, 2, 4, 5, dtype=torch.float64)}
    mounted(net, keys, {"layer.weight": StackedDeltas(full["layer.weight"])}, route, ()).attach(net, keys)
    route.weights = randn(4, 3, 2, dtype=torch.float64)
    x = randn(3, 6, 7, 5, dtype=torch.float64)  # two windows for each of three inputs
    expected = by_hand(reference, full, route.weights.repeat_interleave(2, dim=0), x)
    torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(MismatchError, match="4 rows of a batch of 3"):
        net(x[:4])


@pytest.mark.parametrize("held", [1, 10**9])
def test_a_layers_gradients_are_those_of_autograd(held: int) -> None:
    """For input and weights, however few matrices are held at a time."""
    net = stirred(Net(nn.Linear(5, 4)))
    delta, keys, route = randn(2, 3, 4, 5, dtype=torch.float64), {"layer.weight": "layer.weight"}, Route(held)
    mounted(net, keys, {"layer.weight": StackedDeltas(delta)}, route, ()).attach(net, keys)
    x = randn(3, 6, 7, 5, dtype=torch.float64).requires_grad_()
    weights = randn(4, 6, 3, dtype=torch.float64).requires_grad_()

    def own(x: Tensor, weights: Tensor) -> Tensor:
        route.weights = weights
        return net(x)

    def reference(x: Tensor, weights: Tensor) -> Tensor:
        matrices = net.get_parameter("layer.weight") + torch.einsum("bt,toi->boi", weights, delta)
        return torch.einsum("bni,boi->bno", x, matrices) + net.get_parameter("layer.bias")

    assert torch.autograd.gradcheck(own, (x, weights))
    torch.testing.assert_close(own(x, weights), reference(x, weights))
