"""The networks of a job: one module per task over shared tensors, filled with any model's weights."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from adarank.alignment.task_vectors import member_tensors
from adarank.errors import RecipeError
from adarank.io.checkpoint import Checkpoint
from adarank.io.process_memory import give_back
from adarank.models import Family, TaskModels, share
from adarank.models.hollow import to_device, without
from adarank.recipe.job import Job


def build_models(job: Job) -> TaskModels:
    """One network per task on the recipe's device, tied together, filled with the base's tensors, and the experts' mean where that is asked for."""
    family = family_of(job)
    loaded = ((task, family.load(checkpoint).to(job.recipe.device)) for task, checkpoint in job.experts.items())
    models = share(loaded, job.network)
    give_back()
    models.fill(network_tensors(job, "base"))
    models.fill(job.network.averages())
    return models


def hollow_models(job: Job) -> TaskModels:
    """One network per task on the recipe's device, tied together: heads as the experts', and all shared tensors hollow."""
    family, network = family_of(job), job.network

    def loaded(task: str, checkpoint: Checkpoint) -> nn.Module:
        names = network.experts[task].names
        shared = [names[name] for name in network.tensors if name in names and name not in network.heads[task]]
        return to_device(family.load(without(checkpoint, shared)), job.recipe.device)

    return share(((task, loaded(task, checkpoint)) for task, checkpoint in job.experts.items()), network, empty=True)


def network_tensors(job: Job, which: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the base or of one expert, for every tensor it shares with the network."""
    network = job.network
    return member_tensors(network, network.reference() if which == "base" else network.experts[which])


def family_of(job: Job) -> Family:
    """The kind of models that the job's tasks are of; a `RecipeError` if they have no tasks."""
    if job.family is None:
        raise RecipeError(
            "The models of this recipe have no tasks. Give each a task with its kind and data to adapt or evaluate."
        )
    return job.family
