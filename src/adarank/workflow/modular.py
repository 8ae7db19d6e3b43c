"""Modules of a job, trained and put into a bundle's parts: Surgery's adapters, the routers of WEMoE and Twin-Merging.

Each method says what it learns, from which losses, on networks that carry its modules; the loop, its judge and its state
are adaptation's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from adarank.adapt.agreement import Judge, Judged, Signal, mean_signal
from adarank.adapt.learner import Loss, Memory, Parameters
from adarank.adapt.loop import adapt
from adarank.adapt.problem import Predictions
from adarank.adapt.settings import AdaptSettings
from adarank.data.task import TaskData
from adarank.io.bundle import WHOLE, Piece
from adarank.io.writer import Layout
from adarank.methods import TaskArithmetic, merge_tensors
from adarank.methods.base import Method
from adarank.models import TaskModels
from adarank.models.head_inputs import head_parts
from adarank.models.tied import held_tensors, module_keys
from adarank.modular import Modular, Surgery, TwinMerging, WEMoE, surgery, twin_merging, wemoe
from adarank.modular.layers import Deltas, Route, mounted
from adarank.outputs.write import Parts
from adarank.recipe.job import Job, open_job
from adarank.recipe.plan import settings_in_force
from adarank.settings import parse
from adarank.workflow.adapt import adapt_job, report
from adarank.workflow.build_networks import build_models, changed_tensors, family_of
from adarank.workflow.calibrate import inform_job
from adarank.workflow.context import Run
from adarank.workflow.problem import head_features, problem_of, table_inputs


@dataclass(frozen=True)
class Work:
    """What a method has to work with.

    Attributes:
        models: networks that hold the start's tensors, and what the method puts on them.
        experts: task -> its expert's predictions, as far as the settings ask for them.
        memory: what losses remember from step to step.
    """

    job: Job
    method: Modular
    settings: AdaptSettings
    models: TaskModels
    data: Mapping[str, TaskData]
    experts: Mapping[str, Predictions]
    memory: Memory

    @property
    def device(self) -> torch.device | str:
        return self.job.recipe.device


@dataclass(frozen=True)
class Built:
    """A method's modules on the networks.

    Attributes:
        learned: name -> every tensor that is learned.
        losses: task -> loss of a step.
        part: (task, or None for what is shared; part; tensor) -> what a bundle stores there.
        widths: task -> length of the vector that its head is given.
        left: tensors that tasks differ in, and that no layer can merge input by input.
        about: what the record says beside, once all is learned.
        separate: what is learned, by task, where no task's part depends on another's.
    """

    learned: Mapping[str, Tensor]
    losses: Mapping[str, Loss]
    part: Callable[[str | None, str, str], Tensor]
    widths: Mapping[str, int]
    left: tuple[str, ...] = ()
    about: Callable[[], dict[str, Any]] = dict
    separate: Mapping[str, Sequence[Tensor]] | None = None


@dataclass(frozen=True)
class Assembly:
    """What training a job's modules gave.

    Attributes:
        report: what the record says of it.
    """

    job: Job
    method: Modular
    models: TaskModels
    built: Built
    report: dict[str, Any]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the network that the modules are put on, heads not among them, in its order."""
        return changed_tensors(self.job, self.models.shared, "the start")

    def parts(self) -> Parts:
        """Layouts and a stream of the bundle's parts."""
        sites = {site.name: site for site in self.job.sites()}
        shared, own = self.method.layouts(sites, family_of(self.job), self.built.widths)
        left = set(self.built.left)
        own = {t: {k: spec for k, spec in each.items() if k.partition(":")[2] not in left} for t, each in own.items()}
        settings = self.method.model_dump(mode="json", by_alias=True)
        return Parts(self.method.name, settings, shared, own, self._pieces(shared, own))

    def _pieces(self, shared: Layout, own: Mapping[str, Layout]) -> Iterator[Piece]:
        whole = dict(self.tensors())
        for owner, layout in ((None, shared), *own.items()):
            for stored in layout:
                part, _, name = stored.partition(":")
                yield owner, stored, whole[name] if part == WHOLE else self.built.part(owner, part, name).detach()


