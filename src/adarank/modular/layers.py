"""Layers that merge anew for every input of a batch.

    linear        y(x) = x W₀ᵀ + b₀ + x (Σ_t λ_t(x) τ_t)ᵀ + Σ_t λ_t(x) β_t        τ_t whole, or U_t V_tᵀ: Σ_t λ_t(x) (x V_t) U_tᵀ
    convolution   y(x) = y₀(x) + Σ_t λ_t(x) conv(x; τ_t, β_t)
    layer norm    y(x) = n(x) ∘ (g₀ + Σ_t λ_t(x) γ_t) + b₀ + Σ_t λ_t(x) β_t
    expanded      v(x) = v₀ + Σ_t λ_t(x) ν_t        parameters that a network expands over the batch, such as class tokens

These are what the layer gives with the weights W₀ + Σ_t λ_t(x) τ_t, by linearity; rounding apart, it is the same number.
Of the sums Σ_t λ_t(x) τ_t a few inputs' are in memory at a time, and none is kept for the backward pass: T + n products for
an input of n positions, where x τ_tᵀ task by task would take T·n. They are forward hooks on the layers as they are, so that the network keeps its parts and their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from adarank.errors import MismatchError


class Route:
    """The weights of one forward pass's inputs.

    Attributes:
        weights: (batch, tasks) λ; None where the shared weights alone are meant.
        held_bytes: of the matrices of single inputs, at most so many are in memory at a time, but always one.
    """

    def __init__(self, held_bytes: int = 2**26) -> None:
        self.weights: Tensor | None = None
        self.held_bytes = held_bytes

    def over(self, x: Tensor) -> Tensor | None:
        """λ as (rows, 1, …, 1, tasks), to be multiplied with what a layer gives; None for the shared weights.

        A layer may be given an input's windows as separate rows, one input's after another's.
        """
        if self.weights is None:
            return None
        batch, rows = len(self.weights), len(x)
        if rows % batch:
            raise MismatchError(
                f"A layer was given {rows} rows of a batch of {batch}: which input each belongs to is unknown. "
                "This architecture cannot be merged input by input."
            )
        weights = self.weights.repeat_interleave(rows // batch, dim=0).to(x)
        return weights.reshape(rows, *[1] * (x.dim() - 2), weights.shape[1])


@dataclass(frozen=True)
class StackedDeltas:
    """What each task adds to one tensor, whole or as factors.

    Attributes:
        full: (tasks, *shape), or None.
        u, v: (tasks, rows, k) and (tasks, columns, k) of U Vᵀ, where `full` is None.
    """

    full: Tensor | None = None
    u: Tensor | None = None
    v: Tensor | None = None

    def part(self, name: str) -> Tensor:
        """What bundles store as `delta`, `u` or `v`, of all tasks."""
        tensor = {"delta": self.full, "u": self.u, "v": self.v}[name]
        assert tensor is not None  # bundles store what is there
        return tensor

    def whole(self, shape: Sequence[int]) -> Tensor:
        """(tasks, *shape), factors multiplied."""
        if self.full is not None:
            return self.full
        assert self.u is not None and self.v is not None  # noqa: PT018 (one or the other is there)
        return (self.u @ self.v.mT).reshape(-1, *shape)


class _Merge(nn.Module):
    """A forward hook with tensors: those of `deltas` that are for one layer, by the parameter's name in the layer."""

    def __init__(self, layer: nn.Module, deltas: Mapping[str, StackedDeltas], route: Route) -> None:
        super().__init__()
        self.route = route
        self._shared: dict[str, nn.Parameter | None] = {}
        self.keep(layer, deltas)

    def keep(self, layer: nn.Module, deltas: Mapping[str, StackedDeltas]) -> None:
        """Every delta whole, as a buffer (tasks, *shape) under its parameter's name."""
        for name in layer._parameters:
            delta = deltas.get(name)
            tensor = delta.whole(layer.get_parameter(name).shape) if delta else None
            self.register_buffer(f"delta_{name}", tensor)

    def delta(self, name: str) -> Tensor | None:
        """The buffer of a parameter's deltas; None if it has none."""
        tensor: Tensor | None = self._buffers.get(f"delta_{name}")
        return tensor


