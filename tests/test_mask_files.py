"""Files of masks: they merge to the same bytes again, and masks of another merge are refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from adarank.alignment.align import align
from adarank.alignment.task_vectors import Network
from adarank.errors import AdaRankError, MismatchError
from adarank.io.checkpoint import Checkpoint
from adarank.methods import Masked, Method, merge_tensors
from adarank.spectral.mask_file import MaskFile
from make import MATRICES, State, family, network, same, save, save_shards

LAM = 0.37


Experts = Mapping[str, State]


def merged(method: Method, net: Network) -> State:
    return dict(merge_tensors(method, net))


def masked(net: Network, origin: str, lam: float, share: float) -> Masked:
    """Masks that keep each task's first ⌊share·r⌋ components, at least one."""
    ranks = {
        n: min(i.shape[0], i.numel // i.shape[0])
        for n, i in net.tensors.items()
        if net.choices[n].action == "decompose"
    }
    count = len(net.tasks)
    masks = {n: (torch.arange(r) < max(1, math.floor(share * r + 1e-9))).repeat(count) for n, r in ranks.items()}
    lams = {name: torch.full((count,), lam) for name in net.merged()}
    return Masked(masks=MaskFile(origin, net.tasks, lams, masks, {n: (r,) * count for n, r in ranks.items()}, {}))


def on_disk(folder: Path, tasks: int, dtype: torch.dtype) -> tuple[State, dict[str, State], Network]:
    base, experts = family(tasks, dtype=dtype)
    root = Checkpoint(save_shards(folder / "base", base, 3), "base")
    opened = {task: Checkpoint(save(folder / task, own), task) for task, own in experts.items()}
    return base, experts, align(root, opened)


def test_a_masks_file_reloaded_merges_to_the_same_bytes(tmp_path: Path) -> None:
    base, experts = family(3)
    net = network(base, experts)
    method = masked(net, "average", 0.7, 0.4)
    method.masks.save(tmp_path / "masks.safetensors")
    again = Masked(masks=MaskFile.load(tmp_path / "masks.safetensors"))
    again.check(net)
    assert same(merged(method, net), merged(again, net))


def other_tasks(file: MaskFile) -> MaskFile:
    return MaskFile(file.origin, ("task0", "x"), file.lam, file.masks, file.sizes, {})


def other_order(file: MaskFile) -> MaskFile:
    return MaskFile(file.origin, file.tasks[::-1], file.lam, file.masks, file.sizes, {})


def without_a_tensor(file: MaskFile) -> MaskFile:
    return MaskFile(file.origin, file.tasks, {n: v for n, v in file.lam.items() if n != "norm.weight"}, file.masks,
                    file.sizes, {})  # fmt: skip


def with_other_ranks(file: MaskFile) -> MaskFile:
    return MaskFile(file.origin, file.tasks, file.lam, file.masks, {**file.sizes, MATRICES[0]: (3, 3)}, {})


def with_another_tensor(file: MaskFile) -> MaskFile:
    """Adaptation merged a tensor that this recipe does not."""
    return MaskFile(file.origin, file.tasks, {**file.lam, "gone.weight": torch.ones(2)}, file.masks, file.sizes, {})


def with_masks_of_a_scaled_tensor(file: MaskFile) -> MaskFile:
    """Adaptation decomposed a tensor that this recipe only scales."""
    masks = {**file.masks, "conv.weight": torch.zeros(6, dtype=torch.bool)}
    return MaskFile(file.origin, file.tasks, file.lam, masks, {**file.sizes, "conv.weight": (3, 3)}, {})


@pytest.mark.parametrize("change", [other_tasks, other_order, without_a_tensor, with_other_ranks, with_another_tensor,
                                    with_masks_of_a_scaled_tensor])  # fmt: skip
def test_masks_of_another_merge_are_refused(change: Callable[[MaskFile], MaskFile]) -> None:
    base, experts = family(2)
    net = network(base, experts)
    file = masked(net, "pretrained", 1.0, 0.5).masks
    Masked(masks=file).check(net)
    with pytest.raises(MismatchError):
        Masked(masks=change(file)).check(net)


def test_masks_about_the_base_without_a_base_are_refused() -> None:
    base, experts = family(2)
    file = masked(network(base, experts), "pretrained", 1.0, 0.5).masks
    with pytest.raises(AdaRankError, match="base"):
        Masked(masks=file).check(network(None, experts))
