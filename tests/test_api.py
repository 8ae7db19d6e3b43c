"""The Python interface: state dicts and modules, no files."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import adarank
from adarank.errors import OutputError
from adarank.methods import METHODS, CalibratedMethod
from adarank.methods.task_aware.base import TaskAwareMethod


class Net(nn.Module):
    """A body of two layers, one of them a kernel, and a head per task."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3)
        self.body = nn.Linear(24, 12)
        self.head = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(torch.relu(self.conv(x[:, None])).flatten(1))))


def nets(classes: dict[str, int]) -> tuple[Net, dict[str, Net]]:
    torch.manual_seed(0)
    base = Net(2)
    experts = {}
    for task, count in classes.items():
        experts[task] = Net(count)
        state = {n: t + 0.1 * torch.randn_like(t) for n, t in base.state_dict().items() if not n.startswith("head")}
        experts[task].load_state_dict(state, strict=False)
    return base, experts


@pytest.fixture
def problem() -> tuple[Net, dict[str, Net], dict[str, list[Tensor]]]:
    base, experts = nets({"a": 3, "b": 5})
    return base, experts, {task: [torch.randn(8, 8) for _ in range(4)] for task in experts}


def test_merge_takes_modules_and_state_dicts_alike(problem) -> None:
    base, experts, _ = problem
    from_modules = adarank.merge(base, experts, "cart", {"rank": 0.5})
    from_states = adarank.merge(
        base.state_dict(), {t: e.state_dict() for t, e in experts.items()}, "cart", {"rank": 0.5}
    )
    assert from_modules.keys() == from_states.keys()
    assert all(torch.equal(from_modules[name], from_states[name]) for name in from_modules)


def test_adapt_decomposes_the_kernels_of_a_convolutional_net() -> None:
    def net() -> nn.Sequential:
        deep = [nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 3, groups=2), nn.Conv2d(4, 5, 1)]
        return nn.Sequential(*deep, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 5))

    base, experts = net(), {"a": net(), "b": net()}
    batches = {task: [torch.randn(4, 3, 9, 9) for _ in range(2)] for task in experts}
    parameters = {"origin": "pretrained", "rank": 1.0, "lambda": 0.3}
    adapted = adarank.adapt(base, experts, batches, parameters=parameters, settings={"steps": 1})
    sizes = {"0.weight": 6, "2.weight": 4, "3.weight": 4, "6.weight": 5}  # min(out, in·k·k); the depthwise one is whole
    assert adapted.masks.sizes == {name: (size, size) for name, size in sizes.items()}
    again = adarank.merge(base, experts, "masked", {"masks": adapted.masks})
    assert all(torch.allclose(tensor, adapted.state[name], atol=1e-6) for name, tensor in again.items())


def test_adapt_leaves_the_given_modules_alone(problem) -> None:
    base, experts, batches = problem
    before = {task: {n: t.clone() for n, t in e.state_dict().items()} for task, e in experts.items()}
    adarank.adapt(base, experts, batches, settings=adarank.AdaptSettings(steps=3))
    for task, expert in experts.items():
        assert all(torch.equal(t, before[task][n]) for n, t in expert.state_dict().items())
        assert all(p.requires_grad for p in expert.parameters())


def test_adapted_modules_share_the_body_and_keep_their_heads(problem) -> None:
    base, experts, batches = problem
    found = adarank.adapt(base, experts, batches, settings=adarank.AdaptSettings(steps=3, learn_heads=False))
    assert found.modules["a"].body.weight is found.modules["b"].body.weight
    assert torch.equal(found.modules["b"].head.weight, experts["b"].head.weight)
    assert torch.equal(found.state["body.weight"], found.modules["a"].body.weight)


def test_adapted_state_equals_merging_by_its_masks(problem) -> None:
    base, experts, batches = problem
    settings = adarank.AdaptSettings(steps=30, lr_masks=0.02, lr_lambda=0.02)
    found = adarank.adapt(base, experts, batches, parameters={"rank": 0.25, "lambda": 1.0}, settings=settings)
    again = adarank.merge(base, experts, "masked", {"masks": found.masks})
    assert all(torch.equal(found.state[name], again[name]) for name in found.state)


