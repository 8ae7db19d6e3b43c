"""Heads learned on a merged body: what is kept, what is rolled back, and what stays as it is."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adarank
import clip_zoo
import image_zoo
import modular_zoo
import text_zoo
from adarank.adapt import ADAPTIVE, PRESETS
from adarank.adapt.head_functions import HeadExamples
from adarank.adapt.heads import fit_head
from adarank.adapt.presets import with_preset
from adarank.models.predict import predict
from adarank.recipe.reader import load_recipe
from adarank.workflow.load_tasks import load_tasks
from adarank.workflow.plan import plan


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [("body", nn.Linear(8, 16)), ("act", nn.ReLU()), ("head", nn.Linear(16, 4))]
    return nn.Sequential(OrderedDict(layers))


def inputs(seed: int, count: int = 200) -> list[Tensor]:
    return [torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same_head(one: nn.Module, other: nn.Module) -> bool:
    return torch.equal(one.head.weight, other.head.weight) and torch.equal(one.head.bias, other.head.bias)


@pytest.mark.parametrize("held_out", [None, {"a": inputs(2)}])
def test_on_its_experts_body_a_task_keeps_its_head(held_out: Any) -> None:
    base, expert = net(0), net(1)
    modules, heads = adarank.learn_heads(base, {"a": expert}, state(expert), {"a": inputs(3)}, held_out=held_out)
    assert not heads["a"].kept
    assert heads["a"].agreement == (1, 1)
    assert same_head(modules["a"], expert)


@pytest.mark.parametrize("held_out", [None, {"a": inputs(2)}])
def test_a_head_follows_a_body_whose_units_are_exchanged(held_out: Any) -> None:
    """The same head with its columns exchanged says exactly what the expert says: there is nothing left to gain."""
    base, expert, batches = net(0), net(1), {"a": inputs(3, 400)}
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    merged = {
        **state(expert),
        "body.weight": expert.body.weight[order].detach(),
        "body.bias": expert.body.bias[order].detach(),
    }
    modules, heads = adarank.learn_heads(base, {"a": expert}, merged, batches, held_out=held_out)
    fit = heads["a"]
    assert fit.kept
    assert fit.held_out == (held_out is not None)
    assert fit.agreement[0] < 0.8
    assert fit.agreement[1] > 0.95
    new = inputs(5, 300)[0]
    agreement = (modules["a"](new).argmax(1) == expert(new).argmax(1)).double().mean()
    assert agreement > 0.95
    assert torch.equal(modules["a"].body.weight, merged["body.weight"])


def test_a_kept_head_is_learned_from_held_out_inputs_too() -> None:
    """The slope of its formula over all inputs is 0 there, and that over the adapt inputs alone is not."""
    base, expert, body = net(0), net(1), net(1)
    with torch.no_grad():
        body.body.weight.add_(0.3 * torch.randn(16, 8, generator=torch.Generator().manual_seed(5)))
    learned_on, held_out = inputs(3, 120), inputs(4, 80)
    modules, heads = adarank.learn_heads(base, {"a": expert}, state(body), {"a": learned_on}, held_out={"a": held_out})
    assert heads["a"].kept
    head = copy.deepcopy(modules["a"].head).double().requires_grad_()

    @torch.enable_grad()
    def slope(x: Tensor) -> float:
        """The largest entry of ∇ (mean KL + pull · squared distance to the expert's head), by autograd."""
        head.zero_grad()
        with torch.no_grad():
            given, wanted = modules["a"].act(modules["a"].body(x)).double(), expert(x).double().log_softmax(-1)
        divergence = nn.functional.kl_div(head(given).log_softmax(-1), wanted, log_target=True, reduction="batchmean")
        pairs = zip(head.parameters(), expert.head.parameters(), strict=True)
        (divergence + heads["a"].pull * sum((a - b.detach()).square().sum() for a, b in pairs)).backward()
        return max(float(p.grad.abs().max()) for p in head.parameters())

    assert slope(torch.cat([*learned_on, *held_out])) < 1e-4 < 1e-3 < slope(learned_on[0])


def test_a_head_that_agrees_less_is_rolled_back() -> None:
    """The body differs from the expert's on the inputs that are learned from alone."""
    base, expert = net(0), net(1)
    merged = state(expert)
    merged["body.weight"][:, 7] += 5
    unlike, alike = inputs(3)[0], inputs(2)[0]
    alike[:, 7] = 0
    given = (base, {"a": expert}, merged, {"a": [unlike]})
    modules, heads = adarank.learn_heads(*given, held_out={"a": [alike]})
    assert not heads["a"].kept
    assert heads["a"].agreement[0] == 1 > heads["a"].agreement[1]
    assert same_head(modules["a"], expert)
    assert adarank.learn_heads(*given)[1]["a"].kept  # by cross-validation on the others it would be


def test_a_head_is_kept_that_is_nearer_though_no_class_changes() -> None:
    """The body's vectors are half as long, so the expert's head is less sure; one of twice its weights says what it says."""
    base, expert = net(0), net(1)
    nn.init.zeros_(expert.head.bias)
    merged = state(expert)
    merged |= {name: merged[name] / 2 for name in ("body.weight", "body.bias")}
    given = (base, {"a": expert}, merged, {"a": inputs(3, 400)})
    modules, heads = adarank.learn_heads(*given, held_out={"a": inputs(2)})
    assert heads["a"].agreement[0] == 1
    assert heads["a"].kept
    new = inputs(5, 300)[0]
    error = {half: (module(new).softmax(1) - expert(new).softmax(1)).abs().mean() for half, module in
             (("expert's", with_head(expert, merged)), ("learned", modules["a"]))}  # fmt: skip
    assert error["learned"] < error["expert's"] / 4


def with_head(expert: nn.Module, merged: dict[str, Tensor]) -> nn.Module:
    module = net(0)
    module.load_state_dict({**merged, **{name: t for name, t in expert.state_dict().items() if "head" in name}})
    return module


def test_a_nearer_head_that_loses_inputs_is_rolled_back() -> None:
    """The body does not see what makes one input in ten sure. A bias pays for these, and turns the class of half the others."""
    base, expert = (
        nn.Sequential(OrderedDict([("body", nn.Linear(2, 1)), ("head", nn.Linear(1, 2))])) for _ in range(2)
    )
    with torch.no_grad():
        for name, values in {
            "body.weight": [[1, 3]],
            "body.bias": [0],
            "head.weight": [[-1], [1]],
            "head.bias": [0, 0],
        }.items():
            expert.get_parameter(name).copy_(torch.tensor(values))
    merged = {**state(expert), "body.weight": torch.tensor([[1.0, 0.0]])}
    seen = [torch.stack([torch.linspace(-0.1, 0.1, 401), torch.arange(401) % 10 == 0], 1).float() for _ in range(2)]
    modules, heads = adarank.learn_heads(base, {"a": expert}, merged, {"a": seen[:1]}, held_out={"a": seen[1:]})
    assert heads["a"].divergence[1] < heads["a"].divergence[0]
    assert heads["a"].agreement[1] < heads["a"].agreement[0] - 0.1
    assert not heads["a"].kept
    assert same_head(modules["a"], expert)


def linear(head: Any, given: Tensor) -> Tensor:
    return given @ head["weight"].T


def test_a_fitted_head_is_the_minimum_of_its_formula() -> None:
    torch.manual_seed(0)
    start, given, expert = torch.randn(3, 5).double(), torch.randn(60, 5).double(), torch.randn(60, 3).double()
    found = fit_head(linear, {"weight": start}, HeadExamples(given, expert), 0.1)["weight"]
    p, q = (given @ found.T).softmax(1), expert.softmax(1)
    gradient = (p - q).T @ given / 60 + 0.2 * (found - start)  # of the formula, by hand
    assert gradient.abs().max() < 1e-5
    assert (found - start).abs().max() > 0.1


def test_a_large_pull_gives_the_experts_head() -> None:
    torch.manual_seed(0)
    start, examples = torch.randn(3, 5).double(), HeadExamples(torch.randn(60, 5).double(), torch.randn(60, 3).double())
    distances = [
        float((fit_head(linear, {"weight": start}, examples, pull)["weight"] - start).norm())
        for pull in (0.01, 1, 100, 1e8)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-6


@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_learns_heads(preset: str) -> None:
    for kind in ADAPTIVE.values():
        assert with_preset(kind, {}, {}, preset)[1].learn_heads is False
    assert with_preset(ADAPTIVE["adarank"], {}, {}, None)[1].learn_heads == "auto"


@pytest.mark.parametrize(
    ("settings", "learned"),
    [({}, True), ({"learn_heads": False}, False), ({"objective": "entropy"}, False),
     ({"objective": "entropy", "learn_heads": True}, True), ({"objective": "features"}, True), ({"preset": "paper"}, False)],
)  # fmt: skip
def test_heads_are_learned_where_the_objective_has_a_target(settings: dict[str, Any], learned: bool) -> None:
    base, experts = net(0), {"a": net(1), "b": net(2)}
    batches = {task: inputs(3, 40) for task in experts}
    given = {"rank": 0.5, "lambda": 1.0}
    found = adarank.adapt(base, experts, batches, parameters=given, settings={"steps": 2, **settings})
    assert set(found.heads) == (set(experts) if learned else set())
    for task, module in found.modules.items():
        assert same_head(module, experts[task]) != (task in found.heads and found.heads[task].kept)
    plain = adarank.adapt(
        base, experts, batches, parameters=given, settings={"steps": 2, **settings, "learn_heads": False}
    )
    assert all(torch.equal(own, plain.state[name]) for name, own in found.state.items())


def texts(architecture: str) -> Any:
    return lambda folder, **changes: text_zoo.recipe(text_zoo.make_zoo(folder, architecture), **changes)


def with_poolers(folder: Path, **changes: Any) -> Path:
    """Experts with a pooler that the base lacks, so that it is part of their heads."""
    file = text_zoo.make_zoo(folder) / "models" / "base" / "model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if "pooler" not in name}, file, {"format": "pt"})
    return text_zoo.recipe(folder, **changes)


ZOOS = {name: texts(name) for name in ("bert", "roberta", "distilbert", "gpt2")} | {
    "vit": lambda folder, **changes: image_zoo.recipe(image_zoo.make_zoo(folder), **changes),
    "resnet": lambda folder, **changes: image_zoo.recipe(image_zoo.make_zoo(folder, "resnet"), **changes),
    "clip": lambda folder, **changes: clip_zoo.recipe(clip_zoo.make_zoo(folder), **changes),
    "pooler": with_poolers,
}


@pytest.mark.parametrize("zoo", ZOOS)
def test_heads_are_learned_after_any_merge_of_any_family(tmp_path: Path, zoo: str) -> None:
    """The body is that of the merge alone, and so are the heads that are not kept; a kept one is as near as its record says."""
    plain = ZOOS[zoo](tmp_path, merge_method="average", parameters=None)
    adarank.merge_recipe(plain, tmp_path / "plain")
    path = ZOOS[zoo](tmp_path, merge_method="average", parameters=None, heads="learn")
    record = adarank.merge_recipe(path, tmp_path / "out")["learned_heads"]
    assert record["protocol"] == "disjoint"
    body = [load_file(tmp_path / out / "model.safetensors") for out in ("plain", "out")]
    assert body[0].keys() == body[1].keys()
    assert all(torch.equal(tensor, body[1][name]) for name, tensor in body[0].items())
    assert len(record["heads"]) == 2
    for task, fit in record["heads"].items():
        files = [load_file(tmp_path / out / "heads" / task / "head.safetensors") for out in ("plain", "out")]
        assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items()) != fit["kept"]
        assert fit["divergence"][1] < fit["divergence"][0] or not fit["kept"]
    assert adarank.evaluate_recipe(load_recipe(path), [tmp_path / "out"]).rows


BUNDLES: dict[str, dict[str, Any]] = {
    "tsv_c": {"merge_method": "tsv_c", "parameters": {"rank": 0.01}},
    "surgery": modular_zoo.of("surgery", 4),
    "wemoe": modular_zoo.of("wemoe", 4),
    "twin_merging": modular_zoo.of("twin_merging", 4, rank=0.01),
}


def far_experts(folder: Path) -> Path:
    """A zoo whose experts are so far from the base that some head brings something."""
    text_zoo.make_zoo(folder)
    base = load_file(folder / "models" / "base" / "model.safetensors")
    for task in text_zoo.TASKS:
        file = folder / "models" / task / "model.safetensors"
        moved = load_file(file)
        for name, tensor in base.items():
            moved[f"bert.{name}"] = tensor + 8 * (moved[f"bert.{name}"] - tensor)
        save_file(moved, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("method", BUNDLES)
def test_heads_of_a_bundle_are_learned_on_each_tasks_network(tmp_path: Path, method: str) -> None:
    """Its parts are those of the method alone. What the record says of a head is what the bundle's own network does."""
    far_experts(tmp_path)
    adarank.merge_recipe(text_zoo.recipe(tmp_path, **BUNDLES[method]), tmp_path / "plain")
    path = text_zoo.recipe(tmp_path, heads="learn", **BUNDLES[method])
    fits = adarank.merge_recipe(path, tmp_path / "out")["learned_heads"]["heads"]
    job = adarank.open_job(load_recipe(path))
    assert set(fits) == set(text_zoo.TASKS)
    assert any(fit["kept"] for fit in fits.values())
    for file in ("shared.safetensors", *(f"tasks/{task}/own.safetensors" for task in fits)):
        parts = [load_file(tmp_path / out / file) for out in ("plain", "out")]
        assert all(torch.equal(tensor, parts[1][name]) for name, tensor in parts[0].items())
    for task, data in load_tasks(job).items():
        expert = predict(job.family, job.family.load(job.experts[task]), data, "select")[1].argmax(1)
        agreement = [
            float((predict(job.family, adarank.from_bundle(tmp_path / out, task), data, "select")[1].argmax(1) == expert).double().mean())
            for out in ("plain", "out")
        ]  # fmt: skip
        assert agreement == pytest.approx(
            [fits[task]["agreement"][0], fits[task]["agreement"][fits[task]["kept"]]], abs=1e-4
        )


def test_a_bundle_is_scored_with_its_own_heads(tmp_path: Path) -> None:
    text_zoo.make_zoo(tmp_path)
    path = text_zoo.recipe(tmp_path, heads="learn", merge_method="emr")
    adarank.merge_recipe(path, tmp_path / "out")
    rows, job = adarank.evaluate_recipe(path, [tmp_path / "out"]).rows, adarank.open_job(load_recipe(path))
    for task, data in load_tasks(job).items():
        numbers, logits = predict(job.family, adarank.from_bundle(tmp_path / "out", task), data, "test")
        right = logits.argmax(1) == torch.tensor(data.targets(numbers))
        assert rows[str(tmp_path / "out")][task] == pytest.approx(100 * float(right.double().mean()))
    assert rows["experts"] == adarank.evaluate_recipe(path).rows["experts"]


def test_a_plan_counts_what_learning_heads_holds(tmp_path: Path) -> None:
    """All that is written, and the networks."""
    text_zoo.make_zoo(tmp_path)
    for method in ("average", "emr"):
        plain = plan(text_zoo.recipe(tmp_path, merge_method=method))
        learned = plan(text_zoo.recipe(tmp_path, merge_method=method, heads="learn"))
        body = sum(torch.Size(tensor["shape"]).numel() for tensor in plain["tensors"].values())
        assert learned["peak_bytes"] >= plain["peak_bytes"] + plain["output_bytes"] + 4 * body
        assert learned["splits"]["mood"]["adapt"] > 0


class Pooled(nn.Module):
    """A head of two layers, which the network's own code joins."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.pooler, self.classifier = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(nn.Tanh()(self.pooler(torch.relu(self.body(x)))))


@pytest.mark.parametrize(("count", "layers"), [(4, ("classifier",)), (400, ("classifier", "pooler"))])
def test_a_head_of_two_layers_is_learned_whole_or_not(count: int, layers: tuple[str, ...]) -> None:
    """On a body whose units are exchanged only both together can say what the expert says; a few inputs do for the last alone."""
    torch.manual_seed(0)
    base, expert, order = Pooled(), Pooled(), torch.randperm(16)
    with torch.no_grad():
        expert.pooler.weight *= 4
        expert.classifier.weight *= 8
    merged = state(expert)
    merged |= {name: merged[name][order] for name in ("body.weight", "body.bias")}
    select, held_out = adarank.Select(head=("pooler.*", "classifier.*")), {"a": inputs(2)}
    given = (base, {"a": expert}, merged, {"a": inputs(3, count)})
    modules, heads = adarank.learn_heads(*given, select=select, held_out=held_out)
    learned = {name for name, tensor in modules["a"].state_dict().items() if not torch.equal(tensor, merged[name])}
    assert learned == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    assert heads["a"].layers == len(layers)
    assert heads["a"].agreement[1] > (0.95 if count > 4 else heads["a"].agreement[0])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"merge_method": "adarank"}, "heads: 'adarank' adapts, and learns heads as adapt: learn_heads says"),
        ({"merge_method": "multitask"}, "heads: 'multitask' writes heads of its own"),
        ({"merge_method": "average", "models": [{"model": "models/mood"}, {"model": "models/colour"}]},
         "models: 'mood' has no task with data, and heads: learn reads its inputs"),
    ],
)  # fmt: skip
def test_heads_that_cannot_be_learned_are_refused_at_once(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(adarank.AdaRankError, match=text):
        load_recipe(text_zoo.recipe(tmp_path, heads="learn", **changes))


class Inside(nn.Module):
    """A network that goes on after its head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.after = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.relu(self.head(self.body(x))))


def test_a_head_inside_a_network_is_refused_if_to_be_learned() -> None:
    torch.manual_seed(0)
    base, experts = Inside(), {"a": Inside()}
    select = adarank.Select(head=("head.*",))
    with pytest.raises(adarank.AdaRankError, match="task 'a': its head cannot be learned"):
        adarank.adapt(base, experts, {"a": inputs(1)}, settings={"steps": 1, "learn_heads": True}, select=select)
    assert not adarank.adapt(base, experts, {"a": inputs(1)}, settings={"steps": 1}, select=select).heads
