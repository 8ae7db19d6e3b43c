"""Files of masks: they merge to the same bytes again, and masks of another merge are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from adarank.errors import AdaRankError, MismatchError
from adarank.methods import Masked
from adarank.spectral.mask_file import MaskFile
from make import MATRICES, State, family, masked, merged, network, same

LAM = 0.37


Experts = Mapping[str, State]


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
