"""Ids of tokens in config.json and generation_config.json, where a merge's vocabulary numbers them otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LISTS = frozenset({"suppress_tokens", "begin_suppress_tokens"})
_ENDS = ("_token_id", "_token_ids", "_token_index")


@dataclass(frozen=True)
class TokenIds:
    """From the ids of one vocabulary to those of another.

    Attributes:
        moved: id in the one -> id in the other; None for tokens that the other lacks. Ids of no token are not in it.

    Example:
        TokenIds.between({"a": 0, "b": 1}, {"b": 0, "a": 1}).of({"eos_token_id": 1}, {}) == {"eos_token_id": 0}
    """

    moved: Mapping[int, int | None]

    @classmethod
    def between(cls, before: Mapping[str, int], after: Mapping[str, int]) -> TokenIds | None:
        """None if every id stays."""
        moved = {number: after.get(token) for token, number in before.items()}
        return cls(moved) if any(number != new for number, new in moved.items()) else None

    def of(self, content: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
        """A configuration with its tokens' ids in the other vocabulary.

        Arguments:
            other: the same configuration of a model of that vocabulary, for tokens that it has in place of lost ones.
        """
        changed = dict(content)
        for key, value in content.items():
            if isinstance(value, Mapping):
                inner = other.get(key)
                changed[key] = self.of(value, inner if isinstance(inner, Mapping) else {})
            elif key.endswith(_ENDS) or key in _LISTS:
                changed[key] = self._id(value, other.get(key))
        return changed

    def lost(self, content: Mapping[str, Any]) -> list[str]:
        """The settings that name a token which the other vocabulary lacks."""
        inner = [key for value in content.values() if isinstance(value, Mapping) for key in self.lost(value)]
        single = {k: v for k, v in content.items() if k.endswith(_ENDS) and isinstance(v, int)}
        return [*inner, *(key for key, value in single.items() if self.moved.get(value, value) is None)]

    def _id(self, value: Any, other: Any) -> Any:
        if isinstance(value, list):
            listed = [new for new in (self._id(each, None) for each in value) if new is not None]
            return listed or other
        if isinstance(value, bool) or not isinstance(value, int) or value not in self.moved:
            return value
        new = self.moved[value]
        return other if new is None else new


def resized(config: Mapping[str, Any], rows: int, size: int) -> dict[str, Any]:
    """A configuration with `size` in place of `rows` wherever the vocabulary's size stands; named if it was not."""
    changed = _resized(config, rows, size)
    return {**changed, "vocab_size": size} if changed == config and config and size != rows else changed


def _resized(config: Mapping[str, Any], rows: int, size: int) -> dict[str, Any]:
    return {
        key: _resized(value, rows, size)
        if isinstance(value, Mapping)
        else size
        if key == "vocab_size" and value == rows
        else value
        for key, value in config.items()
    }
