"""Surgery, WEMoE and Twin-Merging, from recipes to bundles to networks."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import adarank
import image_zoo
import text_zoo
from adarank.adapt.history import History
from adarank.errors import CheckpointError, Interrupted, RecipeError
from adarank.io.checkpoint import Checkpoint
from adarank.models.head_inputs import head_inputs
from adarank.modular import surgery
from adarank.modular.twin_merging import Router
from adarank.recipe.job import open_job
from adarank.recipe.plan import settings_in_force
from adarank.recipe.reader import load_recipe
from adarank.workflow.context import RecipeContext
from adarank.workflow.evaluate import evaluate
from adarank.workflow.load_tasks import load_tasks
from adarank.workflow.merge import merge
from make import randn
from modular_zoo import IMAGE, METHODS, TEXT, data_of, inputs, logits, made, near, of, one, rewrite, whole, write


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


# Surgery


@pytest.mark.parametrize("start", ["task_arithmetic", "cart", "adamerging", "fisher"])
def test_surgery_before_its_first_step_is_its_start(start: str, text: Path, tmp_path: Path) -> None:
    own: dict[str, Any] = {"merge_method": start}
    if start == "adamerging":
        own["adapt"] = {
            "steps": 3,
            "batch_size": 4,
            "keep": "last",
            "learn_heads": False,
        }  # of a start the body is used
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


# Twin-Merging


@pytest.mark.parametrize(("kind", "tasks"), [("text", TEXT), ("images", IMAGE)])
def test_twin_merging_of_full_rank_and_sure_router_is_exact(
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


def test_twin_merging_is_the_network_with_each_inputs_weights(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(text, out, **of("twin_merging", 6, rank=0.3, lr=0.05))
    shared = load_file(out / "shared.safetensors")
    own = [load_file(out / "tasks" / task / "own.safetensors") for task in TEXT]
    bundle = adarank.load_bundle(out)
    router = Router(16, 2, 2)
    router.load_state_dict({name: shared[f"{name}:"] for name in router.state_dict()})
    for task, data in data_of(text).items():
        plain = adarank.load_task(whole(text, tmp_path, bundle), task)
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