def test_adapt_lowers_its_objective(problem) -> None:
    base, experts, batches = problem
    settings = adarank.AdaptSettings(steps=40, lr_masks=0.02, lr_lambda=0.02)
    history = adarank.adapt(base, experts, batches, settings=settings).history
    total = [sum(values) for values in zip(*history.losses.values(), strict=True)]
    assert sum(total[-4:]) < sum(total[:4])


def test_self_label_asks_each_expert_once_per_batch(problem) -> None:
    base, experts, batches = problem
    calls: list[tuple[int, bool]] = []

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        calls.append((len(x), torch.is_grad_enabled()))
        return module(x)

    settings = adarank.AdaptSettings(steps=6, check_every=10, learn_heads=False)
    start = {"rank": 0.16, "lambda": 1.0}  # given, so that none is looked for
    adarank.adapt(base, experts, batches, parameters=start, settings=settings, forward=forward)
    graphs = sum(grad for _, grad in calls)
    assert graphs == 6 * 2
    assert len(calls) - graphs == 4 * 2 + 2 * 4 * 2  # each expert on 4 batches; judged at the start and at the end


def test_each_start_is_checked_on_64_inputs_at_most(problem) -> None:
    base, experts, batches = problem
    held_out = {task: [torch.randn(8, 8) for _ in range(20)] for task in experts}
    calls: list[int] = []

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        calls.append(len(x))
        return module(x)

    history = adarank.adapt(
        base, experts, batches, settings={"steps": 0, "objective": "entropy"}, forward=forward, held_out=held_out
    ).history
    assert len(history.starts) > 3
    experts_and_judge = 2 * 2 * sum(map(len, held_out["a"]))
    origins = 2  # the base and the average are compared first
    assert sum(calls) == experts_and_judge + (origins + len(history.starts)) * 2 * 64


def test_a_preset_gives_settings_of_loop_and_method(problem) -> None:
    base, experts, batches = problem
    preset = adarank.adapt(base, experts, batches, settings={"preset": "paper", "steps": 3})
    loop = {"steps": 3, "objective": "entropy", "keep": "last", "schedule": "constant",
            "lr_masks": 1e-3, "lr_lambda": 1e-3}  # fmt: skip
    method = {"origin": "average", "rank": 0.16, "lambda": 2.3, "mask": "binary"}
    written_out = adarank.adapt(base, experts, batches, parameters=method, settings=loop)
    assert preset.history.losses == written_out.history.losses
    assert all(torch.equal(own, written_out.state[name]) for name, own in preset.state.items())
    with pytest.raises(adarank.AdaRankError, match=r"unknown preset 'papr'.*Did you mean 'paper'"):
        adarank.adapt(base, experts, batches, settings={"preset": "papr"})


def test_features_of_layers_are_compared_beside_the_last(problem) -> None:
    base, experts, batches = problem
    start = {"origin": "pretrained", "rank": 1.0, "lambda": 1.0}
    last, both = (
        adarank.adapt(
            base, experts, batches, "adarank", start, {"steps": 1, "objective": "features", **more}
        ).history.losses["a"][0]
        for more in ({}, {"self_label": {"layers": ["con?"]}})
    )
    merged = adarank.merge(base, experts, "task_arithmetic", {"lambda": 1.0})
    weights = [(merged["conv.weight"], merged["conv.bias"]), (experts["a"].conv.weight, experts["a"].conv.bias)]
    conv = experts["a"].conv
    means = [
        nn.functional.conv1d(batches["a"][0][:, None], *pair, conv.stride, conv.padding).detach().mean(dim=1)
        for pair in weights
    ]
    distance = float((means[0] - means[1]).square().sum() / means[1].square().sum())
    assert both == pytest.approx((last + distance) / 2, rel=1e-4)
    for settings, sentence in (
        (
            {"objective": "features", "self_label": {"layers": ["conw"]}},
            r"'conw' is the name of no part.*Did you mean 'conv'",
        ),
        ({"self_label": {"layers": ["conv"]}}, "they are compared by the objective features"),
    ):
        with pytest.raises(adarank.AdaRankError, match=sentence):
            adarank.adapt(base, experts, batches, "adarank", start, {"steps": 1, **settings})


