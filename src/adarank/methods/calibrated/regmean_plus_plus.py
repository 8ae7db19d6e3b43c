"""RegMean++: RegMean on the inputs that the layers will get in the merged model.

    X_t: what expert t's block is given once all blocks before it are the merged ones; else as RegMean

The network is walked from its inputs on. Of each block every expert's own weights are taken on what the merged blocks
before it make of that task's inputs, then the block is merged and the walk goes on. A block is what shares a tensor
name's part up to its last number (`encoder.layer.3`); linear layers outside any numbered part are blocks by themselves.

Nguyen, Dang, Suzuki, Nguyen, "RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model
Merging", arXiv:2508.03121.
"""

from __future__ import annotations

from typing import ClassVar

from adarank.methods.calibrated.base import Gathers
from adarank.methods.calibrated.regmean import RegMean


class RegMeanPlusPlus(RegMean):
    """RegMean with Gram matrices of what the already merged earlier blocks give. All other tensors are averaged."""

    name: ClassVar[str] = "regmean++"
    formula: ClassVar[str] = "as regmean; X_t: inputs of the layer behind the already merged earlier blocks"
    source: ClassVar[str] = "Nguyen et al. 2025, arXiv:2508.03121"
    decides: ClassVar[tuple[str, ...]] = (*RegMean.decides, "off_diagonal")

    def gathered(self, gathers: Gathers) -> RegMeanPlusPlus:
        """The same method with its statistics."""
        return gathers.gram_matrices_by_block(self.with_statistics)
