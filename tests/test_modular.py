"""Surgery, WEMoE and Twin-Merging, from recipes to bundles to networks."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adarank
import image_zoo
import text_zoo
from adarank.adapt.history import History
from adarank.cli.main import main
from adarank.data.task import TaskData
from adarank.errors import CheckpointError, Interrupted, RecipeError
from adarank.io.checkpoint import Checkpoint
from adarank.models.head_inputs import head_inputs
from adarank.modular import MODULAR, surgery, wemoe
from adarank.modular.base import settled
from adarank.modular.twin_merging import Router
from adarank.recipe.job import open_job
from adarank.recipe.plan import settings_in_force
from adarank.recipe.reader import load_recipe
from adarank.workflow.context import RecipeContext
from adarank.workflow.evaluate import evaluate
from adarank.workflow.load_tasks import load_tasks
from adarank.workflow.merge import merge
from make import randn

LOOP = {"batch_size": 4, "check_every": 3, "save_every": 2}
TEXT, IMAGE = list(text_zoo.TASKS), list(image_zoo.TASKS)
Zoo = Callable[..., Path]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_zoo.make_zoo(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_zoo.make_zoo(tmp_path_factory.mktemp("images"))


def of(method: str, steps: int = 0, adapt: Mapping[str, Any] | None = None, **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "parameters": parameters,
        "adapt": {**LOOP, "steps": steps, "keep": "last", **(adapt or {})},
    }


def write(zoo: Path, name: str = "recipe.yaml", **changes: Any) -> Path:
    kind = image_zoo if (zoo / "data" / "digits.npz").exists() else text_zoo
    return kind.recipe(zoo, name, **changes)


def made(zoo: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return merge(load_recipe(write(zoo, **changes)), out)


def data_of(zoo: Path) -> dict[str, TaskData]:
    return load_tasks(open_job(load_recipe(write(zoo, "data.yaml"))))


def inputs(data: TaskData, count: int = 6) -> Mapping[str, Tensor]:
    return data.examples.batch(data.splits.rows["test"][:count])


@torch.no_grad()
def logits(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    found: Tensor = module(**batch).logits
    return found


def one(batch: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """One input of a batch, without its padding."""
    length = int(batch["attention_mask"][number].sum()) if "attention_mask" in batch else None
    return {k: v[number : number + 1, :length] if length else v[number : number + 1] for k, v in batch.items()}


def near(first: Tensor, second: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(first, second, rtol=1e-4, atol=atol)


METHODS = {
    "surgery": of("surgery", 4, rank=3, lr=0.01),
    "wemoe": of("wemoe", 4, lr=0.05),
    "twin_merging": of("twin_merging", 4, rank=0.5, lr=0.05),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["text", "images"])
def test_a_recipe_gives_a_bundle_that_serves_every_task(
    method: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """What evaluation scores, what `from_bundle` gives and what the record says are the same networks."""
    zoo: Path = request.getfixturevalue(kind)
    path = write(zoo, **METHODS[method])
    record = merge(load_recipe(path), tmp_path / "out")
    assert record["adaptation"]["steps"] == 4
    assert set(record["bundle"]["tasks"]) == set(data_of(zoo))
    assert record["bundle"]["experts"] > record["bundle"]["one"]
    table = evaluate(load_recipe(path), [tmp_path / "out"])
    (row,) = table.bundles
    for task, data in data_of(zoo).items():
        module = adarank.from_bundle(tmp_path / "out", task)
        rows = data.splits.rows["test"]
        guesses = [int(logits(module, data.examples.batch([r])).argmax()) for r in rows]
        right = sum(a == b for a, b in zip(guesses, data.targets(rows), strict=True))
        assert table.rows[row][task] == pytest.approx(100 * right / len(rows))
        with pytest.raises(CheckpointError, match="more than their weights"):
            adarank.extract(tmp_path / "out", task, tmp_path / "one")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["text", "images"])
def test_a_batch_gives_what_its_inputs_give_alone(
    method: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Neither the other inputs nor padding take part in an input's weights; a copy and a reload change no bit."""
    zoo: Path = request.getfixturevalue(kind)
    made(zoo, tmp_path / "out", **METHODS[method])
    for task, data in data_of(zoo).items():
        module, again = (adarank.from_bundle(tmp_path / "out", task) for _ in range(2))
        batch = inputs(data)
        found = logits(module, batch)
        assert torch.equal(found, logits(again, batch))
        assert torch.equal(found, logits(copy.deepcopy(module), batch))
        for number in range(len(found)):
            near(logits(module, one(batch, number)), found[number : number + 1])


