"""What must be known of a CLIP's files to merge its image tower under heads that its text tower makes: by `transformers`, by open_clip."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adarank.io.checkpoint import Checkpoint
from adarank.models.clip_networks import OPEN_CLIP, PLAIN
from adarank.models.loading import LOCALLY, loading
from adarank.models.open_clip import (
    IMAGE,
    TEXT_TOWER,
    OpenClipSettings,
    prefix_of,
    text_tower,
    vision_config,
)
from adarank.models.tied import refuse_missing

VISION, PROJECTION = "vision_model.", "visual_projection.weight"
_TEXT = ("text_model.", "text_projection.weight", "logit_scale")
_REMEDY = "Give a whole CLIP model as base_model."


class ClipLayout(Protocol):
    """How CLIP's tensors are named.

    Attributes:
        architecture: the class of a task's network.
        borrowed: tensors of the network that are the base's where an expert has none.
    """

    architecture: str
    borrowed: tuple[str, ...]

    def projection(self, base: Checkpoint) -> str:
        """The base's tensor that brings the image tower's output to the width of heads."""
        ...

    def tower(self, expert: Checkpoint) -> dict[str, str]:
        """Name in the network -> stored name, of an expert's image tower and projection."""
        ...

    def vision(self, expert: Checkpoint, base: Checkpoint) -> Mapping[str, Any]:
        """What the image tower's `config.json` says."""
        ...

    def text(self, base: Checkpoint) -> list[str]:
        """Patterns of the base's tensors that only heads are made of."""
        ...

    def lacking(self, base: Checkpoint) -> list[str]:
        """What heads are made of, and the base lacks."""
        ...

    def width(self, base: Checkpoint) -> int:
        """Of a row of a head."""
        ...

    def longest(self, base: Checkpoint) -> int:
        """Tokens of a prompt at most."""
        ...

    def logit_scale(self, base: Checkpoint) -> Tensor:
        """The logarithm of what cosines are multiplied by."""
        ...

    def text_tower(self, base: Checkpoint) -> nn.Module:
        """The text tower, as `transformers` calls it, in float32 and evaluation mode.

        Raises:
            CheckpointError: the base's files make none.
        """
        ...


class TransformersLayout:
    """As `transformers` writes CLIP."""

    architecture: str = PLAIN
    borrowed: tuple[str, ...] = (PROJECTION,)

    def projection(self, base: Checkpoint) -> str:
        """The base's tensor that brings the image tower's output to the width of heads."""
        return PROJECTION

    def tower(self, expert: Checkpoint) -> dict[str, str]:
        """Name in the network -> stored name, of an expert's image tower and projection."""
        towers = [name for name in expert.tensors if name.startswith(VISION)]
        # CLIPVisionModel writes its tensors with the tower's name before them or without, by version
        plain = not towers and not any(name.startswith("text_model.") for name in expert.tensors)
        stored = list(expert.tensors) if plain else towers
        named = {(VISION + name if plain else name): name for name in stored if name != PROJECTION}
        return named | ({PROJECTION: PROJECTION} if PROJECTION in expert.tensors else {})

    def vision(self, expert: Checkpoint, base: Checkpoint) -> Mapping[str, Any]:
        """What the image tower's `config.json` says."""
        config = expert.config or base.config
        return config.get("vision_config") or config

    def text(self, base: Checkpoint) -> list[str]:
        """Patterns of the base's tensors that only heads are made of."""
        return [f"{part}*" for part in _TEXT]

    def lacking(self, base: Checkpoint) -> list[str]:
        """What heads are made of, and the base lacks."""
        return [name for name in (PROJECTION, *_TEXT[1:]) if name not in base.tensors]

    def width(self, base: Checkpoint) -> int:
        """Of a row of a head."""
        return base.tensors[PROJECTION].shape[0]

    def longest(self, base: Checkpoint) -> int:
        """Tokens of a prompt at most."""
        return int((base.config.get("text_config") or {}).get("max_position_embeddings", 77))  # CLIP's own

    def logit_scale(self, base: Checkpoint) -> Tensor:
        """The logarithm of what cosines are multiplied by."""
        return base.read("logit_scale")

    def text_tower(self, base: Checkpoint) -> nn.Module:
        """The text tower, as `transformers` calls it, in float32 and evaluation mode."""
        settings = {**(base.config.get("text_config") or {}), "projection_dim": self.width(base)}
        return _text_tower(base, settings, str(base.folder), {})


