"""What is merged in blocks is what merging whole tensors gives, bit for bit; what cannot be merged is said of whole tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import adarank
from adarank.alignment.align import align
from adarank.alignment.task_vectors import BLOCK, AlignedCheckpoints, OriginKind
from adarank.errors import AdaRankError, OutputError
from adarank.io.checkpoint import MemorySource
from adarank.io.writer import Streamed, write_folders
from adarank.methods import METHODS, Method, merge_tensors
from adarank.methods.base import Merging

BY_ENTRY = [name for name, kind in METHODS.items() if kind.model_construct().by_entry]
NAMES = ("a.weight", "b.weight")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ONE = ("nearswap", "passthrough")


def models(dtype: torch.dtype, count: int) -> list[dict[str, Tensor]]:
    """A base and experts of two tensors, one of two blocks and a rest, the other, which is not contiguous, of one and a rest."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, (2 * BLOCK + 9) // 3), (5, BLOCK // 5 + 7))
    base = {name: torch.randn(shape, generator=generator) for name, shape in zip(NAMES, shapes, strict=True)}
    noisy = [{n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in base.items()} for _ in range(count)]
    made = [{name: tensor.to(dtype) for name, tensor in state.items()} for state in (base, *noisy)]
    return [{**state, "b.weight": state["b.weight"].t().contiguous().t()} for state in made]


def aligned(states: list[dict[str, Tensor]], based: bool = True) -> AlignedCheckpoints:
    base, *experts = (MemorySource(state, f"model {number}") for number, state in enumerate(states))
    return align(base if based else None, {f"task{number}": expert for number, expert in enumerate(experts)})


def of_whole_tensors(kind: type[Method]) -> type[Method]:
    """The same formula in a class that does not say that it is elementwise."""
    return type("Whole", (kind,), {"__module__": __name__})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BY_ENTRY)
def test_blocks_give_the_bits_of_whole_tensors(name: str, dtype: torch.dtype) -> None:
    kind, given = METHODS[name], {"t": 0.004} if name == "nearswap" else {}
    network = aligned(models(dtype, 1 if name in ONE else 3), kind.needs_base())
    whole = of_whole_tensors(kind)(**given)
    assert not whole.by_entry
    wanted = dict(merge_tensors(whole, network))
    for merged in (
        dict(merge_tensors(kind(**given), network)),
        dict(Merging(kind(**given), network).in_dtypes({n: (tuple(t.shape), t.dtype) for n, t in wanted.items()})),
    ):
        assert all(torch.equal(merged[n], wanted[n]) and merged[n].dtype == wanted[n].dtype for n in NAMES)
    narrow = dict(Merging(kind(**given), network).in_dtypes({n: (tuple(wanted[n].shape), dtype) for n in NAMES}))
    assert all(narrow[n].dtype == dtype and torch.equal(narrow[n], wanted[n].to(dtype)) for n in NAMES)


@pytest.mark.parametrize("kind", ["pretrained", "average", "zero"])
@pytest.mark.parametrize(
    ("of_base", "of_experts"), [*zip(DTYPES, DTYPES, strict=True), *zip(DTYPES, DTYPES[::-1], strict=True)]
)
def test_task_vectors_leave_what_they_are_of_alone(
    kind: OriginKind, of_base: torch.dtype, of_experts: torch.dtype
) -> None:
    base, *experts = models(torch.float64, 2)
    states = [{n: t.to(of_base) for n, t in base.items()}] + [
        {n: t.to(of_experts) for n, t in e.items()} for e in experts
    ]
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in states]
    network = aligned(states)
    for name in NAMES:
        origin = network.origin(name, kind)
        kept, deltas = origin.clone(), network.deltas(name, origin, kind)
        for task, state in zip(deltas, states[1:], strict=True):
            wide = torch.promote_types(state[name].dtype, torch.float32)
            for _ in range(2):  # as often as it is looked up
                assert torch.equal(deltas[task], state[name].to(wide) - kept)
        assert torch.equal(origin, kept)
    assert all(torch.equal(state[n], old[n]) for state, old in zip(states, before, strict=True) for n in NAMES)


@pytest.mark.parametrize("size", [2**14, BLOCK, 10**9])
@pytest.mark.parametrize("name", BY_ENTRY)
def test_a_writer_gets_the_same_bits_in_blocks_of_any_size(name: str, size: int) -> None:
    kind, given = METHODS[name], {"t": 0.004} if name == "nearswap" else {}
    network = aligned(models(torch.bfloat16, 1 if name in ONE else 3), kind.needs_base())
    wanted = dict(merge_tensors(of_whole_tensors(kind)(**given), network))
    layout = {n: (tuple(t.shape), t.dtype) for n, t in wanted.items()}
    for n, tensor in Merging(kind(**given), network, block=size).to_write(layout):
        assert isinstance(tensor, Streamed) == (wanted[n].numel() > size)
        assert torch.equal(tensor.whole(n, None) if isinstance(tensor, Streamed) else tensor, wanted[n])


def test_what_is_wrong_while_writing_is_said_of_the_whole(tmp_path: Path) -> None:
    states = models(torch.bfloat16, 2)
    states[-1]["a.weight"].view(-1)[[5, BLOCK + 1, -1]] = float("nan")
    merging = Merging(METHODS["linear"](), aligned(states, based=False))
    layout = {n: (tuple(t.shape), t.dtype) for n, t in states[0].items()}
    with pytest.raises(AdaRankError, match=r"3 NaN or infinite value\(s\)"):
        write_folders(tmp_path, layout, merging.to_write)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", BY_ENTRY)
def test_what_is_not_finite_is_counted_in_the_whole_tensor(name: str, value: float) -> None:
    kind, given = METHODS[name], {"t": 0.004} if name == "nearswap" else {}
    states = models(torch.bfloat16, 1 if name in ONE else 3)
    states[-1]["a.weight"].view(-1)[[5, BLOCK + 1, -1]] = value
    network = aligned(states, kind.needs_base())
    said = []
    for method in (kind(**given), of_whole_tensors(kind)(**given)):
        with pytest.raises(AdaRankError) as caught:
            list(merge_tensors(method, network))
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "3 NaN or infinite value(s)" in said[0]


def test_a_value_beyond_the_dtype_in_a_late_block_is_refused() -> None:
    states = models(torch.float16, 2)
    for state in states:
        state["a.weight"].view(-1)[-1] = 40_000
    experts = {"one": states[1], "two": states[2]}
    with pytest.raises(OutputError, match=r"'a.weight' has values that F16 cannot hold"):
        adarank.merge(None, experts, "linear", {"normalize": False})


def test_sources_that_make_their_tensors_are_merged_whole() -> None:
    class Made(MemorySource):
        def read(self, name: str) -> Tensor:
            return super().read(name).clone()

    states = models(torch.float32, 2)
    network = align(MemorySource(states[0], "base"), {"a": MemorySource(states[1], "a"), "b": Made(states[2], "b")})
    assert not network.in_place()
    mapped = aligned(states)
    assert mapped.in_place()
    method = METHODS["task_arithmetic"]()
    made, cut = dict(merge_tensors(method, network)), dict(merge_tensors(method, mapped))
    assert all(torch.equal(made[n], cut[n]) for n in NAMES)
