"""Representation Surgery: a small adapter per task between a merged body and the task's head.

    z'_t = z_t - U_t relu(D_t z_t)                            z_t: what the head of t is given; D_t: (r, d), U_t: (d, r)
    D, U = argmin Σ_t mean_x ‖z'_t(x) - z*_t(x)‖₁ / d         z*_t: what it is given in the expert; starts with U = 0

Needs unlabelled inputs, on which merged body and experts are run once. The start may be any merge of one body. No adapter
depends on another, so with `keep: best` each task has that of the judged step at which it is nearest to its expert: before
the first step, where it is U = 0, if none is nearer.

Yang et al., "Representation Surgery for Multi-Task Model Merging", arXiv:2402.02705.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn
from torch.nn.functional import linear

from adarank.modular.base import (
    OF_COMPONENTS,
    OF_LOGITS,
    AdaptBlock,
    AdaRankError,
    AlignedCheckpoints,
    Another,
    Built,
    BundleFolder,
    Context,
    Family,
    Given,
    Layout,
    MergeMethod,
    Modular,
    Outline,
    RecipeError,
    Settings,
    Site,
    Work,
    head_of,
    key,
    parse,
    whole,
)
from adarank.modular.layers import carry


class Start(Settings):
    """What is adapted: any method of recipes that gives one merged body.

    Arguments:
        merge_method, parameters, adapt: as in a recipe.
    """

    merge_method: str = Field("task_arithmetic", description="the merge that adapters are put on")
    parameters: dict[str, Any] = Field({}, description="its settings")
    adapt: dict[str, Any] | None = Field(None, description="its adapt block, if it adapts")


def _mapping(given: Any) -> Mapping[str, Any]:
    """What a recipe has where settings belong; nothing where it is none, which `resolve` says."""
    return given if isinstance(given, Mapping) else {}


class Surgery(Modular):
    """Brings the representations of a merged body back to each expert's, by a low-rank adapter per task.

    Arguments:
        rank: r.
    """

    name: ClassVar[str] = "surgery"
    formula: ClassVar[str] = "z'_t = z_t - U_t relu(D_t z_t); D, U = argmin Σ_t |z'_t - z*_t|₁"
    source: ClassVar[str] = "Yang et al. 2024, arXiv:2402.02705"
    # its adapters do not depend on each other: each keeps its best step
    unused: ClassVar[frozenset[str]] = OF_COMPONENTS | OF_LOGITS | {"tolerance"}

    compares: ClassVar[Mapping[str, Any]] = {"objective": "features"}

    rank: int = Field(16, ge=1, description="width r of each adapter")
    start: Start = Start()
    _start: MergeMethod | None = PrivateAttr(default=None)
    _start_block: AdaptBlock | None = PrivateAttr(default=None)

    @classmethod
    def resolve(cls, given: Given) -> Surgery:
        """The method with its settings, and the method that gives the start with its settings.

        Raises:
            RecipeError: settings that do not fit, or a start that is no single merged model.
        """
        method = super().resolve(given)
        if given.find is None:
            raise RecipeError("surgery: what it is put on is found by its name, in a recipe alone.")
        start = method.start
        if start.adapt is not None:
            method._start_block = parse(AdaptBlock, start.adapt, "parameters.start.adapt")
        kind = given.find(start.merge_method, "parameters.start: unknown merge_method")
        if kind.in_use or kind.labels:
            raise RecipeError(f"parameters.start: '{start.merge_method}' gives no single merged model.")
        return method._started(given, kind.resolve)

    def over(self, given: Given) -> Surgery:
        """The same, put on the start's method over these tensors."""
        return self._started(given, self._put_on().over)

    def _started(self, given: Given, resolve: Callable[[Given], MergeMethod]) -> Surgery:
        adapt, preset = self._start_block.split() if self._start_block else ({}, None)
        changed = self.model_copy()
        try:
            changed._start = resolve(replace(given, parameters=self.start.parameters, adapt=adapt, preset=preset))
        except RecipeError as error:
            raise RecipeError(f"parameters.start: {error}") from None
        return changed

    @classmethod
    def decomposes_kernels(cls, given: Given) -> bool | Collection[str]:
        """Those that the start's method decomposes."""
        start = _mapping(given.parameters.get("start"))
        name = start.get("merge_method")
        if given.find is None or not isinstance(name, str):
            return False
        try:
            kind = given.find(name, "parameters.start: unknown merge_method")
        except AdaRankError:  # `resolve` says so
            return False
        preset = _mapping(start.get("adapt")).get("preset")
        return kind.decomposes_kernels(replace(given, parameters=_mapping(start.get("parameters")), preset=preset))

    def put_on(self) -> Another | None:
        """The method that gives the start, as `parameters.start` names it."""
        start = self.start
        return Another("parameters.start", start.merge_method, start.parameters, self._start_block, self._put_on())

    def check(self, network: AlignedCheckpoints) -> None:
        """Raise a `RecipeError` if the start's method cannot merge this network."""
        self._put_on().check(network)

    def notes(self, network: AlignedCheckpoints) -> list[str]:
        """The notes of the start's method."""
        return [f"start: {text}" for text in self._put_on().notes(network)]

    def of_data(self, tasks: Mapping[str, Any]) -> dict[str, Any]:
        """What the start's method will read of the tasks' data."""
        return self._put_on().of_data(tasks)

    def held_bytes(self, outline: Outline) -> int:
        """The larger of what making the start holds, and training on it; one follows the other."""
        return max(super().held_bytes(outline), self._put_on().held_bytes(outline))

    def start_of(self, context: Context) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any]]:
        """The merged body that the start's method gives."""
        context.note(f"Making the start: {self.start.merge_method}")
        result, settings = context.another(self._put_on())
        return iter(result.tensors), {"start": {"settings": settings, **result.recorded()}}

    def _put_on(self) -> MergeMethod:
        assert self._start is not None  # `resolve` gives it
        return self._start

    def build(self, work: Work) -> Built:
        """Adapters, trained on what heads are given in the merged body and in the experts, each run once."""
        adapters: dict[str, Adapter] = {}
        losses = {}
        for task in work.data:
            merged = work.features(task, one_vector)
            adapters[task] = Adapter(merged.shape[1], self.rank).to(work.device)
            expert = work.predictions[task].features.to(work.device)  # the settings name them
            losses[task] = partial(_step, work, task, adapters[task], merged, expert)
        for task, adapter in adapters.items():
            mount(work.models.modules[task], work.head(task), adapter)

        def part(task: str | None, part: str, name: str) -> Tensor:
            return adapters[str(task)].get_parameter(part)

        named = {task: dict(adapter.named_parameters()) for task, adapter in adapters.items()}
        learned = {f"{task}/{name}": tensor for task, each in named.items() for name, tensor in each.items()}
        widths = {task: adapter.down.shape[1] for task, adapter in adapters.items()}
        separate = {task: list(each.values()) for task, each in named.items()}
        return Built(learned, losses, part, widths, separate=separate)

    @staticmethod
    def dress(bundle: BundleFolder, task: str, module: nn.Module) -> nn.Module:
        """What serves a task of a bundle: the module, with the task's adapter before its head."""
        return dress(bundle, task, module)

    def layouts(
        self, sites: Mapping[str, Site], family: Family, widths: Mapping[str, int]
    ) -> tuple[Layout, dict[str, Layout]]:
        """The start whole, shared; D (r, d) and U (d, r) of each task's adapter, in float32."""

        def adapter_layout(width: int) -> Layout:
            down, up = (self.rank, width), (width, self.rank)
            return {key("down"): (down, torch.float32), key("up"): (up, torch.float32)}

        return whole(sites), {task: adapter_layout(width) for task, width in widths.items()}


