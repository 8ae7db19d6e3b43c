"""One tokenizer of several: the first one's, with the tokens that it lacks added behind its own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from adarank.models.loading import LOCALLY, loading, quiet_transformers
from adarank.models.text import stored_tokenizer

_CONFIG = "tokenizer_config.json"
_OF_LOADING = (*LOCALLY, "is_local", "name_or_path")


def ids_of(tokenizer: Any, rows: int) -> dict[str, int]:
    """Token -> id of the tokens that have a row, in the order of their ids."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return {token: number for token, number in sorted(vocabulary.items(), key=lambda item: item[1]) if number < rows}


def union(folder: Path, others: Sequence[tuple[Any, int]], more: Iterable[str] = ()) -> Any:
    """The tokenizer in `folder`, with the tokens of others and `more` added.

    Its own tokens keep their ids. Behind them come the others' plain tokens by model and id, then the tokens that were
    added to the others, by model and id and with their settings (special ones stay special), then `more`.

    Arguments:
        others: tokenizers of `transformers`, and how many rows their models' tables have: tokens beyond are left out.

    Raises:
        CheckpointError: the tokenizer cannot be used.
    """
    tokenizer = stored_tokenizer(folder)
    present = tokenizer.get_vocab()
    plain: dict[str, None] = {}
    added: dict[str, Any] = {}
    for other, rows in others:
        special = {number: token for number, token in sorted(other.added_tokens_decoder.items()) if number < rows}
        for token in special.values():
            added.setdefault(token.content, token)
        listed = {token.content for token in special.values()}
        plain |= dict.fromkeys(token for token in ids_of(other, rows) if token not in listed and token not in present)
    with loading(folder, "tokens cannot be added to its tokenizer", "Give another tokenizer: source."):
        tokenizer.add_tokens([token for token in plain if token not in added])
        tokenizer.add_tokens(list(added.values()))
        known = tokenizer.get_vocab()
        tokenizer.add_tokens([token for token in more if token not in known])
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer's files, with nothing in them of how it was loaded."""
    with quiet_transformers():
        tokenizer.save_pretrained(folder)
    settings = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    kept = {key: value for key, value in settings.items() if key not in _OF_LOADING}
    (folder / _CONFIG).write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
