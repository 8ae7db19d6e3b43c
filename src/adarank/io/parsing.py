"""JSON and YAML read strictly: a key that is given twice is an error, and so is nesting without end.

The standard readers keep the last of two values without a word, and end nesting beyond Python's stack by a
`RecursionError`, which no caller expects of a file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import yaml


def parse_json(text: str) -> Any:
    """The value that a JSON text holds.

    Raises:
        ValueError: no JSON, a key twice in one object, or nesting deeper than can be read.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        repeated = repetition([key for key, _ in pairs])
        raise ValueError(f"the key {pairs[repeated or 0][0]!r} is given twice")
    return content


def repetition(names: Sequence[Hashable]) -> int | None:
    """Where in `names` one of them comes a second time; None if all differ."""
    seen: set[Hashable] = set()
    for place, name in enumerate(names):
        if name in seen:
            return place
        seen.add(name)
    return None


def parse_yaml(text: str) -> Any:
    """The value that a YAML text holds. A mapping's own key goes before one that it merges in (`<<`), as in YAML 1.1.

    Raises:
        ValueError: a key twice in one mapping, a value that its tag does not fit, nesting deeper than can be read, a date
            or another value that is no plain data, or aliases that stand for too much.
        yaml.YAMLError: no YAML.
    """
    return _checked(lambda: yaml.load(text, Loader=_Loader))


def parse_documents(text: str) -> list[Any]:
    """The values of a YAML text of one document or several, empty ones left out. Raises what `parse_yaml` raises."""
    documents = _checked(lambda: list(yaml.load_all(text, Loader=_Loader)))
    return [document for document in documents if document is not None]


def _checked(read: Callable[[], Any]) -> Any:
    try:
        content = read()
        _check_plain(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (LookupError, TypeError, AttributeError) as error:  # how PyYAML fails on `!!bool maybe`, `!!timestamp x`, …
        raise ValueError(f"a value does not fit its tag ({error})") from None
    return content


_MOST = 100_000  # values in a file, those that aliases repeat counted each time


def _check_plain(content: Any) -> None:
    """Mappings, lists, text, numbers and truth values alone, and not so many that aliases stand for more than memory holds."""
    sizes: dict[int, int] = {}  # of lists and mappings that are done
    open_ones: set[int] = set()

    def size(value: Any) -> int:
        if value is None or isinstance(value, (str, int, float)):
            return 1
        if not isinstance(value, (list, dict)):
            raise ValueError(
                f"{str(value)[:40]!r} is read as {type(value).__name__}, which no setting is: put text in quotes"
            )
        if id(value) in open_ones:
            raise ValueError("an alias (*) stands inside what it names")
        if id(value) not in sizes:
            open_ones.add(id(value))
            parts = value if isinstance(value, list) else [*value.keys(), *value.values()]
            sizes[id(value)] = 1 + sum(map(size, parts))
            open_ones.discard(id(value))
        if sizes[id(value)] > _MOST:
            raise ValueError(f"aliases (*) stand for more than {_MOST} values")
        return sizes[id(value)]

    size(content)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses a key that is given twice."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._checked: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Called for each mapping before it is made, and before what it merges in is put among its own keys."""
        if id(node) not in self._checked:
            self._checked.add(id(node))
            self._refuse_twice([key for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        super().flatten_mapping(node)

    def _refuse_twice(self, keys: Sequence[yaml.ScalarNode]) -> None:
        merged = "tag:yaml.org,2002:merge"
        values = [(key.tag,) if key.tag == merged else self.construct_object(key, deep=True) for key in keys]
        repeated = repetition(values)
        if repeated is not None:
            key = keys[repeated]
            raise ValueError(f"line {key.start_mark.line + 1}: the key {key.value!r} is given twice")