def test_features_of_the_expert_itself_are_at_no_distance(problem) -> None:
    base, experts, batches = problem
    start = {"origin": "pretrained", "rank": 1.0, "lambda": 1.0}
    one, given = {"a": experts["a"]}, {"a": batches["a"]}
    found = adarank.adapt(base, one, given, "adarank", start, {"steps": 1}, objective="features")
    assert found.history.losses["a"][0] == pytest.approx(0, abs=1e-6)
    both = adarank.adapt(base, experts, batches, "adarank", start, {"steps": 1}, objective="features")
    body = [
        nn.Sequential(own.conv, nn.ReLU(), nn.Flatten(1), own.body, nn.ReLU())
        for own in (both.modules["a"], experts["a"])
    ]
    start_state = adarank.merge(base, experts, "task_arithmetic", {"lambda": 1.0})
    body_state = {name: own for name, own in start_state.items() if not name.startswith("head")}
    both.modules["a"].load_state_dict(body_state, strict=False)
    merged, expert = (of.requires_grad_(False)(batches["a"][0][:, None]) for of in body)
    distance = float((merged - expert).square().sum() / expert.square().sum())
    assert both.history.losses["a"][0] == pytest.approx(distance, rel=1e-4)


def test_self_label_of_experts_that_are_the_merge_is_zero(problem) -> None:
    base, experts, batches = problem
    one = {"a": experts["a"]}
    start = {"origin": "pretrained", "rank": 1.0, "lambda": 1.0}
    found = adarank.adapt(base, one, {"a": batches["a"]}, "adarank", start, adarank.AdaptSettings(steps=1))
    assert found.history.losses["a"][0] == pytest.approx(0, abs=1e-6)
    assert found.history.judged[0]["a"].agreement == 1


def test_what_hurts_on_held_out_batches_is_rolled_back(problem) -> None:
    base, experts, batches = problem
    settings = adarank.AdaptSettings(steps=8, lr_masks=0.2, lr_lambda=0.5, check_every=2)
    start = adarank.adapt(base, experts, batches, settings=adarank.AdaptSettings(steps=0))
    held_out = {task: [torch.randn(20, 8)] for task in experts}
    found = adarank.adapt(
        base, experts, batches, settings=settings, objective=lambda logits: logits[:, 0].mean(), held_out=held_out
    )
    assert found.history.choice.rolled_back
    assert found.history.judged[0]["a"].inputs == 20
    assert all(torch.equal(found.state[name], start.state[name]) for name in start.state)


def test_objectives_may_be_named_weighted_or_per_task(problem) -> None:
    base, experts, batches = problem
    one = adarank.AdaptSettings(steps=1)
    named = adarank.adapt(base, experts, batches, settings=one, objective="infomax").history.losses
    mixed = adarank.adapt(
        base, experts, batches, settings=one, objective={"infomax": 2.0, "entropy": 1.0}
    ).history.losses
    plain = adarank.adapt(
        base, experts, batches, settings=adarank.AdaptSettings(steps=1, objectives={"a": "entropy"})
    ).history.losses
    assert mixed["a"][0] == pytest.approx(2 * named["a"][0] + plain["a"][0], abs=1e-5)
    with pytest.raises(adarank.AdaRankError, match="Did you mean 'infomax'"):
        adarank.adapt(base, experts, batches, objective="infomx")
    with pytest.raises(adarank.AdaRankError, match="unknown task 'c'"):
        adarank.adapt(base, experts, batches, settings=adarank.AdaptSettings(objectives={"c": "entropy"}))


def test_zero_steps_of_adamerging_is_task_arithmetic(problem) -> None:
    base, experts, batches = problem
    start = adarank.adapt(base, experts, batches, "adamerging", {"lambda": 0.4}, adarank.AdaptSettings(steps=0)).state
    static = adarank.merge(base, experts, "task_arithmetic", {"lambda": 0.4})
    for name in start:
        torch.testing.assert_close(start[name], static[name])


def test_zero_steps_of_cart_plus_plus_is_cart(problem) -> None:
    base, experts, batches = problem
    start = adarank.adapt(
        base, experts, batches, "cart++", {"rank": 0.3, "lambda": 1.5}, adarank.AdaptSettings(steps=0)
    ).state
    static = adarank.merge(base, experts, "cart", {"rank": 0.3, "lambda": 1.5})
    for name in start:
        torch.testing.assert_close(start[name], static[name])


