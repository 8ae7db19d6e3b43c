"""WEMoE: the bundle is the network with each input's own MLPs, for every architecture that has them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adarank
import image_zoo
import text_zoo
from adarank.errors import RecipeError
from adarank.modular import wemoe
from adarank.recipe.job import open_job
from adarank.recipe.plan import settings_in_force
from adarank.recipe.reader import load_recipe
from adarank.workflow.context import RecipeContext
from adarank.workflow.load_tasks import load_tasks
from make import randn
from modular_zoo import METHODS, TEXT, data_of, inputs, logits, made, near, of, one, stir, whole, write


@pytest.mark.parametrize("kind", ["text", "images"])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_wemoe_starts_as_task_arithmetic(
    kind: str, scale: float | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    zoo: Path = request.getfixturevalue(kind)
    parameters = {} if scale is None else {"lambda": scale}
    made(zoo, tmp_path / "plain", merge_method="task_arithmetic", parameters={"lambda": 0.3, **parameters})
    made(zoo, tmp_path / "out", **of("wemoe", **parameters))
    for task, data in data_of(zoo).items():
        batch = inputs(data)
        near(logits(adarank.from_bundle(tmp_path / "out", task), batch), logits(adarank.load_task(tmp_path / "plain", task), batch))  # fmt: skip


def explicit(plain: nn.Module, out: Path, shared: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    """WEMoE of one input by hand: block by block the MLP's input is looked at, and the MLP's own weights are set."""
    module = copy.deepcopy(plain)
    parameters = dict(module.named_parameters())
    own = [load_file(f) for f in sorted((out / "tasks").glob("*/own.safetensors"), key=lambda f: TEXT.index(f.parent.name))]  # fmt: skip
    firsts = [name.partition(":")[2] for name in shared if name.startswith("a1:")]
    for first in sorted(firsts):
        layer = module.get_submodule("bert." + first.removesuffix(".weight"))
        seen: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        logits(module, batch)
        handle.remove()
        h = seen[0][0]
        a1, b1, a2, b2 = (shared[f"{part}:{first}"] for part in ("a1", "b1", "a2", "b2"))
        weights = (torch.relu(h @ a1.T + b1) @ a2.T + b2).mean(dim=0)
        stem = first.removesuffix("intermediate.dense.weight")
        with torch.no_grad():
            for name in (f"{stem}{layer}.dense.{leaf}" for layer in ("intermediate", "output") for leaf in ("weight", "bias")):  # fmt: skip
                deltas = torch.stack([parts[f"delta:{name}"] for parts in own])
                parameters[f"bert.{name}"] += torch.einsum("t,t...->...", weights, deltas)
    return logits(module, batch)


def test_wemoe_is_the_network_with_each_inputs_own_mlps(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(text, out, **of("wemoe"))
    shared = stir(out)
    bundle = adarank.load_bundle(out)
    for task, data in data_of(text).items():
        routed, batch = bundle.module(task), inputs(data)
        plain = adarank.load_task(whole(text, tmp_path, bundle), task)
        found = logits(routed, batch)
        rows = [explicit(plain, out, shared, one(batch, number)) for number in range(len(found))]
        near(found, torch.cat(rows))
        assert (found - logits(plain, batch)).abs().max() > 1e-3  # the routers do something


def test_wemoe_keeps_what_the_recipe_keeps_and_learns(text: Path, tmp_path: Path) -> None:
    keep = "encoder.layer.0.output.dense.weight"
    adapt = {"batch_size": 16, "objective": "self-label", "check_every": 60}
    record = made(text, tmp_path / "out", **of("wemoe", 60, adapt, lr=0.02), select={"keep": [keep]})
    own = load_file(tmp_path / "out" / "tasks" / "mood" / "own.safetensors")
    assert f"delta:{keep}" not in own
    losses = record["adaptation"]["losses"]
    assert sum(sum(v[-15:]) for v in losses.values()) < sum(sum(v[:15]) for v in losses.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wemoe_of_half_precision_is_exact_and_half_as_large(dtype: torch.dtype, tmp_path: Path) -> None:
    zoo = text_zoo.make_zoo(tmp_path / "zoo", dtype=dtype)
    made(zoo, tmp_path / "out", **of("wemoe", 3, lr=0.05))
    own = load_file(tmp_path / "out" / "tasks" / "mood" / "own.safetensors")
    expert = load_file(zoo / "models" / "mood" / "model.safetensors")
    assert own
    for key, tensor in own.items():
        part, _, name = key.partition(":")
        assert part == "expert"
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expert[f"bert.{name}"])
    recipe = load_recipe(write(zoo, **of("wemoe", 3, lr=0.05)))
    job = open_job(recipe)
    about = {"settings": settings_in_force(job), "inputs": {}, "seed": 0}
    data = load_tasks(job)
    live = job.method.run(RecipeContext(job, data, about, tmp_path / "s" / "state.pt"))
    for task, inside in data.items():
        batch = inputs(inside)
        served = logits(adarank.from_bundle(tmp_path / "out", task), batch)
        near(served, logits(live.modules[task], batch), atol=5e-3)  # the rest is rounded to the models' dtype


def test_wemoe_by_entropy_as_in_the_paper(text: Path, tmp_path: Path) -> None:
    record = made(text, tmp_path / "out", merge_method="wemoe", adapt={"preset": "paper", "steps": 2, "batch_size": 4})
    assert record["settings"]["adapt"]["objective"] == "entropy"
    assert record["settings"]["adapt"]["keep"] == "last"
    assert record["settings"]["parameters"]["lr"] == 1e-4
    assert "head" in record["adaptation"]["known_in_use"]


def test_wemoe_refuses_networks_without_known_mlps(tmp_path: Path) -> None:
    zoo = image_zoo.make_zoo(tmp_path, "resnet")
    with pytest.raises(RecipeError, match=r"found no MLP.*intermediate\.dense with output\.dense.*mlps"):
        made(zoo, tmp_path / "out", **METHODS["wemoe"])


@pytest.mark.parametrize("architecture", ["roberta", "distilbert", "gpt2"])
def test_text_architectures_route(architecture: str, tmp_path: Path) -> None:
    serves(text_zoo.make_zoo(tmp_path, architecture), tmp_path)


@pytest.mark.parametrize("architecture", ["dinov2", "swin", "convnext"])
def test_image_architectures_route(architecture: str, tmp_path: Path) -> None:
    serves(image_zoo.make_zoo(tmp_path, architecture), tmp_path)


def serves(zoo: Path, folder: Path) -> None:
    """WEMoE and Twin-Merging are made, and a batch gives what its inputs give alone."""
    for method in ("wemoe", "twin_merging"):
        made(zoo, folder / method, **METHODS[method])
        for task, data in data_of(zoo).items():
            module, batch = adarank.from_bundle(folder / method, task), inputs(data, 4)
            found = logits(module, batch)
            for number in range(len(found)):
                near(logits(module, one(batch, number)), found[number : number + 1])


def test_routers_average_over_positions_that_are_no_padding() -> None:
    router = wemoe.MLPRouter(4, 3, 0.3)
    with torch.no_grad():
        router.outer.weight.copy_(randn(1, 3, 4))
    h, mask = randn(2, 2, 5, 4), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    alone = torch.cat([router(h[:1]), router(h[1:, :2])])
    near(router(h, mask), alone)
    near(router(h.reshape(2, 5, 1, 4)), router(h))
