"""Adaptation on unlabelled data: one engine, two switches (λ, masks)."""

from __future__ import annotations

from adarank.adapt.history import History
from adarank.adapt.live_weights import Learn, LiveWeights
from adarank.adapt.loop import adapt
from adarank.adapt.methods import ADAPTIVE, AdaptiveMethod
from adarank.adapt.presets import PRESETS
from adarank.adapt.settings import AdaptSettings

__all__ = ["ADAPTIVE", "PRESETS", "AdaptSettings", "AdaptiveMethod", "History", "Learn", "LiveWeights", "adapt"]
