"""FusionBench's side of `fusionbench_compare.py`: runs in FusionBench's environment, where adarank is not installed.

    python benchmarks/fusionbench_driver.py FOLDER

FOLDER holds models as SETTING/NAME.safetensors and jobs.json, a list of {"models", "call", "settings", "out"}. Every
job's merge is written to `out`; the last line printed is a list with each job's error, or null.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fusion_bench import BaseModelPool
from fusion_bench.method.dare.task_arithmetic import DareTaskArithmetic
from fusion_bench.method.dare.ties_merging import DareTiesMerging
from fusion_bench.method.isotropic_merging.iso import ISO_C_Merge, ISO_CTS_Merge
from fusion_bench.method.linear.linear_interpolation import LinearInterpolationAlgorithm
from fusion_bench.method.model_stock.model_stock import ModelStock
from fusion_bench.method.simple_average import SimpleAverageAlgorithm
from fusion_bench.method.slerp.slerp import SlerpMergeAlgorithm
from fusion_bench.method.task_arithmetic.task_arithmetic import TaskArithmeticAlgorithm
from fusion_bench.method.task_singular_vector.TSVM import TaskSingularVectorMerging
from fusion_bench.method.ties_merging.ties_merging import TiesMergingAlgorithm
from fusion_bench.method.weighted_average.weighted_average import WeightedAverageAlgorithm
from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel
from fusion_bench.models.wrappers.task_wise_fusion import TaskWiseMergedModel
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
}


def network(state: Mapping[str, Tensor]) -> nn.Module:
    """A module with the state's names and values as parameters."""
    root = nn.Module()
    for name, tensor in state.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, nn.Parameter(tensor.clone()))
    return root


def layer_wise(base: nn.Module, experts: list[nn.Module], weights: Mapping[str, list[float]]) -> nn.Module:
    """What layer-wise AdaMerging ships, given its coefficients: parameter -> one for every expert."""
    matrix = torch.tensor([weights[name] for name, _ in base.named_parameters()]).T
    return LayerWiseMergedModel(matrix, base, experts).merge_and_unload()


def task_wise(base: nn.Module, experts: list[nn.Module], weights: list[float]) -> nn.Module:
    return TaskWiseMergedModel(torch.tensor(weights), base, experts).merge_and_unload()


def merged(models: Mapping[str, nn.Module], call: str, settings: Mapping[str, Any]) -> nn.Module:
    """The merge of one job. `models` are its own: algorithms write to them."""
    if call in ("layer_wise", "task_wise"):
        base, *experts = models.values()
        return (layer_wise if call == "layer_wise" else task_wise)(base, experts, **settings)
    names = ["_pretrained_", *list(models)[1:]]
    torch.manual_seed(0)  # DARE draws from the global generator
    return ALGORITHMS[call](**settings).run(BaseModelPool(dict(zip(names, models.values(), strict=True))))


def run(folder: Path, job: Mapping[str, Any]) -> str | None:
    files = sorted((folder / job["models"]).glob("*.safetensors"))  # base sorts before expert…
    models = {file.stem: network(load_file(file)) for file in files}
    try:
        found = merged(models, job["call"], job["settings"])
    except Exception as error:  # any: what it refuses, and how, is part of what is compared
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    save_file(
        {name: tensor.detach().contiguous().clone() for name, tensor in found.state_dict().items()}, folder / job["out"]
    )
    return None


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    errors = [run(folder, job) for job in json.loads((folder / "jobs.json").read_text())]
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
