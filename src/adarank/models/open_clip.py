"""CLIP as open_clip names it: what its tensors are called, what they tell of the architecture, and their names in `transformers`.

open_clip packs q, k and v of a layer into one matrix (in_proj), which `transformers` has as three; its projections are the
transposes of those of `transformers`. Sizes are read off the tensors. What these do not tell (the activation, the number of
heads) is read from `open_clip_config.json` beside the weights; without it they are those of OpenAI's CLIPs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from adarank.errors import CheckpointError
from adarank.io.files import read_json

Shapes = Mapping[str, tuple[int, ...]]

IMAGE = "visual."
SETTINGS_FILE = "open_clip_config.json"
TEXT_TOWER = ("token_embedding.weight", "positional_embedding", "transformer.resblocks.0.attn.in_proj_weight", "ln_final.weight",
              "text_projection", "logit_scale")  # fmt: skip
"""What tells that a checkpoint holds the text tower too. task_vectors saves models without its `transformer`."""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of pixels, in OpenAI's CLIPs
_FIRST = f"{IMAGE}conv1.weight"
_LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2", "attn.out_proj": "self_attn.out_proj",
}  # fmt: skip
_VISION = {
    "class_embedding": "embeddings.class_embedding", "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight", "ln_pre.weight": "pre_layrnorm.weight", "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight", "ln_post.bias": "post_layernorm.bias",
}  # fmt: skip
_TEXT = {
    "token_embedding.weight": "embeddings.token_embedding.weight", "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight", "ln_final.bias": "final_layer_norm.bias",
}  # fmt: skip
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)$")
_PACKED = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)$")
_UNUSED = ("attn_mask", "head.weight", "head.bias", "classification_head")


@dataclass(frozen=True)
class OpenClipSettings:
    """What shapes do not tell of a CLIP.

    Attributes:
        activation: of its MLPs, as `transformers` calls it.
        head: entries of a head of the image tower.
        text_heads: heads of the text tower; None for heads of 64 entries.
        mean, std: of the pixels of each colour.
    """

    activation: str = "quick_gelu"
    head: int = 64
    text_heads: int | None = None
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    @classmethod
    def beside(cls, *folders: Path) -> OpenClipSettings:
        """Those of the first folder that has them; OpenAI's if none has."""
        file = next((folder / SETTINGS_FILE for folder in folders if (folder / SETTINGS_FILE).exists()), None)
        if file is None:
            return cls()
        content = read_json(file)
        try:
            model, pixels = content.get("model_cfg") or {}, content.get("preprocess_cfg") or {}
            head, heads = (
                (model.get("vision_cfg") or {}).get("head_width", 64),
                (model.get("text_cfg") or {}).get("heads"),
            )
            if int(head) < 1 or (heads is not None and int(heads) < 1):
                raise ValueError(f"head_width {head}, heads {heads}")
            return cls(
                "quick_gelu" if model.get("quick_gelu") else "gelu",
                int(head),
                None if heads is None else int(heads),
                tuple(map(float, pixels.get("mean", MEAN))),
                tuple(map(float, pixels.get("std", STD))),
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{file}: no settings of open_clip ({error}). Needed: model_cfg with vision_cfg and text_cfg, and preprocess_cfg. Download it again."
            ) from None

    def as_file(self, shapes: Shapes, where: str) -> dict[str, Any]:
        """The content of `open_clip_config.json` for a model of these shapes. The arguments are as of `vision_config`."""
        vision = vision_config(shapes, self, where)
        model: dict[str, Any] = {"embed_dim": vision["projection_dim"], "quick_gelu": self.activation == "quick_gelu"}
        model["vision_cfg"] = {
            "image_size": vision["image_size"], "layers": vision["num_hidden_layers"], "width": vision["hidden_size"],
            "head_width": self.head, "patch_size": vision["patch_size"], "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
        }  # fmt: skip
        if all(name in shapes for name in TEXT_TOWER):
            text = text_config(shapes, self, where)
            model["text_cfg"] = {
                "context_length": text["max_position_embeddings"], "vocab_size": text["vocab_size"], "width": text["hidden_size"],
                "heads": text["num_attention_heads"], "layers": text["num_hidden_layers"],
            }  # fmt: skip
        return {"model_cfg": model, "preprocess_cfg": {"mean": list(self.mean), "std": list(self.std)}}

    def processor(self, side: int) -> dict[str, Any]:
        """The content of `preprocessor_config.json`: the shorter side brought to `side` pixels, the middle cut out."""
        return {
            "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True, "size": {"shortest_edge": side},
            "resample": 3, "do_center_crop": True, "crop_size": {"height": side, "width": side}, "do_rescale": True,
            "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(self.mean), "image_std": list(self.std),
        }  # fmt: skip


def prefix_of(names: Iterable[str]) -> str | None:
    """What stands before open_clip's names in a checkpoint (such as `model.`); None if it has no such image tower.

    Example:
        >>> prefix_of(["model.visual.conv1.weight", "model.visual.proj"])
        'model.'
    """
    first = next((name for name in names if name == _FIRST or name.endswith(f".{_FIRST}")), None)
    return None if first is None else first.removesuffix(_FIRST)


