"""Adaptation a block at a time: two streams, one block in memory, whatever stands before and behind it untouched."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adarank
import clip_zoo
import image_zoo
import lm_zoo
import text_zoo
from adarank.adapt.live_weights import Learn, LiveWeights
from adarank.adapt.methods import AdaRank
from adarank.adapt.streams import Streams
from adarank.cli.main import main
from adarank.errors import RecipeError
from adarank.io.checkpoint import Checkpoint
from adarank.models.chain import Chain, find_chain
from adarank.recipe.reader import load_recipe
from adarank.spectral.blocks import Blocks, task_vector_blocks
from adarank.spectral.mask_file import FILE, MaskFile
from make import randn

WIDTH, LAYERS = 8, 3
FAST = {"by": "block", "steps": 6, "lr_masks": 0.05, "lr_lambda": 0.05, "learn_heads": False}
ALL = {"rank": 1.0, "lambda": 1.0, "origin": "pretrained"}


class Layer(nn.Module):
    """A residual layer that says how often it has run."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.norm = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, given: Tensor, scale: float) -> tuple[Tensor, None]:
        return given + scale * self.narrow(torch.relu(self.wide(self.norm(given)))), None


class Net(nn.Module):
    """A stem, some layers, a norm and a head."""

    def __init__(self, classes: int = 3, layers: int = LAYERS) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(5, WIDTH), nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.classifier = nn.Linear(WIDTH, classes)

    def forward(self, given: Tensor) -> Tensor:
        hidden = self.stem(given)
        for layer in self.layers:
            hidden = layer(hidden, 0.5)[0]
        logits: Tensor = self.classifier(self.norm(hidden))
        return logits


def models(tasks: str, spread: float = 0.2, moved: str = "") -> tuple[Net, dict[str, nn.Module]]:
    """A base, and for each letter an expert, whose tensors of names that begin with `moved` are others."""
    torch.manual_seed(0)
    base, experts = Net(), {}
    for task in tasks:
        experts[task] = Net()
        state = {name: t + spread * torch.randn_like(t) for name, t in base.state_dict().items()}
        kept = {name: t for name, t in base.state_dict().items() if not name.startswith(moved)}
        experts[task].load_state_dict({**state, **kept})
    return base, experts


def batches(tasks: str) -> dict[str, list[Tensor]]:
    return {task: [randn(10 * place + i, 16, 5) for i in range(4)] for place, task in enumerate(tasks)}


def adapted(
    tasks: str,
    parameters: Mapping[str, Any],
    settings: Mapping[str, Any],
    moved: str = "",
    method: str | type[AdaRank] = "adarank",
) -> adarank.Adapted:
    base, experts = models(tasks, moved=moved)
    select = adarank.Select(head=("classifier.*",))
    return adarank.adapt(base, experts, batches(tasks), method, parameters, settings, select=select)


def test_the_state_of_one_expert_is_kept() -> None:
    result, expert = adapted("a", ALL, FAST), models("a")[1]["a"].state_dict()
    for name, tensor in result.state.items():
        torch.testing.assert_close(tensor, expert[name], atol=2e-6, rtol=1e-5)


def test_one_expert_is_recovered_from_half_the_way() -> None:
    long = {**FAST, "steps": 150, "lr_masks": 0.0}
    result, start = (
        adapted("a", {**ALL, "lambda": 0.5}, settings, "layers.").state for settings in (long, {**FAST, "steps": 0})
    )
    expert = models("a", moved="layers.")[1]["a"].state_dict()
    learned = [name for name in result if name.startswith("layers.")]
    assert len(learned) == 6 * LAYERS
    for name in learned:
        before, after = (float((state[name] - expert[name]).abs().max()) for state in (start, result))
        assert before > 0.05
        assert after < before / 5, name
    assert torch.equal(result["stem.weight"], start["stem.weight"])


