"""What an adaptation a block at a time holds in memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import adarank
import text_zoo
from adarank.adapt.streams import Streams
from adarank.io.checkpoint import Checkpoint


@dataclass
class Most:
    """The most memory that tensors of floating-point numbers take whenever a block has run."""

    most: int = 0

    def look(self) -> None:
        gc.collect()  # what nothing holds any more may lie about until then
        held = {}
        for each in gc.get_objects():
            if issubclass(type(each), Tensor) and each.is_floating_point():
                held[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
        self.most = max(self.most, sum(held.values()))


@pytest.fixture
def alone() -> Iterator[None]:
    """What the test freezes, other tests' tensors among it, is neither looked at nor collected until its end."""
    gc.collect()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("alone")
def test_one_block_of_all_models_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of twelve blocks; counted are the tensors that its run makes, at every block."""
    text_zoo.make_zoo(tmp_path, hidden_size=64, intermediate_size=128, num_hidden_layers=12)
    base = Checkpoint(tmp_path / "models" / "base").tensors
    block, network = (4 * sum(base[n].numel for n in base if text in n) for text in ("encoder.layer.0.", "encoder"))
    during, plain = Most(), Streams.keep
    gc.freeze()

    def keep(streams: Streams, stream: str, place: int, batch: str, given: Any) -> None:
        plain(streams, stream, place, batch, given)
        during.look()

    monkeypatch.setattr(Streams, "keep", keep)
    loop = {"by": "block", "steps": 1, "batch_size": 4, "learn_heads": False}
    start = {"origin": "pretrained", "rank": 1.0, "lambda": 0.1}
    adarank.merge_recipe(
        text_zoo.recipe(tmp_path, merge_method="adarank", parameters=start, adapt=loop), tmp_path / "out"
    )
    # a factor of a square matrix is two of it, and a whole task vector may be there beside it; gradients; batches
    assert during.most < 10 * block < network
