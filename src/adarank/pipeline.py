"""The flow: checkpoints → task vectors → method or adaptation → one merged checkpoint → evaluation.

The only file that knows every stage. Each function validates all it can before it spends anything.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adarank.adapt.live import Learn, LiveWeights
from adarank.adapt.loop import AdaptSettings, History, Loss, Progress, adapt
from adarank.adapt.objective import entropy, self_label
from adarank.blocks import build_blocks
from adarank.checkpoint import Checkpoint, check_finite
from adarank.data.spec import Split
from adarank.data.task import TaskData
from adarank.errors import MismatchError, OutputError, RecipeError
from adarank.evaluate import Table, evaluate_task, largest_class_share, predict
from adarank.masks import FILE as MASKS_FILE
from adarank.masks import MaskFile
from adarank.methods import merge_tensors
from adarank.models import TaskModels, share
from adarank.plan import Job, describe, open_job
from adarank.recipe import Recipe
from adarank.record import Clock, machine, versions
from adarank.task_vectors import Network
from adarank.tasks import load_tasks
from adarank.writer import RECORD, atomic_folder, check_output, write_checkpoint, write_json, write_tensors

Note = Callable[[str], None]
"""Told, in a sentence, what stage begins."""

_WATCHED = 256  # inputs per task on which collapse is looked for


def merge(
    recipe: Recipe, out: Path, force: bool = False, note: Note = lambda text: None, progress: Progress | None = None
) -> dict[str, Any]:
    """Do what a recipe says and write the merged model to `out`; returns the record.

    Arguments:
        note: told each stage as it begins.
        progress: called after each adaptation step.

    Raises:
        AdaRankError: anything wrong with recipe, inputs, data or output; nothing is left behind.
        Interrupted: adaptation was stopped; the same call continues it.
    """
    check_output(out, force)
    clock = Clock()
    job = open_job(recipe)
    _check_disk(job, out)
    torch.manual_seed(recipe.seed)
    record: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json", by_alias=True, exclude_unset=True),
        "settings": settings_in_force(job),
        "seed": recipe.seed,
        "versions": versions(),
        "machine": machine(recipe.device),
    }
    note("Hashing the inputs")
    record["inputs"] = job.inputs()
    if recipe.adaptive:
        masks, tensors, found = _adapt(job, record, out, note, progress)
        record["adaptation"] = found
    else:
        masks, tensors = None, merge_tensors(recipe.method(job.network.merged()), job.network, recipe.device)
    note("Writing the merged model")
    with atomic_folder(out, force) as folder:
        write_checkpoint(folder, job.layout(), tensors)
        _write_companions(folder, job, masks)
        record |= {"plan": describe(job), **clock.spent()}
        write_json(folder / RECORD, record)
    shutil.rmtree(_state_folder(out), ignore_errors=True)
    return record


def settings_in_force(job: Job) -> dict[str, Any]:
    """Every setting with its value, defaults included."""
    if job.recipe.adaptive:
        method, settings = job.recipe.adaptation()
        return {
            "parameters": method.model_dump(by_alias=True),
            "adapt": settings.model_dump(mode="json"),
            "data": job.recipe.data.model_dump(),
        }
    method_dump = job.recipe.method(job.network.merged()).model_dump(by_alias=True, exclude={"masks", "weights"})
    return {"parameters": method_dump, "data": job.recipe.data.model_dump()}


def network_tensors(job: Job, which: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the base or of one expert, for every tensor it shares with the network."""
    network = job.network
    member = network.reference() if which == "base" else network.experts[which]
    for name in network.tensors:
        if name in member.names:
            info = member.info(name)
            yield name, check_finite(member.source.read(info.name), info.name, info.file)


def build_models(job: Job) -> TaskModels:
    """One network per task on the recipe's device, tied together, filled with the base's tensors."""
    family = _family(job)
    loaded = ((task, family.load(checkpoint.folder).to(job.recipe.device)) for task, checkpoint in job.experts.items())
    models = share(loaded, job.network)
    models.fill(network_tensors(job, "base"))
    return models