def _step(work: Work, task: str, adapter: Adapter, merged: Tensor, expert: Tensor, step: int) -> Tensor:
    """The loss of one task's batch."""
    rows = list(work.data[task].adapt_rows(step, work.settings.batch_size))
    return distance(adapter, merged[rows], expert[rows])


class Adapter(nn.Module):
    """z - U relu(D z), for the vector that a head is given."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, width))
        self.up = nn.Parameter(torch.zeros(width, rank))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, z: Tensor) -> Tensor:
        """(batch, d) -> (batch, d)."""
        adapted: Tensor = z - linear(linear(z, self.down).relu(), self.up)
        return adapted


def distance(adapter: Adapter, z: Tensor, expert: Tensor) -> Tensor:
    """Mean absolute difference to the expert's representations, a scalar. Both are (batch, d)."""
    difference: Tensor = (adapter(z) - expert).abs().mean()
    return difference


def one_vector(given: Tensor, mask: Tensor | None = None) -> Tensor:
    """What a head is given, if it is one vector per input."""
    if given.dim() != 2:
        raise RecipeError(
            f"surgery: a head is given {tuple(given.shape[1:])} per input, and an adapter needs one vector. "
            "This architecture, whose head looks at every position, cannot be adapted so."
        )
    return given.float()


class _Operate(nn.Module):
    """Pre-hook of a network (`begin`) and of its head's parts: the first of these to run is given the adapted vector."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter, self._open = adapter, False

    def begin(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        """A forward pass begins."""
        self._open = True

    def forward(self, part: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if not self._open:
            return None
        self._open = False
        z = next(argument for argument in (*given, *named.values()) if isinstance(argument, Tensor))
        adapted = self.adapter(one_vector(z)).to(z.dtype)
        swapped = {name: adapted if argument is z else argument for name, argument in named.items()}
        return tuple(adapted if argument is z else argument for argument in given), swapped


def mount(module: nn.Module, head: Sequence[nn.Module], adapter: Adapter) -> None:
    """Put an adapter before the head of a network.

    Arguments:
        head: the parts of the module that hold the head's tensors.
    """
    operate = _Operate(adapter)
    module.register_forward_pre_hook(operate.begin)
    for part in head:
        part.register_forward_pre_hook(operate, with_kwargs=True)
    carry(module, [operate])


def dress(bundle: BundleFolder, task: str, module: nn.Module) -> nn.Module:
    """Put a task's adapter on a network that holds the merged body and the task's head."""
    parts = bundle.parts_of(task).of()
    adapter = Adapter(parts["down"].shape[1], parts["down"].shape[0])
    adapter.load_state_dict({name: parts[name] for name in ("down", "up")})
    mount(module, head_of(bundle, task, module), adapter)
    return module.to(next(module.parameters()).device).eval()
