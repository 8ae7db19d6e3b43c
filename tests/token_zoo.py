"""Small language models with tokenizers of their own: the rows of a table say whose they are and of which token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from make import save

WIDTH = 3
EMBEDDING, OUTPUT, BIAS, MATRIX = "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias", "model.layers.0.mlp.up_proj.weight"  # fmt: skip
WORDS = ["<unk>", "a", "b", "c"]


def tokenizer(folder: Path, words: Sequence[str], added: Sequence[str] = (), special: Sequence[str] = (), template: str = "") -> None:  # fmt: skip
    """A tokenizer of whole words as `transformers` saves it, with tokens added behind."""
    inner = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    outer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    outer.add_tokens([AddedToken(token, normalized=False) for token in added])
    outer.add_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    if template:
        outer.chat_template = template
    outer.save_pretrained(folder)


def model(
    folder: Path,
    words: Sequence[str] = WORDS,
    added: Sequence[str] = (),
    special: Sequence[str] = (),
    template: str = "",
    padding: int = 0,
    tables: Sequence[str] = (EMBEDDING, OUTPUT),
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> dict[str, dict[str, Tensor]]:
    """Random tables with a row for each token and for padding, a matrix, config.json and a tokenizer.

    Returns:
        table -> token -> its row.
    """
    tokens = [*words, *added, *special]
    rows = len(tokens) + padding
    shapes = {name: (rows,) if name == BIAS else (rows, WIDTH) for name in tables}
    source = torch.Generator().manual_seed(sum(folder.name.encode()))
    state = {n: torch.randn(s, generator=source).to(dtype) for n, s in {**shapes, MATRIX: (5, WIDTH)}.items()}
    save(folder, state, {"vocab_size": rows, "hidden_size": WIDTH, **config})
    tokenizer(folder, words, added, special, template)
    return {name: dict(zip(tokens, state[name].float(), strict=False)) for name in tables}


def weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of all files of weights in a folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
