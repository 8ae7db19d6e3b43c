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
from images import TaskImages, seed_for, to_input
from model import Head, new_body, rounded
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
class Mixture:
    """All tasks' train images behind one another, with labels counted on from task to task."""

    images: Tensor
    labels: Tensor
    start: Tensor  # of each task in `images`
    count: Tensor
    labelled: Tensor  # how many of a task's first images may be used with labels
    flip: Tensor
    owner: Tensor  # the task of each class

    def draw(self, named: Tensor, masked: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Augmented images, labels and tasks: one that may be named for each task in `named`, then `masked` of all.

        The latter are spread evenly over the tasks.
        """
        device = self.start.device
        others = torch.arange(masked, device=device) % len(self.start)
        limit = torch.cat([self.labelled[named], self.count[others]])
        task = torch.cat([named, others])
        place = torch.rand(len(task), generator=generator, device=device) * limit
        index = self.start[task] + place.long()
        images = augment(to_input(self.images[index]), BASE_POLICY, generator, self.flip[task])
        return images, self.labels[index], task


def make_mixture(tasks: list[Task], data: list[TaskImages], size: Size) -> Mixture:
    """Lay the tasks' train images out as one mixture."""
    device = data[0].train.device
    classes = torch.tensor([len(d.class_names) for d in data])
    counts = torch.tensor([len(d.train) for d in data])
    first_class = (classes.cumsum(0) - classes).tolist()
    return Mixture(
        images=torch.cat([d.train for d in data]),
        labels=torch.cat([d.train_labels + c for d, c in zip(data, first_class, strict=True)]),
        start=(counts.cumsum(0) - counts).to(device),
        count=counts.to(device),
        labelled=(counts * size.labelled).long().to(device),
        flip=torch.tensor([t.policy.flip for t in tasks], device=device),
        owner=torch.repeat_interleave(torch.arange(len(data)), classes).to(device),
    )


def hide_patches(images: Tensor, size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Gray out random patches; returns the images, all patches' pixels, and which are hidden."""
    n, channels, side, _ = images.shape
    grid, patch = side // size.patch, size.patch
    hidden = torch.rand(n, grid, grid, generator=generator, device=images.device) < size.mask
    blocks = hidden.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
    pixels = images.view(n, channels, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
    return images.masked_fill(blocks, 0.0), pixels.reshape(n, grid * grid, -1), hidden.flatten(1)


class BaseTrainer:
    """Trains one body to fill in hidden patches of all images and, so far, to name some.

    A task's label loss fades out as its validation accuracy nears `Task.base_target`: that
    keeps the base a mediocre classifier of every task while its features keep improving.
    """

    def __init__(self, tasks: list[Task], data: list[TaskImages], size: Size, seed: int) -> None:
        self.tasks, self.data, self.size = tasks, data, size
        self.device = data[0].train.device
        torch.manual_seed(seed_for(seed, "base"))
        self.generator = torch.Generator(self.device).manual_seed(seed_for(seed, "base"))
        self.mixture = make_mixture(tasks, data, size)
        self.body = new_body(size).to(self.device)
        self.forward = compiled(self.body, size)
        self.heads = nn.Linear(size.hidden, len(self.mixture.owner)).to(self.device)
        self.painter = nn.Linear(size.hidden, 3 * size.patch**2).to(self.device)
        self.target = torch.tensor([t.base_target for t in tasks], device=self.device)
        self.weight = torch.ones(len(tasks), device=self.device)
        limit = size.check_images
        first_class = [int((self.mixture.owner < i).sum()) for i in range(len(tasks))]
        self.probe = torch.cat([d.validation[:limit] for d in data])
        self.probe_labels = torch.cat(
            [d.validation_labels[:limit] + c for d, c in zip(data, first_class, strict=True)]
        )
        self.probe_task = torch.cat([d.validation_labels[:limit] * 0 + i for i, d in enumerate(data)])

    def head(self, task: int) -> Head:
        """One task's rows of the heads."""
        rows = self.mixture.owner == task
        return rounded(self.heads.weight[rows]), rounded(self.heads.bias[rows])

    def class_scores(self, states: Tensor, task: Tensor) -> Tensor:
        """Logits over all classes, those of other tasks than a sample's own left out."""
        logits = self.heads(states[:, 0]).float()
        return logits.masked_fill(self.mixture.owner != task[:, None], float("-inf"))

    def loss(self, autocast: torch.autocast) -> Tensor:
        """Label loss on some images of a batch, hidden-patch loss on the others, in one forward pass.

        Tasks far from their target get more of the images: the others would be drawn in vain.
        """
        n = self.size.base_batch - self.size.base_masked
        need = self.weight.clamp(min=0.1)
        named = torch.multinomial(need, n, replacement=True, generator=self.generator)
        images, labels, task = self.mixture.draw(named, self.size.base_masked, self.generator)
        labels, task = labels[:n], task[:n]
        masked, pixels, hidden = hide_patches(images[n:], self.size, self.generator)
        with autocast:
            states = self.forward(torch.cat([images[:n], masked])).last_hidden_state
            logits = self.class_scores(states[:n], task)
            painted = self.painter(states[n:, 1:]).float()
        naming = F.cross_entropy(logits, labels, reduction="none") * self.weight[task]
        error = (painted - pixels).square().mean(-1)
        painting = (error * hidden).sum() / hidden.sum().clamp(min=1)
        return naming.mean() + self.size.mask_weight * painting

    @torch.no_grad()
    def check(self, autocast: torch.autocast) -> Tensor:
        """Validation accuracy per task on a few images; sets the label-loss weights."""
        self.body.eval()
        with autocast:
            states = self.body(to_input(self.probe)).last_hidden_state
            right = self.class_scores(states, self.probe_task).argmax(1) == self.probe_labels
        self.body.train()
        hits = torch.zeros_like(self.target).index_add_(0, self.probe_task, right.float())
        scores = hits / self.probe_task.bincount(minlength=len(self.tasks))
        self.weight = ((self.target - scores) / 0.1).clamp(0, 1)
        return scores

    def train(self, log: Log) -> None:
        """Run all steps."""
        steps = self.size.base_steps
        modules = [self.body, self.heads, self.painter]
        stepper = Stepper(modules, self.size.base_rate, steps, self.size.weight_decay)
        scores = self.check(stepper.autocast)
        for step in range(steps):
            loss = self.loss(stepper.autocast)
            stepper.step(loss)
            if (step + 1) % self.size.check_every == 0:
                scores = self.check(stepper.autocast)
            if (step + 1) % max(1, steps // 10) == 0:
                each = " ".join(f"{x:.2f}" for x in scores.tolist())
                log(f"base step {step + 1}/{steps} loss {loss.item():.3f} validation {each}")


def train_expert(
    body: ViTModel, head: Head, task: Task, data: TaskImages, size: Size, seed: int, log: Log
) -> ViTModel:
    """A copy of `body` fine-tuned for one task; the head stays as it is."""
    device = data.train.device
    torch.manual_seed(seed_for(seed, "expert", task.name))
    generator = torch.Generator(device).manual_seed(seed_for(seed, "expert", task.name))
    body = copy.deepcopy(body).train()
    forward = compiled(body, size)
    steps = size.long_steps if task.long else size.steps
    stepper = Stepper([body], size.rate, steps, size.weight_decay)
    for step in range(steps):
        index = torch.randint(len(data.train), (size.batch,), generator=generator, device=device)
        # Outside autocast: resampling positions need float32.
        images = augment(to_input(data.train[index]), task.policy, generator)
        with stepper.autocast:
            logits = F.linear(forward(images).last_hidden_state[:, 0], *head).float()
        loss = F.cross_entropy(logits, data.train_labels[index], label_smoothing=size.smoothing)
        stepper.step(loss)
        if (step + 1) % max(1, steps // 2) == 0:
            log(f"{task.name} step {step + 1}/{steps} loss {loss.item():.3f}")
    return body
