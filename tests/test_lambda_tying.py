"""λ per tensor, layer (of each task, or shared), task or model against torch.autograd and torch's Adam on the tied numbers themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import adarank
from adarank.adapt import ADAPTIVE, AdaptSettings, Learn, LiveWeights, adapt
from adarank.adapt.start_search import Grid
from adarank.adapt.tying import tie
from adarank.alignment.layers import layer_groups, layer_number
from adarank.errors import RecipeError
from adarank.settings import parse
from adarank.spectral.bases import BASES
from adarank.spectral.blocks import scaled_block, task_vector_blocks
from make import generator, randn
from test_adapt_keeps import SETTINGS, Judged
from test_adapt_loop import Problem, assert_same, boom, told
from test_adapt_start import liking

PER = ["tensor", "layer", "shared-layer", "task", "model"]

NAMES = {
    "bert": {
        "embeddings.LayerNorm.weight": "embeddings",
        "encoder.layer.0.attention.self.query.weight": "encoder.layer.0",
        "encoder.layer.0.output.dense.bias": "encoder.layer.0",
        "encoder.layer.10.output.dense.bias": "encoder.layer.10",
        "pooler.dense.weight": "pooler",
        "pooler.dense.bias": "pooler",
    },
    "vit, all under its own name": {
        "vit.embeddings.cls_token": "vit.embeddings",
        "vit.embeddings.patch_embeddings.projection.weight": "vit.embeddings",
        "vit.encoder.layer.1.layernorm_before.bias": "vit.encoder.layer.1",
        "vit.encoder.layer.11.layernorm_before.bias": "vit.encoder.layer.11",
        "vit.layernorm.weight": "vit.layernorm",
    },
    "visual tower": {
        "visual.class_embedding": "visual",
        "visual.proj": "visual",
        "visual.conv1.weight": "visual.conv1",
        "visual.transformer.resblocks.3.attn.in_proj_weight": "visual.transformer.resblocks.3",
        "visual.transformer.resblocks.3.mlp.c_fc.weight": "visual.transformer.resblocks.3",
    },
    "two stacks of layers": {
        "encoder.block.0.layer.1.DenseReluDense.wi.weight": "encoder.block.0",
        "decoder.block.0.layer.1.DenseReluDense.wi.weight": "decoder.block.0",
        "encoder.final_layer_norm.weight": "encoder",
    },
    "gpt2": {"h.0.attn.c_attn.weight": "h.0", "h.1.attn.c_attn.weight": "h.1", "ln_f.weight": "ln_f"},
    "sequential": {"0.weight": "0", "0.bias": "0", "2.weight": "2"},
    "no modules": {"weight": "", "bias": ""},
    "one module": {"dense.weight": "dense", "dense.bias": "dense"},
}  # fmt: skip


@pytest.mark.parametrize("network", NAMES)
def test_tensors_are_grouped_by_the_layer_in_their_name(network: str) -> None:
    assert dict(zip(NAMES[network], layer_groups(list(NAMES[network])), strict=True)) == NAMES[network]


def test_the_layer_of_a_tensor_is_the_first_number_between_dots() -> None:
    assert [layer_number(n) for n in ("h.12.ln_1.weight", "3.weight", "conv1.weight", "stages.2.layers.5.w", "x.7")] == [
        12, 3, None, 2, None,
    ]  # fmt: skip


@given(st.integers(1, 4), st.sampled_from(PER), st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(0, 99))
def test_spreading_and_gathering_are_loops_over_the_entries(tasks: int, per: Any, layers: list[int], seed: int) -> None:
    names = [f"block.{layer}.w{i}" for i, layer in enumerate(layers)]
    tying = tie(names, tasks, per)
    owner = {
        "tensor": lambda row, task: (row, task),
        "layer": lambda row, task: (layers[row], task),
        "shared-layer": lambda row, task: (layers[row], 0),
        "task": lambda row, task: (0, task),
        "model": lambda row, task: (0, 0),
    }[per]
    keys = dict.fromkeys(owner(row, task) for row in range(len(names)) for task in range(tasks))
    assert tying.shape[0] * tying.shape[1] == len(keys)
    numbers, matrix = randn(seed, *tying.shape), randn(seed, len(names), tasks)
    spread, gathered = tying.spread(numbers), tying.spread(tying.gather(matrix))
    seen: dict[tuple[int, int], float] = {}
    for row in range(len(names)):
        for task in range(tasks):
            key = owner(row, task)
            assert seen.setdefault(key, float(spread[row, task])) == float(spread[row, task])
            total = sum(matrix[i, j] for i in range(len(names)) for j in range(tasks) if owner(i, j) == key)
            assert float(gathered[row, task]) == pytest.approx(float(total), abs=1e-5)
    assert len(set(seen.values())) == len(keys)


class Net(nn.Module):
    """A factor, two layers with a norm after them: matrices, vectors and a scalar; `unused` takes part in nothing."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.zeros((), dtype=dtype))
        self.layers = nn.ModuleList([nn.Linear(5, 6), nn.Linear(6, 4)]).to(dtype)
        self.norm = nn.LayerNorm(4).to(dtype)
        self.unused = nn.Linear(2, 2).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.factor * self.norm(x)