def from_open_clip(
    state: Mapping[str, Tensor], where: str, settings: OpenClipSettings
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An open_clip model's tensors under the names of `transformers`, and its configuration.

    Arguments:
        state: of a whole model, or of its image tower with or without what else a file holds, with any prefix
            (`model.visual.conv1.weight`).
        where: what errors begin with.

    Returns:
        Tensors and `config.json` of a `CLIPModel`, or of a `CLIPVisionModelWithProjection` where there is no text tower.

    Raises:
        CheckpointError: it is no CLIP with a transformer as its image tower, or some tensors have no place.
    """
    names = without_prefix(state, where)
    whole = all(name in names for name in TEXT_TOWER)
    made: dict[str, Tensor] = {}
    lost = []
    for name, tensor in names.items():
        if (not name.startswith(IMAGE) and not whole) or name.startswith(_UNUSED):
            continue  # such as logit_scale of an image tower that was saved with a model's rest
        placed = _placed(name, tensor)
        lost += [] if placed else [name]
        made |= placed
    if lost:
        raise CheckpointError(
            f"{where}: {len(lost)} tensor(s) have no place in transformers' CLIP, such as {lost[0]}. Only CLIPs as OpenAI's are converted."
        )
    return made, _config(names, settings, whole, where)


def without_prefix(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """An open_clip model's tensors under open_clip's own names.

    Raises:
        CheckpointError: it has no image tower of open_clip.
    """
    prefix = prefix_of(state)
    if prefix is None:
        raise CheckpointError(
            f"{where}: no image tower of open_clip (no tensor …{_FIRST}). Only CLIPs with a vision transformer are read."
        )
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def text_tower(
    state: Mapping[str, Tensor], settings: OpenClipSettings, where: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and settings of a `CLIPTextModelWithProjection` of an open_clip model's tensors, under open_clip's own names."""
    made: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith((IMAGE, *_UNUSED, "logit_")):
            made |= _placed(name, tensor)
    return made, text_config({name: tuple(tensor.shape) for name, tensor in state.items()}, settings, where)


def vision_config(shapes: Shapes, settings: OpenClipSettings, where: str) -> dict[str, Any]:
    """What `config.json` says of an image tower.

    Arguments:
        shapes: open_clip's name, without a prefix -> shape.
        where: what errors begin with.

    Raises:
        CheckpointError: a tensor that tells a size is missing.
    """
    patch, positions = _shape(shapes, _FIRST, where)[-1], _shape(shapes, f"{IMAGE}positional_embedding", where)[0]
    tower = _tower(shapes, IMAGE, settings, where)
    sizes = {
        "patch_size": patch,
        "image_size": round((positions - 1) ** 0.5) * patch,
        "projection_dim": _shape(shapes, f"{IMAGE}proj", where)[1],
    }
    return {**tower, "num_attention_heads": max(1, tower["hidden_size"] // settings.head), **sizes}


def text_config(shapes: Shapes, settings: OpenClipSettings, where: str) -> dict[str, Any]:
    """What `config.json` says of a text tower. The arguments and errors are as of `vision_config`."""
    tokens, width = _shape(shapes, "token_embedding.weight", where)
    # the ids of CLIP's own vocabulary: start and end of a text are its last two tokens
    return {**_tower(shapes, "", settings, where), "num_attention_heads": settings.text_heads or max(1, width // 64), "vocab_size": tokens,
            "max_position_embeddings": _shape(shapes, "positional_embedding", where)[0], "projection_dim": _shape(shapes, "text_projection", where)[1],
            "bos_token_id": tokens - 2, "eos_token_id": tokens - 1, "pad_token_id": tokens - 1}  # fmt: skip


def _shape(shapes: Shapes, name: str, where: str) -> tuple[int, ...]:
    if name not in shapes:
        raise CheckpointError(
            f"{where}: laid out as a CLIP of open_clip, and '{name}' is missing. Only CLIPs with a vision transformer, as OpenAI's, are read."
        )
    return shapes[name]


def _placed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors of `transformers` that one becomes; none if it has no place."""
    vision = name.startswith(IMAGE)
    tower, outside = ("vision_model.", _VISION) if vision else ("text_model.", _TEXT)
    name = name.removeprefix(IMAGE)
    if name in outside:
        return {tower + outside[name]: tensor}
    if name == ("proj" if vision else "text_projection"):
        return {"visual_projection.weight" if vision else "text_projection.weight": tensor.T.contiguous()}
    if name == "logit_scale":
        return {name: tensor}
    packed = _PACKED.match(name)
    if packed:
        front = f"{tower}encoder.layers.{packed[1]}.self_attn."
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{front}{letter}_proj.{packed[2]}": part.contiguous() for letter, part in parts}
    block = _BLOCK.match(name)
    if block and block[2] in _LAYER:
        return {f"{tower}encoder.layers.{block[1]}.{_LAYER[block[2]]}.{block[3]}": tensor}
    return {}


def _config(names: Mapping[str, Tensor], settings: OpenClipSettings, whole: bool, where: str) -> dict[str, Any]:
    shapes = {name: tuple(tensor.shape) for name, tensor in names.items()}
    vision = vision_config(shapes, settings, where)
    dtype = str(names[_FIRST].dtype).removeprefix("torch.")
    if not whole:
        return {
            "architectures": ["CLIPVisionModelWithProjection"],
            "model_type": "clip_vision_model",
            "dtype": dtype,
            **vision,
        }
    return {"architectures": ["CLIPModel"], "model_type": "clip", "dtype": dtype, "projection_dim": vision["projection_dim"],
            "vision_config": {**vision, "model_type": "clip_vision_model"},
            "text_config": {**text_config(shapes, settings, where), "model_type": "clip_text_model"}}  # fmt: skip


def _tower(shapes: Shapes, front: str, settings: OpenClipSettings, where: str) -> dict[str, Any]:
    blocks = f"{front}transformer.resblocks."
    layers = {name.removeprefix(blocks).split(".")[0] for name in shapes if name.startswith(blocks)}
    inner, width = _shape(shapes, f"{blocks}0.mlp.c_fc.weight", where)
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": len(layers),
        "hidden_act": settings.activation,
    }
