"""A small CLIP as open_clip lays it out, computed by PyTorch's own attention."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from clip_zoo import CLASSES, WORDS
from image_zoo import processor

WIDTH, LAYERS, SIDE, PATCH, OUT, TOKENS = 128, 2, 16, 8, 24, 30


class QuickGELU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 2 * width), gelu=QuickGELU(), c_proj=nn.Linear(2 * width, width))
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width) for _ in range(LAYERS))


class Visual(nn.Module):
    """An image tower as open_clip lays it out, computed by PyTorch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn((SIDE // PATCH) ** 2 + 1, WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = Transformer(WIDTH)
        self.proj = nn.Parameter(torch.randn(WIDTH, OUT))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(images), 1, WIDTH), patches], 1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj


class Clip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = Visual()
        self.token_embedding = nn.Embedding(TOKENS, 64)
        self.positional_embedding = nn.Parameter(torch.randn(7, 64))
        self.transformer = Transformer(64)
        self.ln_final = nn.LayerNorm(64)
        self.text_projection = nn.Parameter(torch.randn(64, OUT))
        self.logit_scale = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("attn_mask", torch.full((7, 7), float("-inf")).triu(1), persistent=False)

    def text(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.token_embedding(ids) + self.positional_embedding
        for block in self.transformer.resblocks:
            x = block(x, self.attn_mask)
        return self.ln_final(x)[range(len(ids)), ids.argmax(dim=-1)] @ self.text_projection


def make_zoo(folder: Path, prefix: str = "", keep_text: bool = True) -> Path:
    """Write models/ (base; digits and shapes, fine-tuned image towers) and data/, for `clip_zoo.recipe`; returns `folder`.

    Arguments:
        prefix: what stands before every name, as `model.` where task_vectors saved a model.
        keep_text: the base has its text tower; task_vectors saves models without its layers.
    """
    torch.manual_seed(0)
    clip = Clip().eval()
    base = {f"{prefix}{name}": tensor.clone() for name, tensor in clip.state_dict().items()}
    _save({n: t for n, t in base.items() if keep_text or not n.startswith(f"{prefix}transformer.")}, folder / "base")
    words = [*dict.fromkeys(WORDS), *(f"w{number}" for number in range(30))]
    # as in CLIP's own vocabulary the end of a text has the largest id, and its start the one before
    tokens = [*["[PAD]", "[UNK]", "[MASK]", *words][: TOKENS - 2], "[CLS]", "[SEP]"]
    made = transformers.BertTokenizerFast(vocab={token: i for i, token in enumerate(tokens)}, model_max_length=7)
    made.save_pretrained(folder / "models" / "base")
    processor().save_pretrained(folder / "models" / "base")
    (folder / "data").mkdir()
    for number, (task, classes) in enumerate(CLASSES.items(), start=1):
        moved = {n: t + 0.1 * t.std() * torch.randn_like(t) if ".visual." in f".{n}" and t.dim() else t for n, t in base.items()}  # fmt: skip
        _save(moved, folder / task)
        rng = np.random.default_rng(number)
        images = rng.integers(0, 256, (24, SIDE, SIDE, 3), dtype=np.uint8)
        np.savez(folder / "data" / f"{task}.npz", image=images, label=rng.integers(0, len(classes), 24))
    return folder


def _save(state: dict[str, torch.Tensor], path: Path) -> None:
    target = path.parent / "models" / path.name
    target.mkdir(parents=True)
    save_file(state, target / "open_clip_model.safetensors")