@pytest.mark.parametrize("method", METHODS)
def test_the_bundle_serves_the_networks_that_were_trained(method: str, text: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write(text, **METHODS[method]))
    job = open_job(recipe)
    about = {"settings": settings_in_force(job), "inputs": {}, "seed": 0}
    data = load_tasks(job)
    live = job.method.run(RecipeContext(job, data, about, tmp_path / "state" / "state.pt"))
    merge(recipe, tmp_path / "out")
    for task, own in data.items():
        batch = inputs(own)
        assert torch.equal(
            logits(live.modules[task], batch), logits(adarank.from_bundle(tmp_path / "out", task), batch)
        )


@pytest.mark.parametrize("method", METHODS)
def test_stopped_and_continued_gives_the_same_bytes(method: str, text: Path, tmp_path: Path) -> None:
    path = write(text, **METHODS[method])

    def stop(history: History, steps: int) -> None:
        if history.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="step 3 of 4"):
        merge(load_recipe(path), tmp_path / "out", progress=stop)
    torch.rand(5)
    record = merge(load_recipe(path), tmp_path / "out")
    assert record["adaptation"]["resumed_from"] == [3]
    merge(load_recipe(path), tmp_path / "whole")
    weights = sorted(p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*.safetensors"))
    assert len(weights) == 5  # shared, and of each task: its own parts and its head
    for file in weights:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_knows_the_size(method: str, images: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write(images, **METHODS[method]))
    planned = open_job(recipe).output_bytes()
    merge(recipe, tmp_path / "out")
    files = [tmp_path / "out" / "shared.safetensors", *tmp_path.glob("out/tasks/*/own.safetensors")]
    assert planned == sum(t.numel() * t.element_size() for f in files for t in load_file(f).values())


# Surgery


@pytest.mark.parametrize("start", ["task_arithmetic", "cart", "adamerging", "fisher"])
def test_surgery_before_its_first_step_is_its_start(start: str, text: Path, tmp_path: Path) -> None:
    own: dict[str, Any] = {"merge_method": start}
    if start == "adamerging":
        own["adapt"] = {"steps": 3, "batch_size": 4, "keep": "last"}
    plain = merge(load_recipe(write(text, "start.yaml", **own)), tmp_path / "start")
    record = made(text, tmp_path / "out", **of("surgery", start=own))
    assert record["adaptation"]["start"]["settings"] == plain["settings"]
    for task, data in data_of(text).items():
        batch = inputs(data)
        assert torch.equal(
            logits(adarank.from_bundle(tmp_path / "out", task), batch),
            logits(adarank.load_task(tmp_path / "start", task), batch),
        )


@pytest.mark.parametrize("kind", ["text", "images"])
def test_surgery_brings_representations_nearer_to_the_experts(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """On inputs that it never saw, too, as both are smooth functions of few dimensions here."""
    zoo: Path = request.getfixturevalue(kind)
    made(zoo, tmp_path / "start", merge_method="task_arithmetic")
    record = made(zoo, tmp_path / "out", **of("surgery", 100, {"batch_size": 16, "check_every": 100}, rank=16, lr=0.02))
    assert all(sum(v[-10:]) < 0.7 * sum(v[:10]) for v in record["adaptation"]["losses"].values())
    auto = open_job(load_recipe(write(zoo)))
    for task, data in data_of(zoo).items():
        assert auto.family is not None
        batch = inputs(data, 20)
        found = {}
        for name, module in {
            "expert": auto.family.load(auto.experts[task]),
            "start": adarank.load_task(tmp_path / "start", task),
            "out": adarank.from_bundle(tmp_path / "out", task),
        }.items():
            with head_inputs(module, [module.get_submodule("classifier")]) as seen:
                logits(module, batch)
            found[name] = seen[0]
        assert (found["out"] - found["expert"]).abs().mean() < (found["start"] - found["expert"]).abs().mean()


def test_surgery_keeps_each_tasks_own_best_step(text: Path, tmp_path: Path) -> None:
    """The judged step with the highest agreement, the first of equals; the adapters are those of runs that end there."""
    settings = {"keep": "best", "batch_size": 8, "check_every": 5}
    record = made(text, tmp_path / "out", **of("surgery", 20, settings, lr=0.05))["adaptation"]
    judged = {int(step): own for step, own in record["judged"].items()}
    assert sorted(judged) == [0, 5, 10, 15, 20]
    for task in TEXT:
        best = max(judged, key=lambda step: (judged[step][task]["agreement"], -step))
        assert record["steps_kept"][task] == best
        shorter = of("surgery", best, {**settings, "keep": "last", "schedule": "constant"}, lr=0.05)
        longer = of("surgery", 20, {**settings, "schedule": "constant"}, lr=0.05)
        made(text, tmp_path / f"{task}-short", **shorter)
        kept = made(text, tmp_path / f"{task}-long", **longer)["adaptation"]["steps_kept"][task]
        if kept == best:
            files = [tmp_path / f"{task}-{run}" / "tasks" / task / "own.safetensors" for run in ("short", "long")]
            assert files[0].read_bytes() == files[1].read_bytes()


def test_an_adapter_is_its_formula() -> None:
    adapter = surgery.Adapter(5, 3)
    with torch.no_grad():
        adapter.up.copy_(randn(1, 5, 3))
    z, expert = randn(2, 7, 5), randn(3, 7, 5)
    down, up = (own.detach().numpy() for own in (adapter.down, adapter.up))
    by_hand = z.numpy() - np.maximum(z.numpy() @ down.T, 0) @ up.T
    near(adapter(z), torch.from_numpy(by_hand))
    assert float(surgery.distance(adapter, z, expert)) == pytest.approx(np.abs(by_hand - expert.numpy()).mean(), 1e-5)


def test_surgery_refuses_heads_that_look_at_every_position(tmp_path: Path) -> None:
    zoo = text_zoo.make_zoo(tmp_path, "gpt2")
    with pytest.raises(RecipeError, match="needs one vector"):
        made(zoo, tmp_path / "out", **METHODS["surgery"])


# WEMoE


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


def stir(out: Path, seed: int = 0) -> dict[str, Tensor]:
    """Routers of a WEMoE bundle that decide by the input; returns its shared parts."""
    shared = load_file(out / "shared.safetensors")
    for number, name in enumerate(sorted(shared)):
        if name.split(":")[0] in ("a1", "a2"):
            shared[name] = randn(seed + number, *shared[name].shape) * (0.3 if name.startswith("a2") else 1.0)
    rewrite(out, "shared.safetensors", shared)
    return shared


def rewrite(out: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Replace a file of a bundle, and what its manifest says of it."""
    save_file(dict(tensors), out / name)
    manifest = json.loads((out / "bundle.json").read_text())
    content = (out / name).read_bytes()
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (out / "bundle.json").write_text(json.dumps(manifest))


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
        plain = adarank.load_task(_whole(text, tmp_path, bundle), task)
        found = logits(routed, batch)
        rows = [explicit(plain, out, shared, one(batch, number)) for number in range(len(found))]
        near(found, torch.cat(rows))
        assert (found - logits(plain, batch)).abs().max() > 1e-3  # the routers do something


def _whole(zoo: Path, folder: Path, bundle: Any) -> Path:
    """The network that routers are put on, as a merged output: its MLPs hold the base's weights."""
    target = folder / "whole"
    if not target.exists():
        made(zoo, target, merge_method="task_arithmetic")
        save_file({n: t.clone() for n, t in bundle.tensors(bundle.tasks[0])}, target / "model.safetensors")
    return target


def test_wemoe_keeps_what_the_recipe_keeps_and_learns(text: Path, tmp_path: Path) -> None:
    keep = "encoder.layer.0.output.dense.weight"
    adapt = {"batch_size": 16, "objective": "self-label", "check_every": 60}
    record = made(text, tmp_path / "out", **of("wemoe", 60, adapt, lr=0.02), select={"keep": [keep]})
    own = load_file(tmp_path / "out" / "tasks" / "mood" / "own.safetensors")
    assert f"delta:{keep}" not in own
    losses = record["adaptation"]["losses"]
    assert sum(sum(v[-15:]) for v in losses.values()) < sum(sum(v[:15]) for v in losses.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wemoe_of_half_precision_models_is_exact_and_half_as_large(dtype: torch.dtype, tmp_path: Path) -> None:
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
    router = wemoe.Router(4, 3, 0.3)
    with torch.no_grad():
        router.outer.weight.copy_(randn(1, 3, 4))
    h, mask = randn(2, 2, 5, 4), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    alone = torch.cat([router(h[:1]), router(h[1:, :2])])
    near(router(h, mask), alone)
    near(router(h.reshape(2, 5, 1, 4)), router(h))


# Twin-Merging


@pytest.mark.parametrize(("kind", "tasks"), [("text", TEXT), ("images", IMAGE)])
def test_twin_merging_at_full_rank_and_a_sure_router_is_the_expert(
    kind: str, tasks: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    zoo: Path = request.getfixturevalue(kind)
    out = tmp_path / "out"
    record = made(zoo, out, **of("twin_merging", rank=1.0))
    assert record["adaptation"]["not_routed"] == []
    family = open_job(load_recipe(write(zoo))).family
    assert family is not None
    data = data_of(zoo)
    for number, task in enumerate(tasks):
        shared = load_file(out / "shared.safetensors")
        shared["last.weight:"].zero_()
        shared["last.bias:"] = torch.full((2,), -100.0)
        shared["last.bias:"][number] = 100.0
        rewrite(out, "shared.safetensors", shared)
        batch = inputs(data[task])
        expert = family.load(Checkpoint(zoo / "models" / task))
        near(logits(adarank.from_bundle(out, task), batch), logits(expert, batch))


def test_twin_merging_is_the_network_with_each_inputs_own_weights(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(text, out, **of("twin_merging", 6, rank=0.3, lr=0.05))
    shared = load_file(out / "shared.safetensors")
    own = [load_file(out / "tasks" / task / "own.safetensors") for task in TEXT]
    bundle = adarank.load_bundle(out)
    router = Router(16, 2, 2)
    router.load_state_dict({name: shared[f"{name}:"] for name in router.state_dict()})
    for task, data in data_of(text).items():
        plain = adarank.load_task(_whole(text, tmp_path, bundle), task)
        batch = inputs(data)
        found = logits(bundle.module(task), batch)
        for number in range(len(found)):
            single, merged = one(batch, number), copy.deepcopy(plain)
            with head_inputs(plain, [plain.get_submodule("classifier")]) as seen:
                logits(plain, single)
            weights = router(seen[0]).softmax(dim=-1)[0]
            with torch.no_grad():
                for name, parameter in merged.named_parameters():
                    name = name.removeprefix("bert.")
                    for share, parts in zip(weights, own, strict=True):
                        if f"u:{name}" in parts:
                            parameter += share * (parts[f"u:{name}"] @ parts[f"v:{name}"].T)
                        elif f"delta:{name}" in parts:
                            parameter += share * parts[f"delta:{name}"]
            near(logits(merged, single), found[number : number + 1])


def test_residuals_are_the_best_of_their_rank(text: Path, tmp_path: Path) -> None:
    """Against numpy's SVD of expert minus shared expert."""
    out = tmp_path / "out"
    made(text, out, **of("twin_merging", rank=0.3))
    shared, own = load_file(out / "shared.safetensors"), load_file(out / "tasks" / "mood" / "own.safetensors")
    expert = load_file(text / "models" / "mood" / "model.safetensors")
    names = [key.partition(":")[2] for key in own if key.startswith("u:")]
    assert names
    for name in names:
        residual = (expert[f"bert.{name}"] - shared[f"whole:{name}"]).numpy()
        u, s, v = np.linalg.svd(residual, full_matrices=False)
        k = max(1, int(0.3 * len(s)))
        near(own[f"u:{name}"] @ own[f"v:{name}"].T, torch.from_numpy((u[:, :k] * s[:k]) @ v[:k]))


def test_the_router_learns_to_tell_the_tasks(images: Path, tmp_path: Path) -> None:
    """The tasks' images are noise, but one task's are dark."""
    zoo = tmp_path / "zoo"
    image_zoo.make_zoo(zoo)
    dark = dict(np.load(zoo / "data" / "digits.npz"))
    np.savez(zoo / "data" / "digits.npz", image=dark["image"] // 8, label=dark["label"])
    record = made(zoo, tmp_path / "out", **of("twin_merging", 60, {"batch_size": 16, "check_every": 60}, lr=0.005))
    assert all(share > 0.9 for share in record["adaptation"]["told_by_router"].values())
    assert sum(v[-1] for v in record["adaptation"]["losses"].values()) < 0.5


# Recipes


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (of("surgery", rank=0), "rank"),
        (of("surgery", start={"merge_method": "emr"}), "'emr' gives no single merged model"),
        (of("surgery", start={"merge_method": "multitask"}), "'multitask' gives no single merged model"),
        (of("surgery", start={"merge_method": "cartt"}), "cart"),
        (of("surgery", start={"merge_method": "cart", "adapt": {"steps": 3}}), "start: adapt: 'cart' does not adapt"),
        (of("surgery", start={"merge_method": "adarank", "adapt": {"stepz": 3}}), "stepz"),
        (of("surgery", adapt={"objective": "entropy"}), "objective.*nothing to 'surgery'"),
        (
            of("wemoe", adapt={"step_unit": "mask", "lr_masks": 0.1, "clamp": [0, 1]}),
            "clamp, lr_masks, step_unit.*nothing to 'wemoe'",
        ),
        (of("wemoe", adapt={"objectives": {"moot": "entropy"}}), "unknown task 'moot'"),
        (of("wemoe", adapt={"preset": "roberta-7-ta"}), "preset"),
        (of("twin_merging", rank=1.5), "rank"),
        ({**METHODS["wemoe"], "base_model": None}, "base_model"),
        ({**METHODS["wemoe"], "models": [{"model": "models/mood"}]}, "adapts on its inputs"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(text: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        load_recipe(write(text, **changes))


@pytest.mark.parametrize("name", ["surgery", "wemoe", "twin_merging"])
def test_the_papers_preset_keeps_a_modular_methods_own_steps(name: str) -> None:
    plain, paper = (settled(MODULAR[name], {}, {}, preset)[1] for preset in (None, "paper"))
    assert paper.steps == plain.steps == MODULAR[name].defaults["steps"]
    assert (paper.keep, paper.schedule, paper.betas) == ("last", "constant", (0.9, 0.999))


@pytest.mark.parametrize("method", METHODS)
def test_the_command_line_shows_it(method: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = str(write(text, **METHODS[method])), tmp_path / "out"
    for command in (["plan", path], ["merge", path, str(out)], ["inspect", str(out)], ["evaluate", path, str(out)]):
        assert main(command) == 0
    shown = capsys.readouterr().out
    assert "must know" in shown
    assert "% of the" in shown
    assert "components" not in shown
    assert main(["methods", method]) == 0
    page = capsys.readouterr().out
    assert "unlabelled inputs" in page
    assert "adapt.steps" in page
    assert "lr_masks" not in page
