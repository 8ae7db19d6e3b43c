"""Multi-task training, the reference that merges are measured against: one body for all tasks, trained on their labels.

    θ, h = argmin mean_t mean_(x, y) of t  -log p(y | x; θ, h_t)        starting from θ = W₀

Of tasks with several labels an input, or with numbers, -log p is the loss that `transformers` has for them.

Every step takes one batch of every task. AdamW on all of the body and on each task's head, its step size rising and then
falling linearly to zero; the last step is kept, so no label but those trained on is ever read.

Caruana 1997, "Multitask Learning"; the row "traditional MTL" of AdaMerging (arXiv:2310.02575) and later papers.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from adarank.adapt.history import History
from adarank.adapt.learner import Loss, Parameters
from adarank.adapt.loop import adapt
from adarank.adapt.settings import AdaptSettings
from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.data.labels import Label
from adarank.data.metrics import loss as label_loss
from adarank.data.task import TaskData
from adarank.method import Context, MergeMethod, Outline, Result, changed_tensors
from adarank.models import TaskModels


class Multitask(MergeMethod):
    """A reference, not a merge: trains the base on all tasks together, with the labels of their adapt split.

    Arguments:
        heads: `fresh` ones, drawn from the seed as the architecture draws them, do not depend on the experts. `expert` starts from
            the experts' heads; `fixed` uses these and never changes them, for experts whose own heads were fixed, as the
            zero-shot heads of CLIP are.
        weight_decay: of matrices and kernels; biases and norms have none.
        save_every: steps between two saves of the state, which is three times as large as the model.
    """

    name: ClassVar[str] = "multitask"
    formula: ClassVar[str] = "W, h = argmin mean_t E_(x,y)~t [-log p(y | x; W, h_t)], from W₀"
    source: ClassVar[str] = "Caruana 1997, Multitask Learning; traditional MTL in arXiv:2310.02575"
    data: ClassVar[str] = "labelled inputs of each task"
    use: ClassVar[str] = "trains on"
    labels: ClassVar[str] = "labels of the adapt split"
    of_inputs: ClassVar[bool] = True
    keeps_embeddings: ClassVar[bool] = False  # fine-tuning trains them too
    takes_steps: ClassVar[bool] = True
    not_searched: ClassVar[str] = "learns what it writes"
    python: ClassVar[tuple[str, str]] = ("", "trains on labels. Give it as a recipe to adarank.merge_recipe.")

    steps: int = Field(1000, ge=0, description="AdamW steps")
    batch_size: int = Field(16, ge=1, description="inputs per task and step")
    lr: float = Field(5e-5, gt=0, description="largest AdamW step size")
    weight_decay: float = Field(0.01, ge=0, description="of tensors with two dimensions and more")
    warmup: float = Field(0.06, ge=0, le=1, description="share of the steps over which the step size rises")
    heads: Literal["fresh", "expert", "fixed"] = Field("fresh", description="what each task's head starts from")
    save_every: int = Field(100, ge=1, description="steps between two saves of the state")

    @classmethod
    def needs(cls) -> str:
        """Models and data, and that labels are read."""
        return f"base, experts (their heads and configurations) and labelled inputs: reads {cls.labels}"

    @classmethod
    def passes_over(cls) -> str:
        """How often checkpoints and inputs are gone through."""
        return "the base to start; a batch of each task every step, forward and backward"

    @classmethod
    def memory(cls) -> str:
        """What is held at a time."""
        return "all weights, their gradients and AdamW's two moments, and one task's batch"

    def action(self, chosen: str) -> str:
        """What happens to a tensor: `keep` or `train`."""
        return chosen if chosen in ("keep", "average") else "train"

    def held_bytes(self, outline: Outline) -> int:
        """Weights, gradients and AdamW's two moments; what is kept once; a second network while one is loaded."""
        network = outline.network
        body = sum(info.numel for info in network.tensors.values())
        trained = sum(network.tensors[name].numel for name in network.merged())
        return 4 * (4 * (trained + outline.head_numel()) + (body - trained) + body)

    def run(self, context: Context) -> Result:
        """Train, from a saved state if there is one. Reads labels of the adapt split only.

        Raises:
            DataError: a row of an adapt split carries no label.
        """
        data = context.data
        labels = {task: _labels(of) for task, of in data.items()}
        marks = {task: [of.fingerprint(), sorted(labels[task].items())] for task, of in data.items()}
        fingerprint = context.fingerprint(marks, "parameters")
        context.note("Loading the networks")
        models = context.models()
        if self.heads == "fresh":
            _draw_heads(models, context.seed)
        joint = JointTraining(_trained(context.network, models, self.heads == "fixed"), self, len(data))
        context.note("Training, with labels")
        for module in models.modules.values():
            module.train()
        torch.manual_seed(context.seed)  # of dropout, whatever was drawn before
        losses = {task: self._loss(context, models, of, labels[task]) for task, of in data.items()}
        history = adapt(joint, losses, self.pace(), context.state, fingerprint, context.progress)
        tensors = changed_tensors(context.network, models.shared, "training")
        heads = {task: _head(context.network, models, task) for task in data}
        return Result(tensors, heads=heads, block="training", report=self._report(history, data))

    def _loss(self, context: Context, models: TaskModels, data: TaskData, labels: Mapping[int, Label]) -> Loss:
        family, module, device = context.family, models.modules[data.name], context.device

        def loss(step: int) -> Tensor:
            rows = data.adapt_rows(step, self.batch_size)
            batch = {k: v.to(device) for k, v in data.examples.batch(rows).items()}
            return label_loss([labels[row] for row in rows], family.logits(module, batch), data.problem)

        return loss

    def _report(self, history: History, data: Mapping[str, TaskData]) -> dict[str, Any]:
        return {
            "what": "a reference, not a merge: trained jointly from the base",
            "protocol": "disjoint",  # no other is allowed
            "reads": "labels of the adapt split of every task; none of select and test",
            "steps": history.step,
            "heads": self.heads,
            "seconds_in_steps": round(history.seconds, 3),
            "resumed_from": history.resumed_from,
            "losses": {task: [round(v, 5) for v in values] for task, values in history.losses.items()},
            "splits": {task: {split: len(rows) for split, rows in of.splits.rows.items()} for task, of in data.items()},
            "notes": [f"{task}: {text}" for task, of in data.items() for text in of.notes],
        }

    def pace(self) -> AdaptSettings:
        """These settings as those of the loop."""
        return _Pace(
            steps=self.steps, batch_size=self.batch_size, keep="last", check_every=self.save_every, warmup=self.warmup
        )


