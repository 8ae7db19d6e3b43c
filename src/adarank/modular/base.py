"""What a modular method is: it trains small modules on unlabelled inputs and keeps them, with weights, in a bundle.

A method's file holds its formula, its settings, its modules, and two functions: one mounts the modules on a network, one
dresses a network from a bundle's parts. `workflow/modular.py` trains them on a job's inputs. Method files take what they are
written with from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from adarank.adapt.presets import PRESETS
from adarank.adapt.settings import AdaptSettings
from adarank.errors import RecipeError
from adarank.io.bundle import WHOLE, BundleFolder, PartFile, key
from adarank.io.writer import Layout
from adarank.methods.task_aware.base import Site
from adarank.models import FAMILIES
from adarank.models.family import Family
from adarank.models.head_inputs import head_inputs, owners, pooled
from adarank.models.tied import held_tensors, stored_keys
from adarank.settings import Settings, parse
from adarank.sparsify.threshold import top_count

__all__ = [
    "FAMILIES",
    "OF_COMPONENTS",
    "OF_LOGITS",
    "WHOLE",
    "BundleFolder",
    "Family",
    "Layout",
    "Modular",
    "PartFile",
    "RecipeError",
    "Settings",
    "Site",
    "Spec",
    "head_inputs",
    "head_of",
    "key",
    "module_names",
    "pooled",
    "settled",
    "top_count",
    "whole",
    "whole_tensors",
]

# Settings of the loop that are about λ and masks, or about logits.
OF_COMPONENTS = frozenset({"lr_masks", "lr_lambda", "temperature", "logit", "clamp"})
OF_LOGITS = frozenset({"objective", "objectives", "self_label", "filter", "momentum", "balance"})


class Modular(Settings):
    """Base of the modular methods.

    Class attributes:
        knows: what must be known of an input when the network is used.
        spectral: True if it decomposes matrices.
        defaults: of the loop's settings, where they are not AdaptSettings' own.
        unused: the loop's settings that mean nothing here.
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    source: ClassVar[str]
    knows: ClassVar[str]
    spectral: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, Any]] = {"steps": 1000, "check_every": 100, "save_every": 100}
    unused: ClassVar[frozenset[str]] = OF_COMPONENTS

    lr: float = Field(1e-3, gt=0, description="Adam step size")

    def layouts(
        self, sites: Mapping[str, Site], family: Family, widths: Mapping[str, int]
    ) -> tuple[Layout, dict[str, Layout]]:
        """Layouts of the shared parts and of each task's own, from headers alone.

        Arguments:
            sites: every tensor of the network but heads, by name.
            widths: task -> length of the vector that its head is given.
        """
        raise NotImplementedError


Spec = tuple[tuple[int, ...], torch.dtype]


def whole(sites: Mapping[str, Site]) -> dict[str, Spec]:
    """The parts that are each tensor as it is."""
    return {key(WHOLE, name): (site.shape, site.dtype) for name, site in sites.items()}


def whole_tensors(bundle: BundleFolder, task: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the network that a modular bundle's modules are put on: the same for every task."""
    shared = bundle.shared()
    yield from ((name, shared.of(name)[WHOLE]) for name in bundle.about.tensors)


def module_names(bundle: BundleFolder, task: str, module: nn.Module) -> dict[str, str]:
    """Tensor of a bundle's network -> its name in a task's module."""
    names = bundle.about.names[task]
    stored = {name: own for name in bundle.about.tensors if (own := names.of(name)) is not None}
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
    kind: type[Modular], parameters: Mapping[str, Any], adapt: Mapping[str, Any], preset: str | None
) -> tuple[Modular, AdaptSettings]:
    """A modular method and its loop's settings: its defaults, the preset `paper`, then what is given by hand.

    Raises:
        RecipeError: settings that do not fit, or that mean nothing to the method.
    """
    idle = sorted(kind.unused & adapt.keys())
    if idle:
        raise RecipeError(f"adapt: {', '.join(idle)} mean(s) nothing to '{kind.name}'. Remove it.")
    if preset not in (None, "paper"):
        raise RecipeError(f"adapt: preset '{preset}' is not for '{kind.name}', which knows 'paper'.")
    values = {k: v for k, v in PRESETS["paper"]["adapt"].items() if k not in kind.unused} if preset else {}
    method = parse(kind, parameters, f"parameters of '{kind.name}'")
    return method, parse(AdaptSettings, {**kind.defaults, **values, **adapt}, "adapt")