def assemble_job(run: Run) -> Assembly:
    """Train the modules that the job's recipe asks for, from a saved state if there is one. Reads no label."""
    job, data = run.job, run.data
    method, settings = job.recipe.modules()
    if isinstance(method, (Surgery, TwinMerging)):  # their losses are their own: this says what experts are asked
        asked_for = "features" if isinstance(method, Surgery) else "entropy"
        settings = settings.model_copy(update={"objective": asked_for, "balance": 0.0})
    fingerprint = run.fingerprint(run.marks)
    start, started = _start(run, method)
    run.note("Loading the networks")
    models = build_models(job)
    experts = run.expert_predictions(models, settings)
    models.fill(start)
    for tensor in models.shared.values():
        tensor.requires_grad_(False)
    work = Work(job, method, settings, models, data, experts, {})
    run.note("Putting the modules on the networks")
    torch.manual_seed(job.recipe.seed)  # of what modules start from
    built = _BUILD[type(method)](work)
    judge = problem_of(job, models, data, settings, experts).judge()
    run.note("Training the modules, without labels")
    learner = Parameters(built.learned, method.lr)
    one_pass = min(own.one_pass(settings.batch_size) for own in data.values())
    if built.separate is None or settings.keep == "last":
        history = adapt(
            learner, built.losses, settings, run.state, fingerprint, run.progress, judge, work.memory, one_pass=one_pass
        )
        told = report(history, job, settings, data)
    else:
        each = _Each(built.separate, work.memory, settings.signal)
        last = settings.model_copy(update={"keep": "last"})
        watching = each.watching(judge)
        history = adapt(
            learner, built.losses, last, run.state, fingerprint, run.progress, watching, work.memory, one_pass=one_pass
        )
        steps = each.keep()
        told = report(history, job, settings, data, {task: history.judged[step][task] for task, step in steps.items()})
        told |= {
            "step_kept": None,
            "steps_kept": steps,
            "why_kept": "each task's adapter is of the judged step nearest to its expert",
        }
    told |= {"known_in_use": method.knows, "not_routed": list(built.left)}
    return Assembly(job, method, models, built, told | started | built.about())


class _Each:
    """The best judged step of each task by itself. What it remembers is saved with the loop's state."""

    def __init__(self, separate: Mapping[str, Sequence[Tensor]], memory: Memory, signal: Signal) -> None:
        self._separate, self._memory, self._signal = separate, memory, signal

    def watching(self, judge: Judge) -> Judge:
        """The judge, after which the tasks that are nearer to their experts than ever before are remembered."""

        def judged(step: int) -> Judged:
            found = judge(step)
            for task, own in found.items():
                value = mean_signal({task: own}, self._signal)
                least = float(
                    self._memory.setdefault(f"{task}/start", torch.tensor(own.agreement, dtype=torch.float64))
                )
                if own.agreement < least:  # by divergence it may be nearer, and still disagree more often
                    continue
                if f"{task}/value" not in self._memory or value > float(self._memory[f"{task}/value"]):
                    self._memory[f"{task}/value"] = torch.tensor(value, dtype=torch.float64)
                    self._memory[f"{task}/step"] = torch.tensor(step)
                    for number, tensor in enumerate(self._separate[task]):
                        self._memory[f"{task}/{number}"] = tensor.detach().clone()
            return found

        return judged

    @torch.no_grad()
    def keep(self) -> dict[str, int]:
        """Give each task its best; returns the steps."""
        for task, tensors in self._separate.items():
            for number, tensor in enumerate(tensors):
                tensor.copy_(self._memory[f"{task}/{number}"])
        return {task: int(self._memory[f"{task}/step"]) for task in self._separate}


