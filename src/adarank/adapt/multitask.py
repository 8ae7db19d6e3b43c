"""Multi-task training, the reference that merges are measured against: one body for all tasks, trained on their labels.

    θ, h = argmin mean_t mean_(x, y) of t  -log p(y | x; θ, h_t)        starting from θ = W₀

Every step takes one batch of every task. AdamW on all of the body and on each task's head, its step size rising and then
falling linearly to zero; the last step is kept, so no label but those trained on is ever read.

Caruana 1997, "Multitask Learning"; the row "traditional MTL" of AdaMerging (arXiv:2310.02575) and later papers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from adarank.adapt.learner import Parameters
from adarank.adapt.settings import AdaptSettings
from adarank.settings import Settings


class Multitask(Settings):
    """A reference, not a merge: trains the base on all tasks together, with the labels of their adapt split.

    Arguments:
        heads: `fresh` ones, drawn as the architecture does from the seed, owe nothing to the experts. `expert` starts from
            the experts' heads; `fixed` uses these and never changes them, for experts whose own heads were fixed, as the
            zero-shot heads of CLIP are.
        weight_decay: of matrices and kernels; biases and norms have none.
        save_every: steps between two saves of the state, which is three times as large as the model.
    """

    name: ClassVar[str] = "multitask"
    formula: ClassVar[str] = "W, h = argmin mean_t E_(x,y)~t [-log p(y | x; W, h_t)], from W₀"
    source: ClassVar[str] = "Caruana 1997, Multitask Learning; traditional MTL in arXiv:2310.02575"
    needs: ClassVar[str] = (
        "base, experts (their heads and configurations) and labelled inputs: reads labels of the adapt split"
    )

    steps: int = Field(1000, ge=0, description="AdamW steps")
    batch_size: int = Field(16, ge=1, description="inputs per task and step")
    lr: float = Field(5e-5, gt=0, description="largest AdamW step size")
    weight_decay: float = Field(0.01, ge=0, description="of tensors with two dimensions and more")
    warmup: float = Field(0.06, ge=0, le=1, description="share of the steps over which the step size rises")
    heads: Literal["fresh", "expert", "fixed"] = Field("fresh", description="what each task's head starts from")
    save_every: int = Field(100, ge=1, description="steps between two saves of the state")

    def pace(self) -> AdaptSettings:
        """These settings as those of the loop."""
        return AdaptSettings(
            steps=self.steps,
            batch_size=self.batch_size,
            schedule="linear",
            warmup=self.warmup,
            keep="last",
            balance=0.0,
            save_every=self.save_every,
        )


class JointTraining(Parameters):
    """A network's own weights as what the loop learns, by the mean over tasks of their losses.

    Arguments:
        tensors: name -> every tensor that a step may change: parameters, and buffers such as running statistics.
        tasks: how many tasks' losses add up.
    """

    def __init__(self, tensors: Mapping[str, Tensor], method: Multitask, tasks: int) -> None:
        super().__init__(tensors, method.lr)
        self._decay, self._tasks = method.weight_decay, tasks

    def optimiser(self, settings: AdaptSettings) -> torch.optim.Optimizer:
        """AdamW; what has fewer than two dimensions does not decay."""
        matrices = [own for own in self.parameters if own.dim() > 1]
        others = [own for own in self.parameters if own.dim() < 2]
        groups = [
            {"params": own, "lr": self.lr, "start": self.lr, "weight_decay": decay}
            for decay, own in ((self._decay, matrices), (0.0, others))
            if own
        ]
        return torch.optim.AdamW(groups, betas=settings.betas)

    def pull_back(self) -> None:
        """From the gradient of the sum over tasks to that of their mean."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad /= self._tasks