LAYER = {"factor": 0, "layers.0": 1, "layers.1": 2, "norm": 3, "unused": 4}


class Toy:
    """Two tasks that each want other outputs, by the engine and by autograd with a leaf for every tied number."""

    def __init__(self, per: Any, dtype: torch.dtype, learn_masks: bool, clamp: tuple[float, float] | None) -> None:
        torch.manual_seed(0)
        self.net, self.per, self.clamp = Net(dtype), per, clamp
        self.origin = {n: randn(i, *p.shape, dtype=dtype) for i, (n, p) in enumerate(self.net.named_parameters())}
        self.deltas = {
            n: {t: randn(100 * k + i, *w.shape, dtype=dtype) for k, t in enumerate("ab", 1)}
            for i, (n, w) in enumerate(self.origin.items())
        }
        self.x = {t: randn(k, 7, 5, dtype=dtype) for k, t in enumerate("ab", 50)}
        self.y = {t: randn(k, 7, 4, dtype=dtype) for k, t in enumerate("ab", 60)}
        blocks = {
            n: task_vector_blocks(w, self.deltas[n])
            if learn_masks and w.dim() == 2
            else scaled_block(w, self.deltas[n])
            for n, w in self.origin.items()
        }
        self.live = LiveWeights(
            dict(self.net.named_parameters()), blocks, Learn(learn_masks, True, 1.0, clamp, per), scale=0.3
        )
        self.leaves: dict[Any, Tensor] = {}

    def leaf(self, name: str, task: str) -> Tensor:
        layer = next(number for prefix, number in LAYER.items() if name.startswith(prefix))
        key = {"tensor": (name, task), "layer": (layer, task), "shared-layer": layer, "task": task, "model": 0}[
            self.per
        ]
        return self.leaves.setdefault(
            key, torch.full((), 0.3, dtype=self.net.factor.dtype).requires_grad_()
        )  # one number, wherever it is used

    def loss(self, task: str, weights: dict[str, Tensor] | None = None) -> Tensor:
        out = self.net(self.x[task]) if weights is None else functional_call(self.net, weights, (self.x[task],))
        return (out - self.y[task]).square().mean()

    def by_autograd(self) -> Tensor:
        """The summed loss with every tied number in its graph."""
        weights = {}
        for name, origin in self.origin.items():
            used = {t: self.leaf(name, t).clamp(*self.clamp) if self.clamp else self.leaf(name, t) for t in "ab"}
            weights[name] = origin + sum(used[t] * self.deltas[name][t] for t in "ab")
        return self.loss("a", weights) + self.loss("b", weights)

    def matrix(self, values: dict[Any, Tensor]) -> Tensor:
        """(tensors, tasks) of what is kept per leaf."""
        owner = {id(leaf): key for key, leaf in self.leaves.items()}
        return torch.stack(
            [torch.stack([values[owner[id(self.leaf(n, t))]] for t in "ab"]) for n in self.origin]
        ).detach()


