"""Live merged weights with a coefficient for every entry of every task vector.

W = W₀ + Σ_t α_t ∘ τ_t        dL/dα_t = dL/dW ∘ τ_t
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adarank.adapt.settings import AdaptSettings
from adarank.spectral.blocks import Blocks
from adarank.spectral.mask_file import MaskFile


class ElementWeights:
    """Merged weights as a function of one coefficient per entry and task.

    Arguments:
        parameters: tensor name -> the network's parameter (or buffer), written in place.
        blocks: the same names -> origin and task vectors, whole, on the parameter's device.
        scale: every coefficient at the start.

    Attributes:
        coefficients: tensor name -> (tasks, rows, columns), as its task vectors are.
    """

    def __init__(self, parameters: Mapping[str, Tensor], blocks: Mapping[str, Blocks], scale: float) -> None:
        self.parameters = dict(parameters)
        self._origins = {name: block.origin for name, block in blocks.items()}
        self._vectors = {name: _whole(block) for name, block in blocks.items()}
        self.coefficients = {name: torch.empty_like(vectors) for name, vectors in self._vectors.items()}
        self.reset(scale, 1.0)
        for parameter in self.parameters.values():
            parameter.requires_grad_(isinstance(parameter, nn.Parameter))

    def optimiser(self, settings: AdaptSettings) -> torch.optim.Optimizer:
        """Adam over all coefficients."""
        group = {"params": list(self.coefficients.values()), "lr": settings.lr_lambda, "start": settings.lr_lambda}
        return torch.optim.Adam([group])

    def learned(self) -> dict[str, Tensor]:
        """The coefficients."""
        return self.coefficients

    @torch.no_grad()
    def reset(self, scale: float, rank: float) -> None:
        """All coefficients `scale`; there are no components of which a rank could be kept."""
        for coefficients in self.coefficients.values():
            coefficients.fill_(scale)

    @torch.no_grad()
    def write(self) -> None:
        """Compose every merged tensor into the network's parameters."""
        for name, coefficients in self.coefficients.items():
            moved = (coefficients * self._vectors[name]).sum(dim=0)
            origin = self._origins[name]
            self.parameters[name].copy_(origin + moved.reshape(origin.shape))

    @torch.no_grad()
    def pull_back(self) -> None:
        """Set the coefficients' gradients from the parameters' accumulated ones."""
        for name, vectors in self._vectors.items():
            grad = self.parameters[name].grad
            if grad is not None:
                self.coefficients[name].grad = grad.reshape(vectors.shape[1:]) * vectors

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for tensor in (*self.parameters.values(), *self.coefficients.values()):
            tensor.grad = None

    def ascend(self) -> bool:
        """Gradients are taken where the coefficients are."""
        return False

    def descend(self) -> None:
        """There is nothing to go back from."""

    def kept_share(self) -> float | None:
        """There are no components."""
        return None

    @property
    def factors(self) -> Mapping[str, Blocks]:
        """There are none."""
        return {}

    def settle(self) -> None:
        """Nothing: all is in float32."""

    def mask_file(self, tasks: tuple[str, ...], origin: str, about: Mapping[str, Any]) -> MaskFile | None:
        """There are no masks, and more coefficients than a masks file holds."""
        return None


def _whole(block: Blocks) -> Tensor:
    vectors = [whole for whole in block.wholes if whole is not None]
    assert len(vectors) == len(block.sizes)  # nothing was decomposed
    return torch.stack(vectors)
