"""FeatCal against its formulas, solved by least squares on the two streams of a network that is run by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adarank
from make import randn


class Block(nn.Module):
    """A norm and two linear layers around a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 6), nn.Linear(6, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, classes: int, width: int = 4, class_token: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, classes)
        if class_token:
            self.cls_token = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x if x.dim() == 2 else x[:, 0])


def problem(
    shape: tuple[int, ...] = (40, 4), class_token: bool = False
) -> tuple[Net, dict[str, Net], dict[str, Tensor]]:
    torch.manual_seed(0)
    base = Net(2, class_token=class_token)
    experts = {task: Net(count, class_token=class_token) for task, count in (("a", 2), ("b", 3))}
    for expert in experts.values():
        near = {n: t + 0.3 * torch.randn_like(t) for n, t in base.state_dict().items() if not n.startswith("head")}
        expert.load_state_dict(near, strict=False)
    return base, experts, {task: 1 + randn(i, *shape) for i, task in enumerate(experts)}


SETTINGS = {"start": 0.3, "target": 0.3, "anchor": 2.0, "ridge": 0.05}


def ridge_fit(xs: list, weights: list, targets: list, ridge: float, anchor: np.ndarray) -> np.ndarray:
    """argmin_W Σ_t w_t mean‖W x_s - y‖² + λ‖W - A‖² by numpy's least squares, rows weighted; W as (out, in)."""
    left = [np.sqrt(w / len(x)) * x for x, w in zip(xs, weights, strict=True)]
    right = [np.sqrt(w / len(y)) * y for y, w in zip(targets, weights, strict=True)]
    left.append(np.sqrt(ridge) * np.eye(xs[0].shape[1]))
    right.append(np.sqrt(ridge) * anchor.T)
    return np.linalg.lstsq(np.vstack(left), np.vstack(right), rcond=None)[0].T


def by_hand(base: Net, experts: dict[str, Net], inputs: dict[str, Tensor], settings: dict) -> dict[str, np.ndarray]:
    """The calibrated blocks, each layer's inputs caught by running the streams layer by layer."""
    merged = Net(2).double()
    states = {task: {n: t.double() for n, t in net.state_dict().items()} for task, net in experts.items()}
    origin = {n: t.double() for n, t in base.state_dict().items()}
    body = [n for n in origin if not n.startswith("head")]
    before = {n: origin[n] + settings["start"] * sum(states[t][n] - origin[n] for t in states) for n in body}
    merged.load_state_dict({**origin, **before})
    streams = {task: (x.double(), x.double()) for task, x in inputs.items()}
    result: dict[str, np.ndarray] = {}

    def anchor(name: str) -> np.ndarray:
        return (settings["anchor"] * before[name] + (1 - settings["anchor"]) * origin[name]).numpy()

    def given(block: Block, x: Tensor) -> dict[str, Tensor]:
        z = block.norm(x)
        return {"norm": x, "up": z, "down": torch.tanh(block.up(z))}

    for number in range(2):
        expert_blocks = {task: net.double().blocks[number] for task, net in experts.items()}
        seen = {t: (given(merged.blocks[number], s), given(expert_blocks[t], e)) for t, (s, e) in streams.items()}
        solved: dict[str, np.ndarray] = {}
        for layer in ("up", "down"):
            name = f"blocks.{number}.{layer}"
            xs = [seen[t][0][layer].detach().numpy() for t in states]
            xe = [seen[t][1][layer].detach().numpy() for t in states]
            xt = [settings["target"] * e + (1 - settings["target"]) * s for s, e in zip(xs, xe, strict=True)]
            shares = [1 / np.linalg.norm(x.T @ x / len(x)) for x in xs]
            weights = [states[t][f"{name}.weight"].numpy() for t in states]
            biases = [states[t][f"{name}.bias"].numpy() for t in states]
            targets = [x @ w.T for x, w in zip(xt, weights, strict=True)]
            weight = ridge_fit(xs, shares, targets, settings["ridge"], anchor(f"{name}.weight"))
            rest = [b + np.mean(y - x @ weight.T, axis=0) for b, y, x in zip(biases, targets, xs, strict=True)]
            pulled = settings["ridge"] * anchor(f"{name}.bias")
            total = sum(s * r for s, r in zip(shares, rest, strict=True)) + pulled
            solved |= {f"{name}.weight": weight, f"{name}.bias": total / (sum(shares) + settings["ridge"])}
        name, width = f"blocks.{number}.norm", 4
        gains, shifts = np.zeros(width), np.zeros(width)
        for channel in range(width):  # y = γ z + β towards each expert's γ_t z + β_t
            left, right = [], []
            for t in states:
                z = nn.functional.layer_norm(seen[t][0]["norm"], (width,)).detach().numpy()[:, channel]
                design = np.stack([z, np.ones_like(z)], axis=1) / np.sqrt(len(z))
                own_pair = [float(states[t][f"{name}.{key}"][channel]) for key in ("weight", "bias")]
                left.append(design)
                right.append(design @ own_pair)
            left.append(np.sqrt(settings["ridge"]) * np.eye(2))
            right.append(
                np.sqrt(settings["ridge"]) * np.array([anchor(f"{name}.{k}")[channel] for k in ("weight", "bias")])
            )
            gains[channel], shifts[channel] = np.linalg.lstsq(np.vstack(left), np.concatenate(right), rcond=None)[0]
        solved |= {f"{name}.weight": gains, f"{name}.bias": shifts}
        merged.load_state_dict({n: torch.from_numpy(t) for n, t in solved.items()}, strict=False)
        result |= solved
        streams = {t: (merged.blocks[number](s), expert_blocks[t](e)) for t, (s, e) in streams.items()}
    return result