@pytest.mark.parametrize(
    "parameters", [{}, {"basis": "tsv_m"}, {"mask": "binary", "rank": 0.5, "lambda": 1.3}], ids=str
)
def test_zero_steps_give_the_start_of_the_whole(parameters: dict[str, Any]) -> None:
    none = {**FAST, "steps": 0}
    by_block, by_model = (adapted("ab", parameters, {**none, "by": by}) for by in ("block", "model"))
    assert by_block.history.starts == by_model.history.starts
    assert by_block.state.keys() == by_model.state.keys()
    assert all(torch.equal(by_block.state[name], by_model.state[name]) for name in by_block.state)
    assert all(torch.equal(by_block.masks.masks[name], mask) for name, mask in by_model.masks.masks.items())


@torch.enable_grad()
def test_the_gradient_of_a_block_is_that_of_autograd() -> None:
    """Of masks and λ, beside float64 autograd through a whole network whose other layers are constants."""
    base, experts = models("ab")
    net, given = models("a")[0], batches("a")["a"][0]
    names = {f"{part}.weight": getattr(net.layers[1], part).weight for part in ("wide", "narrow")}  # type: ignore[arg-type]
    origins = {name: weight.detach().clone() for name, weight in names.items()}
    deltas = {name: {task: expert.layers[1].get_parameter(name).detach() - origins[name] for task, expert in experts.items()}
              for name in names}  # type: ignore[operator, union-attr, index]  # fmt: skip
    blocks: dict[str, Blocks] = {name: task_vector_blocks(origins[name], deltas[name], name) for name in names}
    live = LiveWeights(names, blocks, Learn(mask="soft"), 0.7, 0.5)
    live.write()
    chain = find_chain(net, lambda module, batch: module(batch), given, list(names.values()))
    assert chain.paths == ("layers.1",)
    target = randn(7, 16, WIDTH)
    (chain.run(0, given, {})[0] - target).square().sum().backward()
    live.pull_back()

    double = Net().double()
    double.load_state_dict({name: tensor.double() for name, tensor in base.state_dict().items()})
    lam = torch.full((2, 2), 0.7, dtype=torch.float64, requires_grad=True)
    masks = {name: mask.double().requires_grad_() for name, mask in live.masks().items()}
    weights = {}
    for row, name in enumerate(names):
        block = blocks[name]
        factors = block.s.double() * masks[name] * lam[row].repeat_interleave(torch.tensor(block.sizes))
        weights[name] = block.origin.double() + (block.u.double() * factors) @ block.v.double().T
    hidden = double.layers[0](double.stem(given.double()), 0.5)[0].detach()
    output = torch.func.functional_call(double.layers[1], weights, (hidden, 0.5))[0]
    (output - target.double()).square().sum().backward()
    torch.testing.assert_close(live.lam.grad.double(), lam.grad, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]
    by_mask = torch.cat([mask.grad for mask in masks.values()])  # type: ignore[misc]
    spectra = [s.double() for block in blocks.values() for s in block.s.split(block.sizes)]
    paces = torch.cat([(s.square().mean().sqrt() / s).clamp(max=20) for s in spectra])  # steps count in weights
    torch.testing.assert_close(live.logits.grad.double() * 0.2, by_mask * paces, rtol=1e-3, atol=1e-4)  # type: ignore[union-attr]


ALIVE: weakref.WeakSet[LiveWeights] = weakref.WeakSet()
MOST: list[int] = []


class Counted(AdaRank):
    """AdaRank that counts how many tensors' factors are in memory whenever it makes live weights."""

    name = "counted"

    def live(self, parameters: Any, blocks: Any, settings: Any, basis: Any) -> LiveWeights:
        made = super().live(parameters, blocks, settings, basis)
        ALIVE.add(made)
        MOST.append(sum(len(each.blocks) for each in ALIVE))
        return made


def test_factors_of_one_block_are_in_memory_at_a_time() -> None:
    MOST.clear()
    adapted("abc", {"rank": 0.5, "lambda": 1.0}, FAST, method=Counted)
    assert len(MOST) > 3 * LAYERS
    assert max(MOST) == len([name for name in Net().state_dict() if name.startswith("layers.0.")])


