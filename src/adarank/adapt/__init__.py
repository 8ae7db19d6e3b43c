"""Adaptation on unlabelled data: one engine, two switches (λ, masks)."""

from __future__ import annotations

from adarank.adapt.live_weights import Learn, LiveWeights
from adarank.adapt.loop import History, adapt
from adarank.adapt.methods import ADAPTIVE, PRESETS, AdaptiveMethod
from adarank.adapt.settings import AdaptSettings

__all__ = ["ADAPTIVE", "PRESETS", "AdaptSettings", "AdaptiveMethod", "History", "Learn", "LiveWeights", "adapt"]