@pytest.mark.parametrize("changes", [{}, {"target": 1.0}, {"anchor": 1.0, "ridge": 0.5}, {"start": 0.1, "target": 0.0}])
def test_featcal_by_hand(changes: dict) -> None:
    settings = {**SETTINGS, **changes}
    base, experts, inputs = problem()
    result = adarank.merge(
        base, experts, "featcal", settings, batches={t: list(x.split(16)) for t, x in inputs.items()}
    )
    wanted = by_hand(base, experts, inputs, settings)
    assert {name for name in result if not name.startswith("head")} == wanted.keys()
    for name, tensor in ((name, result[name]) for name in wanted):
        np.testing.assert_allclose(tensor.numpy(), wanted[name], rtol=2e-4, atol=2e-5, err_msg=name)


def test_without_a_pull_one_expert_is_itself() -> None:
    base, experts, inputs = problem()
    result = adarank.merge(
        base, {"a": experts["a"]}, "featcal", {"start": 1.0, "ridge": 0.0}, batches={"a": [inputs["a"]]}
    )
    for name in (name for name in result if not name.startswith("head")):
        torch.testing.assert_close(result[name], experts["a"].state_dict()[name], rtol=1e-3, atol=1e-3)


def test_a_great_pull_is_the_anchor() -> None:
    base, experts, inputs = problem()
    batches = {task: [x] for task, x in inputs.items()}
    result = adarank.merge(base, experts, "featcal", {"start": 0.3, "anchor": 2.0, "ridge": 1e9}, batches=batches)
    beyond = adarank.merge(base, experts, "task_arithmetic", {"lambda": 0.6})
    for name in (name for name in result if not name.startswith("head")):
        torch.testing.assert_close(result[name], beyond[name], rtol=1e-4, atol=1e-4)


def test_the_first_layer_without_pull_and_target_is_regmeans() -> None:
    """Where all Gram matrices weigh alike: RegMean++ is the special case."""
    torch.manual_seed(1)
    base, a, b = (nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)) for _ in range(3))
    experts, inputs = {"a": a, "b": b}, {"a": randn(1, 30, 4), "b": randn(2, 30, 4)}
    inputs = {task: x / torch.linalg.matrix_norm(x.T @ x).sqrt() for task, x in inputs.items()}
    batches = {task: [x] for task, x in inputs.items()}
    settings = {"target": 0.0, "ridge": 0.0}
    result = adarank.merge(base, experts, "featcal", settings, batches=batches)["0.weight"]
    wanted = adarank.merge(base, experts, "regmean++", {"off_diagonal": 1.0}, batches=batches)["0.weight"]
    torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)


def test_behind_a_class_token_other_positions_hardly_count() -> None:
    base, experts, inputs = problem((20, 5, 4), class_token=True)
    settings = {**SETTINGS, "positions": 1e-9}
    moved = {task: torch.cat([x[:, :1], x[:, 1:] + 3 * randn(7, 20, 4, 4)], dim=1) for task, x in inputs.items()}
    result, other = (
        adarank.merge(base, experts, "featcal", settings, batches={t: [x] for t, x in given.items()})
        for given in (inputs, moved)
    )
    assert torch.equal(result["cls_token"], other["cls_token"])
    assert not torch.allclose(result["blocks.0.up.weight"], other["blocks.0.up.weight"], atol=1e-3)
    whole = adarank.merge(
        base, experts, "featcal", {**SETTINGS, "positions": 1.0}, batches={t: [x] for t, x in inputs.items()}
    )
    assert not torch.allclose(result["blocks.1.up.weight"], whole["blocks.1.up.weight"], atol=1e-4)
    assert torch.equal(result["blocks.0.up.weight"], whole["blocks.0.up.weight"])


def test_experts_are_left_as_they_were() -> None:
    base, experts, inputs = problem()
    before = {task: {n: t.clone() for n, t in net.state_dict().items()} for task, net in experts.items()}
    adarank.merge(base, experts, "featcal", batches={task: [x] for task, x in inputs.items()})
    for task, net in experts.items():
        assert all(torch.equal(t, before[task][n]) for n, t in net.state_dict().items())
