"""The one rule that says what happens to each tensor of a network.

    decompose   a matrix whose task vectors go through the SVD (methods without spectra just see a matrix)
    scale       merged by λ·delta: biases, norms, positional tables; kernels, unless `with_kernels` says otherwise
    average     the experts' plain mean, whatever the method: nothing of it is scaled or learned
    keep        kept from the base: buffers that a model computes, embeddings of text models, what no expert has
    head        belongs to a task and is kept per task

The default is read off the tensor's name, shape and dtype; a recipe overrides it with patterns
(`fnmatch`: `*`, `?`, `[...]`, matched against the tensor's name in the base).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from pydantic import field_validator

from adarank.errors import RecipeError, itemise
from adarank.io.checkpoint import TensorInfo
from adarank.settings import Settings

Action = Literal["decompose", "scale", "average", "keep", "head"]

_EMBEDDING = ("embed", "wte", "wpe", "shared.weight")
_TOKENS = re.compile(r"embed|wte|shared\.weight|lm_head|tok_")
_NO_TOKENS = re.compile(r"posit|wpe|type|patch|proj|norm|rel|lm_head\.dense")
# Of Swin and its kin, and of T5 and its kin: two-dimensional, but lists of biases.
_TABLES = ("position_bias_table", "relative_attention_bias.weight")
# Of CLIP, in transformers and in open_clip, from a tower into the space of both: both papers' released code decomposes none.
_PROJECTIONS = ("visual_projection.weight", "text_projection.weight", "visual.proj", "text_projection")
_HEADS = ("classifier", "pre_classifier", "score", "head", "heads", "lm_head", "logits_proj", "classification_head")


# Buffers that the architectures of `transformers` (and timm's Swin) compute themselves. Older releases saved them, newer
# ones do not, so that files of different age have them or not; what a file holds is not what the model uses.
_COMPUTED = re.compile(
    r"(^|\.)((original_)?inv_freq|inv_timescales|(cos|sin)_cached|rope\.freqs|freqs_(cis?|cos|sin)"  # rotary positions
    r"|masked_bias|(self_)?mask_value_float(16|32)|causal_mask|attn_mask|alibi|slopes"
    r"|attn\.embed_positions|embed_positions\.(weights|_float_tensor)"  # of sines
    r"|(position|token_type|buffered_token_type)_ids|relative_position_index|relative_coords_table|attention_bias_idxs)$"
)
_BY_RECIPE = "recipe: "
_MOST = "kernel of a convolution: most of this network's merged numbers"
_COUNTER = "num_batches_tracked"  # of batch norms: state of training, without effect on what a network computes


class Select(Settings):
    """Patterns per action; what matches none follows the default.

    Attributes:
        decompose, scale, average, keep, head: patterns over tensor names in the base (`fnmatch`: `*`, `?`, `[...]`), one or several.

    Raises:
        RecipeError: on use, if patterns of two actions match a tensor, or one that matches cannot take the action.

    Example:
        base, a, b = (torch.nn.Linear(8, 4) for _ in range(3))
        merged = adarank.merge(base, {"a": a, "b": b}, "cart", select=adarank.Select(keep="bias"))
        assert torch.equal(merged["bias"], base.bias)
    """

    @field_validator("decompose", "scale", "average", "keep", "head", mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given

    decompose: tuple[str, ...] = ()
    scale: tuple[str, ...] = ()
    average: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    head: tuple[str, ...] = ()

    def patterns(self) -> list[tuple[Action, str]]:
        """All (action, pattern) pairs."""
        groups: list[tuple[Action, Sequence[str]]] = [
            ("decompose", self.decompose), ("scale", self.scale), ("average", self.average), ("keep", self.keep),
            ("head", self.head),
        ]  # fmt: skip
        return [(action, pattern) for action, patterns in groups for pattern in patterns]


@dataclass(frozen=True)
class Choice:
    """What happens to a tensor, and why."""

    action: Action
    reason: str

    def by_default(self, action: Action) -> bool:
        """True if it is this action, and no pattern of the recipe says so."""
        return self.action == action and not self.reason.startswith(_BY_RECIPE)


def choose(info: TensorInfo, select: Select, keep_embeddings: bool) -> Choice:
    """The action for one tensor.

    Arguments:
        info: the tensor, under its name in the base.
        select: the recipe's overrides.
        keep_embeddings: the family keeps 2-D embedding tables from the base (text models do: their experts
            share the vocabulary, and both papers leave the tables out).

    Raises:
        RecipeError: patterns of different actions match the tensor, or it cannot take the action asked for.
    """
    matched = check_patterns(info.name, select)
    if matched:
        return _asked(info, *matched[0])
    return _default(info, keep_embeddings)


def check_patterns(name: str, select: Select) -> list[tuple[Action, str]]:
    """The (action, pattern) pairs that match a tensor; a `RecipeError` if they ask for different actions."""
    matched = [(action, pattern) for action, pattern in select.patterns() if fnmatchcase(name, pattern)]
    actions = {action for action, _ in matched}
    if len(actions) > 1:
        listed = [f"{action}: {pattern}" for action, pattern in matched]
        raise RecipeError(
            itemise(f"select: '{name}' is asked for {len(actions)} actions.", listed, "Leave one of them.")
        )
    return matched


def _asked(info: TensorInfo, action: Action, pattern: str) -> Choice:
    if action in ("decompose", "scale", "average") and not info.dtype.is_floating_point:
        raise RecipeError(
            f"select: {action} '{pattern}' matches '{info.name}', which holds {info.dtype}. Only float tensors merge."
        )
    if action == "decompose" and len(info.shape) < 2:
        raise RecipeError(
            f"select: decompose '{pattern}' matches '{info.name}' of shape {info.shape}. Only matrices have an SVD."
        )
    return Choice(action, f"{_BY_RECIPE}{pattern}")


def with_kernels(
    tensors: Mapping[str, TensorInfo], choices: Mapping[str, Choice], wanted: bool | Collection[str]
) -> dict[str, Choice]:
    """The choices for a method that decomposes kernels of convolutions by default, where no pattern of the recipe says otherwise.

    Kernels outweigh the matrices if the network's kernels hold more numbers than all else that is decomposed, whatever patterns say of
    some of them. No header tells whether a kernel's channels are in groups: its rows are output channels all the same.
    Kernels of one input channel, as of depthwise convolutions, stay scaled: they have k·k components at most, and few numbers.

    Arguments:
        tensors: name -> tensor of the network.
        choices: name -> what happens to it by `choose`.
        wanted: names of the kernels that are decomposed; True: where kernels outweigh the matrices; False: none.
    """
    merged = {n: info for n, info in tensors.items() if choices[n].action in ("decompose", "scale")}
    kernels = {n: info for n, info in merged.items() if is_kernel(info)}
    by_default = [n for n in kernels if choices[n].by_default("scale")]
    if not isinstance(wanted, bool):
        return {**choices, **{n: Choice("decompose", "kernel of a convolution") for n in by_default if n in wanted}}
    matrices = sum(merged[n].numel for n in merged.keys() - kernels if choices[n].action == "decompose")
    if not wanted or sum(info.numel for info in kernels.values()) <= matrices:
        return dict(choices)
    return {**choices, **{n: Choice("decompose", _MOST) for n in by_default if kernels[n].shape[1] > 1}}


def is_kernel(info: TensorInfo) -> bool:
    """True for what a convolution over an image or a volume multiplies by; not for tables of positions, nor stacked matrices of three dimensions."""
    return info.name.endswith("weight") and len(info.shape) > 3 and info.shape[0] > 1


def _default(info: TensorInfo, keep_embeddings: bool) -> Choice:
    if not info.dtype.is_floating_point:
        return Choice("keep", f"{str(info.dtype).removeprefix('torch.')} buffer")
    if len(info.shape) != 2 or min(info.shape) < 2:
        return Choice("scale", f"{len(info.shape)}-D tensor")
    if info.name.endswith(_TABLES):
        return Choice("scale", "positional table")
    if info.name.endswith(_PROJECTIONS):
        return Choice("scale", "projection")
    if is_embedding(info.name):
        return Choice("keep", "embedding table") if keep_embeddings else Choice("scale", "embedding table")
    return Choice("decompose", "matrix")


def computed(info: TensorInfo) -> str | None:
    """Why a tensor is nothing that was learned, so that inputs may differ in it or lack it; None for all others.

    Buffers that the model computes are known by name (positions, rotary frequencies) or are causal masks called `bias`.
    """
    if _COMPUTED.search(info.name) or is_mask(info):
        return "computed by the model"
    return "a counter of training" if info.name.rsplit(".", 1)[-1] == _COUNTER else None


def is_mask(info: TensorInfo) -> bool:
    """True for causal masks that GPT-2, GPT-Neo, GPT-J and their kin store as the `bias` of an attention."""
    if info.name.rsplit(".", 1)[-1] != "bias":
        return False
    square = len(info.shape) >= 2 and info.shape[-1] == info.shape[-2]
    return square and (info.dtype in (torch.bool, torch.uint8) or (len(info.shape) == 4 and info.shape[:2] == (1, 1)))


def is_embedding(name: str) -> bool:
    """True if a tensor is called as embedding tables are."""
    return any(part in name.lower() for part in _EMBEDDING)


def is_table(name: str) -> bool:
    """True if a matrix of this name has a row for each token: an embedding table, or a language model's layer of output."""
    return bool(_TOKENS.search(name)) and not _NO_TOKENS.search(name)


