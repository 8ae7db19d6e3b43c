"""CLIP's image tower under one task's fixed head, in the layout of `transformers` and in that of open_clip.

    logits = W z / |z|      z = P · vision(x)

Of open_clip's layout the network has the very parameters, under their names: q, k and v are one packed matrix, which is cut
when it is used, so that what merges, decomposes or learns it sees one matrix, as the papers' code does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAIN, OPEN_CLIP = "CLIPZeroShotClassifier", "OpenClipZeroShotClassifier"
"""What `architectures` of a task's config.json names."""
_CLASSES: dict[str, type[PreTrainedModel]] = {}


class CosineHead(nn.Module):
    """Dot products of each input's direction with the classes' rows.

    Arguments:
        width: of an input. `weight` is (classes, width).
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes, width))

    def forward(self, features: Tensor) -> Tensor:
        """(inputs, classes) dot products of `features`, (inputs, width)."""
        return functional.linear(functional.normalize(features, dim=-1), self.weight)


class PackedAttention(nn.Module):
    """Attention of positions to one another, with q, k and v in one matrix.

    Arguments:
        width: of a position. `in_proj_weight` is (3·width, width): the rows of q, of k, of v.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, positions: Tensor) -> Tensor:
        """(inputs, positions, width) of as many."""
        packed = functional.linear(positions, self.in_proj_weight, self.in_proj_bias)
        q, k, v = packed.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out


class PackedBlock(nn.Module):
    """A layer of the tower: attention and an MLP, each added to what it is given."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers.activations import ACT2FN

        width, inner = config.hidden_size, config.intermediate_size
        self.ln_1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attn = PackedAttention(width, config.num_attention_heads)
        self.ln_2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        up, down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=up, gelu=ACT2FN[config.hidden_act], c_proj=down))

    def forward(self, positions: Tensor) -> Tensor:
        """(inputs, positions, width) of as many."""
        positions = positions + self.attn(self.ln_1(positions))
        out: Tensor = positions + self.mlp(self.ln_2(positions))
        return out


class PackedTransformer(nn.Module):
    """The tower's layers, one after another."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(PackedBlock(config) for _ in range(config.num_hidden_layers))

    def forward(self, positions: Tensor) -> Tensor:
        """(inputs, positions, width) of as many."""
        for block in self.resblocks:
            positions = block(positions)
        return positions


class PackedVision(nn.Module):
    """The image tower with its projection, its parameters named and laid out as open_clip's.

    Arguments:
        config: a `CLIPVisionConfig`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.conv1 = nn.Conv2d(config.num_channels, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((config.image_size // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.transformer = PackedTransformer(config)
        self.ln_post = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.proj = nn.Parameter(torch.zeros(width, config.projection_dim))

    def forward(self, images: Tensor) -> Tensor:
        """(inputs, projection_dim) of images, (inputs, channels, height, width)."""
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(images), 1, -1)
        positions = self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding)
        out: Tensor = self.ln_post(self.transformer(positions)[:, 0]) @ self.proj
        return out


def classifier_class() -> type[PreTrainedModel]:
    """The `transformers` model of one task. Made on use, as importing `transformers` is slow; the same class every time.

    Its `from_config` makes a network of the layout that the configuration's `architectures` name.
    """
    if PLAIN not in _CLASSES:
        from transformers import CLIPVisionModelWithProjection
        from transformers.modeling_outputs import ImageClassifierOutput

        class CLIPZeroShotClassifier(CLIPVisionModelWithProjection):
            """CLIP's image tower and projection with the fixed head of one task."""

            _model_mapping: Mapping[Any, Any] = {}  # no `AutoModelFor...` leads here

            def __init__(self, config: Any) -> None:
                super().__init__(config)
                self.classifier = CosineHead(config.projection_dim, config.num_labels)

            def forward(self, pixel_values: Tensor, **named: Any) -> Any:
                output = super().forward(pixel_values=pixel_values, **named)
                return ImageClassifierOutput(
                    logits=self.classifier(output.image_embeds),
                    hidden_states=output.hidden_states,
                    attentions=output.attentions,
                )

            @classmethod
            def from_config(cls, config: Any, trust_remote_code: bool = False) -> Any:
                packed = OPEN_CLIP in (config.architectures or ())
                return (open_clip_class() if packed else cls)(config)

        _CLASSES[PLAIN] = CLIPZeroShotClassifier
    return _CLASSES[PLAIN]


def open_clip_class() -> type[PreTrainedModel]:
    """As `classifier_class`, of open_clip's layout."""
    if OPEN_CLIP not in _CLASSES:
        from transformers import CLIPVisionConfig, PreTrainedModel
        from transformers.modeling_outputs import ImageClassifierOutput

        class OpenClipZeroShotClassifier(PreTrainedModel):
            """open_clip's image tower and projection with the fixed head of one task."""

            config_class = CLIPVisionConfig
            base_model_prefix = "model"  # which it has not: what stands before names where task_vectors saved a model
            main_input_name = "pixel_values"
            _model_mapping: Mapping[Any, Any] = {}

            def __init__(self, config: Any) -> None:
                super().__init__(config)
                self.visual = PackedVision(config)
                self.classifier = CosineHead(config.projection_dim, config.num_labels)
                self.post_init()  # type: ignore[no-untyped-call]

            def forward(self, pixel_values: Tensor) -> Any:
                return ImageClassifierOutput(logits=self.classifier(self.visual(pixel_values)))

        _CLASSES[OPEN_CLIP] = OpenClipZeroShotClassifier
    return _CLASSES[OPEN_CLIP]
