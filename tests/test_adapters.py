"""LoRA adapters as experts: what `peft` makes of them when it merges is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adarank.alignment.adapters import with_adapter
from adarank.alignment.align import align
from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.io.adapted import Adapted
from adarank.io.adapter import Adapter
from adarank.io.checkpoint import Checkpoint, MemorySource
from adarank.io.low_rank import Factors, about_average
from adarank.methods import METHODS, merge_tensors
from adarank.spectral.svd import decompose_factors
from lora_zoo import KINDS, Kind, agree, merged_by_peft, save_adapter, save_base

TASKS = ("one", "two", "three")
METHODS_COMPARED = {
    "task_arithmetic": {"lambda": 0.4},
    "ties": {"density": 0.3},
    "cart": {"rank": 0.3},
    "tsv_m": {},
}
PLAIN = KINDS["lora"]


class Zoo:
    """A base, three adapters over it, and the states that peft merges them into, of one kind."""

    def __init__(self, kind: Kind, folder: Path) -> None:
        self.folder, self.kind = folder, kind
        save_base(kind, folder / "base")
        for seed, task in enumerate(TASKS):
            save_adapter(kind, folder / task, seed)
        self.states = {task: merged_by_peft(kind, folder / task) for task in TASKS}

    def adapted(self) -> tuple[Checkpoint, dict[str, Adapted]]:
        base = Checkpoint(self.folder / "base")
        return base, {task: with_adapter(base, Adapter(self.folder / task)) for task in TASKS}

    def factored(self) -> AlignedCheckpoints:
        base, experts = self.adapted()
        return align(base, experts, task_heads=self.kind.task is not None)

    def dense(self) -> AlignedCheckpoints:
        """The same by whole models. A weight that is tied has two names in a module's state, and one in a file."""
        base, experts = self.adapted()
        kept = {task: {n: self.states[task][n] for n in each.tensors} for task, each in experts.items()}
        sources = {task: MemorySource(state, task) for task, state in kept.items()}
        return align(base, sources, task_heads=self.kind.task is not None)


@pytest.fixture(scope="module")
def zoos(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Zoo] = {}

    def zoo(name: str) -> Zoo:
        if name not in made:
            made[name] = Zoo(KINDS[name], tmp_path_factory.mktemp("zoo"))
        return made[name]

    return zoo


def merged(network: AlignedCheckpoints, name: str, parameters: Any = None) -> dict[str, Tensor]:
    method = METHODS[name].model_validate(METHODS_COMPARED.get(name, {}) if parameters is None else parameters)
    return dict(merge_tensors(method, network))


@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_over_its_model_is_what_peft_merges(name: str, zoos: Any) -> None:
    zoo = zoos(name)
    base, experts = zoo.adapted()
    for task, expert in experts.items():
        assert expert.tensors
        assert any(
            name not in base.tensors or not torch.equal(expert.read(name), base.read(name)) for name in expert.tensors
        )
        for tensor, info in expert.tensors.items():
            assert tuple(expert.read(tensor).shape) == info.shape
            torch.testing.assert_close(expert.read(tensor), zoo.states[task][tensor], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS_COMPARED)
@pytest.mark.parametrize("name", KINDS)
def test_merging_adapters_is_merging_what_peft_merges(name: str, method: str, zoos: Any) -> None:
    zoo = zoos(name)
    agree(merged(zoo.factored(), method), merged(zoo.dense(), method))


OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("iso_c", {}), ("star", {}), ("svd_k", {"rank": 0.2}), ("cart", {"energy": 0.9}), ("cart", {"rank": 1.0}),
    ("average", {}), ("linear", {}), ("karcher", {}), ("model_stock", {}), ("consensus_ta", {}), ("breadcrumbs", {"density": 0.8}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "parameters"), OTHERS)
@pytest.mark.parametrize("name", ["lora", "rank and alpha patterns", "every matrix", "all biases"])
def test_every_other_method_agrees_too(name: str, method: str, parameters: dict[str, Any], zoos: Any) -> None:
    zoo = zoos(name)
    agree(merged(zoo.factored(), method, parameters), merged(zoo.dense(), method, parameters), 5e-5)


@pytest.mark.parametrize("name", ["lora", "all biases"])
def test_a_subspace_and_what_is_outside_of_it_agree(name: str, zoos: Any) -> None:
    """Iso-CTS where it is determined: with adapters of few components more tasks than directions may be left outside."""
    zoo = zoos(name)
    agree(merged(zoo.factored(), "iso_cts"), merged(zoo.dense(), "iso_cts"), 5e-5)


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    ranks=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_spectra_of_factors_are_those_of_the_product(rows: int, columns: int, ranks: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    parts = {
        str(i): Factors(torch.randn(rows, r).double(), torch.randn(r, r).double(), torch.randn(r, columns).double())
        for i, r in enumerate(ranks)
    }
    mean = sum(part.dense() for part in parts.values()) / len(parts)
    for task, centred in about_average(parts).items():
        for factors, dense in ((centred, parts[task].dense() - mean), (parts[task], parts[task].dense())):
            spectrum = decompose_factors(factors)
            assert spectrum.count == min(rows, columns)
            torch.testing.assert_close(spectrum.values(), torch.linalg.svdvals(dense), atol=1e-9, rtol=1e-9)
            torch.testing.assert_close(spectrum.reconstruct(), dense, atol=1e-9, rtol=1e-9)
            assert spectrum.s.numel() <= max(factors.rank, 0) or factors.rank >= min(rows, columns)
            torch.testing.assert_close(factors.norm(), dense.norm(), atol=1e-9, rtol=1e-9)
