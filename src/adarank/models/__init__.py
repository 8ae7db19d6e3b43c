"""Families of models. A new one is one file here and one line below."""

from __future__ import annotations

from adarank.models.base import Family, TaskModels, share
from adarank.models.image import ImageClassifiers
from adarank.models.text import TextClassifiers

FAMILIES: dict[str, Family] = {family.kind: family for family in (TextClassifiers(), ImageClassifiers())}

__all__ = ["FAMILIES", "Family", "TaskModels", "share"]