def is_head_name(name: str) -> bool:
    """True if the first part of a tensor's name is one that task heads carry in `transformers`."""
    return name.split(".", 1)[0] in _HEADS


def matching(select: Select, names: Sequence[str]) -> Select:
    """The patterns that match some of these names."""
    kept = {
        action: tuple(
            pattern
            for other, pattern in select.patterns()
            if other == action and any(fnmatchcase(name, pattern) for name in names)
        )
        for action in Select.model_fields
    }
    return Select(**kept)


def patterns_for(names: Sequence[str], others: Collection[str]) -> list[str]:
    """Patterns that match all of these names and none of the others: ends of names, as short as they can be."""
    patterns: list[str] = []
    for name in names:
        if not any(fnmatchcase(name, pattern) for pattern in patterns):
            parts = name.split(".")
            ends = ["*." + ".".join(parts[-count:]) for count in range(2, len(parts))]
            fitting = (end for end in ends if not any(fnmatchcase(other, end) for other in others))
            patterns.append(next(fitting, name))
    return patterns


def unmatched(select: Select, names: Sequence[str]) -> list[str]:
    """A sentence for each pattern that matches no tensor: most likely a typing mistake."""
    return [
        f"select: {action} '{pattern}' matches no tensor."
        for action, pattern in select.patterns()
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