def test_evaluate_counts_right_answers(problem) -> None:
    _, experts, batches = problem
    answers = {task: [(x, experts[task](x).argmax(1).tolist()) for x in batches[task]] for task in experts}
    assert adarank.evaluate(experts, answers) == {"a": 100.0, "b": 100.0}
    wrong = {"a": [(x, [(y + 1) % 3 for y in labels]) for x, labels in answers["a"]]}
    assert adarank.evaluate(experts, wrong) == {"a": 0.0}


@pytest.mark.parametrize(
    ("call", "method", "where"),
    [
        ("merge", "adarank", r"adarank\.adapt"),
        ("merge", "emr", r"adarank\.merge_each"),
        ("merge", "twin_merging", r"adarank\.from_bundle"),
        ("merge", "multitask", r"adarank\.merge_recipe"),
        ("merge", "crat", "'cart'"),
        ("merge_each", "cart", r"adarank\.merge\."),
        ("merge_each", "wemoe", r"adarank\.from_bundle"),
        ("adapt", "cart", r"adarank\.merge\."),
        ("adapt", "tsv_c", r"adarank\.merge_each"),
        ("adapt", "surgery", r"adarank\.from_bundle"),
        ("adapt", "adarnk", "'adarank'"),
    ],
)
def test_a_method_of_another_kind_points_to_where_it_is_had(problem, call: str, method: str, where: str) -> None:
    base, experts, batches = problem
    given = (base, experts, batches) if call == "adapt" else (base, experts)
    with pytest.raises(adarank.AdaRankError, match=where):
        getattr(adarank, call)(*given, method=method)


def test_tasks_without_batches_are_all_named(problem) -> None:
    base, experts, _ = problem
    with pytest.raises(adarank.AdaRankError, match="'a', 'b'"):
        adarank.adapt(base, experts, {})


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(6, 6, bias=False)
            self.again = nn.Linear(6, 6, bias=False)
            self.again.weight = self.up.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.again(torch.relu(self.up(x)))

    torch.manual_seed(0)
    base = Tied()
    experts = {"a": Tied(), "b": Tied()}
    found = adarank.adapt(
        base, experts, {t: [torch.randn(4, 6)] for t in experts}, settings=adarank.AdaptSettings(steps=2)
    )
    assert found.modules["a"].again.weight is found.modules["a"].up.weight


@pytest.mark.parametrize("call", [lambda *given: adarank.merge(*given, "task_arithmetic", {"lambda": 1.0}),
                                  lambda *given: adarank.merge_each(*given, "tall_masks")])  # fmt: skip
def test_what_float16_cannot_hold_is_refused(call) -> None:
    base = {"w": torch.zeros(4, 4, dtype=torch.float16)}
    experts = {task: {"w": torch.full((4, 4), 60_000.0, dtype=torch.float16)} for task in "ab"}
    with pytest.raises(
        OutputError, match=r"'w' has values that F16 cannot hold\. Give base and experts in a wider dtype"
    ):
        call(base, experts)


ALONE = ("masked", "passthrough", "slerp", "nearswap", "arcee_fusion")  # takes no experts, or one
OF_STATES = [name for name, kind in METHODS.items() if name not in ALONE and not issubclass(kind, CalibratedMethod)]


@pytest.mark.parametrize("method", OF_STATES)
def test_an_expert_in_float64_beside_others_in_float32_merges(method: str) -> None:
    torch.manual_seed(1)
    base = {"w": torch.randn(6, 5), "b": torch.randn(6)}
    near = [{n: t + 0.1 * torch.randn_like(t) for n, t in base.items()} for _ in range(2)]
    wide = {n: t.double() for n, t in near[1].items()}
    call = adarank.merge_each if issubclass(METHODS[method], TaskAwareMethod) else adarank.merge
    mixed, plain = (call(base, {"a": near[0], "b": own}, method) for own in (wide, near[1]))
    if call is adarank.merge_each:
        mixed, plain = mixed["b"], plain["b"]
    assert all(torch.allclose(own, plain[name], atol=1e-5) for name, own in mixed.items())
