"""Twin-Merging: what experts share is merged once; the rest of each expert is added for every input, weighted by a router.

    W* = W₀ + λ Σ_t τ_t                                            the shared expert
    R_t = SVD_k(W_t - W*) of matrices, W_t - W* of other tensors    what only the task has
    w(x) = softmax(r(z(x)))                                        z: what the head is given in the shared expert
    W(x) = W* + Σ_t w_t(x) R_t

The router r is trained on unlabelled inputs to tell which task they come from. An input passes the network twice: once
for z, once with its weights. Of each matrix a share `rank` of the components is kept: 0.1, a mask rate of 0.9 in the
paper's words. r is three linear layers with leaky ReLUs between, on z brought to mean 0 and deviation 1 over the inputs that it
is trained on; the authors' has batch norms and dropout instead, and z is the mean over tokens of the last hidden states.
The router's last step is kept unless the recipe says `keep: best`: how often it is right does not turn on single inputs.

Lu et al., "Twin-Merging: Dynamic Integration of Modular Expertise in Model Merging", arXiv:2406.15479.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, leaky_relu

from adarank.modular.base import (
    FAMILIES,
    OF_COMPONENTS,
    OF_LOGITS,
    Built,
    BundleFolder,
    Context,
    Family,
    Layout,
    Modular,
    PartFile,
    Site,
    Spec,
    Work,
    arithmetic,
    head_inputs,
    head_of,
    key,
    module_names,
    top_count,
    whole,
)
from adarank.modular.layers import Mounted, Route, StackedDeltas, carry, mounted
from adarank.spectral.svd import decompose


class TwinMerging(Modular):
    """A shared expert, and low-rank residuals of every task that a router weighs for each input.

    Arguments:
        scale: λ of the shared expert.
        rank: share of each residual matrix's singular components that is kept, in (0, 1].
        hidden: width of the router's hidden layers, as a multiple of its input's.
    """

    name: ClassVar[str] = "twin_merging"
    formula: ClassVar[str] = "W(x) = W* + Σ_t w_t(x) SVD_k(W_t - W*), W* = W₀ + λ Σ_t τ_t, w = softmax(r(z))"
    source: ClassVar[str] = "Lu et al. 2024, arXiv:2406.15479"
    knows: ClassVar[str] = "the task of every input, for its head; its weights are merged as the router says"
    in_use: ClassVar[str] = f"In use it must know {knows}."
    spectral: ClassVar[bool] = True
    compares: ClassVar[Mapping[str, Any]] = {"objective": "entropy"}
    defaults: ClassVar[Mapping[str, Any]] = {**Modular.defaults, "steps": 500, "batch_size": 32, "keep": "last"}
    unused: ClassVar[frozenset[str]] = OF_COMPONENTS | OF_LOGITS

    scale: float = Field(0.29, alias="lambda", description="λ of the shared expert")
    rank: float = Field(0.1, gt=0, le=1, description="share of each residual matrix's components that is kept")
    hidden: int = Field(2, ge=1, description="width of the router's hidden layers ÷ that of its input")
    lr: float = Field(5e-4, gt=0, description="Adam step size of the router")

    def layouts(
        self, sites: Mapping[str, Site], family: Family, widths: Mapping[str, int]
    ) -> tuple[Layout, dict[str, Layout]]:
        """The shared expert and the router; of each task its residuals, matrices as factors U and V where these are smaller."""
        shared = whole(sites)
        residuals: dict[str, Spec] = {}
        width = next(iter(widths.values()))
        for name, tensor in Router(width, self.hidden, len(widths)).state_dict().items():
            shared[key(name)] = (tuple(tensor.shape), torch.float32)
        for name in (name for name, site in sites.items() if site.merged):
            residuals |= {
                key(part, name): (shape, sites[name].floats) for part, shape in self.shapes(sites[name]).items()
            }
        return shared, {task: dict(residuals) for task in widths}

    def start_of(self, context: Context) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any]]:
        """The shared expert: task arithmetic."""
        return arithmetic(context, self.scale), {}

    def build(self, work: Work) -> Built:
        """A router, trained to tell the tasks by what heads are given in the shared expert, which is run once."""
        network = work.context.network
        tasks = network.tasks
        features = {task: work.features(task) for task in tasks}
        width = next(iter(features.values())).shape[1]
        router = Router(width, self.hidden, len(tasks)).to(work.device)
        rows = {task: list(of.splits.rows["adapt"]) for task, of in work.data.items()}
        router.fit_scale(torch.cat([features[task][rows[task]] for task in tasks]))
        sites = work.sites()
        deltas = deltas_of(network.merged(), lambda name: self._residuals(work, sites[name]))
        left = self._put_on(work, router, deltas)

        def part(task: str | None, part: str, name: str) -> Tensor:
            return router.state_dict()[part] if task is None else deltas[name].part(part)[tasks.index(task)]

        def about() -> dict[str, Any]:
            shares = {task: _right(router, features[task][work.judged_rows(task)], tasks.index(task)) for task in tasks}
            return {"told_by_router": shares}

        losses = {task: partial(_step, work, router, features[task], task) for task in tasks}
        return Built(dict(router.named_parameters()), losses, part, dict.fromkeys(tasks, width), left, about)

    def _put_on(self, work: Work, router: Router, deltas: Mapping[str, StackedDeltas]) -> tuple[str, ...]:
        """Mount router and residuals on all networks; returns the tensors that no layer can merge input by input."""
        keys = {task: work.keys(task) for task in work.models.modules}
        route, first = Route(), work.context.network.tasks[0]
        layers = mounted(work.models.modules[first], keys[first], deltas, route, work.family.expanded)
        for task, module in work.models.modules.items():
            layers.attach(module, keys[task])
            mount(module, work.head(task), router, layers, route)
        return layers.left

    def _residuals(self, work: Work, site: Site) -> list[dict[str, Tensor]]:
        """Each task's parts of W_t - W* for one tensor."""
        shared = work.models.shared[site.name].detach()
        members = work.context.network.experts.values()
        return [self.residual(site, member.read(site.name, work.device).float() - shared) for member in members]

    @staticmethod
    def dress(bundle: BundleFolder, task: str, module: nn.Module) -> nn.Module:
        """What serves a task of a bundle: the module, its weights merged for every input as the router says."""
        return dress(bundle, task, module)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """The parts of one tensor's residual: factors where they take less room."""
        k, (rows, columns) = self.kept(site), _matrix(site)
        if k * (rows + columns) < site.numel:
            return {"u": (rows, k), "v": (columns, k)}
        return {"delta": site.shape}

    def kept(self, site: Site) -> int:
        """How many components of a tensor's residual are kept; all of what is no matrix."""
        rank = min(_matrix(site))
        return top_count(self.rank, rank) if site.action == "decompose" else rank

    def residual(self, site: Site, residual: Tensor) -> dict[str, Tensor]:
        """The parts of W_t - W* for one tensor."""
        k, rank = self.kept(site), min(_matrix(site))
        if k == rank:
            return {"delta": residual}
        spectrum = decompose(residual, site.name)
        if "delta" in self.shapes(site):
            return {"delta": spectrum.reconstruct(k).reshape(site.shape)}
        return {"u": spectrum.u[:, :k] * spectrum.s[:k], "v": spectrum.v[:, :k]}