def _start(run: Run, method: Modular) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any]]:
    """(name, tensor) of the network that modules are put on, and what the record says of how it was made."""
    job = run.job
    recipe = job.recipe.start()
    if recipe is None:
        return _arithmetic(job, method), {}
    own, place = open_job(recipe), run.state.parent / "start"
    settings = settings_in_force(own)
    run.note(f"Making the start: {recipe.merge_method}")
    if own.method is None:
        about = {**run.about, "settings": settings}
        adapted = adapt_job(replace(run, job=own, about=about, state=place / "state.pt"))
        return adapted.tensors(), {"start": {"settings": settings, "adaptation": adapted.report}}
    ready, found = inform_job(own, run.data, run.about["inputs"], place, run.note)
    statistics = {"statistics": found} if found else {}
    return merge_tensors(ready, job.network, recipe.device), {"start": {"settings": settings, **statistics}}


def _arithmetic(job: Job, method: Modular) -> Iterator[tuple[str, Tensor]]:
    """Task arithmetic; MLPs that will be routed stay the base's."""
    assert isinstance(method, (WEMoE, TwinMerging))
    kept: set[str] = set()
    if isinstance(method, WEMoE):
        blocks = wemoe.mlps(job.network.tensors, set(job.network.merged()), family_of(job).mlps)
        kept = {n for block in blocks for n in block.tensors}
    ready: Method = parse(TaskArithmetic, {"lambda": method.scale}, "parameters")
    for name, tensor in merge_tensors(ready, job.network, job.recipe.device):
        yield name, job.network.kept(name) if name in kept else tensor


def _surgery(work: Work) -> Built:
    """Adapters, trained on what heads are given in the merged body and in the experts, each asked once."""
    assert isinstance(work.method, Surgery)
    adapters: dict[str, surgery.Adapter] = {}
    losses: dict[str, Loss] = {}
    for task, own in work.data.items():
        seen = _features(work, task, surgery.one_vector)
        adapters[task] = surgery.Adapter(seen.shape[1], work.method.rank).to(work.device)
        expert = work.experts[task].features
        assert isinstance(expert, Tensor)  # the settings ask for them
        losses[task] = partial(_step_of_surgery, work, own, adapters[task], seen, expert.to(work.device))
    for task, adapter in adapters.items():
        surgery.mount(work.models.modules[task], head_parts(work.models, task), adapter)

    def part(task: str | None, part: str, name: str) -> Tensor:
        return adapters[str(task)].get_parameter(part)

    learned = {f"{task}/{name}": own for task, adapter in adapters.items() for name, own in adapter.named_parameters()}
    widths = {task: own.down.shape[1] for task, own in adapters.items()}
    separate = {task: list(own.parameters()) for task, own in adapters.items()}
    return Built(learned, losses, part, widths, separate=separate)


def _step_of_surgery(
    work: Work, data: TaskData, adapter: surgery.Adapter, seen: Tensor, expert: Tensor, step: int
) -> Tensor:
    rows = list(data.adapt_rows(step, work.settings.batch_size))
    return surgery.distance(adapter, seen[rows], expert[rows])


def _wemoe(work: Work) -> Built:
    """Routers of all MLPs, trained through the networks by the objective of adaptation."""
    assert isinstance(work.method, WEMoE)
    job, network = work.job, work.job.network
    merged = set(network.merged())
    blocks = wemoe.mlps(network.tensors, merged, family_of(job).mlps)
    deltas = {name: _task_vectors(job, name) for block in blocks for name in block.tensors if name in merged}
    width = {block: network.tensors[block.tensors[-1]].numel for block in blocks}
    routers = {b: wemoe.Router(width[b], len(network.tasks), work.method.scale).to(work.device) for b in blocks}
    wemoe.mount([(m, _keys(job, task, m)) for task, m in work.models.modules.items()], deltas, routers)
    named = {block.name: router for block, router in routers.items()}

    def part(task: str | None, part: str, name: str) -> Tensor:
        if task is not None and part == "expert":
            return network.experts[task].read(name)
        if task is not None:
            return deltas[name].part(part)[network.tasks.index(task)]
        return named[name].get_parameter(next(n for n, stored in wemoe.ROUTER.items() if stored == part))

    learned = {f"{name}/{n}": own for name, router in named.items() for n, own in router.named_parameters()}
    losses = problem_of(job, work.models, work.data, work.settings, work.experts, work.memory).losses()
    return Built(learned, losses, part, dict.fromkeys(network.tasks, 0))


