"""What is measured of experts on their inputs, and merged from it, against plain autograd, hooks and loops."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch
import transformers
from torch import Tensor, nn

import adarank
from adarank.calibration.gather import Gatherer, Sample, Store, block_of
from adarank.calibration.hooks import Grams, add_squared_gradients, label_weights, linear_layers, recording_grams
from adarank.methods import RegMeanPlusPlus
from adarank.models import TaskModels, share
from make import network, randn
from test_statistics import Vectors, least_squares


class Net(nn.Module):
    """Two linear layers and a norm; `turns` runs the second one again and again."""

    def __init__(self, classes: int, turns: int = 1) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.second = nn.Linear(6, 6)
        self.head = nn.Linear(6, classes)
        self.turns = turns

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.relu(self.first(x)))
        for _ in range(self.turns):
            x = torch.relu(self.second(x))
        return self.head(x)


def nets(classes: Mapping[str, int], turns: int = 1) -> dict[str, Net]:
    """Experts near each other, with heads of their own."""
    torch.manual_seed(0)
    base = Net(2, turns)
    found = {}
    for task, count in classes.items():
        found[task] = Net(count, turns).eval()
        near = {n: t + 0.2 * torch.randn_like(t) for n, t in base.state_dict().items() if not n.startswith("head")}
        found[task].load_state_dict(near, strict=False)
    return found


def body(expert: nn.Module) -> dict[str, nn.Parameter]:
    return {name: own for name, own in expert.named_parameters() if not name.startswith("head")}


def gatherer(experts: Mapping[str, nn.Module], batches: Mapping[str, Sequence[Tensor]]) -> Gatherer:
    net = network(None, {task: own.state_dict() for task, own in experts.items()}, task_heads=True)
    models: TaskModels = share(((task, copy.deepcopy(own)) for task, own in experts.items()), net)

    def singles(task: str) -> Iterator[tuple[Tensor, None]]:
        return ((x[None], None) for batch in batches[task] for x in batch)

    return Gatherer(
        net, models, Sample(lambda module, x: module(x), lambda task: iter(batches[task]), singles), Store()
    )


def by_hand(expert: nn.Module, inputs: Tensor, weights: Sequence[Mapping[int, float]]) -> dict[str, Tensor]:
    """mean_x Σ_y w_y (∂ log p_y)² by one backward pass for each input and label."""
    total = {name: torch.zeros_like(own) for name, own in body(expert).items()}
    for x, own in zip(inputs, weights, strict=True):
        for label, weight in own.items():
            expert.zero_grad()
            expert(x[None]).log_softmax(-1)[0, label].backward()
            for name, parameter in body(expert).items():
                total[name] += weight * parameter.grad**2 / len(inputs)
    return total


def fisher_by_hand(weights: Mapping[str, Vectors], information: Mapping[str, Vectors]) -> dict[str, Tensor]:
    """Fisher merging of whole models, normalised over the model."""
    scales = {
        t: torch.cat([f.flatten() for f in own.values()]).square().mean().sqrt() for t, own in information.items()
    }
    names = next(iter(weights.values()))
    f = {name: {t: (information[t][name] / scales[t]).clamp(min=1e-6) for t in weights} for name in names}
    return {n: sum(f[n][t] * weights[t][n] for t in weights) / sum(f[n].values()) for n in names}


@pytest.mark.parametrize("kind", ["true", "empirical"])
def test_fisher_from_modules_is_each_inputs_squared_gradient(kind: str) -> None:
    experts = nets({"a": 3, "b": 4})
    inputs = {"a": randn(1, 7, 4), "b": randn(2, 5, 4)}
    labels = {"a": [0, 1, 2, 0, 1, 2, 0], "b": [3, 2, 1, 0, 3]}
    information = {}
    for task, x in inputs.items():
        p = experts[task](x).softmax(-1).detach().tolist()
        own = [{y: 1.0} for y in labels[task]] if kind == "empirical" else [dict(enumerate(row)) for row in p]
        information[task] = by_hand(experts[task], x, own)
    wanted = fisher_by_hand({task: body(own) for task, own in experts.items()}, information)
    batches = {
        t: [x] if kind == "true" else [(x[:3], labels[t][:3]), (x[3:], labels[t][3:])] for t, x in inputs.items()
    }
    found = adarank.merge(None, experts, "fisher", {"kind": kind}, batches=batches)
    assert found.keys() == wanted.keys()
    for name, own in found.items():
        torch.testing.assert_close(own, wanted[name].detach(), rtol=1e-4, atol=1e-5)


def test_true_fisher_is_the_diagonal_of_the_gauss_newton_form() -> None:
    """Σ_y p_y ∇log p_y ∇log p_yᵀ = Jᵀ (diag(p) - p pᵀ) J, J the logits' Jacobian: no squared gradient in sight."""
    expert = nets({"a": 5})["a"]
    x = randn(3, 1, 4)
    parameters = {name: own.detach() for name, own in body(expert).items()}
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(expert, p, (x,))[0])(parameters)
    p = expert(x).softmax(-1)[0].detach()
    middle = p.diag() - p[:, None] * p
    total = {name: torch.zeros_like(own) for name, own in parameters.items()}
    weights = label_weights(expert(x)[0], None, 10, torch.Generator())
    add_squared_gradients(total, body(expert), expert(x)[0], weights)
    for name, own in total.items():
        j = jacobian[name].flatten(1)
        torch.testing.assert_close(own.flatten(), (j * (middle @ j)).sum(0), rtol=1e-4, atol=1e-7)