def run(zoo: ModuleType, folder: Path, out: str, progress: Any = None, **adapt: Any) -> dict[str, Any]:
    block = {"batch_size": 4, **FAST, **adapt}
    start = {"origin": "pretrained", "rank": 1.0, "lambda": 0.1}
    recipe = zoo.recipe(folder, merge_method="adarank", parameters=start, adapt=block)
    return adarank.merge_recipe(load_recipe(recipe), folder / out, progress=progress)["adaptation"]


CASES = [(text_zoo, {"architecture": name}) for name in ("bert", "distilbert", "gpt2")]
CASES += [(image_zoo, {"architecture": name}) for name in ("vit", "convnext", "resnet", "swin")] + [(clip_zoo, {})]
CASES += [(lm_zoo, {"architecture": "t5"})]


@pytest.mark.parametrize(
    ("zoo", "given"),
    CASES,
    ids=lambda value: getattr(value, "__name__", "-".join(value.values()) if isinstance(value, dict) else ""),
)
def test_every_family_is_adapted_block_by_block(zoo: ModuleType, given: dict[str, Any], tmp_path: Path) -> None:
    zoo.make_zoo(tmp_path, **given)
    report = run(zoo, tmp_path, "out", keep="last", steps=8)
    blocks = report["blocks"]
    assert report["steps"] == 8 * len(blocks)
    first, last = blocks[0], blocks[-1]
    assert sum(first["after"].values()) < sum(first["before"].values())
    assert all(value > 0 for value in last["before"].values())
    merged = Checkpoint(tmp_path / "out")
    assert all(
        bool(merged.read(name).isfinite().all())
        for name in merged.tensors
        if merged.tensors[name].dtype.is_floating_point
    )


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_zoo.make_zoo(tmp_path_factory.mktemp("zoo"))


def test_its_masks_give_its_weights_and_can_be_looked_at(zoo: Path) -> None:
    run(text_zoo, zoo, "seen", keep="last")
    again = text_zoo.recipe(zoo, "again.yaml", merge_method="masked", parameters={"masks": str(zoo / "seen" / FILE)})
    adarank.merge_recipe(load_recipe(again), zoo / "again")
    one, other = (Checkpoint(zoo / name) for name in ("seen", "again"))
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.tensors)
    for command in ("inspect", "verify", "report"):
        assert main([command, str(zoo / "seen")]) == 0
    assert "encoder.layer.1" in (zoo / "seen.html").read_text()


class Killed(Exception):
    """Stands for the process's end."""


def killing(at: int) -> Callable[[Any, int], None]:
    def progress(history: Any, steps: int) -> None:
        if history.step == at:
            raise Killed

    return progress


def same(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in ("model.safetensors", FILE))


@pytest.mark.parametrize("at", [1, 7, 12])  # in the first block, in the second, and at its end
def test_a_run_killed_in_any_block_goes_on_bit_equal(zoo: Path, at: int) -> None:
    if not (zoo / "whole").exists():
        run(text_zoo, zoo, "whole")
    with pytest.raises(Killed):
        run(text_zoo, zoo, f"killed-{at}", progress=killing(at))
    report = run(text_zoo, zoo, f"killed-{at}")
    assert report["resumed_from"] == ([6] if at > 6 else [])
    assert MaskFile.load(zoo / f"killed-{at}" / FILE).about == MaskFile.load(zoo / "whole" / FILE).about
    assert same(zoo / f"killed-{at}", zoo / "whole")
    assert not list(zoo.glob(".killed*"))