CLAMPS = [None, (0.0, 0.32), (0.29, 1.0), (0.4, 1.0)]


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("learn_masks", [False, True])
@pytest.mark.parametrize("per", PER)
def test_the_gradient_of_a_tied_lambda_is_autograds(per: str, learn_masks: bool, dtype: Any, clamp: Any) -> None:
    toy = Toy(per, dtype, learn_masks, clamp)
    toy.live.write()
    for task in "ab":
        toy.loss(task).backward()
    toy.live.pull_back()
    toy.by_autograd().backward()
    wanted = {k: leaf.grad if leaf.grad is not None else torch.zeros((), dtype=dtype) for k, leaf in toy.leaves.items()}
    assert (
        toy.live.lam.numel()
        == len(toy.leaves)
        == {"tensor": 16, "layer": 10, "shared-layer": 5, "task": 2, "model": 1}[per] + (2 if per == "tensor" else 0)
    )
    found = tie(list(toy.origin), 2, per).spread(toy.live.lam.grad)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(found, toy.matrix(wanted), rtol=tolerance, atol=tolerance)
    assert (found.abs().max() > 1e-3) == (clamp != (0.4, 1.0))


@pytest.mark.parametrize("clamp", [None, (0.28, 0.33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per", PER)
def test_adaptation_of_tied_lambdas_is_adam_on_the_tied_numbers(per: str, dtype: Any, clamp: Any) -> None:
    toy, steps = Toy(per, dtype, False, clamp), 8
    losses: Any = {t: lambda step, t=t: toy.loss(t) for t in "ab"}
    history = adapt(toy.live, losses, AdaptSettings(steps=steps, lr_lambda=0.02, schedule="constant"))
    toy.by_autograd()
    adam = torch.optim.Adam(toy.leaves.values(), lr=0.02)
    totals = []
    for _ in range(steps):
        adam.zero_grad()
        total = toy.by_autograd()
        totals.append(total.item())
        total.backward()
        for leaf in toy.leaves.values():
            leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        adam.step()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-3
    assert [sum(v) for v in zip(*history.losses.values(), strict=True)] == pytest.approx(totals, rel=tolerance)
    wanted = toy.matrix(toy.leaves)
    used = toy.live.used_lam()
    torch.testing.assert_close(
        used, wanted.clamp(*clamp) if clamp else wanted, rtol=0, atol=1e-10 if dtype == torch.float64 else 1e-4
    )
    assert (used != 0.3).any()


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("at", [2, 4, 7])
def test_a_killed_run_with_tied_lambdas_ends_with_the_same_bits(tmp_path: Path, per: Any, at: int) -> None:
    learn = Learn(temperature=1.0, per=per, returnable=False)
    torch.manual_seed(0)
    whole = Problem(learn)
    wanted = whole.run()
    torch.manual_seed(0)
    first = Problem(learn)
    first.hook("b", at, boom)
    with pytest.raises(ZeroDivisionError):
        first.run(state=tmp_path / "state.pt")
    torch.manual_seed(0)
    second = Problem(learn)
    found = second.run(state=tmp_path / "state.pt")
    assert_same(whole, second)
    assert told(found) == told(wanted)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("basis", BASES)
def test_the_masks_file_has_lambdas_and_merges_as_adapted(basis: str, per: str) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    experts = {t: nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)) for t in "ab"}
    for own in experts.values():
        own.load_state_dict({k: v + 0.3 * torch.randn_like(v) for k, v in base.state_dict().items()})
    loop = AdaptSettings(steps=6, lr_masks=0.05, lr_lambda=0.02, keep="last", schedule="constant")
    parameters = {"basis": basis, "lambda_per": per}
    found = adarank.adapt(base, experts, {t: [torch.randn(8, 6)] for t in experts}, "adarank", parameters, loop)
    groups = len(BASES[basis].groups(list(experts)))
    rows = {"tensor": 4, "layer": 2, "shared-layer": 2, "task": 1, "model": 1}[per]
    lams = torch.stack(list(found.masks.lam.values()))
    assert lams.shape == (4, groups)
    # Iso-C has no component of one task alone: those λ move by biases only
    assert lams.unique(dim=0).shape[0] == rows
    assert len({tuple(column) for column in lams.T.tolist()}) == (1 if per in ("model", "shared-layer") else groups)
    again = adarank.merge(base, experts, "masked", {"masks": found.masks})
    for name, value in again.items():
        torch.testing.assert_close(value, found.state[name], rtol=0, atol=1e-6)


class Following(Problem):
    """Notes the masks after every step."""

    def run(self, *given: Any, **more: Any) -> Any:
        self.seen: list[Tensor] = []
        return adapt(
            self.live,
            self.losses,
            AdaptSettings(steps=60, lr_masks=0.05, lr_lambda=0.02, schedule="constant"),
            progress=lambda *_: self.seen.append(torch.cat(list(self.live.masks().values()))),
        )


def test_components_pruned_at_the_start_return_only_if_they_may() -> None:
    for returnable in (True, False):
        problem = Following(Learn(temperature=1.0, returnable=returnable), scale=1.5)
        start = torch.cat(list(problem.live.masks().values()))
        problem.run()
        returned = any(bool((mask & ~start).any()) for mask in problem.seen)
        assert returned == returnable
        assert any(bool((start & ~mask).any()) for mask in problem.seen)  # what is kept may go either way
        pruned = problem.live.logits[~start]
        assert returnable or bool((pruned == -0.1).all())


@pytest.mark.parametrize("seed", range(3))
def test_components_that_may_not_return_have_no_gradient(seed: int) -> None:
    grads = {}
    for returnable in (True, False):
        problem = Problem(Learn(temperature=1.0, returnable=returnable))
        problem.live.write()
        x = torch.randn(8, 5, generator=generator(seed))
        problem.net(x).square().mean().backward()
        problem.live.pull_back()
        grads[returnable] = problem.live.logits.grad
    kept = problem.live.logits > 0
    assert torch.equal(grads[False][kept], grads[True][kept])
    assert not grads[False][~kept].any()
    assert grads[True][~kept].any()


@pytest.mark.parametrize("rank", [0.25, 1.0])
def test_what_may_return_is_of_the_start_also_after_a_kill(tmp_path: Path, rank: float) -> None:
    settings = SETTINGS.model_copy(update={"keep": "last", "lr_masks": 0.2})

    def go(state: Path | None = None, at: int | None = None) -> Judged:
        torch.manual_seed(0)
        own = Judged()
        own.live.learn = Learn(temperature=1.0, returnable=False)
        if at is not None:
            own.hook("b", at, boom)
        grid = Grid((rank, 0.5), (0.3, 1.0), (1, 0))
        adapt(own.live, own.losses, settings, state, judge=liking(own.live, rank, 1.0), memory=own.memory, grid=grid)
        return own

    whole = go()
    with pytest.raises(ZeroDivisionError):
        go(tmp_path / "state.pt", at=7)
    again = go(tmp_path / "state.pt")
    assert_same(whole, again)
    start = Judged().live
    start.reset(1.0, rank)
    first, last = (torch.cat(list(own.masks().values())) for own in (start, whole.live))
    assert not (last & ~first).any()
    assert rank == 0.25 or (first & ~last).any()


@pytest.mark.parametrize("method", ADAPTIVE)
def test_an_unknown_granularity_is_refused_with_those_that_are(method: str) -> None:
    with pytest.raises(RecipeError, match=r"lambda_per.*'tensor', 'layer', 'shared-layer', 'task' or 'model'.*'block'"):
        parse(ADAPTIVE[method], {"lambda_per": "block"}, "parameters")
