"""Which tensors of a model have a row for each token: embedding tables, layers of output and their biases."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from adarank.alignment.layers import layer_number
from adarank.alignment.selection import is_table
from adarank.io.checkpoint import Source

# Names that no other tensor has: such a matrix of another number of rows is one that cannot be told.
_SURE = re.compile(
    r"(^|\.)(embed_tokens\w*|word_embeddings?|token_embeddings?|tokens_embed|embeddings|wte|tok_embeddings|embed_in|embed_out|shared|lm_head)\.weight$"
)
_OUTPUT = re.compile(
    r"(^|\.)(lm_head|embed_out|output_layer|predictions|vocab_projector)(\.decoder)?\.(weight|bias)$|^(output|decoder|head)\.(weight|bias)$"
)
_KEY = "vocab_size"


@dataclass(frozen=True)
class VocabularyTables:
    """A model's tensors with a row for each token.

    Attributes:
        rows: how many rows they have; 0 without any.
        names: their names.
        problems: what stands in the way of moving rows, in sentences.
    """

    rows: int
    names: tuple[str, ...]
    problems: tuple[str, ...] = ()


def vocabulary_tables(source: Source) -> VocabularyTables:
    """The tensors of a model that have a row for each token, from names, shapes and config.json.

    A tensor that is not known by its name counts if it is of no layer, and no other size of config.json is the vocabulary's.

    Example:
        vocabulary_tables(Checkpoint("models/base")).names == ("lm_head.weight", "model.embed_tokens.weight")
    """
    sure = {n: i.shape[0] for n, i in source.tensors.items() if len(i.shape) == 2 and _SURE.search(n)}
    known = [size for size in _sizes(source.config, _KEY) if size in sure.values()]
    rows = known[0] if known else max(sure.values(), default=0)
    if rows == 0:
        return VocabularyTables(0, ())
    alone = bool(source.config) and rows not in set(_sizes(source.config))
    names = tuple(
        name
        for name, info in source.tensors.items()
        if info.dtype.is_floating_point
        and info.shape[:1] == (rows,)
        and (
            (len(info.shape) == 2 and is_table(name)) or _OUTPUT.search(name) or (alone and layer_number(name) is None)
        )
    )
    problems = [f"'{n}' has {size} rows, where the vocabulary has {rows}" for n, size in sure.items() if size != rows]
    problems += [
        f"'{n}' of shape {i.shape} has a column for each token"
        for n, i in source.tensors.items()
        if i.shape == (1, rows) and alone
    ]
    return VocabularyTables(rows, names, tuple(f"{source.label}: {text}" for text in problems))


def _sizes(config: Mapping[str, Any], key: str | None = None) -> Iterator[int]:
    """Whole numbers of a configuration and its parts: those of a key, or all others than the vocabulary's and tokens' ids."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _sizes(value, key)
        elif isinstance(value, int) and not isinstance(value, bool):
            other = name != _KEY and not name.endswith("_token_id")
            yield from [value] if (name == key if key else other) else []
