"""Families of models. A new one is one file here and one line below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adarank.models.clip import ZeroShotImageClassifiers
from adarank.models.family import Family
from adarank.models.image import ImageClassifiers
from adarank.models.text import TextClassifiers
from adarank.models.tied import TaskModels, share

ALL: tuple[Family, ...] = (TextClassifiers(), ImageClassifiers(), ZeroShotImageClassifiers())
FAMILIES: dict[str, Family] = {family.kind: family for family in ALL}


def kind_of(config: Mapping[str, Any]) -> str | None:
    """The kind that a model's `config.json` tells: by the classes it names, else by its model type. None if neither does."""
    named = " ".join(config.get("architectures") or ())
    told = [kind for kind, family in FAMILIES.items() if any(own in named for own in family.architectures)]
    if not told and "model_type" in config:
        from transformers import CONFIG_MAPPING  # imported on use: it is slow, and most configurations name a class

        if config["model_type"] in CONFIG_MAPPING:
            made = CONFIG_MAPPING[config["model_type"]]
            told = [kind for kind, family in FAMILIES.items() if made in family.auto_class()._model_mapping]
    return told[0] if len(told) == 1 else None


__all__ = ["FAMILIES", "Family", "TaskModels", "kind_of", "share"]
