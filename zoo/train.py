"""The two training loops: the base on a mixture of all tasks, and one expert per task."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTModel

from augment import augment
from images import TaskImages, to_input
from model import Head, new_body, rounded
from stages import seed_for
from tasks import BASE_POLICY, Size, Task

Log = Callable[[str], None]


class Stepper:
    """AdamW with warm-up and a cosine decay to zero, in mixed precision."""

    def __init__(self, modules: list[nn.Module], peak: float, steps: int, decay: float) -> None:
        self.parameters = [p for module in modules for p in module.parameters()]
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.device = self.parameters[0].device
        self.optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), fused=True)
        self.peak, self.steps, self.done = peak, steps, 0
        self.autocast = torch.autocast(self.device.type, torch.bfloat16)

    def step(self, loss: Tensor) -> None:
        """Take one optimizer step down `loss`."""
        warm_up = min(1.0, (self.done + 1) / max(1.0, 0.05 * self.steps))
        rate = self.peak * warm_up * 0.5 * (1 + math.cos(math.pi * self.done / self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.done += 1


def compiled(body: ViTModel, size: Size) -> Callable[..., Any]:
    """The body's forward pass, compiled where the size asks for it; the weights are shared."""
    return torch.compile(body) if size.compiled else body


@dataclass(frozen=True)
class Pool:
    """Some images of each task, to draw from as often from one task as from another."""

    index: Tensor  # into the mixture's images, task after task
    start: Tensor  # of each task in `index`
    count: Tensor

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Places of `size` images in the mixture, and their tasks."""
        task = torch.arange(size, device=self.start.device) % len(self.start)
        place = torch.rand(size, generator=generator, device=self.start.device) * self.count[task]
        return self.index[self.start[task] + place.long()], task


def make_pool(parts: list[Tensor]) -> Pool:
    """The pool of these places, a tensor of them for each task."""
    counts = torch.tensor([len(part) for part in parts], device=parts[0].device)
    return Pool(torch.cat(parts), counts.cumsum(0) - counts, counts)


@dataclass(frozen=True)
class Mixture:
    """All tasks' train images behind one another, with labels counted on from task to task."""

    images: Tensor
    labels: Tensor
    whole: Pool
    named: Pool  # the few whose labels may be used
    flip: Tensor  # how likely a task's images are mirrored
    owner: Tensor  # the task of each class


def first_of_each_class(labels: Tensor, limit: int) -> Tensor:
    """Places of the first `limit` images of every class."""
    order = torch.sort(labels, stable=True).indices
    counts = labels.bincount()
    rank = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[labels[order]]
    return order[rank < limit]


def make_mixture(tasks: list[Task], data: list[TaskImages], size: Size) -> Mixture:
    """Lay the tasks' train images out as one mixture."""
    device = data[0].train.device
    classes = torch.tensor([len(d.class_names) for d in data])
    first_class = (classes.cumsum(0) - classes).tolist()
    counts = torch.tensor([len(d.train) for d in data])
    first_image = (counts.cumsum(0) - counts).tolist()
    return Mixture(
        images=torch.cat([d.train for d in data]),
        labels=torch.cat([d.train_labels + c for d, c in zip(data, first_class, strict=True)]),
        whole=make_pool(
            [torch.arange(len(d.train), device=device) + i for d, i in zip(data, first_image, strict=True)]
        ),
        named=make_pool(
            [
                first_of_each_class(d.train_labels, size.labelled) + i
                for d, i in zip(data, first_image, strict=True)
            ]
        ),
        flip=torch.tensor([t.policy.flip for t in tasks], device=device),
        owner=torch.repeat_interleave(torch.arange(len(data)), classes).to(device),
    )


def contrast(views: Tensor, heat: float) -> Tensor:
    """How badly each view tells its other half from all others: mean -log softmax of cosines (Chen et al. 2020).

    Arguments:
        views: (2n, d); rows i and n + i show one image.
    """
    n = len(views) // 2
    units = F.normalize(views, dim=1)
    cosines = (units @ units.T).fill_diagonal_(float("-inf")) / heat
    return F.cross_entropy(cosines, torch.arange(2 * n, device=views.device).roll(n))