def task_losses(job: Job, models: TaskModels, data: Mapping[str, TaskData], settings: AdaptSettings) -> dict[str, Loss]:
    """task -> objective on the task's batch of a step.

    For `self-label` every expert is run once over its adapt inputs; the models hold the base's tensors afterwards.
    """
    family = _family(job)
    targets = expert_logits(job, models, data) if settings.objective == "self-label" else {}

    def loss_of(task: str) -> Loss:
        def loss(step: int) -> Tensor:
            rows = data[task].adapt_rows(step, settings.batch_size)
            batch = {k: v.to(job.recipe.device) for k, v in data[task].examples.batch(rows).items()}
            logits = family.logits(models.modules[task], batch)
            return self_label(logits, targets[task][list(rows)].to(logits)) if targets else entropy(logits)

        return loss

    return {task: loss_of(task) for task in job.network.tasks}


def expert_logits(job: Job, models: TaskModels, data: Mapping[str, TaskData]) -> dict[str, Tensor]:
    """task -> the expert's logits on the task's adapt inputs, by row number (zeros for all other rows)."""
    found = {}
    for task in job.network.tasks:
        models.fill(network_tensors(job, task))
        rows, logits = predict(_family(job), models.modules[task], data[task], "adapt")
        found[task] = torch.zeros(len(data[task].examples.lengths), logits.shape[-1])
        found[task][rows] = logits
    models.fill(network_tensors(job, "base"))
    return found


def _adapt(
    job: Job, record: Mapping[str, Any], out: Path, note: Note, progress: Progress | None
) -> tuple[MaskFile, Iterator[tuple[str, Tensor]], dict[str, Any]]:
    """Adapt; the masks, the merged tensors as they are written, and what the record says of it."""
    method, settings = job.recipe.adaptation()
    data = load_tasks(job)
    note("Loading the networks")
    models = build_models(job)
    note("Decomposing the task vectors")
    live = LiveWeights(
        {name: models.shared[name] for name in job.network.merged()},
        build_blocks(job.network, method.origin, job.recipe.device, method.spectra),
        Learn(method.learn_masks, method.learn_lambda, settings.temperature, settings.clamp),
        method.scale,
        method.rank,
        settings.logit,
    )
    losses = task_losses(job, models, data, settings)
    live.write()
    before = _watch(job, models, data)
    fingerprint = _fingerprint(job, record, data)
    note("Adapting")
    history = adapt(
        live,
        losses,
        settings,
        _state_folder(out) / "state.pt",
        fingerprint,
        progress,
    )
    watched = {task: {"before": before[task], "after": after} for task, after in _watch(job, models, data).items()}
    about = {"settings": record["settings"], "inputs": record["inputs"], "seed": job.recipe.seed}
    masks = live.mask_file(job.network.tasks, method.origin, about)
    found = _found(history, live, job, watched, data)
    return masks, _live_tensors(job, live), found


def _live_tensors(job: Job, live: LiveWeights) -> Iterator[tuple[str, Tensor]]:
    for name in job.network.tensors:
        yield (
            name,
            check_finite(live.parameters[name].detach(), name, "adaptation")
            if name in live.parameters
            else job.network.kept(name),
        )


def _watch(job: Job, models: TaskModels, data: Mapping[str, TaskData]) -> dict[str, float]:
    """task -> share of the most frequent prediction on unlabelled select inputs (adapt inputs where there are none)."""
    shares = {}
    for task, own in data.items():
        split: Split = "select" if own.splits.rows["select"] else "adapt"
        _, logits = predict(_family(job), models.modules[task], own.first(split, _WATCHED), split)
        shares[task] = largest_class_share(logits)
    return shares


def collapsed(before: float, after: float) -> bool:
    """True if a task came to predict one class nearly always and did not do so before."""
    return after >= 0.95 and after > before + 0.03


def _found(
    history: History,
    live: LiveWeights,
    job: Job,
    watched: Mapping[str, Mapping[str, float]],
    data: Mapping[str, TaskData],
) -> dict[str, Any]:
    return {
        "protocol": job.recipe.data.protocol,
        "steps": history.step,
        "step_kept": "the last one; no label was read",
        "seconds_in_steps": round(history.seconds, 3),
        "resumed_from": history.resumed_from,
        "components_kept": live.kept_share(),
        "losses": {task: [round(v, 5) for v in values] for task, values in history.losses.items()},
        "kept": [round(v, 5) for v in history.kept],
        "largest_class_share": watched,
        "collapsed": [task for task, seen in watched.items() if collapsed(seen["before"], seen["after"])],
        "splits": {task: {split: len(rows) for split, rows in own.splits.rows.items()} for task, own in data.items()},
        "notes": [f"{task}: {text}" for task, own in data.items() for text in own.notes],
    }