def _twin(work: Work) -> Built:
    """A router, trained to tell the tasks by what heads are given in the shared expert, asked once."""
    assert isinstance(work.method, TwinMerging)
    job, method, tasks = work.job, work.method, work.job.network.tasks
    seen = {task: _features(work, task, None) for task in tasks}
    width = next(iter(seen.values())).shape[1]
    router = twin_merging.Router(width, method.hidden, len(tasks)).to(work.device)
    rows = {task: list(own.splits.rows["adapt"]) for task, own in work.data.items()}
    router.fit_scale(torch.cat([seen[task][rows[task]] for task in tasks]))
    sites = {site.name: site for site in job.sites()}
    deltas = twin_merging.deltas_of(job.network.merged(), lambda name: _residuals(work, name, method, sites))
    keys = {task: _keys(job, task, module) for task, module in work.models.modules.items()}
    route, first = Route(), tasks[0]
    found = mounted(work.models.modules[first], keys[first], deltas, route, family_of(job).expanded)
    for task, module in work.models.modules.items():
        found.attach(module, keys[task])
        twin_merging.mount(module, head_parts(work.models, task), router, found, route)

    def loss(task: str, step: int) -> Tensor:
        batch = seen[task][list(work.data[task].adapt_rows(step, work.settings.batch_size))]
        return cross_entropy(router(batch), torch.full((len(batch),), tasks.index(task), device=batch.device))

    def part(task: str | None, part: str, name: str) -> Tensor:
        return router.state_dict()[part] if task is None else deltas[name].part(part)[tasks.index(task)]

    def about() -> dict[str, Any]:
        return {"told_by_router": {task: _told(work, task, router, seen[task]) for task in tasks}}

    losses = {task: partial(loss, task) for task in tasks}
    return Built(dict(router.named_parameters()), losses, part, dict.fromkeys(tasks, width), found.left, about)


_BUILD: dict[type[Modular], Callable[[Work], Built]] = {Surgery: _surgery, WEMoE: _wemoe, TwinMerging: _twin}


def _features(work: Work, task: str, pool: Any) -> Tensor:
    """(rows, width) what a task's head is given in the merged body, for the rows adapted on and judged on."""
    return head_features(work.job, work.models, work.data, work.settings, task, pool).to(work.device)


@torch.no_grad()
def _told(work: Work, task: str, router: nn.Module, seen: Tensor) -> float:
    """Share of a task's judged inputs that the router gives to it."""
    judged, split = table_inputs(work.job, work.data, work.settings)[task].judged
    chosen = router(seen[list(judged.splits.rows[split])]).argmax(dim=-1)
    return float((chosen == work.job.network.tasks.index(task)).double().mean())


def _keys(job: Job, task: str, module: nn.Module) -> dict[str, str]:
    return module_keys(job.network, task, job.network.merged(), module, held_tensors(module))


def _task_vectors(job: Job, name: str) -> Deltas:
    """The task vectors of one tensor about the base, stacked."""
    origin = job.network.origin(name, "pretrained", job.recipe.device)
    deltas = job.network.deltas(name, origin)
    return Deltas(torch.stack([deltas[task] for task in deltas]).float())


def _residuals(work: Work, name: str, method: TwinMerging, sites: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """Each task's parts of W_t - W* for one tensor."""
    shared = work.models.shared[name].detach()
    members = work.job.network.experts.values()
    return [method.residual(sites[name], member.read(name, work.device).float() - shared) for member in members]
