"""What `adapter_config.json` of `peft` says of a LoRA adapter, and which kinds of adapter are read.

Everything that changes what an adapter's tensors mean is either known here or refused by its name: settings of later
releases too. Facts after peft 0.21 (https://github.com/huggingface/peft), `tuners/lora`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adarank.errors import CheckpointError, itemise
from adarank.io.files import read_json

CONFIG = "adapter_config.json"
_MERGE_FIRST = (
    "Merge it into its model first, with peft's merge_and_unload, and give the folder that save_pretrained writes then."
)
_NO_WEIGHTS = (
    "It changes no weights of the model, so it cannot be merged; fine-tune the model or train a LoRA in its place."
)
# Prompts, prefixes, and routers that choose per input: peft cannot merge them either.
_NOT_MERGEABLE = frozenset({
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE",
    "POLY", "XLORA",
})  # fmt: skip
# Settings that decide which layers were trained and how, and nothing of what the stored tensors mean.
_OF_TRAINING = frozenset({
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "velora_config", "runtime_config", "megatron_core",
    "qalora_group_size", "ensure_weight_tying", "modules_to_save", "bias", "parent_library", "target_modules_to_tie",
})  # fmt: skip
_READ = frozenset({
    "r", "lora_alpha", "fan_in_fan_out", "use_rslora", "use_dora", "init_lora_weights", "rank_pattern", "alpha_pattern",
    "trainable_token_indices", "target_parameters",
})  # fmt: skip
# Initialisations that leave the base as it is. Others move a part of it into the adapter.
_STARTS = frozenset({True, False, None, "gaussian", "eva", "orthogonal", "mica", "true", "false"})
_CONVERT = "the adapter is counted from a changed base. Save it as plain LoRA with path_initial_model_for_weight_conversion of peft's save_pretrained, or merge it with merge_and_unload."
_REFUSED = {
    "lora_bias": "biases of B are not read",
    "megatron_config": "layers of Megatron are split over devices",
    "arrow_config": "Arrow chooses among adapters for every token, so there is no one set of weights",
    "alora_invocation_tokens": "an activated LoRA (aLoRA) acts from its invocation tokens on, so there is no one set of weights",
    "use_qalora": "QA-LoRA acts on pooled groups of inputs",
    "layer_replication": "its model has other layers than the base",
    "use_bdlora": "block-diagonal factors (BD-LoRA) are not read",
    "kasa_config": "KaSA cuts the base's weights when it is loaded",
    "monteclora_config": "MonteCLoRA samples its weights",
}


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of a LoRA adapter that its tensors are read by.

    Attributes:
        rank, alpha: r and α of layers that no pattern matches.
        ranks, alphas: pattern of a layer's name -> its r, its α.
        rank_stabilised: the scale is α/√r (rsLoRA), not α/r.
        decomposed: weights are a direction and a magnitude per output (DoRA).
        transposed: weights were said to be stored as (in, out), as those of GPT-2.
        parameters: names of parameters that are changed without a layer around them.
        tokens: name of an embedding ("" for the input's) -> rows that were trained.
        base: what it says its model is called; "" if it does not say.
        task: `SEQ_CLS`, `CAUSAL_LM` and so on; "" if it does not say.
    """

    rank: int
    alpha: float
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False
    decomposed: bool = False
    transposed: bool = False
    parameters: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    base: str = ""
    task: str = ""

    def rank_of(self, layer: str) -> int:
        """r of a layer, given its name in the model."""
        key = _matching(self.ranks, layer)
        return self.rank if key is None else self.ranks[key]

    def scale_of(self, layer: str) -> float:
        """What B·A is multiplied by in a layer: α/r, or α/√r (Kalajdzievski 2023, arXiv:2312.03732)."""
        key, rank = _matching(self.alphas, layer), self.rank_of(layer)
        alpha = self.alpha if key is None else self.alphas[key]
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def parameters_of(self, layer: str) -> list[str]:
        """The parameters of a layer that are changed without a layer of their own, by their whole names."""
        names = [f"{layer}.{given.rpartition('.')[2]}" for given in self.parameters]
        return [
            name
            for name, given in zip(names, self.parameters, strict=True)
            if name == given or name.endswith(f".{given}")
        ]


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The configuration of a LoRA adapter.

    Raises:
        CheckpointError: it is missing, damaged, of another kind of adapter, or of a LoRA that is not read; all reasons at once.
    """
    file = folder / CONFIG
    if not file.exists():
        raise CheckpointError(
            f"{folder}: no adapter: it has no {CONFIG}. Give a folder that peft's save_pretrained wrote."
        )
    given = read_json(file)
    kind = str(given.get("peft_type") or "(no peft_type)").upper()
    if kind != "LORA":
        remedy = _NO_WEIGHTS if kind in _NOT_MERGEABLE else _MERGE_FIRST
        raise CheckpointError(
            f"{file}: an adapter of kind {kind}, and LoRA (with rsLoRA and DoRA) is the kind that is read. {remedy}"
        )
    problems = [*_unread(given), *_ill_typed(given)]
    if problems:
        heading = f"{file}: a LoRA that is not read:"
        raise CheckpointError(
            f"{heading[:-1]}: {problems[0]}. {_MERGE_FIRST}"
            if len(problems) == 1
            else itemise(heading, problems, _MERGE_FIRST)
        )
    return _config(given)


def _unread(given: Mapping[str, Any]) -> list[str]:
    """Settings under which tensors mean something else, in words."""
    problems = [f"{key}: {why}" for key, why in _REFUSED.items() if given.get(key)]
    start = given.get("init_lora_weights", True)
    if not isinstance(start, bool | str | None) or (start.lower() if isinstance(start, str) else start) not in _STARTS:
        problems.append(f"init_lora_weights: {start!r}: {_CONVERT}")
    known = _OF_TRAINING | _READ | _REFUSED.keys()
    return problems + [
        f"{key}: {str(value)[:40]!r}: not known here" for key, value in given.items() if key not in known and value
    ]


def _ill_typed(given: Mapping[str, Any]) -> list[str]:
    """Values that cannot be what they should."""
    ranks, alphas = given.get("rank_pattern") or {}, given.get("alpha_pattern") or {}
    problems = [f"r: {given.get('r')!r} is no whole number from 1 on"] if not _is_rank(given.get("r", 8)) else []
    problems += (
        [f"lora_alpha: {given['lora_alpha']!r} is no number"] if not _is_number(given.get("lora_alpha", 8)) else []
    )
    for key, patterns, fits in (("rank_pattern", ranks, _is_rank), ("alpha_pattern", alphas, _is_number)):
        if not isinstance(patterns, dict) or not all(fits(value) for value in patterns.values()):
            problems.append(f"{key}: {str(patterns)[:40]!r} is no mapping of names to numbers")
        else:
            problems += [f"{key}: {name!r} is no pattern" for name in patterns if not _is_pattern(name)]
    named = given.get("target_parameters") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        problems.append(f"target_parameters: {str(named)[:40]!r} is no list of names")
    if _tokens(given.get("trainable_token_indices")) is None:
        problems.append(f"trainable_token_indices: {str(given['trainable_token_indices'])[:40]!r} are no rows")
    return problems


def _config(given: Mapping[str, Any]) -> AdapterConfig:
    return AdapterConfig(
        rank=given.get("r", 8),
        alpha=float(given.get("lora_alpha", 8)),
        ranks=dict(given.get("rank_pattern") or {}),
        alphas=dict(given.get("alpha_pattern") or {}),
        rank_stabilised=bool(given.get("use_rslora")),
        decomposed=bool(given.get("use_dora")),
        transposed=bool(given.get("fan_in_fan_out")),
        parameters=tuple(given.get("target_parameters") or ()),
        tokens=_tokens(given.get("trainable_token_indices")) or {},
        base=str(given.get("base_model_name_or_path") or ""),
        task=str(given.get("task_type") or ""),
    )


def _tokens(given: Any) -> dict[str, tuple[int, ...]] | None:
    """Embedding -> trained rows; None if what is given is neither that nor a list of rows."""
    by_name = {"": given} if isinstance(given, list) else given or {}
    if not isinstance(by_name, dict) or not all(isinstance(rows, list) for rows in by_name.values()):
        return None
    whole = all(
        isinstance(row, int) and not isinstance(row, bool) and row >= 0 for rows in by_name.values() for row in rows
    )
    return {str(name): tuple(rows) for name, rows in by_name.items()} if whole else None


def _matching(patterns: Mapping[str, Any], layer: str) -> str | None:
    """The first pattern that is a layer's name, or matches the end of it from a dot on."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", layer)), None)


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