def test_a_run_killed_between_files_goes_on_bit_equal(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (zoo / "whole").exists():
        run(text_zoo, zoo, "whole")
    plain, written = Streams.keep, 0

    def keep(streams: Streams, stream: str, place: int, batch: str, given: Any) -> None:
        nonlocal written
        written += (stream, place) == ("merged", 1)
        if written == 3:
            raise Killed
        plain(streams, stream, place, batch, given)

    with monkeypatch.context() as patched:
        patched.setattr(Streams, "keep", keep)
        with pytest.raises(Killed):
            run(text_zoo, zoo, "between")
    assert run(text_zoo, zoo, "between")["resumed_from"] == [6]
    assert same(zoo / "between", zoo / "whole")


def test_steps_that_lead_away_are_taken_back(zoo: Path) -> None:
    report = run(text_zoo, zoo, "away", lr_masks=5.0, lr_lambda=5.0, schedule="constant")
    still = run(text_zoo, zoo, "still", steps=0)
    assert still["steps"] == 0
    kept = {block["block"]: block["kept"] for block in report["blocks"]}
    assert False in kept.values()
    for block in report["blocks"]:
        ratios = [block["after"][task] / block["before"][task] for task in block["before"]]
        assert block["kept"] == (sum(ratios) < len(ratios))
    one, other = (Checkpoint(zoo / name) for name in ("away", "still"))
    for name in one.tensors:
        if not any(kept[block] and f"{block}." in name for block in kept):
            assert torch.equal(one.read(name), other.read(name)), name


def test_what_cannot_be_learned_by_block_is_refused() -> None:
    for settings, parameters, text in (
        ({"objective": "entropy"}, {}, "adapt.objective: by: block"),
        ({}, {"lambda_per": "task"}, "lambda_per: one λ for each task"),
    ):
        with pytest.raises(RecipeError, match=text):
            adapted("ab", parameters, {**FAST, **settings})
    base, experts = models("ab")
    with pytest.raises(RecipeError, match="objective: blocks have an objective of their own"):
        adarank.adapt(base, experts, batches("ab"), settings=FAST, objective=lambda logits: logits.sum())


def test_masks_are_of_the_positions_a_block_runs_over() -> None:
    chain = Chain(nn.Identity(), lambda module, batch: batch, ("encoder.block.0", "decoder.block.0"))
    batch = {"attention_mask": torch.ones(2, 3, 4), "decoder_attention_mask": torch.ones(2, 5)}
    assert chain.mask(0, batch).shape == (6, 4)  # type: ignore[union-attr]
    assert chain.mask(1, batch) is batch["decoder_attention_mask"]
    assert chain.mask(0, batch["attention_mask"]) is None
    assert chain.mask(0, {}) is None


class Shared(Net):
    """One layer that runs several times."""

    def forward(self, given: Tensor) -> Tensor:
        hidden = self.layers[0](self.layers[0](self.stem(given), 0.5)[0], 0.5)[0]
        logits: Tensor = self.classifier(self.norm(hidden))
        return logits


class Dense(Net):
    """Every layer is seen at the end."""

    def forward(self, given: Tensor) -> Tensor:
        hidden, seen = self.stem(given), []
        for layer in self.layers:
            hidden = layer(hidden, 0.5)[0]
            seen.append(hidden)
        logits: Tensor = self.classifier(self.norm(sum(seen[:-1], seen[-1])))
        return logits


@pytest.mark.parametrize(
    ("net", "text"),
    [
        (Shared(layers=1), "runs 2 times in a pass"),
        (Dense(), "do not give its predictions"),
        (nn.Sequential(), "has no blocks"),
    ],
    ids=["shared", "dense", "none"],
)
def test_networks_without_a_chain_are_refused(net: nn.Module, text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        find_chain(net, lambda module, batch: module(batch), randn(1, 4, 5), list(net.parameters()))


def test_lists_inside_a_block_are_taken_where_they_are_all() -> None:
    inner = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    beside = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    beside.register_parameter("scale", nn.Parameter(torch.ones(1)))
    net = nn.Sequential(inner, beside)
    chain = find_chain(net, lambda module, batch: module(batch), randn(1, 4, 5), list(net.parameters()))
    assert chain.paths == ("0.0", "0.1", "1")
    assert json.dumps(chain.needed(2)) == "[1]"
