"""Plain tensors as what the loop learns: adapters, routers, a network's own weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adarank.adapt.settings import AdaptSettings


class Parameters:
    """Tensors that losses depend on directly, learned by Adam with one step size.

    Arguments:
        tensors: name -> every tensor that a step may change. Those that are no `nn.Parameter` have no gradient: they are
            part of the state only, such as running statistics.
        lr: Adam's step size before the schedule.
    """

    def __init__(self, tensors: Mapping[str, Tensor], lr: float) -> None:
        self._tensors, self.lr = dict(tensors), lr
        self.parameters = [own for own in self._tensors.values() if isinstance(own, nn.Parameter)]
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def optimiser(self, settings: AdaptSettings) -> torch.optim.Optimizer:
        """Adam over all of them."""
        return torch.optim.Adam([{"params": self.parameters, "lr": self.lr, "start": self.lr}], betas=settings.betas)

    def learned(self) -> Mapping[str, Tensor]:
        """The tensors, by name."""
        return self._tensors

    def reset(self, scale: float, rank: float) -> None:
        """There is no grid of λ and rank."""
        raise TypeError("plain parameters have one start")

    def write(self) -> None:
        """Nothing: the networks hold what is learned."""

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def pull_back(self) -> None:
        """Nothing: the gradients are where they belong."""

    def kept_share(self) -> float | None:
        """There are no components."""
        return None
