"""The models that `fusionbench_compare.py` merges, made from a seed. Torch alone: FusionBench's side imports it too."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

State = Mapping[str, Tensor]
Experts = Mapping[str, State]
Models = tuple[State, Experts]
SHAPES: dict[str, tuple[int, ...]] = {
    "positions": (1, 9, 12),
    "patches.weight": (12, 3, 4, 4),
    "patches.bias": (12,),
    "words.weight": (40, 12),
    "layers.0.norm.weight": (12,),
    "layers.0.qkv.weight": (36, 12),
    "layers.0.qkv.bias": (36,),
    "layers.0.out.weight": (12, 12),
    "layers.1.up.weight": (24, 16),
    "layers.1.up.bias": (24,),
    "layers.1.down.weight": (16, 24),
    "layers.1.mix.weight": (32, 32),
}
SPREAD, NOISE, SHARED = 0.05, 0.02, 0.02
WIDTH, INPUTS, BATCH = 12, 64, 32


class Classifier(nn.Module):
    """A network small enough for methods that run the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.last = nn.Linear(WIDTH, 24), nn.LayerNorm(24), nn.Linear(24, 5)

    def forward(self, inputs: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.last(gelu(self.norm(self.up(inputs)))))


def classifier(state: State) -> Classifier:
    module = Classifier()
    module.load_state_dict(dict(state))
    return module


def inputs(number: int, silent: bool = False) -> Tensor:
    """The unlabelled inputs of an expert, (INPUTS, WIDTH); `silent`: their first entry is always 0."""
    found = torch.randn(INPUTS, WIDTH, generator=torch.Generator().manual_seed(number))
    if silent:
        found[:, 0] = 0
    return found


def models(seed: int) -> dict[str, Models]:
    """Name -> base and experts.

    pair, two, three, four: one to four experts. narrow: three, with a matrix of two rows. scalar: two, with a tensor of
    one value that they move apart. cancelling: two, with a bias that they move by opposite amounts, exactly.
    classifier: three `Classifier`s.
    """
    sizes = {"pair": 1, "two": 2, "three": 3, "four": 4, "narrow": 3, "scalar": 2, "cancelling": 2}
    extra = {"narrow": {"last.weight": (2, 16)}, "scalar": {"temperature": ()}, "cancelling": {"last.bias": (8,)}}
    shapes = {name: {**SHAPES, **extra.get(name, {})} for name in sizes}
    shapes["classifier"] = {name: tuple(tensor.shape) for name, tensor in Classifier().state_dict().items()}
    found: dict[str, Models] = {}
    for number, (name, tasks) in enumerate({**sizes, "classifier": 3}.items()):
        found[name] = made(shapes[name], tasks, torch.Generator().manual_seed(1000 * seed + number))
    for name, tensor, moves in (("scalar", "temperature", (0.1, -0.05)), ("cancelling", "last.bias", (0.5, -0.5))):
        base, experts = found[name]
        base[tensor].zero_()
        for own, move in zip(experts.values(), moves, strict=True):
            own[tensor].fill_(move)
    return found


def made(shapes: Mapping[str, tuple[int, ...]], tasks: int, source: torch.Generator) -> Models:
    """A base of noise, and experts that add noise to it, part of it the same for all."""

    def noise(scale: float) -> dict[str, Tensor]:
        return {name: scale * torch.randn(shape, generator=source) for name, shape in shapes.items()}

    base, shared = noise(SPREAD), noise(SHARED)
    own = {f"expert{i}": noise(NOISE) for i in range(tasks)}
    return base, {task: {n: base[n] + shared[n] + noisy[n] for n in shapes} for task, noisy in own.items()}
