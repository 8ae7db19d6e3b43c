"""ProDistill, SyMerge and SAMerging: what they start from, what their steps are, and what means nothing to them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adarank
import text_zoo
from adarank.adapt import Learn, LiveWeights
from adarank.adapt.element_weights import ElementWeights
from adarank.adapt.objectives import trusted_label
from adarank.cli.main import main
from adarank.errors import RecipeError
from adarank.method import Given
from adarank.recipe.reader import load_recipe
from adarank.recipe.registry import METHODS
from adarank.spectral.blocks import scaled_block
from make import randn

FAST = {"steps": 20, "learn_heads": False}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.classifier = nn.Linear(6, 3)

    def forward(self, given: Tensor) -> Tensor:
        for layer in self.layers:
            given = torch.tanh(layer(given))
        logits: Tensor = self.classifier(given)
        return logits


def models(tasks: str) -> tuple[Net, dict[str, nn.Module]]:
    torch.manual_seed(0)
    base, experts = Net(), {}
    for task in tasks:
        experts[task] = Net()
        experts[task].load_state_dict({name: t + 0.5 * torch.randn_like(t) for name, t in base.state_dict().items()})
    return base, experts


def adapted(tasks: str, method: str, parameters: Mapping[str, Any], settings: Mapping[str, Any]) -> adarank.Adapted:
    base, experts = models(tasks)
    batches = {task: [randn(10 * place + i, 16, 6) for i in range(4)] for place, task in enumerate(tasks)}
    heads = adarank.Select(head=("classifier.*",))
    return adarank.adapt(base, experts, batches, method, parameters, settings, select=heads)


@pytest.mark.parametrize(("method", "scale"), [("prodistill", 0.3), ("symerge", 0.3), ("samerging", 0.0)])
def test_zero_steps_are_task_arithmetic(method: str, scale: float) -> None:
    still = {"steps": 0} if method == "symerge" else {**FAST, "steps": 0}
    base, experts = models("ab")
    arithmetic = adarank.merge(
        base, experts, "task_arithmetic", {"lambda": scale}, adarank.Select(head=("classifier.*",))
    )
    result = adapted("ab", method, {}, still)
    assert len(result.state) == 4
    for name, tensor in result.state.items():
        torch.testing.assert_close(tensor, arithmetic[name], atol=1e-6, rtol=1e-6)
    for task, expert in experts.items():
        assert torch.equal(
            result.modules[task].get_parameter("classifier.weight"), expert.get_parameter("classifier.weight")
        )


def test_one_expert_is_kept_by_prodistill_and_recovered() -> None:
    expert = models("a")[1]["a"].state_dict()
    kept = adapted("a", "prodistill", {"lambda": 1.0}, FAST)
    half, start = (adapted("a", "prodistill", {"lambda": 0.5}, {**FAST, "steps": steps}) for steps in (200, 0))
    assert kept.masks is None
    for name, tensor in kept.state.items():
        torch.testing.assert_close(tensor, expert[name], atol=1e-5, rtol=1e-5)
        before, after = (float((state[name] - expert[name]).norm()) for state in (start.state, half.state))
        assert after < before / 2, name


def test_the_gradient_of_every_entry_is_that_of_autograd() -> None:
    origin, deltas = randn(1, 4, 5), {task: randn(place, 4, 5) for place, task in ((2, "a"), (3, "b"))}
    weight = nn.Parameter(origin.clone())
    live = ElementWeights({"weight": weight}, {"weight": scaled_block(origin, deltas)}, 0.7)
    live.write()
    (weight.square().sum() + weight.exp().sum()).backward()
    live.pull_back()
    coefficients = torch.full((2, 4, 5), 0.7, dtype=torch.float64, requires_grad=True)
    moved = origin.double() + sum(
        (coefficients[place] * delta.double() for place, delta in enumerate(deltas.values())), torch.zeros(())
    )
    (moved.square().sum() + moved.exp().sum()).backward()
    torch.testing.assert_close(live.coefficients["weight"].grad.double(), coefficients.grad)  # type: ignore[union-attr]


def test_symerge_learns_heads_and_lambda_within_its_range() -> None:
    result, experts = (
        adapted("ab", "symerge", {"lr_heads": 0.05}, {"steps": 60, "lr_lambda": 0.03, "keep": "last"}),
        models("ab")[1],
    )
    lam = torch.stack(list(result.masks.lam.values()))  # type: ignore[union-attr]
    assert float(lam.min()) >= 0
    assert float(lam.max()) <= 1
    assert len(lam.unique()) > 4
    for task, expert in experts.items():
        moved = result.modules[task].get_parameter("classifier.weight") - expert.get_parameter("classifier.weight")
        assert float(moved.detach().abs().max()) > 0.01


def test_symerge_takes_heads_back_with_its_steps() -> None:
    away = {"steps": 5, "lr_lambda": 50.0, "schedule": "constant", "tolerance": 0}
    result = adapted("ab", "symerge", {"lr_heads": 50.0, "lambda": 0.5, "clamp": None}, away)
    assert result.history.choice is not None
    assert result.history.choice.rolled_back
    for task, expert in models("ab")[1].items():
        assert torch.equal(
            result.modules[task].get_parameter("classifier.bias"), expert.get_parameter("classifier.bias")
        )


def test_trusted_labels_leave_out_where_the_merge_is_surer() -> None:
    logits, expert = 2 * randn(1, 40, 3), 2 * randn(2, 40, 3)
    counted = []
    for here, there in zip(logits.double(), expert.double(), strict=True):
        p, q = here.softmax(0), there.softmax(0)
        if int(p.argmax()) == int(q.argmax()) or float(q.max()) >= float(p.max()):
            counted.append(-float(p[q.argmax()].log()))
    assert 10 < len(counted) < 35
    assert float(trusted_label(logits, expert)) == pytest.approx(sum(counted) / len(counted), rel=1e-5)


def test_without_radius_samerging_is_adamerging() -> None:
    soft = {"self_label": {"temperature": 2.0}}
    given = {"lambda": 0.4}
    flat, sharp, plain = (
        adapted("ab", method, {**given, **more}, {**FAST, **settings, "keep": "last"}).masks
        for method, more, settings in (
            ("samerging", {"sam": 0.0}, {}),
            ("samerging", {"sam": 0.5}, {}),
            ("adamerging", {}, soft),
        )
    )
    assert flat is not None and plain is not None and sharp is not None  # noqa: PT018
    assert all(torch.equal(flat.lam[name], plain.lam[name]) for name in plain.lam)
    assert not all(torch.equal(sharp.lam[name], plain.lam[name]) for name in plain.lam)


def test_a_sharpness_aware_step_goes_up_and_back() -> None:
    origin, deltas = randn(1, 4, 5), {task: randn(place, 4, 5) for place, task in ((2, "a"), (3, "b"))}
    weight = nn.Parameter(origin.clone())
    live = LiveWeights({"weight": weight}, {"weight": scaled_block(origin, deltas)}, Learn(masks=False, sam=0.3), 0.5)
    live.write()
    weight.square().sum().backward()
    live.pull_back()
    assert live.lam.grad is not None
    before, gradient = live.lam.clone(), live.lam.grad.clone()
    assert live.ascend()
    step = live.lam - before
    torch.testing.assert_close(step, 0.3 * before**2 * gradient / (before.abs() * gradient).norm())
    assert float((step / before).norm()) == pytest.approx(0.3, rel=1e-5)
    moved = origin + sum((live.lam[0, place] * delta for place, delta in enumerate(deltas.values())), torch.zeros(()))
    torch.testing.assert_close(weight.detach(), moved)
    live.descend()
    assert torch.equal(live.lam, before)


@pytest.mark.parametrize(
    ("method", "adapt", "text"),
    [
        ("prodistill", {"by": "model"}, "learns a block at a time"),
        ("prodistill", {"objective": "entropy"}, "adapt.objective: means nothing to 'prodistill'"),
        ("symerge", {"by": "block"}, "learns heads by predictions"),
        ("samerging", {"lr_masks": 0.1}, "adapt.lr_masks: means nothing to 'samerging'"),
    ],
)
def test_what_means_nothing_is_refused(method: str, adapt: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        METHODS[method].resolve(Given(adapt=adapt))


def test_a_given_block_changes_its_own_keys_alone() -> None:
    chosen: Any = METHODS["samerging"].resolve(Given(adapt={"self_label": {"confidence": 0.5}}))
    assert (chosen.settings.self_label.temperature, chosen.settings.self_label.confidence) == (2.0, 0.5)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("prodistill", {"by": "block", "lr_lambda": 0.01, "steps": 100, "batch_size": 64, "keep": "last"}),
        (
            "symerge",
            {"lr_lambda": 0.01, "steps": 500, "batch_size": 32, "objective": "trusted-label", "keep": "last"},
        ),
        ("samerging", {"lr_lambda": 1e-3, "steps": 1000, "batch_size": 16, "objective": "self-label"}),
    ],
)
def test_the_paper_preset_is_the_papers(method: str, settings: dict[str, Any]) -> None:
    chosen: Any = METHODS[method].resolve(Given(adapt={}, preset="paper"))
    assert {key: getattr(chosen.settings, key) for key in settings} == settings
    assert chosen.settings.schedule == "constant"
    assert not chosen.settings.learn_heads
    assert chosen.clamp == ((0.0, 1.0) if method == "symerge" else None)


def test_an_output_of_joint_heads_is_verified_and_scored(tmp_path: Path) -> None:
    text_zoo.make_zoo(tmp_path)
    given = text_zoo.recipe(tmp_path, merge_method="symerge", adapt={"steps": 3, "batch_size": 4, "keep": "last"})
    report = adarank.merge_recipe(load_recipe(given), tmp_path / "out")["adaptation"]
    assert report["joint_heads"] == list(text_zoo.TASKS)
    assert main(["verify", str(tmp_path / "out")]) == 0