class _Pace(AdaptSettings):
    """The loop's settings, with step sizes that rise before they fall."""

    warmup: float

    def factor(self, step: int) -> float:
        """Linearly up over the share `warmup` of the steps, then linearly down to zero."""
        rise = round(self.warmup * self.steps)
        return (step + 1) / rise if step < rise else 1 - (step - rise) / max(1, self.steps - rise)


class JointTraining(Parameters):
    """A network's weights as what the loop learns, by the mean over tasks of their losses.

    Arguments:
        tensors: name -> every tensor that a step may change: parameters, and buffers such as running statistics.
        tasks: how many tasks' losses add up.
    """

    def __init__(self, tensors: Mapping[str, Tensor], method: Multitask, tasks: int) -> None:
        super().__init__(tensors, method.lr)
        self._decay, self._tasks = method.weight_decay, tasks

    def optimiser(self, settings: AdaptSettings) -> torch.optim.Optimizer:
        """AdamW; what has fewer than two dimensions does not decay."""
        matrices = [tensor for tensor in self.parameters if tensor.dim() > 1]
        others = [tensor for tensor in self.parameters if tensor.dim() < 2]
        groups = [
            {"params": tensors, "lr": self.lr, "start": self.lr, "weight_decay": decay}
            for decay, tensors in ((self._decay, matrices), (0.0, others))
            if tensors
        ]
        return torch.optim.AdamW(groups)

    def pull_back(self) -> None:
        """From the gradient of the sum over tasks to that of their mean."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad /= self._tasks


def _labels(data: TaskData) -> dict[int, Label]:
    """Row -> label, of the adapt split. Rows of other splits are not in it."""
    data.adapt_rows(0, 1)  # refuses an empty split
    rows = data.splits.rows["adapt"]
    return dict(zip(rows, data.targets(rows), strict=True))


def _draw_heads(models: TaskModels, seed: int) -> None:
    """New heads, drawn as their architecture draws them. Each depends on the seed and on its task's name alone."""
    for task, module in models.modules.items():
        kind: Any = type(module)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(f"{seed}/{task}/head".encode()))
            drawn = kind(module.config).state_dict()
        head = {id(tensor) for tensor in models.heads[task].values()}
        with torch.no_grad():
            for name, tensor in module.state_dict(keep_vars=True).items():
                if id(tensor) in head:
                    tensor.copy_(drawn[name])


def _trained(network: AlignedCheckpoints, models: TaskModels, heads_fixed: bool) -> dict[str, Tensor]:
    """What training may change: all of the body that is neither kept nor averaged, counters of batch norms too, and perhaps heads."""
    body = {name: tensor for name, tensor in models.shared.items()
            if network.choices[name].action not in ("keep", "average") or name.endswith("num_batches_tracked")}  # fmt: skip
    if heads_fixed:
        return body
    heads = {f"heads/{task}/{name}": tensor for task, head in models.heads.items() for name, tensor in head.items()}
    return body | heads


def _head(network: AlignedCheckpoints, models: TaskModels, task: str) -> dict[str, Tensor]:
    """A task's trained head, under the names that its expert's files use."""
    trained = {name: tensor.detach() for name, tensor in models.heads[task].items()}
    return {**network.head(task), **trained}