class OpenClipLayout:
    """As open_clip writes CLIP, and with it task_vectors and TALL-masks: q, k and v in one matrix."""

    architecture: str = OPEN_CLIP
    borrowed: tuple[str, ...] = ()

    def projection(self, base: Checkpoint) -> str:
        """The base's tensor that brings the image tower's output to the width of heads."""
        return f"{_prefix(base)}{IMAGE}proj"

    def tower(self, expert: Checkpoint) -> dict[str, str]:
        """Name in the network -> stored name, of an expert's image tower and projection."""
        prefix = _prefix(expert)
        return {name.removeprefix(prefix): name for name in expert.tensors if name.startswith(prefix + IMAGE)}

    def vision(self, expert: Checkpoint, base: Checkpoint) -> Mapping[str, Any]:
        """What the image tower's `config.json` says."""
        shapes = {name: expert.tensors[stored].shape for name, stored in self.tower(expert).items()}
        return vision_config(shapes, OpenClipSettings.beside(expert.folder, base.folder), expert.label)

    def text(self, base: Checkpoint) -> list[str]:
        """Patterns of the base's tensors that only heads are made of: all but the image tower's."""
        prefix = _prefix(base)
        firsts = [name.removeprefix(prefix).partition(".") for name in self._outside(base)]
        return list(dict.fromkeys(f"{prefix}{first}{dot}{'*' * len(dot)}" for first, dot, _ in firsts))

    def lacking(self, base: Checkpoint) -> list[str]:
        """What heads are made of, and the base lacks."""
        names = [_prefix(base) + name for name in TEXT_TOWER]
        return [name for name in names if name not in base.tensors]

    def width(self, base: Checkpoint) -> int:
        """Of a row of a head."""
        return base.tensors[self.projection(base)].shape[1]

    def longest(self, base: Checkpoint) -> int:
        """Tokens of a prompt at most."""
        return base.tensors[f"{_prefix(base)}positional_embedding"].shape[0]

    def logit_scale(self, base: Checkpoint) -> Tensor:
        """The logarithm of what cosines are multiplied by."""
        return base.read(f"{_prefix(base)}logit_scale")

    def text_tower(self, base: Checkpoint) -> nn.Module:
        """The text tower, as `transformers` calls it, in float32 and evaluation mode."""
        prefix = _prefix(base)
        state = {name.removeprefix(prefix): base.read(name) for name in self._outside(base)}
        tensors, settings = text_tower(state, OpenClipSettings.beside(base.folder), base.label)
        return _text_tower(base, settings, None, {"state_dict": tensors})

    def _outside(self, base: Checkpoint) -> list[str]:
        return [name for name in base.tensors if not name.startswith(_prefix(base) + IMAGE)]


def layout_of(checkpoint: Checkpoint) -> ClipLayout:
    """The layout of a CLIP's files: open_clip's where its image tower is named so."""
    return TransformersLayout() if prefix_of(checkpoint.tensors) is None else OpenClipLayout()


def _prefix(checkpoint: Checkpoint) -> str:
    return prefix_of(checkpoint.tensors) or ""


def _text_tower(base: Checkpoint, settings: Mapping[str, Any], folder: str | None, given: Mapping[str, Any]) -> nn.Module:  # fmt: skip
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    with loading(Path(base.folder), "no text tower of CLIP can be loaded", _REMEDY):
        loaded: Any = CLIPTextModelWithProjection.from_pretrained(
            folder, config=CLIPTextConfig(**settings), dtype=torch.float32, output_loading_info=True, **given, **LOCALLY
        )
    tower, report = loaded
    refuse_missing(tower, report["missing_keys"], base.label)
    made: nn.Module = tower.eval()
    return made