def _step(work: Work, router: Router, features: Tensor, task: str, step: int) -> Tensor:
    """The loss of one task's batch."""
    batch = features[list(work.data[task].adapt_rows(step, work.settings.batch_size))]
    number = work.context.network.tasks.index(task)
    return cross_entropy(router(batch), torch.full((len(batch),), number, device=batch.device))


@torch.no_grad()
def _right(router: Router, features: Tensor, task: int) -> float:
    """Share of (inputs, width) features that the router gives to a task."""
    return float((router(features).argmax(dim=-1) == task).double().mean())


def _matrix(site: Site) -> tuple[int, int]:
    """Rows and columns, kernels taken as (out, in·k·k); a vector is one column."""
    rows = site.shape[0] if site.shape else 1
    return rows, site.numel // max(1, rows)


class Router(nn.Module):
    """r: from what heads are given in the shared expert to a logit per task."""

    mean: Tensor
    spread: Tensor

    def __init__(self, width: int, hidden: int, tasks: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, hidden * width)
        self.second = nn.Linear(hidden * width, hidden * width)
        self.last = nn.Linear(hidden * width, tasks)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))

    def forward(self, z: Tensor) -> Tensor:
        """(batch, width) -> (batch, tasks) logits."""
        h = leaky_relu(self.first((z - self.mean) / self.spread))
        logits: Tensor = self.last(leaky_relu(self.second(h)))
        return logits

    @torch.no_grad()
    def fit_scale(self, z: Tensor) -> None:
        """Take mean and deviation of (inputs, width) representations."""
        self.mean.copy_(z.mean(dim=0))
        self.spread.copy_(z.std(dim=0).clamp_min(1e-6))


class _Decide(nn.Module):
    """A network's pre-hook: passes the batch through the shared expert, and sets every input's weights."""

    def __init__(self, router: Router, head: Sequence[nn.Module], route: Route) -> None:
        super().__init__()
        self.router, self._route, self._deciding = router, route, False
        self.__dict__["_head"] = list(head)  # parts of the network, not of this

    def forward(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self._deciding:
            return
        self._deciding, self._route.weights = True, None
        try:
            with torch.no_grad(), head_inputs(module, self.__dict__["_head"]) as seen:
                module(*given, **named)
        finally:
            self._deciding = False
        self._route.weights = self.router(seen[-1]).softmax(dim=-1)


def mount(module: nn.Module, head: Sequence[nn.Module], router: Router, layers: Mounted, route: Route) -> None:
    """Put a router on a network that holds the shared expert and has the residuals' merges attached."""
    decide = _Decide(router, head, route)
    module.register_forward_pre_hook(decide, with_kwargs=True)
    carry(module, [decide, *layers.merges.values()])


def deltas_of(names: Sequence[str], parts: Callable[[str], Sequence[Mapping[str, Tensor]]]) -> dict[str, StackedDeltas]:
    """Residuals of some tensors, from each task's parts of them."""
    deltas = {}
    for name in names:
        each = parts(name)
        stacked = {part: torch.stack([of_task[part].float() for of_task in each]) for part in each[0]}
        deltas[name] = StackedDeltas(stacked.get("delta"), stacked.get("u"), stacked.get("v"))
    return deltas


def dress(bundle: BundleFolder, task: str, module: nn.Module) -> nn.Module:
    """Put a bundle's router and residuals on a network that holds its shared expert."""
    about, shared = bundle.about, bundle.shared().of()
    each: list[PartFile] = [bundle.parts_of(name) for name in about.tasks]
    width = len(shared["mean"])
    with torch.random.fork_rng(devices=[]):  # drawn, and then filled
        router = Router(width, len(shared["first.bias"]) // width, len(about.tasks))
    router.load_state_dict({name: shared[name] for name in router.state_dict()})
    keys, route = module_names(bundle, task, module), Route()
    deltas = deltas_of(each[0].names(), lambda name: [of_task.of(name) for of_task in each])
    layers = mounted(module, keys, deltas, route, FAMILIES[str(about.models)].expanded)
    layers.attach(module, keys)
    mount(module, head_of(bundle, task, module), router, layers, route)
    return module.to(next(module.parameters()).device).eval()
