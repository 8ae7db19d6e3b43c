"""What the loop steps: live merged weights, a network's own weights, adapters, routers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adarank.adapt.settings import AdaptSettings
from adarank.spectral.blocks import Blocks
from adarank.spectral.mask_file import MaskFile


class Learner(Protocol):
    """Numbers that losses depend on, and how a step changes them."""

    def optimiser(self, settings: AdaptSettings) -> torch.optim.Optimizer:
        """An optimiser over what is learned; `start` of each group is its step size before the schedule."""
        ...

    def learned(self) -> Mapping[str, Tensor]:
        """Everything that a step changes, by name: what a saved state and the best step's copy hold."""
        ...

    def reset(self, scale: float, rank: float) -> None:
        """Go to a start of a grid of λ and rank. Called only if there is such a grid."""
        ...

    def write(self) -> None:
        """Write the current numbers into the networks."""
        ...

    def zero_grad(self) -> None:
        """Forget all gradients."""
        ...

    def pull_back(self) -> None:
        """Turn the gradients that backward passes accumulated into those of what is learned."""
        ...

    def ascend(self) -> bool:
        """Go to where the gradient is to be taken, given that of where one is; False if that is here."""
        ...

    def descend(self) -> None:
        """Go back to before `ascend`, with the gradient that was taken there."""
        ...

    def kept_share(self) -> float | None:
        """Share of components kept now; None where there are none to keep."""
        ...


class LiveLearner(Learner, Protocol):
    """What merged weights of a network are a function of.

    Attributes:
        parameters: tensor name -> the network's parameter (or buffer) that `write` writes.
    """

    parameters: dict[str, Tensor]

    @property
    def factors(self) -> Mapping[str, Blocks]:
        """Tensor name -> origin, task vectors and spectra, where components are learned."""
        ...

    def settle(self) -> None:
        """Compose what steps left in lower precision as it will be written. Steps are over."""
        ...

    def mask_file(self, tasks: tuple[str, ...], origin: str, about: Mapping[str, Any]) -> MaskFile | None:
        """The current masks and λ, as the file that the method `masked` applies; None if something else is learned."""
        ...


def between(start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """The point at that share of the way from start to end. Whole numbers, such as counters, are those of the end."""
    return {
        name: torch.lerp(start[name], tensor, share) if tensor.is_floating_point() else tensor
        for name, tensor in end.items()
    }


class Parameters:
    """Tensors that losses depend on directly, learned by Adam with one step size.

    Arguments:
        tensors: name -> every tensor that a step may change. Those that are no `nn.Parameter` have no gradient: they are
            part of the state only, such as running statistics.
        lr: Adam's step size before the schedule.
    """

    def __init__(self, tensors: Mapping[str, Tensor], lr: float) -> None:
        self._tensors, self.lr = dict(tensors), lr
        self.parameters = [tensor for tensor in self._tensors.values() if isinstance(tensor, nn.Parameter)]
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def optimiser(self, settings: AdaptSettings) -> torch.optim.Optimizer:
        """Adam over all of them."""
        return torch.optim.Adam([{"params": self.parameters, "lr": self.lr, "start": self.lr}])

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

    def ascend(self) -> bool:
        """Gradients are taken where the parameters are."""
        return False

    def descend(self) -> None:
        """There is nothing to go back from."""

    def kept_share(self) -> float | None:
        """There are no components."""
        return None


Loss = Callable[[int], Tensor]
"""step -> scalar loss of one task, with its graph."""


Memory = dict[str, Tensor]
"""What losses remember from step to step, such as running means. It is saved and restored with the state."""