def test_more_classes_than_wanted_are_drawn_as_predicted() -> None:
    logits, generator = randn(0, 7), torch.Generator().manual_seed(0)
    assert label_weights(logits, None, 7, generator) == pytest.approx(dict(enumerate(logits.softmax(-1).tolist())))
    drawn = torch.zeros(2000, 7)
    for row in drawn:
        weights = label_weights(logits, None, 5, generator)
        assert sum(weights.values()) == pytest.approx(1.0)
        row[list(weights)] = torch.tensor(list(weights.values()))
    torch.testing.assert_close(drawn.mean(0), logits.softmax(-1), rtol=0, atol=0.02)
    assert label_weights(logits, 4, 5, generator) == {4: 1.0}


# Gram matrices


def grams_of(module: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    names = dict(module.named_parameters())
    found = Grams()
    with torch.no_grad(), recording_grams(linear_layers(module, names, names), found):
        for batch in batches:
            found.begin(batch)
            module(**batch)
    return found.means()


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_padding_does_not_count(architecture: str) -> None:
    small = {"bert": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12},
             "gpt2": {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 20}}[architecture]  # fmt: skip
    config = transformers.AutoConfig.for_model(architecture, vocab_size=20, pad_token_id=0, **small)
    torch.manual_seed(0)
    module = transformers.AutoModel.from_config(config).eval()
    texts = [[2, 5, 6, 7, 3], [2, 8, 3], [2, 9, 10, 11, 12, 13, 3]]

    def batch(rows: Sequence[Sequence[int]], length: int) -> dict[str, Tensor]:
        padded = [[*row, *[0] * (length - len(row))] for row in rows]
        mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}

    plain = grams_of(module, [{"input_ids": torch.tensor([row])} for row in texts])
    assert len(plain) >= 4
    for length in (7, 12):
        for batches in ([batch(texts, length)], [batch(texts[:1], length), batch(texts[1:], length)]):
            found = grams_of(module, batches)
            for name, own in plain.items():
                torch.testing.assert_close(found[name], own, rtol=1e-4, atol=1e-5)


def test_a_layer_that_runs_several_times_sums_over_all_of_them() -> None:
    expert, x = nets({"a": 2}, turns=3)["a"], randn(1, 9, 4)
    found = grams_of(expert, [{"x": x}])
    given, state = [], expert.norm(torch.relu(expert.first(x)))
    for _ in range(3):
        given.append(state.detach())
        state = torch.relu(expert.second(state))
    vectors = torch.cat(given)
    torch.testing.assert_close(found["second.weight"], vectors.T @ vectors / len(vectors))


def test_layers_tied_to_one_weight_share_a_gram_matrix() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    module[2].weight = module[0].weight
    x = randn(0, 6, 4)
    vectors = torch.cat([x, torch.tanh(module[0](x))]).detach()
    found = Grams()
    with torch.no_grad(), recording_grams(linear_layers(module, {"w": module[0].weight}, ["w"]), found):
        module(x)
    torch.testing.assert_close(found.means()["w"], vectors.T @ vectors / len(vectors))


# From modules


def test_regmean_from_modules_fits_and_averages_the_rest() -> None:
    experts = nets({"a": 3, "b": 2})
    inputs = {"a": randn(1, 30, 4), "b": randn(2, 20, 4)}
    found = adarank.merge(None, experts, "regmean", batches={t: x.split(7) for t, x in inputs.items()})
    weights = {task: own.first.weight.detach().double().T for task, own in experts.items()}
    wanted = least_squares({task: x.double() for task, x in inputs.items()}, weights, 0.95)
    torch.testing.assert_close(found["first.weight"].double().T, wanted, rtol=1e-4, atol=1e-5)
    for name in ("first.bias", "norm.weight", "norm.bias", "second.bias"):
        torch.testing.assert_close(found[name], torch.stack([body(own)[name] for own in experts.values()]).mean(0))


