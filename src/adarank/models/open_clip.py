"""CLIP as open_clip names it, brought to the names of `transformers`.

open_clip packs q, k and v of a layer into one matrix (in_proj), which is cut into three; its projections are the transposes of
those of `transformers`. Sizes are read off the tensors. Heads have 64 entries each, as in all of OpenAI's CLIPs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adarank.errors import CheckpointError

_HEAD = 64
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


def from_open_clip(state: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An open_clip model's tensors under the names of `transformers`, and its configuration.

    Arguments:
        state: of a whole model, or of its image tower alone, with any prefix (`model.visual.conv1.weight`).
        where: what errors begin with.

    Returns:
        Tensors and `config.json` of a `CLIPModel`, or of a `CLIPVisionModelWithProjection` where there is no text tower.

    Raises:
        CheckpointError: it is no CLIP with a transformer as its image tower, or some tensors have no place.
    """
    first = next((name for name in state if name.endswith("visual.conv1.weight")), None)
    if first is None:
        raise CheckpointError(
            f"{where}: no image tower of open_clip (no tensor …visual.conv1.weight). Only CLIPs with a vision transformer are converted."
        )
    prefix = first.removesuffix("visual.conv1.weight")
    names = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    whole = "token_embedding.weight" in names
    made: dict[str, Tensor] = {}
    lost = []
    for name, tensor in names.items():
        vision = name.startswith("visual.")
        if (not vision and not whole) or name.startswith(_UNUSED):
            continue  # such as logit_scale of an image tower that was saved with a model's rest
        tower = "vision_model." if vision else "text_model."
        placed = _placed(name.removeprefix("visual."), tensor, tower, _VISION if vision else _TEXT)
        lost += [] if placed else [name]
        made |= placed
    if lost:
        raise CheckpointError(
            f"{where}: {len(lost)} tensor(s) have no place in transformers' CLIP, such as {lost[0]}. Only CLIPs as OpenAI's are converted."
        )
    return made, _config(made, whole)


def _placed(name: str, tensor: Tensor, tower: str, outside: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors that one becomes; none if it has no place."""
    if name in outside:
        return {tower + outside[name]: tensor}
    if name == "proj" and tower == "vision_model.":
        return {"visual_projection.weight": tensor.T.contiguous()}
    if name == "text_projection":
        return {"text_projection.weight": tensor.T.contiguous()}
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


def _config(made: Mapping[str, Tensor], whole: bool) -> dict[str, Any]:
    patches = made["vision_model.embeddings.patch_embedding.weight"]
    side = round((len(made["vision_model.embeddings.position_embedding.weight"]) - 1) ** 0.5)
    width = len(made["visual_projection.weight"])
    vision = {**_tower(made, "vision_model."), "patch_size": patches.shape[-1], "image_size": side * patches.shape[-1], "projection_dim": width}  # fmt: skip
    dtype = str(patches.dtype).removeprefix("torch.")
    if not whole:
        return {
            "architectures": ["CLIPVisionModelWithProjection"],
            "model_type": "clip_vision_model",
            "dtype": dtype,
            **vision,
        }
    tokens = made["text_model.embeddings.token_embedding.weight"]
    positions = made["text_model.embeddings.position_embedding.weight"]
    # the ids of CLIP's own vocabulary: start and end of a text are its last two tokens
    text = {**_tower(made, "text_model."), "vocab_size": len(tokens), "max_position_embeddings": len(positions), "projection_dim": width,
            "bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}  # fmt: skip
    return {"architectures": ["CLIPModel"], "model_type": "clip", "dtype": dtype, "projection_dim": width,
            "vision_config": {**vision, "model_type": "clip_vision_model"}, "text_config": {**text, "model_type": "clip_text_model"}}  # fmt: skip


def _tower(made: Mapping[str, Tensor], tower: str) -> dict[str, Any]:
    layers = {name.split(".")[3] for name in made if name.startswith(f"{tower}encoder.layers.")}
    up = made[f"{tower}encoder.layers.0.mlp.fc1.weight"]
    return {
        "hidden_size": up.shape[1],
        "intermediate_size": up.shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(1, up.shape[1] // _HEAD),
        "hidden_act": "quick_gelu",
    }
