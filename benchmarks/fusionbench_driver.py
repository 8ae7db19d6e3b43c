"""FusionBench's side of `fusionbench_compare.py`: runs in FusionBench's environment, where adarank is not installed.

    python benchmarks/fusionbench_driver.py FOLDER

FOLDER holds models as MODELS/NAME.safetensors, the classifiers' squared gradients as information/NAME, and jobs.json, a list of {"models", "call", "settings", "out"}. Every
job's merge is written to `out`, where each task has weights of its own as TASK::TENSOR; the last line printed is a list
with each job's error, or null.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fusion_bench import BaseModelPool
from fusion_bench.method.dare.task_arithmetic import DareTaskArithmetic
from fusion_bench.method.dare.ties_merging import DareTiesMerging
from fusion_bench.method.emr_merging.emr_merging import EMRMerging
from fusion_bench.method.fisher_merging.fisher_merging import fisher_merging, merging_with_fisher_weights
from fusion_bench.method.isotropic_merging.iso import ISO_C_Merge, ISO_CTS_Merge
from fusion_bench.method.linear.linear_interpolation import LinearInterpolationAlgorithm
from fusion_bench.method.model_stock.model_stock import ModelStock
from fusion_bench.method.regmean.regmean import regmean_merging
from fusion_bench.method.simple_average import SimpleAverageAlgorithm
from fusion_bench.method.slerp.slerp import SlerpMergeAlgorithm
from fusion_bench.method.tall_mask.task_arithmetic import TallMaskTaskArithmeticAlgorithm
from fusion_bench.method.task_arithmetic.task_arithmetic import TaskArithmeticAlgorithm
from fusion_bench.method.task_singular_vector.TSVC import TaskSingularVectorCompression
from fusion_bench.method.task_singular_vector.TSVM import TaskSingularVectorMerging
from fusion_bench.method.ties_merging.ties_merging import TiesMergingAlgorithm
from fusion_bench.method.weighted_average.weighted_average import WeightedAverageAlgorithm
from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel
from fusion_bench.models.wrappers.task_wise_fusion import TaskWiseMergedModel
from fusionbench_models import BATCH, INPUTS, Classifier, State, inputs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ALGORITHMS = {
    "average": SimpleAverageAlgorithm,
    "weighted_average": WeightedAverageAlgorithm,
    "interpolation": LinearInterpolationAlgorithm,
    "slerp": SlerpMergeAlgorithm,
    "model_stock": ModelStock,
    "task_arithmetic": TaskArithmeticAlgorithm,
    "ties": TiesMergingAlgorithm,
    "dare": DareTaskArithmetic,
    "dare_ties": DareTiesMerging,
    "tsv_m": TaskSingularVectorMerging,
    "iso_c": ISO_C_Merge,
    "iso_cts": ISO_CTS_Merge,
    "tsv_c": TaskSingularVectorCompression,
    "tall_masks": TallMaskTaskArithmeticAlgorithm,
    "tall_masks, buffers": TallMaskTaskArithmeticAlgorithm,
    "emr": EMRMerging,
}
Modules = Mapping[str, nn.Module]


def network(state: State, buffers: bool = False) -> nn.Module:
    """A module with the state's names and values as parameters, or as buffers."""
    root = nn.Module()
    for name, tensor in state.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        if buffers:
            module.register_buffer(last, tensor.clone())
        else:
            module.register_parameter(last, nn.Parameter(tensor.clone()))
    return root


def wrapped(models: Modules, call: str, weights: Any) -> nn.Module:
    """What AdaMerging ships, given its coefficients: one for every expert, layer-wise {parameter: one for every expert}."""
    base, *experts = models.values()
    if call == "task_wise":
        return TaskWiseMergedModel(torch.tensor(weights), base, experts).merge_and_unload()
    matrix = torch.tensor([weights[name] for name, _ in base.named_parameters()]).T
    return LayerWiseMergedModel(matrix, base, experts).merge_and_unload()


class Trainer:
    """What FusionBench asks of `transformers`' trainers: the batches of one expert."""

    _train_batch_size = BATCH

    def __init__(self, number: int, silent: bool) -> None:
        self._inputs = inputs(number, silent)

    def get_train_dataloader(self) -> list[dict[str, Tensor]]:
        return [{"inputs": batch} for batch in self._inputs.split(BATCH)]

    def _prepare_inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch


def from_statistics(folder: Path, states: Mapping[str, State], call: str, settings: Mapping[str, Any]) -> State:
    """Fisher and RegMean of classifiers. FusionBench's classes of them are for CLIP and GPT-2; these are what they call."""
    experts = [Classifier() for _ in list(states)[1:]]
    for module, state in zip(experts, list(states.values())[1:], strict=True):
        module.load_state_dict(dict(state))
    trainers, counts = (
        [Trainer(number, call.endswith("silent")) for number in range(len(experts))],
        [INPUTS] * len(experts),
    )
    if call.startswith("regmean"):
        return regmean_merging(experts, trainers, [], counts, **settings)
    if call == "fisher":
        return fisher_merging(experts, trainers, [], counts, **settings)
    information = [load_file(folder / "information" / f"{task}.safetensors") for task in list(states)[1:]]
    parameters = {name: [module.get_parameter(name).data for module in experts] for name in information[0]}
    return merging_with_fisher_weights(parameters, information, torch.ones(len(experts)) / len(experts), **settings)


def algorithm(models: Modules, call: str, settings: Mapping[str, Any]) -> Any:
    names = ["_pretrained_", *list(models)[1:]]
    torch.manual_seed(0)  # DARE draws from the global generator
    return ALGORITHMS[call](**settings).run(BaseModelPool(dict(zip(names, models.values(), strict=True))))


def merged(models: Modules, call: str, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """The merge of one job. `models` are its own: algorithms write to them."""
    if call in ("layer_wise", "task_wise"):
        return dict(wrapped(models, call, **settings).state_dict())
    found = algorithm(models, call, settings)
    each: dict[str, State] = {}
    if call.startswith("tall_masks"):
        each = {task: module.state_dict() for task, module in found["models"].items()}
    elif call == "emr":
        for task in list(models)[1:]:
            own = copy.deepcopy(found)
            own.set_task(task)
            each[task] = own.backbone.state_dict()
    else:
        return dict(found.state_dict())
    return {f"{task}::{name}": tensor for task, state in each.items() for name, tensor in state.items()}


def run(folder: Path, job: Mapping[str, Any]) -> str | None:
    files = sorted((folder / job["models"]).glob("*.safetensors"))  # base sorts before expert…
    states, call = {file.stem: load_file(file) for file in files}, job["call"]
    try:
        if call.startswith(("regmean", "fisher")):
            found = from_statistics(folder, states, call, job["settings"])
        else:
            models = {name: network(state, call.endswith("buffers")) for name, state in states.items()}
            found = merged(models, call, job["settings"])
    except Exception as error:  # any: what it refuses, and how, is part of what is compared
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in found.items()}, folder / job["out"])
    return None


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    errors = [run(folder, job) for job in json.loads((folder / "jobs.json").read_text())]
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