def evaluate(
    recipe: Recipe, outputs: Sequence[Path] = (), split: Split = "test", note: Note = lambda text: None
) -> Table:
    """Score base, experts and merged outputs on one split of every task.

    Arguments:
        outputs: folders written by `merge`; a row each.
        split: `test`, or `select` while choosing settings.
    """
    job = open_job(recipe)
    data = load_tasks(job)
    opened = {_row(path, recipe): _open_output(path, job.network) for path in outputs}
    models = build_models(job)
    protocol = "transductive" if recipe.data.protocol == "transductive" else "disjoint"
    table = Table(split, protocol, {task: len(own.splits.rows[split]) for task, own in data.items()})
    if job.base is not None:
        note("Scoring the base")
        table.rows["base"] = score_all(job, models, data, split)
    for name, checkpoint in opened.items():
        note(f"Scoring {name}")
        models.fill((key, checkpoint.read(key)) for key in job.network.tensors)
        table.rows[name] = score_all(job, models, data, split)
    note("Scoring the experts")
    table.rows["experts"] = score_experts(job, models, data, split)
    return table


def score_all(job: Job, models: TaskModels, data: Mapping[str, TaskData], split: Split) -> dict[str, float]:
    """The score of every task with the tensors that the models hold now."""
    return {task: evaluate_task(_family(job), models.modules[task], data[task], split) for task in job.network.tasks}


def score_experts(job: Job, models: TaskModels, data: Mapping[str, TaskData], split: Split) -> dict[str, float]:
    """Each task's score by its own expert. The models hold the last expert's tensors afterwards."""
    scores = {}
    for task in job.network.tasks:
        models.fill(network_tensors(job, task))
        scores[task] = evaluate_task(_family(job), models.modules[task], data[task], split)
    return scores


def _row(path: Path, recipe: Recipe) -> str:
    """A row's name: the output's path, and what it was adapted on if that may be what is scored."""
    file = path / RECORD
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if "adaptation" not in record:
        return str(path)
    if record["adaptation"]["protocol"] == "transductive":
        return f"{path} [transductive]"
    same = record["settings"]["data"] == recipe.data.model_dump()
    return str(path) if same else f"{path} [adapted on other splits, which may hold scored inputs]"


def _open_output(path: Path, network: Network) -> Checkpoint:
    checkpoint = Checkpoint(path)
    lost = [name for name in network.tensors if name not in checkpoint.tensors]
    if lost:
        raise MismatchError(
            f"{path}: lacks {len(lost)} tensor(s) of this recipe's network, such as '{lost[0]}'. Give an output of this recipe's models."
        )
    return checkpoint


def _write_companions(folder: Path, job: Job, masks: MaskFile | None) -> None:
    """Configuration and tokenizer files, each task's head, and the masks."""
    for file in job.root.side_files():
        shutil.copyfile(file, folder / file.name)
    if job.recipe.output_dtype() is not None and (folder / "config.json").exists():
        config = {**job.root.config}
        config["dtype" if "dtype" in config else "torch_dtype"] = job.recipe.out_dtype or job.recipe.dtype
        write_json(folder / "config.json", config)
    for task, names in job.network.heads.items():
        if names:
            target = folder / "heads" / task
            target.mkdir(parents=True)
            metadata = {"backbone": job.network.experts[task].backbone}
            write_tensors(target / "head.safetensors", job.network.head(task), metadata)
            write_json(target / "config.json", job.experts[task].config)
    if masks:
        masks.save(folder / MASKS_FILE)


def _fingerprint(job: Job, record: Mapping[str, Any], data: Mapping[str, TaskData]) -> str:
    """Identifies everything that an adaptation's numbers depend on."""
    choices = {name: choice.action for name, choice in job.network.choices.items()}
    rows = {task: own.fingerprint() for task, own in data.items()}
    settings = {
        **record["settings"],
        "adapt": {k: v for k, v in record["settings"]["adapt"].items() if k != "save_every"},
    }
    text = json.dumps([settings, record["inputs"], record["seed"], record["machine"], choices, rows], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _state_folder(out: Path) -> Path:
    return out.parent / f".{out.name}.state"


def _family(job: Job) -> Any:
    if job.family is None:
        raise RecipeError(
            "The models of this recipe have no tasks. Give each a task with its kind and data to adapt or evaluate."
        )
    return job.family


def _check_disk(job: Job, out: Path) -> None:
    parent = next(p for p in (out.resolve(), *out.resolve().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    needed = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in job.layout().values())
    if needed > free:
        raise OutputError(
            f"{out}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free. Free space or give another path."
        )
