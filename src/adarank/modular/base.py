"""What a modular method is: it trains small modules on unlabelled inputs and keeps them, with weights, in a bundle.

A method's file holds its formula, its settings, its modules, and two functions: one mounts the modules on a network, one
dresses a network from a bundle's parts. `training.py` trains them on unlabelled inputs. Method files take what they are
written with from here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from adarank.adapt.base import AdaptBlock, Adapting
from adarank.adapt.presets import PRESETS
from adarank.adapt.settings import AdaptSettings
from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.errors import AdaRankError, RecipeError
from adarank.io.bundle import WHOLE, BundleFolder, PartFile, Parts, key
from adarank.io.writer import Layout, layout_bytes
from adarank.method import Another, Context, Given, MergeMethod, Outline, Result, Site, changed_tensors
from adarank.methods import TaskArithmetic, merge_tensors
from adarank.models import FAMILIES
from adarank.models.family import Family
from adarank.models.head_inputs import head_inputs, owners, pooled
from adarank.models.tied import held_tensors, stored_keys
from adarank.modular.training import Built, Work, pieces, train
from adarank.settings import Settings, parse
from adarank.sparsify.threshold import top_count

__all__ = [
    "FAMILIES",
    "OF_COMPONENTS",
    "OF_LOGITS",
    "WHOLE",
    "AdaRankError",
    "AdaptBlock",
    "AlignedCheckpoints",
    "Another",
    "Built",
    "BundleFolder",
    "Context",
    "Family",
    "Given",
    "Layout",
    "MergeMethod",
    "Modular",
    "Outline",
    "PartFile",
    "RecipeError",
    "Settings",
    "Site",
    "Spec",
    "Work",
    "arithmetic",
    "head_inputs",
    "head_of",
    "key",
    "module_names",
    "parse",
    "pooled",
    "settled",
    "top_count",
    "whole",
]

M = TypeVar("M", bound="Modular")

# Settings of the loop that are about λ and masks, or about logits.
OF_COMPONENTS = frozenset({"by", "lr_masks", "lr_lambda", "learn_heads"})
OF_LOGITS = frozenset({"objective", "objectives", "self_label"})


class Modular(Adapting):
    """Base of the modular methods.

    Class attributes, beside those of the contract (`method/contract.py`):
        knows: what must be known of an input when the network is used.
        spectral: True if it decomposes matrices.
        compares: settings of the loop that stand for its losses; they decide which of the experts' predictions are computed.
    """

    knows: ClassVar[str] = "the task of every input"
    in_use: ClassVar[str] = f"In use it must know {knows}."
    spectral: ClassVar[bool] = False
    of_inputs: ClassVar[bool] = True
    compares: ClassVar[Mapping[str, Any]] = {}
    defaults: ClassVar[Mapping[str, Any]] = {"steps": 1000, "check_every": 100}
    unused: ClassVar[frozenset[str]] = OF_COMPONENTS
    python: ClassVar[tuple[str, str]] = (
        "",
        "trains modules. Give it as a recipe to adarank.merge_recipe, and load its bundle with adarank.from_bundle.",
    )

    lr: float = Field(1e-3, gt=0, description="Adam step size")

    def layouts(
        self, sites: Mapping[str, Site], family: Family, widths: Mapping[str, int]
    ) -> tuple[Layout, dict[str, Layout]]:
        """Layouts of the shared parts and of each task's parts, from headers alone.

        Arguments:
            sites: every tensor of the network but heads, by name.
            widths: task -> length of the vector that its head is given.
        """
        raise NotImplementedError

    def build(self, work: Work) -> Built:
        """The modules on the networks: what is learned, and from which losses."""
        raise NotImplementedError

    def start_of(self, context: Context) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any]]:
        """(name, tensor) of the network that modules are put on, and what a record says of how it was made."""
        raise NotImplementedError

    @classmethod
    def resolve(cls: type[M], given: Given) -> M:
        """The method with its settings and those of its loop, as `settled` gives them."""
        method, settings = settled(cls, given.parameters, given.adapt or {}, given.preset)
        return method.with_settings(settings)

    @classmethod
    def needs(cls) -> str:
        """Models, data, and what must be known of an input when the network is used."""
        return f"{super().needs()}; in use it must know {cls.knows}"

    @classmethod
    def memory(cls) -> str:
        """What is held at a time: networks are run, so more than one tensor."""
        return "the network twice, what each task has for its own, and one task's batch"

    @property
    def decomposes(self) -> bool:
        """Whether it decomposes matrices, as `spectral` says."""
        return self.spectral

    def output_layouts(self, outline: Outline) -> tuple[Layout, dict[str, Layout]]:
        """Layouts of the bundle's shared parts, and of each task's parts.

        Raises:
            RecipeError: the models have no task.
        """
        if outline.family is None:
            raise RecipeError(
                f"'{self.name}' runs networks, and the models have no task. Give each its task with data."
            )
        return self.layouts({site.name: site for site in outline.sites()}, outline.family, outline.head_widths())

    def held_bytes(self, outline: Outline) -> int:
        """The network twice while one is loaded, the heads, and what modules hold."""
        body = sum(info.numel for info in outline.network.tensors.values())
        modules = sum(layout_bytes(layout) for layout in self.output_layouts(outline)[1].values())
        return 4 * (2 * body + outline.head_numel()) + modules

    def run(self, context: Context) -> Result:
        """Train the modules, from a saved state if there is one. Reads no label."""
        settings = self.settings.model_copy(update=dict(self.compares))
        fingerprint = context.fingerprint()
        start, made = self.start_of(context)
        context.note("Loading the networks")
        models = context.models()
        predictions = context.expert_predictions(models, settings)
        models.fill(start)
        for tensor in models.shared.values():
            tensor.requires_grad_(False)
        work = Work(context, settings, models, predictions, {})
        context.note("Putting the modules on the networks")
        torch.manual_seed(context.seed)  # of what modules start from
        built = self.build(work)
        report = train(work, built, self.lr, fingerprint)
        report |= {"known_in_use": self.knows, "not_routed": list(built.left), **made, **built.about()}
        return Result(parts=self._parts(work, built), block="adaptation", report=report, modules=dict(models.modules))

    def _parts(self, work: Work, built: Built) -> Parts:
        """Layouts and a stream of the bundle's parts."""
        shared, of_tasks = self.layouts(work.sites(), work.family, built.widths)
        left = set(built.left)
        of_tasks = {
            t: {k: spec for k, spec in each.items() if k.partition(":")[2] not in left} for t, each in of_tasks.items()
        }
        settings = self.model_dump(mode="json", by_alias=True)
        whole = changed_tensors(work.context.network, work.models.shared, "the start")
        return Parts(self.name, settings, shared, of_tasks, pieces(built, whole, shared, of_tasks))

    @classmethod
    def task_tensors(cls, tensors: Layout, shared: PartFile, of_task: PartFile) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the network that the modules are put on: the same for every task."""
        yield from ((name, shared.of(name)[WHOLE]) for name in tensors)


Spec = tuple[tuple[int, ...], torch.dtype]


def whole(sites: Mapping[str, Site]) -> dict[str, Spec]:
    """The parts that are each tensor as it is."""
    return {key(WHOLE, name): (site.shape, site.dtype) for name, site in sites.items()}


def arithmetic(context: Context, scale: float, kept: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of task arithmetic.

    Arguments:
        scale: its λ.
        kept: tensors that stay the base's.
    """
    ready = parse(TaskArithmetic, {"lambda": scale}, "parameters")
    for name, tensor in merge_tensors(ready, context.network, context.device):
        yield name, context.network.kept(name) if name in kept else tensor


