"""What an error says of inputs that are not one network: of which architectures they are, how many tensors differ and how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

from adarank.alignment.selection import is_head_name
from adarank.errors import itemise
from adarank.io.checkpoint import Source

_COUNTED = {
    "missing": "missing from experts",
    "extra": "missing from the base",
    "shape": "of other shapes",
    "integer": "of integers that differ",
    "dtype": "float in some inputs and integer in others",
}
_SIZES = ("hidden_size", "d_model", "n_embd", "dim", "num_hidden_layers", "n_layer", "num_layers", "intermediate_size",
          "num_attention_heads", "num_key_value_heads", "head_dim")  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """A tensor that cannot be merged, and why."""

    kind: Literal["missing", "extra", "shape", "integer", "dtype"]
    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


def mismatch(problems: Sequence[Problem], others: Sequence[str], task_heads: bool) -> str:
    """The message about all problems.

    Arguments:
        others: sentences on inputs of other architectures, from `other_kinds`.
        task_heads: heads were looked for, and left out.
    """
    counts: Counter[str] = Counter(problem.kind for problem in problems)
    counted = ", ".join(f"{counts[kind]} {words}" for kind, words in _COUNTED.items() if counts[kind])
    heading = "\n".join([*others, f"{len(problems)} tensor(s) cannot be merged: {counted}."])
    if others:
        kinds = zip_longest(*([str(p) for p in problems if p.kind == kind] for kind in _COUNTED))
        few = [text for texts in kinds for text in texts if text]  # some of each kind
        return itemise(heading, few, "Models of other architectures or sizes do not merge.", 6)
    remedy = "Every expert must be fine-tuned from the base. To leave a tensor out, name it in the recipe under select: keep (the base's) or head (each task's)."
    head = next((p.name for p in problems if p.kind == "extra" and is_head_name(p.name)), None)
    if head and not task_heads:
        remedy += f" Where '{head}' is the head of a task, give the model its task: kind."
    return itemise(heading, [str(problem) for problem in problems], remedy)


def other_kinds(root: Source, experts: Sequence[Source], called: str) -> list[str]:
    """A sentence for each expert whose configuration is of another architecture or size than the base's.

    Arguments:
        called: what the sentences call the base.
    """
    texts = []
    theirs = root.config
    for expert in experts:
        mine = expert.config
        if expert is root or not mine.get("model_type") or not theirs.get("model_type"):
            continue
        if mine["model_type"] not in _model_types(theirs):
            texts.append(f"{expert.label} is a {_kind(mine)}, {called} a {_kind(theirs)}.")
        elif sizes := [key for key in _SIZES if key in mine and key in theirs and mine[key] != theirs[key]]:
            listed = " and ".join(f"{key} {mine[key]} where {called} has {theirs[key]}" for key in sizes)
            texts.append(f"{expert.label} is of another size: {listed}.")
    return texts


def _model_types(config: Mapping[str, Any]) -> set[Any]:
    """The model types of a configuration and of its towers."""
    parts = [config, *(config.get(key) for key in ("text_config", "vision_config"))]
    return {part.get("model_type") for part in parts if isinstance(part, Mapping)}


def _kind(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    return f"{config['model_type']} ({named[0]})" if isinstance(named, list) and named else str(config["model_type"])
