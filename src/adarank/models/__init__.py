"""Families of models. A new one is one file here and one line below."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from adarank.models.clip import ZeroShotImageClassifiers
from adarank.models.family import Family
from adarank.models.generation import CausalModels, SequenceModels
from adarank.models.image import ImageClassifiers
from adarank.models.open_clip import prefix_of
from adarank.models.sentence_encoders import SentenceEncoders
from adarank.models.text import TextClassifiers
from adarank.models.text_heads import MultipleChoice, QuestionAnswering, TokenClassifiers
from adarank.models.tied import TaskModels, share

ALL: tuple[Family, ...] = (
    TextClassifiers(), ImageClassifiers(), ZeroShotImageClassifiers(), CausalModels(), SequenceModels(),
    TokenClassifiers(), QuestionAnswering(), MultipleChoice(), SentenceEncoders(),
)  # fmt: skip
FAMILIES: dict[str, Family] = {family.kind: family for family in ALL}
# Classes of `transformers` with a head that is no classifier of whole inputs.
_OTHER_HEAD = re.compile(
    r"(LM|LMHeadModel|For(ConditionalGeneration|PreTraining|QuestionAnswering|TokenClassification|MultipleChoice|NextSentencePrediction))\b"
)


def kind_of(config: Mapping[str, Any]) -> str | None:
    """The kind that a model's `config.json` tells: by the classes it names, else by its model type. None if neither does."""
    named = classes_of(config)
    kinds = [kind for kind, family in FAMILIES.items() if any(suffix in named for suffix in family.architectures)]
    if not kinds and isinstance(config.get("model_type"), str) and not no_classifier(config):
        from transformers import CONFIG_MAPPING  # imported on use: it is slow, and most configurations name a class

        if config["model_type"] in CONFIG_MAPPING:
            made = CONFIG_MAPPING[config["model_type"]]
            kinds = [  # a configuration alone does not say that a model generates
                kind for kind, family in FAMILIES.items() if not named_alone(kind) and made in family.auto_class()._model_mapping
            ]  # fmt: skip
    return kinds[0] if len(kinds) == 1 else None


def kind_by_names(names: Iterable[str]) -> str | None:
    """The kind of models that are known by what their tensors are called: CLIPs of open_clip, which have no config.json."""
    return None if prefix_of(names) is None else ZeroShotImageClassifiers.kind


def classes_of(config: Mapping[str, Any]) -> str:
    """The classes that a model's `config.json` names; empty if it names none."""
    named = config.get("architectures")
    return ", ".join(map(str, named)) if isinstance(named, (list, tuple)) else str(named or "")


def no_classifier(config: Mapping[str, Any], kind: str | None = None, head: bool = True) -> bool:
    """True if the class that a model's `config.json` names is of another kind than tasks are.

    Arguments:
        kind: what tasks are of; None for any kind.
        head: the model has tensors beside its body, which may be a classifier's though the class is that of a body.
    """
    named = classes_of(config)
    if kind is not None and named_alone(kind):
        wanted = FAMILIES[kind].architectures
        return bool(named and wanted) and not any(part in named for part in wanted)
    families = [family for family in ALL if kind is None or not named_alone(family.kind)]
    of_a_family = any(part in named for family in families for part in family.architectures)
    return bool(named) and not of_a_family and (not head or _OTHER_HEAD.search(named) is not None)


def named_alone(kind: str) -> bool:
    """True of kinds whose models are told by their class or by the recipe, and by nothing else."""
    return FAMILIES[kind].generates or FAMILIES[kind].by_class


def foreign_code(config: Mapping[str, Any]) -> str | None:
    """What a model's configuration would have run that is not in `transformers`, in words; None if nothing."""
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        if "/" in str(config.get(key) or ""):
            return f"{key}: {config[key]!r} is code on the hub"
    for value in config.values():
        if isinstance(value, Mapping) and (inner := foreign_code(value)):
            return inner
    if config.get("auto_map"):
        from transformers import CONFIG_MAPPING  # imported on use: it is slow, and most configurations name no code

        if config.get("model_type") not in CONFIG_MAPPING:
            return f"auto_map: model_type {config.get('model_type')!r} is code beside the weights"
    return None


__all__ = [
    "FAMILIES",
    "Family",
    "TaskModels",
    "classes_of",
    "foreign_code",
    "kind_by_names",
    "kind_of",
    "named_alone",
    "no_classifier",
    "share",
]