def hide_patches(images: Tensor, size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Gray out random patches; returns the images, all patches' pixels, and which are hidden."""
    n, channels, side, _ = images.shape
    grid, patch = side // size.patch, size.patch
    hidden = torch.rand(n, grid, grid, generator=generator, device=images.device) < size.mask
    blocks = hidden.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
    pixels = images.view(n, channels, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
    return images.masked_fill(blocks, 0.0), pixels.reshape(n, grid * grid, -1), hidden.flatten(1)


class BaseTrainer:
    """Trains one body on three things at once: the names of few images, which two views show one image, hidden patches.

    So its features come from all train images, and its heads from few labels: it knows a little of every task.
    """

    def __init__(self, tasks: list[Task], data: list[TaskImages], size: Size, seed: int) -> None:
        self.data, self.size = data, size
        self.device = data[0].train.device
        torch.manual_seed(seed_for(seed, "base"))
        self.generator = torch.Generator(self.device).manual_seed(seed_for(seed, "base"))
        self.mixture = make_mixture(tasks, data, size)
        self.body = new_body(size).to(self.device)
        self.forward = compiled(self.body, size)
        self.heads = nn.Linear(size.hidden, len(self.mixture.owner)).to(self.device)
        self.projector = nn.Sequential(
            nn.Linear(size.hidden, 2 * size.hidden), nn.GELU(), nn.Linear(2 * size.hidden, size.hidden)
        ).to(self.device)
        self.painter = nn.Linear(size.hidden, 3 * size.patch**2).to(self.device)

    def head(self, task: int) -> Head:
        """One task's rows of the heads."""
        rows = self.mixture.owner == task
        return rounded(self.heads.weight[rows]), rounded(self.heads.bias[rows])

    def class_scores(self, features: Tensor, task: Tensor) -> Tensor:
        """Logits over all classes, those of other tasks than a sample's own left out."""
        return self.heads(features).float().masked_fill(self.mixture.owner != task[:, None], float("-inf"))

    def loss(self, autocast: torch.autocast) -> Tensor:
        """The three losses, in one forward pass."""
        size, mixture = self.size, self.mixture
        named, task = mixture.named.draw(size.base_named, self.generator)
        paired, pair_task = mixture.whole.draw(size.base_paired, self.generator)
        masked, masked_task = mixture.whole.draw(size.base_masked, self.generator)
        places, owners = torch.cat([named, paired, paired, masked]), [task, pair_task, pair_task, masked_task]
        flip = mixture.flip[torch.cat(owners)]
        images = augment(to_input(mixture.images[places]), BASE_POLICY, self.generator, flip)
        named_end, paired_end = size.base_named, size.base_named + 2 * size.base_paired
        holed, pixels, hidden = hide_patches(images[paired_end:], size, self.generator)
        with autocast:
            states = self.forward(torch.cat([images[:paired_end], holed])).last_hidden_state
            logits = self.class_scores(states[:named_end, 0], task)
            views = self.projector(states[named_end:paired_end, 0]).float()
            painted = self.painter(states[paired_end:, 1:]).float()
        naming = F.cross_entropy(logits, mixture.labels[named])
        error = (painted - pixels).square().mean(-1)
        painting = (error * hidden).sum() / hidden.sum().clamp(min=1)
        return naming + contrast(views, size.heat) + size.mask_weight * painting

    def train(self, log: Log) -> None:
        """Run all steps."""
        steps = self.size.base_steps
        modules = [self.body, self.heads, self.projector, self.painter]
        stepper = Stepper(modules, self.size.base_rate, steps, self.size.weight_decay)
        for step in range(steps):
            loss = self.loss(stepper.autocast)
            stepper.step(loss)
            if (step + 1) % max(1, steps // 10) == 0:
                log(f"base step {step + 1}/{steps} loss {loss.item():.3f}")


def train_expert(
    body: ViTModel, head: Head, task: Task, data: TaskImages, size: Size, seed: int, log: Log
) -> ViTModel:
    """A copy of `body` fine-tuned for one task; the head stays as it is."""
    device = data.train.device
    torch.manual_seed(seed_for(seed, "expert", task.name))
    generator = torch.Generator(device).manual_seed(seed_for(seed, "expert", task.name))
    body = copy.deepcopy(body).train()
    forward = compiled(body, size)
    steps = size.steps
    stepper = Stepper([body], size.rate, steps, size.weight_decay)
    for step in range(steps):
        index = torch.randint(len(data.train), (size.batch,), generator=generator, device=device)
        # Outside autocast: resampling positions need float32.
        images = augment(to_input(data.train[index]), task.policy, generator)
        with stepper.autocast:
            logits = F.linear(forward(images).last_hidden_state[:, 0], *head).float()
        loss = F.cross_entropy(logits, data.train_labels[index])
        stepper.step(loss)
        if (step + 1) % max(1, steps // 2) == 0:
            log(f"{task.name} step {step + 1}/{steps} loss {loss.item():.3f}")
    return body