def module_names(bundle: BundleFolder, task: str, module: nn.Module) -> dict[str, str]:
    """Tensor of a bundle's network -> its name in a task's module."""
    names = bundle.about.names[task]
    stored = {name: in_expert for name in bundle.about.tensors if (in_expert := names.of(name)) is not None}
    shapes = {name: bundle.about.tensors[name][0] for name in stored if bundle.about.tensors[name][1].is_floating_point}
    return stored_keys(stored, shapes, module, held_tensors(module))


def head_of(bundle: BundleFolder, task: str, module: nn.Module) -> list[nn.Module]:
    """The parts of a task's module that hold the tensors of its head."""
    stored = bundle.head(task)
    tensors = stored.tensors if stored else {}
    held = held_tensors(module)
    names = stored_keys({n: n for n in tensors}, {n: info.shape for n, info in tensors.items()}, module, held)
    return owners(module, [held[name] for name in names.values()])


def settled(
    kind: type[M], parameters: Mapping[str, Any], adapt: Mapping[str, Any], preset: str | None
) -> tuple[M, AdaptSettings]:
    """A modular method and its loop's settings: its defaults, the preset `paper`, then what is given by hand.

    Raises:
        RecipeError: settings that do not fit, or that mean nothing to the method.
    """
    idle = sorted(kind.unused & adapt.keys())
    if idle:
        raise RecipeError(f"adapt: {', '.join(idle)} mean(s) nothing to '{kind.name}'. Remove it.")
    if preset not in (None, "paper"):
        raise RecipeError(f"adapt: preset '{preset}' is not for '{kind.name}', which knows 'paper'.")
    others = kind.unused | {"steps"}  # as many as in the method's own paper, which its defaults have
    values = {k: v for k, v in PRESETS["paper"]["adapt"].items() if k not in others} if preset else {}
    method = parse(kind, parameters, f"parameters of '{kind.name}'")
    return method, parse(AdaptSettings, {**kind.defaults, **values, **adapt}, "adapt")
