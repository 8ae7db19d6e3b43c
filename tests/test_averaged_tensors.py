"""`select: average`: a tensor is the experts' plain mean, whatever merges, adapts or trains the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adarank
import text_zoo
from adarank.adapt import AdaptSettings
from adarank.cli.main import main
from adarank.recipe.reader import load_recipe
from make import family, identical

AVERAGED = "layer.0.*"


def mean_of(states: list[dict[str, Tensor]], name: str) -> Tensor:
    return torch.stack([state[name].double() for state in states]).mean(0)


@pytest.mark.parametrize("method", ["task_arithmetic", "cart", "tsv_m", "ties_merging", "wudi", "average"])
def test_averaged_tensors_are_the_mean_and_others_unchanged(method: str) -> None:
    base, experts = family(3)
    merged = adarank.merge(base, experts, method, select=adarank.Select(average=AVERAGED))
    kept = adarank.merge(base, experts, method, select=adarank.Select(keep=AVERAGED))
    for name, tensor in merged.items():
        if name.startswith("layer.0."):
            torch.testing.assert_close(tensor.double(), mean_of(list(experts.values()), name), rtol=1e-6, atol=1e-6)
        else:
            assert identical(tensor, kept[name])


@pytest.mark.parametrize("mask", ["soft", "binary"])
def test_adaptation_runs_on_the_mean_and_learns_nothing_of_it(problem: Any, mask: str) -> None:
    base, experts, batches = problem
    settings = AdaptSettings(steps=5, keep="last", learn_heads=False)
    select = adarank.Select(average="bias")
    adapted = adarank.adapt(base, experts, batches, settings=settings, parameters={"mask": mask}, select=select)
    mean = mean_of([expert.state_dict() for expert in experts.values()], "bias").float()
    torch.testing.assert_close(adapted.state["bias"], mean)
    assert set(adapted.masks.lam) == {"weight"}
    for module in adapted.modules.values():
        torch.testing.assert_close(module.bias.detach(), mean)
        torch.testing.assert_close(module.weight.detach(), adapted.state["weight"])


@pytest.mark.parametrize("changes", [
    {"merge_method": "emr"},
    {"merge_method": "surgery", "adapt": {"steps": 2, "check_every": 1}},
    {"merge_method": "multitask", "parameters": {"steps": 2}},
    {"merge_method": "regmean++", "parameters": {"examples": 4}},
    {"merge_method": "adarank", "adapt": {"steps": 2, "check_every": 1}},
])  # fmt: skip
def test_every_kind_of_output_has_the_mean(text: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    select = {"average": ["encoder.layer.0.*", "embeddings.word_embeddings.*"]}
    path = text_zoo.recipe(text, f"{changes['merge_method']}-averaged.yaml", **changes, select=select)
    adarank.merge_recipe(load_recipe(path), tmp_path / "out")
    bundle = changes["merge_method"] in ("emr", "surgery")
    load = adarank.from_bundle if bundle else adarank.load_task
    experts = [load(tmp_path / "out", task) for task in text_zoo.TASKS]
    states = [load_file(text / "models" / task / "model.safetensors") for task in text_zoo.TASKS]
    checked = 0
    for module in experts:
        parameters = dict(module.named_parameters())
        for name in states[0]:
            inner = name.partition(".")[2]
            if inner.startswith(("encoder.layer.0.", "embeddings.word_embeddings.")):
                wanted = mean_of(states, name)
                key = next(key for key in parameters if key.endswith(inner) and parameters[key].shape == wanted.shape)
                torch.testing.assert_close(parameters[key].detach().double(), wanted, rtol=1e-5, atol=1e-6)
                checked += 1
    assert checked == 17 * len(text_zoo.TASKS)  # weights and biases of six linear layers and two norms, and the table


def test_a_plan_counts_them(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = text_zoo.recipe(
        text, "planned.yaml", merge_method="cart", select={"average": "embeddings.word_embeddings.*"}
    )
    assert main(["plan", str(path)]) == 0
    assert "1 tensors averaged" in capsys.readouterr().out


def test_experts_of_other_shapes_cannot_be_averaged() -> None:
    base, a, b = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(4, 2)
    with pytest.raises(adarank.AdaRankError, match="weight"):
        adarank.merge(base, {"a": a, "b": b}, "cart", select=adarank.Select(average="weight"))
