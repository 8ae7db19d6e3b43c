"""WEMoE: task arithmetic, but for the MLPs, whose weights are merged anew for every input.

    W = W₀ + λ Σ_t τ_t                              every tensor but those of the MLPs
    W(x) = W₀ + Σ_t λ_t(x) τ_t                      the two linear layers of each block's MLP
    λ(x) = mean_i r(h_i)                            h_i: what the MLP is given at position i; padding does not count
    r(h) = A₂ relu(A₁ h + a₁) + a₂                  starts with A₂ = 0 and a₂ = λ: as task arithmetic

The routers r, one per block, are all that is learned, on unlabelled inputs: the paper minimises entropy
(`preset: paper`), the default is that of adaptation here. A₂ starts at zero, where the authors draw it with a deviation
of 0.01, so that the start is task arithmetic exactly.

Tang et al., "Merging Multi-Task Models via Weight-Ensembling Mixture of Experts", arXiv:2402.00433.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from adarank.modular.base import (
    FAMILIES,
    WHOLE,
    AlignedCheckpoints,
    Built,
    BundleFolder,
    Context,
    Family,
    Layout,
    Modular,
    RecipeError,
    Site,
    Spec,
    Work,
    arithmetic,
    key,
    module_names,
    pooled,
    whole,
)
from adarank.modular.layers import Route, StackedDeltas, carry, mounted

ROUTER = {"inner.weight": "a1", "inner.bias": "b1", "outer.weight": "a2", "outer.bias": "b2"}
"""Parameter of a router -> the part of a bundle that holds it."""


class WEMoE(Modular):
    """MLPs that merge their weights for each input by learned routers; all else by task arithmetic.

    Arguments:
        scale: λ of what is not routed, and what every router gives at the start.
    """

    name: ClassVar[str] = "wemoe"
    formula: ClassVar[str] = "MLPs: W(x) = W₀ + Σ_t λ_t(x) τ_t, λ(x) = mean_i r(h_i); else W = W₀ + λ Σ_t τ_t"
    source: ClassVar[str] = "Tang et al. 2024, arXiv:2402.00433"
    knows: ClassVar[str] = "the task of every input, for its head; its MLPs are merged for each input"

    in_use: ClassVar[str] = f"In use it must know {knows}."

    scale: float = Field(0.3, alias="lambda", description="λ of task arithmetic, and of the routers at the start")
    lr: float = Field(1e-4, gt=0, description="Adam step size of the routers")

    def layouts(
        self, sites: Mapping[str, Site], family: Family, widths: Mapping[str, int]
    ) -> tuple[Layout, dict[str, Layout]]:
        """The start and the routers, shared; of each task the task vectors, or tensors, of the routed MLPs.

        Raises:
            RecipeError: there is no MLP to route.
        """
        shared = whole(sites)
        of_task: dict[str, Spec] = {}
        for block in mlps(sites, {name for name, site in sites.items() if site.merged}, family.mlps):
            d, tasks = sites[block.tensors[-1]].numel, len(widths)
            shapes = {"a1": (d, d), "b1": (d,), "a2": (tasks, d), "b2": (tasks,)}
            shared |= {key(part, block.name): (shape, torch.float32) for part, shape in shapes.items()}
            for site in (sites[name] for name in block.tensors if sites[name].merged):
                half = site.dtype.itemsize < site.floats.itemsize  # then the expert's tensor is smaller, and as exact
                of_task |= {key("expert" if half else "delta", site.name): (site.shape, site.dtype)}
        return shared, {task: dict(of_task) for task in widths}

    def start_of(self, context: Context) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any]]:
        """Task arithmetic; MLPs that will be routed stay the base's."""
        network = context.network
        routed = mlps(network.tensors, set(network.merged()), context.family.mlps)
        return arithmetic(context, self.scale, {name for block in routed for name in block.tensors}), {}

    def build(self, work: Work) -> Built:
        """Routers of all MLPs, trained through the networks by the objective of adaptation."""
        network = work.context.network
        merged = set(network.merged())
        blocks = mlps(network.tensors, merged, work.family.mlps)
        deltas = {n: _task_vectors(network, n, work.device) for block in blocks for n in block.tensors if n in merged}
        width = {block: network.tensors[block.tensors[-1]].numel for block in blocks}
        routers = {b: MLPRouter(width[b], len(network.tasks), self.scale).to(work.device) for b in blocks}
        mount([(module, work.keys(task)) for task, module in work.models.modules.items()], deltas, routers)
        named = {block.name: router for block, router in routers.items()}

        def part(task: str | None, part: str, name: str) -> Tensor:
            if task is not None and part == "expert":
                return network.experts[task].read(name)
            if task is not None:
                return deltas[name].part(part)[network.tasks.index(task)]
            return named[name].get_parameter(next(n for n, stored in ROUTER.items() if stored == part))

        learned = {f"{name}/{n}": tensor for name, router in named.items() for n, tensor in router.named_parameters()}
        return Built(learned, work.losses(), part, dict.fromkeys(network.tasks, 0))

    @staticmethod
    def dress(bundle: BundleFolder, task: str, module: nn.Module) -> nn.Module:
        """What serves a task of a bundle: the module, its MLPs merged for every input by the routers."""
        return dress(bundle, task, module)