class _Linear(_Merge):
    """On nn.Linear and on transformers' Conv1D, which stores its matrix the other way round."""

    def keep(self, layer: nn.Module, deltas: Mapping[str, StackedDeltas]) -> None:
        super().keep(layer, {name: delta for name, delta in deltas.items() if delta.full is not None})
        delta, turned = deltas.get("weight"), not isinstance(layer, nn.Linear)
        if delta is not None and delta.full is not None and turned:
            self._buffers["delta_weight"] = delta.full.mT
        if delta is not None and delta.u is not None and delta.v is not None:
            up, down = (delta.v, delta.u) if turned else (delta.u, delta.v)
            self.register_buffer("up", up.transpose(0, 1).flatten(1))  # (out, tasks·k)
            self.register_buffer("down", down.mT.flatten(0, 1))  # (tasks·k, in)

    def forward(self, layer: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        weights = self.route.over(given[0])
        if weights is None:
            return out
        matrix, bias = self.delta("weight"), self.delta("bias")
        up, down = self._buffers.get("up"), self._buffers.get("down")
        if up is not None and down is not None:
            inner = linear(given[0], down)
            out = out + linear(inner * weights.repeat_interleave(inner.shape[-1] // weights.shape[-1], dim=-1), up)
        if matrix is not None:
            x = given[0].reshape(len(weights), -1, matrix.shape[-1])
            held = self.route.held_bytes
            product: Tensor = _InputMatrix.apply(x, weights.reshape(len(weights), -1), matrix, held)  # type: ignore[no-untyped-call]
            out = out + product.reshape(out.shape)
        return out if bias is None else out + weights @ bias


class _InputMatrix(torch.autograd.Function):
    """y_i = x_i (Σ_t λ_it τ_t)ᵀ, with gradients for x and λ. The matrices are formed for a few inputs at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, matrix: Tensor, held_bytes: int) -> Tensor:
        """(rows, positions, in), (rows, tasks) and (tasks, out, in) -> (rows, positions, out)."""
        ctx.save_for_backward(x, weights, matrix)
        ctx.held_bytes = held_bytes
        out = x.new_empty(*x.shape[:2], matrix.shape[1])
        for rows in _chunks(x, matrix, held_bytes):
            torch.bmm(x[rows], _matrices(weights[rows], matrix).mT, out=out[rows])
        return out

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weights, matrix = ctx.saved_tensors
        grad = given[0]
        grad_x, grad_weights = torch.empty_like(x), torch.empty_like(weights)
        for rows in _chunks(x, matrix, ctx.held_bytes):
            torch.bmm(grad[rows], _matrices(weights[rows], matrix), out=grad_x[rows])
            slope = torch.bmm(grad[rows].mT, x[rows])  # of each input's matrix
            grad_weights[rows] = slope.flatten(1) @ matrix.flatten(1).T
        return grad_x, grad_weights, None, None


def _matrices(weights: Tensor, matrix: Tensor) -> Tensor:
    """(rows, out, in) Σ_t λ_t τ_t."""
    return (weights @ matrix.flatten(1)).reshape(-1, *matrix.shape[1:])


def _chunks(x: Tensor, matrix: Tensor, held_bytes: int) -> list[slice]:
    """Rows whose matrices fit into so much memory together."""
    count = max(1, held_bytes // (matrix[0].numel() * matrix.element_size()))
    return [slice(i, i + count) for i in range(0, len(x), count)]


class _Conv(_Merge):
    def forward(self, layer: nn.Conv2d, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        weights = self.route.over(given[0])
        if weights is None:
            return out
        kernel, bias = self.delta("weight"), self.delta("bias")
        for task in range(weights.shape[-1]):
            if kernel is not None:
                out = out + weights[..., task, None] * layer._conv_forward(given[0], kernel[task], None)
            if bias is not None:
                out = out + weights[..., task, None] * bias[task][:, None, None]
        return out


class _Norm(_Merge):
    def forward(self, layer: nn.LayerNorm, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        weights = self.route.over(given[0])
        if weights is None:
            return out
        gain, bias = self.delta("weight"), self.delta("bias")
        if gain is not None:
            out = out + layer_norm(given[0], layer.normalized_shape, eps=layer.eps) * (weights @ gain)
        return out if bias is None else out + weights @ bias


class _Expanded(_Merge):
    """Before and after a part that expands its parameters over the batch: there each input has merged ones."""

    def forward(self, part: nn.Module, given: tuple[Any, ...]) -> None:
        self._shared = dict(part._parameters)
        weights = self.route.weights
        for name, shared in self._shared.items() if weights is not None else ():
            delta = self.delta(name)
            if delta is not None and shared is not None and weights is not None:
                merged = shared + torch.tensordot(weights.to(delta), delta, dims=1)[:, 0]
                part._parameters[name] = merged

    def restore(self, part: nn.Module, given: tuple[Any, ...], out: Any) -> None:
        """Give the part the shared parameters back."""
        part._parameters.update(self._shared)


@dataclass(frozen=True)
class Mounted:
    """Merges of one network's layers, which may be put on several networks of the same architecture.

    Attributes:
        merges: tuple of the network's tensors that a layer has -> its merge.
        left: tensors with deltas that are in no layer of a known kind: they stay as they are, the same for all inputs.
    """

    merges: Mapping[tuple[str, ...], nn.Module]
    left: tuple[str, ...]

    def attach(self, module: nn.Module, keys: Mapping[str, str]) -> None:
        """Hook the merges to the layers of a network.

        Arguments:
            keys: tensor of the network -> its name in the module.
        """
        for names, merge in self.merges.items():
            layer = module.get_submodule(keys[names[0]].rpartition(".")[0])
            if isinstance(merge, _Expanded):
                layer.register_forward_pre_hook(merge)
                layer.register_forward_hook(merge.restore, always_call=True)
            else:
                layer.register_forward_hook(merge)


def carry(module: nn.Module, parts: Iterable[nn.Module]) -> None:
    """Make hooked parts submodules of a network, so that they follow it to a device."""
    module.add_module("per_input", nn.ModuleList(parts))


def mounted(
    module: nn.Module,
    keys: Mapping[str, str],
    deltas: Mapping[str, StackedDeltas],
    route: Route,
    expanded: Sequence[str],
) -> Mounted:
    """The merges that a network's layers need.

    Arguments:
        keys: tensor of the network -> its name in the module.
        deltas: what tasks add, by the network's names.
        expanded: names of parameters that networks of the family expand over the batch.
    """
    layers: dict[str, dict[str, str]] = {}
    for name in (name for name in keys if name in deltas):
        path, _, leaf = keys[name].rpartition(".")
        layers.setdefault(path, {})[leaf] = name
    merges: dict[tuple[str, ...], nn.Module] = {}
    for path, names in layers.items():
        layer = module.get_submodule(path)
        kind = _kind(layer)
        if kind is _Expanded:
            names = {leaf: n for leaf, n in names.items() if leaf in expanded and len(layer.get_parameter(leaf)) == 1}
        if kind is not None and names:
            of_layer = {leaf: deltas[name] for leaf, name in names.items()}
            merges[tuple(names.values())] = kind(layer, of_layer, route)
    placed = {name for names in merges for name in names}
    return Mounted(merges, tuple(name for name in deltas if name not in placed))


def _kind(layer: nn.Module) -> type[_Merge] | None:
    """What merges a layer; None if nothing does. Subclasses may do more than their class, so the exact class decides."""
    from transformers.pytorch_utils import Conv1D  # imported on use: it is slow

    known: dict[type[nn.Module], type[_Merge]] = {
        nn.Linear: _Linear,
        Conv1D: _Linear,
        nn.Conv2d: _Conv,
        nn.LayerNorm: _Norm,
    }
    if next(layer.children(), None) is not None:
        return _Expanded
    return known.get(type(layer))
