"""Methods whose networks are more than weights: adapters, and routers that merge anew for every input."""

from __future__ import annotations

from adarank.modular.base import Modular
from adarank.modular.surgery import Surgery
from adarank.modular.twin_merging import TwinMerging
from adarank.modular.wemoe import WEMoE

MODULAR: dict[str, type[Modular]] = {method.name: method for method in (Surgery, WEMoE, TwinMerging)}

__all__ = ["MODULAR", "Modular", "Surgery", "TwinMerging", "WEMoE"]
