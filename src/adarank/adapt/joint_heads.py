"""Live merged weights and the tasks' heads, learned by the same steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adarank.adapt.learner import LiveLearner
from adarank.adapt.settings import AdaptSettings
from adarank.spectral.blocks import Blocks
from adarank.spectral.mask_file import MaskFile


class WithHeads:
    """What the merged weights are a function of, and every task's head beside it.

    Arguments:
        live: the merged weights.
        heads: task -> the tensors of its head, in its network.
        lr: Adam's step size of the heads before the schedule.
    """

    def __init__(self, live: LiveLearner, heads: Mapping[str, Mapping[str, Tensor]], lr: float) -> None:
        self.live, self.parameters, self._lr = live, live.parameters, lr
        self._heads = {f"heads/{task}/{name}": t for task, head in heads.items() for name, t in head.items()}
        self._learned = [tensor for tensor in self._heads.values() if isinstance(tensor, nn.Parameter)]
        for tensor in self._learned:
            tensor.requires_grad_(True)

    def optimiser(self, settings: AdaptSettings) -> torch.optim.Optimizer:
        """That of the merged weights, with a group of all heads."""
        optimiser = self.live.optimiser(settings)
        optimiser.add_param_group({"params": self._learned, "lr": self._lr, "start": self._lr})
        return optimiser

    def learned(self) -> Mapping[str, Tensor]:
        """What the merged weights are a function of, and the heads."""
        return {**self.live.learned(), **self._heads}

    def reset(self, scale: float, rank: float) -> None:
        """Go to a start of the merged weights. Starts are searched for before any head has moved."""
        self.live.reset(scale, rank)

    def write(self) -> None:
        """Write the merged weights; the networks hold the heads themselves."""
        self.live.write()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self.live.zero_grad()
        for tensor in self._learned:
            tensor.grad = None

    def pull_back(self) -> None:
        """Of the merged weights; those of the heads are where they belong."""
        self.live.pull_back()

    def ascend(self) -> bool:
        """As the merged weights do."""
        return self.live.ascend()

    def descend(self) -> None:
        """As the merged weights do."""
        self.live.descend()

    def kept_share(self) -> float | None:
        """Of the merged weights."""
        return self.live.kept_share()

    @property
    def factors(self) -> Mapping[str, Blocks]:
        """Of the merged weights."""
        return self.live.factors

    def settle(self) -> None:
        """As the merged weights do."""
        self.live.settle()

    def mask_file(self, tasks: tuple[str, ...], origin: str, about: Mapping[str, Any]) -> MaskFile | None:
        """Of the merged weights."""
        return self.live.mask_file(tasks, origin, about)