def _task_vectors(network: AlignedCheckpoints, name: str, device: torch.device | str) -> StackedDeltas:
    """The task vectors of one tensor about the base, stacked."""
    deltas = network.deltas(name, network.origin(name, "pretrained", device), "pretrained")
    return StackedDeltas(torch.stack([deltas[task] for task in deltas]).float())


@dataclass(frozen=True)
class Block:
    """One MLP: weight and bias of its first layer, and of its second."""

    tensors: tuple[str, str, str, str]

    @property
    def name(self) -> str:
        """Its first tensor, after which the parts of its router are called."""
        return self.tensors[0]


def mlps(names: Iterable[str], merged: Collection[str], pairs: Sequence[tuple[str, str]]) -> list[Block]:
    """The MLPs of a network of which anything merges, by what a family calls their two layers.

    Raises:
        RecipeError: there is none.
    """
    known = dict.fromkeys(names)
    blocks: list[Block] = []
    for name in known:
        for first, second in pairs:
            front, back = name.removesuffix(f"{first}.weight"), (f"{second}.weight", f"{second}.bias")
            wanted = (name, f"{front}{first}.bias", front + back[0], front + back[1])
            if (
                front != name
                and all(tensor in known for tensor in wanted)
                and any(tensor in merged for tensor in wanted)
            ):
                blocks.append(Block(wanted))
    if not blocks:
        called = ", ".join(f"{first} with {second}" for first, second in pairs)
        raise RecipeError(
            f"wemoe: found no MLP to route in these models; known are pairs of layers called {called}, each with weight and bias. "
            "For another architecture add the names of its two layers to `mlps` of its family in src/adarank/models/."
        )
    return blocks


class MLPRouter(nn.Module):
    """r: how an MLP is merged for an input."""

    def __init__(self, width: int, tasks: int, scale: float) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, tasks)
        nn.init.normal_(self.inner.weight, std=0.01)
        nn.init.zeros_(self.inner.bias)
        nn.init.zeros_(self.outer.weight)
        nn.init.constant_(self.outer.bias, scale)

    def forward(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        """(batch, tasks) λ from the MLP's (batch, …, width) inputs; `mask` is (batch, positions)."""
        weights: Tensor = self.outer(self.inner(h).relu())
        return pooled(weights.reshape(len(h), -1, weights.shape[-1]), mask)


class _Mask:
    """A network's pre-hook: remembers which positions of the batch are no padding."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None

    def __call__(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.mask = named.get("attention_mask")


class _Decide(nn.Module):
    """The pre-hook of an MLP's first layer: sets the route of the MLP for this batch."""

    def __init__(self, router: MLPRouter, route: Route, mask: _Mask) -> None:
        super().__init__()
        self.router, self._route, self._mask = router, route, mask

    def forward(self, layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        self._route.weights = self.router(given[0], self._mask.mask)


def mount(
    networks: Sequence[tuple[nn.Module, Mapping[str, str]]],
    deltas: Mapping[str, StackedDeltas],
    routers: Mapping[Block, MLPRouter],
) -> None:
    """Put routers and task vectors on networks whose MLPs hold W₀; the networks share them.

    Arguments:
        networks: (module, tensor of the network -> its name in the module).
        deltas: task vectors of the MLPs' tensors that merge.
    """
    mask = _Mask()
    parts: list[nn.Module] = []
    for block, router in routers.items():
        route = Route()
        of_block = {name: deltas[name] for name in block.tensors if name in deltas}
        layers = mounted(*networks[0], of_block, route, ())
        if layers.left:
            raise RecipeError(f"wemoe: {layers.left[0]} is in no linear layer, so it cannot be merged input by input.")
        decide = _Decide(router, route, mask)
        for module, keys in networks:
            module.get_submodule(keys[block.name].rpartition(".")[0]).register_forward_pre_hook(decide)
            layers.attach(module, keys)
        parts += [decide, *layers.merges.values()]
    for module, _ in networks:
        module.register_forward_pre_hook(mask, with_kwargs=True)
        carry(module, parts)


def dress(bundle: BundleFolder, task: str, module: nn.Module) -> nn.Module:
    """Put a bundle's routers and task vectors on a network that holds its tensors."""
    about, shared = bundle.about, bundle.shared()
    each = [bundle.parts_of(name) for name in about.tasks]
    merged = {name for name in about.tensors if each[0].of(name)}
    blocks = mlps(about.tensors, merged, FAMILIES[str(about.models)].mlps)
    deltas: dict[str, StackedDeltas] = {}
    for name in (name for block in blocks for name in block.tensors if name in merged):
        stored = [of_task.of(name) for of_task in each]
        base = shared.of(name)[WHOLE].float()
        stack = [
            of_task["delta"].float() if "delta" in of_task else of_task["expert"].float() - base for of_task in stored
        ]
        deltas[name] = StackedDeltas(torch.stack(stack))
    routers: dict[Block, MLPRouter] = {}
    for block in blocks:
        parts = shared.of(block.name)
        with torch.random.fork_rng(devices=[]):  # drawn, and then filled
            routers[block] = MLPRouter(len(parts["b1"]), len(about.tasks), 0.0)
        routers[block].load_state_dict({name: parts[part] for name, part in ROUTER.items()})
    device = next(module.parameters()).device
    mount([(module, module_names(bundle, task, module))], deltas, routers)
    return module.to(device).eval()