def test_the_size_of_batches_changes_nothing() -> None:
    experts = nets({"a": 3, "b": 2})
    inputs = {"a": randn(1, 30, 4), "b": randn(2, 20, 4)}
    for method in ("fisher", "regmean", "regmean++"):
        results = [
            adarank.merge(None, experts, method, batches={t: x.split(size) for t, x in inputs.items()})
            for size in (1, 7, 30)
        ]
        for other in results[1:]:
            assert all(torch.allclose(own, other[name], rtol=1e-3, atol=1e-5) for name, own in results[0].items())


def test_modules_given_stay_as_they_are() -> None:
    experts = nets({"a": 3, "b": 2})
    before = {task: {n: t.clone() for n, t in own.state_dict().items()} for task, own in experts.items()}
    for method in ("fisher", "regmean", "regmean++"):
        adarank.merge(None, experts, method, batches={"a": [randn(1, 6, 4)], "b": [randn(2, 6, 4)]})
    for task, own in experts.items():
        assert all(torch.equal(t, before[task][n]) for n, t in own.state_dict().items())
        assert all(p.requires_grad for p in own.parameters())


def test_regmean_plus_plus_with_one_layer_is_regmean() -> None:
    torch.manual_seed(0)
    experts = {task: nn.ModuleDict({"body": nn.Linear(4, 5), "head": nn.Linear(5, 2)}) for task in "ab"}
    batches = {"a": [randn(1, 9, 4)], "b": [randn(2, 12, 4)]}

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        return module["head"](module["body"](x))

    found = [adarank.merge(None, experts, m, batches=batches, forward=forward) for m in ("regmean", "regmean++")]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(own, found[1][name]) for name, own in found[0].items())


@pytest.mark.parametrize("turns", [1, 2])
def test_the_second_layer_is_fitted_to_the_merged_first_one(turns: int) -> None:
    experts = nets({"a": 3, "b": 2}, turns)
    inputs = {"a": randn(1, 30, 4), "b": randn(2, 20, 4)}
    batches = {task: x.split(8) for task, x in inputs.items()}
    found = adarank.merge(None, experts, "regmean++", batches=batches)
    plain = adarank.merge(None, experts, "regmean", batches=batches)
    assert torch.equal(found["first.weight"], plain["first.weight"])
    assert not torch.allclose(found["second.weight"], plain["second.weight"])
    vectors = {}
    with torch.no_grad():
        for task, x in inputs.items():
            layer = nn.functional.linear(x, found["first.weight"], found["first.bias"]).relu()
            state, given = nn.functional.layer_norm(layer, (6,), found["norm.weight"], found["norm.bias"]), []
            for _ in range(turns):
                given.append(state)
                state = torch.relu(experts[task].second(state))  # the block itself is the expert's own
            vectors[task] = torch.cat(given).double()
    weights = {task: own.second.weight.detach().double().T for task, own in experts.items()}
    wanted = least_squares(vectors, weights, 0.95)
    torch.testing.assert_close(found["second.weight"].double().T, wanted, rtol=1e-3, atol=1e-4)
    measured = gatherer(experts, batches).inform(RegMeanPlusPlus()).statistics
    for task, x in vectors.items():
        gram = (x.T @ x / len(x)).float()
        torch.testing.assert_close(measured.read("second.weight", task), gram, rtol=1e-3, atol=1e-4)


def test_a_block_ends_with_the_last_number_of_a_name() -> None:
    names = {"encoder.layer.3.output.dense.weight": "encoder.layer.3", "stages.1.blocks.10.fc.bias": "stages.1.blocks.10",
             "0.weight": "0", "pooler.dense.weight": "pooler.dense", "layer4.fc.weight": "layer4.fc"}  # fmt: skip
    assert {name: block_of(name) for name in names} == names


@pytest.mark.parametrize(
    ("experts", "batches", "parameters", "parts"),
    [
        (None, {}, {}, ["none for 'a'", "none for 'b'", "unlabelled inputs"]),
        (
            None,
            {"a": [torch.zeros(2, 4)], "b": [torch.zeros(2, 4)]},
            {"kind": "empirical"},
            ["'a' is no pair", "'b' is"],
        ),
        ("states", {"a": [torch.zeros(2, 4)], "b": [torch.zeros(2, 4)]}, {}, ["'a' is no module", "'b' is no module"]),
        (None, {"a": [object()], "b": [object()]}, {}, ["cannot be cut"]),
    ],
)
def test_mistakes_from_python_are_sentences(experts, batches, parameters, parts) -> None:
    given = nets({"a": 3, "b": 2})
    if experts == "states":
        given = {task: own.state_dict() for task, own in given.items()}
    with pytest.raises(adarank.AdaRankError) as caught:
        adarank.merge(None, given, "fisher", parameters, batches=batches)
    assert all(part in str(caught.value) for part in parts)
